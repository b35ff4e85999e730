"""Exports are what transformers and peft would have written from the live model, and nothing less is reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_gang import spec
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from farspan.errors import CheckpointError
from farspan.trainer import export_check, export_job, export_lora
from farspan.trainer.adapters import integer_files
from farspan.trainer.adapters.lora import start as lora_start
from farspan.trainer.adapters.lora.apply import install
from farspan.trainer.adapters.paca.apply import COLUMNS, add_columns
from farspan.trainer.adapters.paca.files import load as load_columns
from farspan.trainer.adapters.peqa.files import load as load_scales
from farspan.trainer.adapters.pv.apply import coded_layers
from farspan.trainer.adapters.pv.choose import Changes
from farspan.trainer.adapters.pv.choose import change as write_codes
from farspan.trainer.adapters.reversible.files import load as load_reversible
from farspan.trainer.bases.config import Int8
from farspan.trainer.bases.load import quantize
from farspan.trainer.checkpoint import Checkpointer
from farspan.trainer.config import (
    L4Q,
    PEQA,
    PV,
    Adapter,
    FullFineTune,
    LoRA,
    Model,
    PaCA,
    Precision,
    RandomModel,
    Reversible,
)
from farspan.trainer.engine import Fragment
from farspan.trainer.export import ExportReport, export_checkpoint
from farspan.trainer.export_process import ExportRequest, export_in_process
from farspan.trainer.models import DTYPES, add_adapter
from farspan.trainer.run_folder import RunFolder

# peft 0.21 asks transformers for a name that transformers 5.23 calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCAB = 300
TOKENS = torch.arange(24).remainder(VOCAB)[None]
CHECKED = ("names, shapes and dtypes of", "values bit for bit after", "a finite forward")


class Trained:
    """A tiny model after some "training" (noise on what is trainable), and its checkpoint without an export."""

    def __init__(
        self,
        root: Path,
        *,
        family: str = "llama",
        tied: bool = False,
        precision: Precision = "fp32",
        adapter: Adapter | None = None,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> None:
        self.dtype, self.precision = DTYPES[precision], precision
        self.adapter: Adapter = adapter or FullFineTune()
        self.folder = RunFolder(root)
        config = AutoConfig.for_model(
            family,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=3,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(self.dtype).save_pretrained(
            self.folder.base_model
        )
        _write_tokenizer(self.folder.base_model)
        self.base = _opened(self.folder.base_model, self.dtype)
        self.live: Any = add_adapter(self.base, self.adapter, seed=0)
        masters = {}
        for name, parameter in self.live.named_parameters():
            if parameter.requires_grad:
                masters[name] = parameter.detach().float() + 0.02 * torch.randn(parameter.shape)
        if change is not None:
            change(masters)
        with torch.no_grad():
            for name, master in masters.items():
                self.live.get_parameter(name).copy_(master)
        for index, layer in enumerate(coded_layers(self.live).values()):
            drawn = torch.Generator().manual_seed(index)
            places = torch.randperm(layer.in_features * layer.out_features, generator=drawn)[:50]
            new = torch.randint(0, 2**layer.bits, (50,), generator=drawn, dtype=torch.uint8)
            write_codes(layer.packed, layer.bits, Changes(places, new))  # type: ignore[arg-type]
        self.masters = masters
        checkpointer = Checkpointer(self.folder, spec(root, adapter=self.adapter, precision=precision))
        checkpointer.save(1, self.fragments(), {})
        saved = checkpointer.close()
        assert saved is not None
        self.checkpoint = saved.path

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, kind, tuple(master.shape), 0, master.flatten() * scale)
            for name, master in self.masters.items()
            for kind, scale in (("master", 1.0), ("exp_avg", 3.0), ("exp_avg_sq", 5.0))
        ] + codes_fragments(self.live)

    def export(self, out_dir: Path, **options: Any) -> ExportReport:
        return export_checkpoint(
            self.checkpoint,
            out_dir,
            **{
                "model": RandomModel(),
                "adapter": self.adapter,
                "base_model_dir": self.folder.base_model,
                "dtype": self.precision,
            }
            | options,
        )

    def logits(self) -> torch.Tensor:
        return _logits(self.live)


def codes_fragments(model: Any) -> list[Fragment]:
    """The integers of PV-Tuning as a checkpoint takes them."""
    words = {name: layer.words() for name, layer in coded_layers(model).items()}
    return [Fragment(f"{name}.codes", "codes", tuple(t.shape), 0, t) for name, t in words.items()]


def _opened(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def _logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _same_files(ours: Path, theirs: Path) -> None:
    """The same safetensors files with the same names, dtypes and bits."""
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert sorted(path.name for path in ours.glob("*.safetensors")) == names
    for name in names:
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        for key in b:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_columns_open_again(tmp_path: Path, precision: Precision) -> None:
    """As a file of indices and columns, and written into the base for everybody else: the same logits, to the bit."""
    trained = Trained(tmp_path / "run", adapter=PaCA(rank=4), precision=precision)
    want = trained.logits()
    report = trained.export(tmp_path / "out")
    assert {"paca.json", "paca.safetensors"} <= set(report.files) and "a finite forward" in report.compared
    assert report.size_bytes < 60_000
    opened = load_columns(tmp_path / "out", dtype=trained.dtype, attn_implementation="eager")
    assert torch.equal(_logits(opened), want)
    assert trained.export(tmp_path / "merged", merged=True).kind == "merged"
    assert torch.equal(_logits(_opened(tmp_path / "merged", trained.dtype)), want)
    assert not torch.equal(_logits(_opened(trained.folder.base_model, trained.dtype)), want)
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    )
    with pytest.raises(CheckpointError, match="no trained columns for this model"):
        load_columns(tmp_path / "out", base=other)


@pytest.mark.parametrize("adapter", [LoRA(rank=4), PaCA(rank=4)], ids=["lora", "paca"])
def test_a_merge_into_a_quantized_base_is_of_the_weights_that_were_trained_on(tmp_path: Path, adapter: Adapter) -> None:
    trained = Trained(tmp_path / "run", adapter=adapter)
    trained.export(tmp_path / "out", merged=True, stored=Int8())
    merged = _opened(tmp_path / "out", torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    base = _opened(trained.folder.base_model, torch.float32)
    quantize(base, Int8())
    live: Any = add_adapter(base, adapter, seed=0)
    for name, master in trained.masters.items():
        live.get_parameter(name).data.copy_(master)
    torch.testing.assert_close(_logits(merged), _logits(live), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_logits(merged), trained.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_did_not_start_at_zero_opens_on_the_untouched_base(
    tmp_path: Path, init: Any, rslora: bool
) -> None:
    """Twice the rank, in peft; merged too."""
    adapter = LoRA(rank=3, alpha=6.0, init=init, rslora=rslora)
    trained = Trained(tmp_path / "run", adapter=adapter)
    fresh: Any = add_adapter(_opened(trained.folder.base_model, torch.float32), adapter, seed=0)
    for layer in lora_start.lora_layers(fresh).values():
        lora_start.begin(layer, *lora_start.from_weights(layer, adapter))
    save_file(lora_start.pairs(fresh), trained.folder.adapter_start)
    lora_start.restore(trained.live, lora_start.pairs(fresh))
    for name, master in trained.masters.items():
        trained.live.get_parameter(name).data.copy_(master)
    want = trained.logits()
    trained.export(tmp_path / "out", start=trained.folder.adapter_start)
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["r"] == 6 and told["init_lora_weights"] is True and not told["use_rslora"]
    opened = PeftModel.from_pretrained(_opened(trained.folder.base_model, torch.float32), tmp_path / "out")
    torch.testing.assert_close(_logits(opened), want, rtol=1e-4, atol=1e-5)
    trained.export(tmp_path / "merged", merged=True, start=trained.folder.adapter_start)
    torch.testing.assert_close(_logits(_opened(tmp_path / "merged", torch.float32)), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="where the adapter started is not known"):
        trained.export(tmp_path / "lost")


def test_dora_opens_in_peft(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", adapter=LoRA(rank=4, dora=True))
    want = trained.logits()
    trained.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
    opened = PeftModel.from_pretrained(_opened(trained.folder.base_model, torch.float32), tmp_path / "out")
    torch.testing.assert_close(_logits(opened), want, rtol=1e-5, atol=1e-6)
    trained.export(tmp_path / "merged", merged=True)
    torch.testing.assert_close(_logits(_opened(tmp_path / "merged", torch.float32)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [None, 16])
def test_trained_scales_open_again(tmp_path: Path, group: int | None) -> None:
    """As scales on the integers made again from the base, and as the model in 16 bits that both stand for."""
    trained = Trained(tmp_path / "run", adapter=PEQA(bits=4, group=group), precision="bf16")
    want = trained.logits()
    report = trained.export(tmp_path / "out")
    assert {"peqa.json", "peqa.safetensors"} <= set(report.files) and "a finite forward" in report.compared
    opened = load_scales(tmp_path / "out", dtype=trained.dtype, attn_implementation="eager")
    assert torch.equal(_logits(opened), want)
    assert trained.export(tmp_path / "merged", merged=True).kind == "merged"
    assert torch.equal(_logits(_opened(tmp_path / "merged", trained.dtype)), want)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    text = (
        (tmp_path / "out" / "peqa.json")
        .read_text()
        .replace('"group": null', '"group": 8')
        .replace('"group": 16', '"group": 8')
    )
    (tmp_path / "other" / "peqa.json").write_text(text)
    with pytest.raises(CheckpointError, match="no trained scales for this model"):
        load_scales(tmp_path / "other", dtype=trained.dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [None, 16])
def test_integers_of_learned_steps_open_again(tmp_path: Path, group: int | None, precision: Precision) -> None:
    """As integers on the base, and in plain weights for everybody: the logits of training, to the bit."""
    trained = Trained(tmp_path / "run", adapter=L4Q(rank=2, bits=4, group=group), precision=precision)
    want = trained.logits()
    report = trained.export(tmp_path / "out")
    assert {"l4q.json", "l4q.safetensors"} <= set(report.files) and "a finite forward" in report.compared
    stored = load_file(tmp_path / "out" / "l4q.safetensors")
    packed = [t for name, t in stored.items() if name.endswith(".packed")]
    weights = sum(m.out_features * m.in_features for m in trained.live.modules() if hasattr(m, "original"))
    assert len(packed) == 14 and sum(t.nbytes for t in packed) == weights // 2
    opened = integer_files.load(tmp_path / "out", "l4q", attn_implementation="eager")
    assert torch.equal(_logits(opened), want)
    assert trained.export(tmp_path / "merged", merged=True).kind == "merged"
    assert torch.equal(_logits(_opened(tmp_path / "merged", trained.dtype)), want)
    assert not torch.equal(_logits(_opened(trained.folder.base_model, trained.dtype)), want)
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    )
    with pytest.raises(CheckpointError, match="no matrices of integers for this model"):
        integer_files.load(tmp_path / "out", "l4q", base=other)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_trained_integers_are_saved_restored_and_opened(tmp_path: Path, bits: int, group: int | None) -> None:
    """Through a checkpoint into a fresh model; as integers on the base; in plain weights: the same logits."""
    adapter = PV(bits=bits, group=group)
    trained = Trained(tmp_path / "run", adapter=adapter, precision="bf16")
    want = trained.logits()
    fresh: Any = add_adapter(_opened(trained.folder.base_model, trained.dtype), adapter, seed=0)
    assert not torch.equal(_logits(fresh), want)
    state = [
        Fragment(name, kind, tuple(p.shape), 0, p.detach().view(-1) if kind == "master" else torch.empty(p.numel()))
        for name, p in fresh.named_parameters()
        if p.requires_grad
        for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    Checkpointer(trained.folder, spec(tmp_path / "run", adapter=adapter, precision="bf16")).load(
        trained.checkpoint, state + codes_fragments(fresh)
    )
    assert torch.equal(_logits(fresh), want)
    report = trained.export(tmp_path / "out")
    assert {"pv.json", "pv.safetensors"} <= set(report.files) and "a finite forward" in report.compared
    opened = integer_files.load(tmp_path / "out", "pv", attn_implementation="eager")
    assert torch.equal(_logits(opened), want)
    assert trained.export(tmp_path / "merged", merged=True).kind == "merged"
    assert torch.equal(_logits(_opened(tmp_path / "merged", trained.dtype)), want)


def test_learned_steps_that_were_not_trained_are_refused(tmp_path: Path) -> None:
    def undo(masters: dict[str, torch.Tensor]) -> None:
        for name, value in live.named_parameters():
            if value.requires_grad:
                masters[name].copy_(value)

    base = Trained(tmp_path / "first", adapter=FullFineTune())
    live: Any = add_adapter(_opened(base.folder.base_model, torch.float32), L4Q(rank=2), seed=0)
    trained = Trained(tmp_path / "run", adapter=L4Q(rank=2), change=undo)
    with pytest.raises(CheckpointError) as caught:
        trained.export(tmp_path / "out")
    assert "was not trained" in caught.value.why


def test_columns_that_are_the_base_are_refused(tmp_path: Path) -> None:
    def undo(masters: dict[str, torch.Tensor]) -> None:
        for name, columns in masters.items():
            layer = untouched.get_submodule(name.removesuffix(f".{COLUMNS}"))
            columns.copy_(layer.weight.detach()[:, chosen[name.removesuffix(f".{COLUMNS}")]])

    base = Trained(tmp_path / "first", adapter=FullFineTune())
    untouched = _opened(base.folder.base_model, torch.float32)
    chosen = add_columns(_opened(base.folder.base_model, torch.float32), PaCA(rank=4), seed=0)
    trained = Trained(tmp_path / "run", adapter=PaCA(rank=4), change=undo)
    with pytest.raises(CheckpointError, match="exported is not what was saved"):
        trained.export(tmp_path / "out")


# --- full fine-tuning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied", "precision"),
    [("llama", False, "bf16"), ("llama", True, "fp32"), ("qwen3", True, "bf16"), ("qwen3", False, "fp32")],
)
def test_full_export_is_what_save_pretrained_writes(
    tmp_path: Path, family: str, tied: bool, precision: Precision
) -> None:
    trained = Trained(tmp_path / "run", family=family, tied=tied, precision=precision)
    report = trained.export(tmp_path / "out")
    trained.live.save_pretrained(tmp_path / "reference")
    _same_files(tmp_path / "out", tmp_path / "reference")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "reference"))
    assert ours == theirs
    assert torch.equal(_logits(_opened(tmp_path / "out", trained.dtype)), trained.logits())
    assert report.kind == "full" and report.num_tensors == len(trained.masters)
    assert report.num_parameters == sum(p.numel() for p in trained.live.parameters())
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= set(report.files)
    assert [done.startswith(said) for done, said in zip(report.compared, CHECKED)] == [True] * 3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 256


def test_a_large_model_is_sharded_like_save_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(tmp_path / "run")
    monkeypatch.setattr(export_job, "SHARD_SIZE", "40KB")
    report = trained.export(tmp_path / "out")
    trained.live.save_pretrained(tmp_path / "reference", max_shard_size="40KB")
    ours, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("out", "reference")
    )
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert all(torch.equal(tensor, trained.masters[name]) for name, tensor in tensors.items())
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
        assert {name for name, file in ours["weight_map"].items() if file == shard} == tensors.keys()
    assert torch.equal(_logits(_opened(tmp_path / "out", torch.float32)), trained.logits())


def test_fused_experts_are_stored_one_by_one_like_save_pretrained(tmp_path: Path) -> None:
    """A mixture of experts is called otherwise on disk than in memory; what a user opens has the names on disk."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCAB,
        bos_token_id=None,
        eos_token_id=3,
    )
    live = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    live.save_pretrained(tmp_path / "base")
    folder = RunFolder(tmp_path / "run")
    checkpointer = Checkpointer(folder, spec(folder.root))
    state = [Fragment(n, "master", tuple(p.shape), 0, p.detach().flatten()) for n, p in live.named_parameters()]
    checkpointer.save(1, state, {})
    saved = checkpointer.close()
    assert saved is not None
    report = export_checkpoint(
        saved.path, tmp_path / "out", model=Model(str(tmp_path / "base")), adapter=FullFineTune(), dtype="fp32"
    )
    _same_files(tmp_path / "out", tmp_path / "base")
    assert any("experts.3.gate_proj" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert "values bit for bit after transformers loaded them" in report.compared


def test_what_a_model_keeps_beside_its_parameters_comes_from_the_base(tmp_path: Path) -> None:
    """DeepSeek's routing bias is a buffer: saved with the model, moved by no optimizer."""
    config = AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        vocab_size=VOCAB,
        bos_token_id=None,
        eos_token_id=3,
    )
    live = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    biases = [buffer for name, buffer in live.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 1
    biases[0].normal_()
    live.save_pretrained(tmp_path / "base")
    folder = RunFolder(tmp_path / "run")
    checkpointer = Checkpointer(folder, spec(folder.root))
    state = [Fragment(n, "master", tuple(p.shape), 0, p.detach().flatten()) for n, p in live.named_parameters()]
    checkpointer.save(1, state, {})
    saved = checkpointer.close()
    assert saved is not None
    source = Model(str(tmp_path / "base"))
    export_checkpoint(saved.path, tmp_path / "out", model=source, adapter=FullFineTune(), dtype="fp32")
    _same_files(tmp_path / "out", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither in the checkpoint nor in the base"):
        export_checkpoint(saved.path, tmp_path / "again", model=source, adapter=FullFineTune(), dtype="fp32")


# --- LoRA ----------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, LoRA] = {
    "all linear": LoRA(rank=4),
    "named targets": LoRA(rank=2, alpha=3.0, target_modules=("q_proj", "down_proj")),
    "modules to save": LoRA(rank=4, modules_to_save=("lm_head", "embed_tokens")),
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("which", ADAPTERS)
def test_adapter_export_is_what_peft_writes(tmp_path: Path, which: str, precision: Precision) -> None:
    trained = Trained(tmp_path / "run", precision=precision, adapter=ADAPTERS[which])
    report = trained.export(tmp_path / "out")
    trained.live.save_pretrained(tmp_path / "reference", save_embedding_layers=False)
    _same_files(tmp_path / "out", tmp_path / "reference")
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "reference"))
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == theirs
    assert Path(ours["base_model_name_or_path"]) == trained.folder.base_model.resolve()
    opened = PeftModel.from_pretrained(
        _opened(trained.folder.base_model, trained.dtype), tmp_path / "out", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(_logits(opened), trained.logits(), rtol=0, atol=2e-2 if precision == "bf16" else 1e-6)
    install(opened)  # peft's layers round at other places than ours
    assert torch.equal(_logits(opened), trained.logits())
    assert not torch.equal(_logits(opened), _logits(_opened(trained.folder.base_model, trained.dtype)))
    assert report.kind == "adapter" and report.num_tensors == len(trained.masters)
    assert report.compared[1] == "a non-zero adapter" and report.compared[-1] == "a finite forward"
    assert "absolute path" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("which", ADAPTERS)
def test_merged_export_is_peft_merge_and_unload(tmp_path: Path, which: str) -> None:
    trained = Trained(tmp_path / "run", adapter=ADAPTERS[which])
    report = trained.export(tmp_path / "out", merged=True)
    live_logits = trained.logits()
    merged = trained.live.merge_and_unload()
    opened = _opened(tmp_path / "out", torch.float32)
    assert opened.state_dict().keys() == merged.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    torch.testing.assert_close(_logits(opened), live_logits)
    assert report.kind == "merged" and "values bit for bit" in report.compared[1]


def test_a_reversible_model_in_floating_point_opens_again(tmp_path: Path) -> None:
    """With its factors; where its anchors were is of no matter to the model."""
    adapter = Reversible(form="float", wiring=2, factors=(0.7, 0.4), width=8, inside=LoRA(rank=4), anchor_every=2)
    trained = Trained(tmp_path / "run", adapter=adapter, precision="bf16")
    report = trained.export(tmp_path / "out", merged=False)
    assert "streams: a finite forward" in report.compared
    told = json.loads((tmp_path / "out" / "reversible.json").read_text())
    assert (told["form"], told["factors"], told["wiring"]) == ("float", [0.7, 0.4], 2)
    opened = load_reversible(tmp_path / "out", dtype=trained.dtype, attn_implementation="eager")
    assert torch.equal(_logits(opened), trained.logits())
    published = {key: value for key, value in told.items() if key != "factors"}
    (tmp_path / "out" / "reversible.json").write_text(json.dumps(published))
    other = load_reversible(tmp_path / "out", dtype=trained.dtype, attn_implementation="eager")
    assert not torch.equal(_logits(other), trained.logits()), "other factors are another model"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "inside",
    [LoRA(rank=4), FullFineTune(), PaCA(rank=4), PEQA(bits=4), L4Q(rank=2), LoRA(rank=2, dropout=0.1)],
    ids=["lora", "full", "paca", "peqa", "l4q", "merged"],
)
def test_a_reversible_model_opens_again(
    tmp_path: Path, inside: Adapter, precision: Precision, request: pytest.FixtureRequest
) -> None:
    """With its own loader it is the model that was trained, to the bit; with peft alone, what trains inside."""
    merged = "merged" in request.node.callspec.id
    adapter = Reversible(wiring=1, bits=2, width=8, inside=inside, fraction_bits=18)  # type: ignore[arg-type]
    trained = Trained(tmp_path / "run", adapter=adapter, precision=precision)
    report = trained.export(tmp_path / "out", merged=merged)
    assert {"reversible.json", "reversible_adapter.safetensors"} <= set(report.files)
    assert "streams: a finite forward" in report.compared
    opened = load_reversible(tmp_path / "out", dtype=trained.dtype, attn_implementation="eager")
    want = trained.logits()
    if merged:  # W + B A rounded once, instead of two products added
        torch.testing.assert_close(_logits(opened), want, rtol=2e-2, atol=2e-2 if precision == "bf16" else 1e-4)
    else:
        assert torch.equal(_logits(opened), want)
    if isinstance(inside, LoRA) and not merged:
        plain = PeftModel.from_pretrained(_opened(trained.folder.base_model, trained.dtype), tmp_path / "out")
        assert not torch.equal(_logits(plain), want), "peft knows nothing of the streams"
    (tmp_path / "out" / "reversible.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no reversible model"):
        load_reversible(tmp_path / "out")


def test_a_bf16_merge_rounds_once(tmp_path: Path) -> None:
    """Against float64: each merged weight is the bf16 nearest to W + scale B A of the bf16 adapter."""
    trained = Trained(tmp_path / "run", precision="bf16", adapter=LoRA(rank=4, alpha=6.0))
    adapter = get_peft_model_state_dict(trained.live, save_embedding_layers=False)
    base = load_file(trained.folder.base_model / "model.safetensors")
    trained.export(tmp_path / "out", merged=True)
    for name, merged in load_file(tmp_path / "out" / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact = base[name].double()
        if f"{key}.lora_A.weight" in adapter:
            exact = exact + 1.5 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
            assert not torch.equal(merged, base[name])
        nearest = exact.to(torch.bfloat16)
        # fp32 arithmetic may land on the other side of a tie of the bf16 grid, never further
        assert (merged != nearest).float().mean() < 1e-3, name
        torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=0)


def test_a_tied_head_trained_apart_stays_apart_when_merged(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        trained = Trained(tmp_path / "run", tied=True, adapter=LoRA(rank=2, modules_to_save=("lm_head",)))
        trained.export(tmp_path / "out", merged=True)
    torch.testing.assert_close(_logits(_opened(tmp_path / "out", torch.float32)), trained.logits())


# --- anything off is an error --------------------------------------------------------------------------------------


def test_a_value_changed_while_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(tmp_path / "run")

    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = sorted(tensors)[3]
        tensors[name].view(torch.int32).flatten()[0] ^= 1
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(export_job, "save_file", save_wrongly)
    with pytest.raises(CheckpointError, match="not what was saved") as error:
        trained.export(tmp_path / "out")
    assert "differs from the checkpoint" in error.value.why
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export_check, "_too_large", lambda size_bytes: "it is too large")
    with pytest.raises(CheckpointError) as error:
        trained.export(tmp_path / "again")
    assert "differs from the checkpoint" in error.value.why


@pytest.mark.parametrize(
    ("break_it", "said"), [("drop", "other names"), ("cast", "is BF16, not F32"), ("reshape", "has shape")]
)
def test_wrong_headers_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: str, said: str) -> None:
    trained = Trained(tmp_path / "run", adapter=LoRA(rank=2))

    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = sorted(tensors)[0]
        changed = {"drop": {}, "cast": {name: tensors[name].bfloat16()}, "reshape": {name: tensors[name].flatten()}}
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest | changed[break_it], path, metadata=metadata)

    monkeypatch.setattr(export_lora, "save_file", save_wrongly)
    with pytest.raises(CheckpointError, match="not what was saved") as error:
        trained.export(tmp_path / "out")
    assert said in error.value.why


def test_an_adapter_that_does_nothing_is_refused(tmp_path: Path) -> None:
    def zero(masters: dict[str, torch.Tensor]) -> None:
        for name, master in masters.items():
            if "lora_B" in name:
                master.zero_()

    trained = Trained(tmp_path / "run", adapter=LoRA(rank=2), change=zero)
    with pytest.raises(CheckpointError) as error:
        trained.export(tmp_path / "out")
    assert "every lora_B is zero" in error.value.why


@pytest.mark.parametrize("adapter", [FullFineTune(), LoRA(rank=2)])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, adapter: Adapter) -> None:
    def spoil(masters: dict[str, torch.Tensor]) -> None:
        next(iter(masters.values())).view(-1)[5] = float("nan")

    trained = Trained(tmp_path / "run", adapter=adapter, change=spoil)
    with pytest.raises(CheckpointError) as error:
        trained.export(tmp_path / "out")
    assert "not finite" in error.value.why


def test_another_model_a_used_folder_and_a_missing_base_are_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run")
    with pytest.raises(CheckpointError) as error:
        trained.export(tmp_path / "out", adapter=LoRA(rank=2))
    assert "differ in name or size" in error.value.why
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        trained.export(tmp_path / "used")
    with pytest.raises(CheckpointError, match="base model"):
        trained.export(tmp_path / "new", base_model_dir=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="base model"):
        trained.export(tmp_path / "new", base_model_dir=None)


def test_without_the_memory_values_are_compared_on_the_files_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tmp_path / "run", adapter=LoRA(rank=2))
    monkeypatch.setattr(export_check.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    report = trained.export(tmp_path / "out")
    assert report.compared[-2] == "values bit for bit in the files"
    assert report.compared[-1].startswith("forward: not run, it needs 0.")


# --- in a process of its own ---------------------------------------------------------------------------------------


def test_each_save_exports_and_the_export_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", adapter=LoRA(rank=2))
    tokenizer = tmp_path / "tokenizer"
    _write_tokenizer(tokenizer)
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    job = spec(tmp_path / "run", export=True, adapter=trained.adapter)
    checkpointer = Checkpointer(trained.folder, job, tokenizer_dir=tokenizer)
    checkpointer.save(2, trained.fragments(), {})
    saved = checkpointer.wait()
    assert saved is not None and saved.export_s > 0
    files = {entry["path"] for entry in json.loads((saved.path / "manifest.json").read_text())["files"]}
    assert {"export/adapter_model.safetensors", "export/chat_template.jinja"} <= files
    trained.live.save_pretrained(tmp_path / "reference", save_embedding_layers=False)
    _same_files(saved.path / "export", tmp_path / "reference")


def test_what_the_export_process_says_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(tmp_path / "run")
    lines = {"what": "what was exported is wrong", "at": "out", "why": "because", "try_": "again"}
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\necho '{json.dumps({'error': {'kind': 'CheckpointError', **lines}})}'\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    checkpointer = Checkpointer(trained.folder, spec(tmp_path / "run", export=True))
    checkpointer.save(2, trained.fragments(), {})
    with pytest.raises(CheckpointError, match="what was exported is wrong") as error:
        checkpointer.close()
    assert (error.value.at, error.value.why, error.value.try_) == ("out", "because", "again")
    assert [path.name for path in trained.folder.complete_checkpoints()] == ["step_1"]


def test_an_export_that_takes_too_long_or_dies_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ExportRequest(
        checkpoint_dir=tmp_path,
        out_dir=tmp_path / "out",
        model=RandomModel(),
        adapter=FullFineTune(),
        base_model_dir=None,
        tokenizer_dir=None,
        dtype="fp32",
    )
    with pytest.raises(CheckpointError) as error:
        export_in_process(request, timeout_s=0.05)
    assert "no answer after 0 s" in error.value.why
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError) as error:
        export_in_process(request, timeout_s=20)
    assert "ended with code 1" in error.value.why


def test_the_export_process_ends_with_the_process_that_asked() -> None:
    command = [sys.executable, "-m", "farspan.trainer.export_process", "{}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out, asking = os.pipe()
    process = subprocess.Popen(command, stdin=out, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    os.close(out)
    os.close(asking)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 1 and b"Traceback" not in log
