"""Models of every family, prepared as jobs ask, against plain transformers and peft."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from farspan.errors import JobError
from farspan.memory.config import MemoryBudget
from farspan.memory.plan import Placement, checkpoint_every_layer
from farspan.trainer import tiling
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import FullFineTune, LoRA, RandomModel
from farspan.trainer.models import add_adapter, load_model, prepare_model, write_random_model

FAMILIES = get_args(RandomModel.model_fields["family"].annotation)
CPU = torch.device("cpu")
TILED = MemoryBudget(mlp_tile=16, loss_tile=32)
REBUILT = checkpoint_every_layer(2, rows=70, attention_rows=70)


def folder_of(tmp_path: Path, family: str, **changes: Any) -> Path:
    folder = tmp_path / family
    model = RandomModel(family=family, hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=260, **changes)
    write_random_model(model, folder, precision="fp32", context=128, eos_id=0, pad_id=1)
    return folder


def sequence(rows: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 260, (1, rows), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    labels[0, 5:9] = -100
    return ids, labels


def compare(got: dict[str, Any], want: dict[str, Any], rtol: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm()
        assert error < rtol, (name, float(error))


def ours(folder: Path, adapter: Any, memory: MemoryBudget, fill: Any = None) -> tuple[float, dict[str, Any]]:
    module, trainable = prepare_model(
        load_model(str(folder), revision=None, dtype=torch.float32, device=CPU),
        adapter=adapter,
        memory=memory,
        seed=3,
        placement=REBUILT if memory is TILED else None,
    )
    if fill is not None:
        fill(trainable)
    ids, labels = sequence()
    loss = module(ids, labels, torch.arange(70)[None], PackedSequence((70,)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable.items()}


def theirs(folder: Path, adapter: Any, fill: Any = None) -> tuple[float, dict[str, Any]]:
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model: Any = add_adapter(causal, adapter, seed=3)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if fill is not None:
        fill(named)
    ids, labels = sequence()
    loss = cross_entropy(model(input_ids=ids, use_cache=False).logits[0], labels[0], reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in named.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_in_transformers(family: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, family)
    want_loss, want = theirs(folder, FullFineTune())
    for memory in (MemoryBudget(), TILED):
        loss, got = ours(folder, FullFineTune(), memory)
        assert loss == pytest.approx(want_loss, rel=1e-6)
        compare(got, want, 5e-6)


def test_tied_embeddings_train_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama", tie_embeddings=True)
    _, want = theirs(folder, FullFineTune())
    _, got = ours(folder, FullFineTune(), TILED)
    assert "lm_head.weight" not in got
    compare(got, want, 5e-6)


def test_lora_with_a_whole_module_and_named_targets(tmp_path: Path) -> None:
    def fill(trainable: dict[str, Any]) -> None:
        for index, (name, p) in enumerate(sorted(trainable.items())):
            if "lora_B" in name:
                p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))

    folder = folder_of(tmp_path, "qwen3")
    adapter = LoRA(rank=3, alpha=5, target_modules=("q_proj", "down_proj"), modules_to_save=("lm_head",))
    want_loss, want = theirs(folder, adapter, fill)
    for memory in (MemoryBudget(), TILED):
        loss, got = ours(folder, adapter, memory, fill)
        assert loss == pytest.approx(want_loss, rel=1e-6)
        assert sum("lm_head" in name for name in got) == 1
        compare(got, want, 5e-6)


@pytest.mark.parametrize("placement", [None, REBUILT], ids=["keep", "rebuild"])
def test_adapter_dropout_is_the_same_in_the_recomputed_forward(
    placement: Placement | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, tiles and layers that run again must replay their masks: compared with tiles that run once."""
    folder = folder_of(tmp_path, "llama")
    memory = MemoryBudget(mlp_tile=16, loss_tile=32)

    def gradients(placement: Placement | None = None) -> dict[str, Any]:
        causal = load_model(str(folder), revision=None, dtype=torch.float32, device=CPU)
        module, trainable = prepare_model(
            causal, adapter=LoRA(rank=4, dropout=0.5), memory=memory, seed=0, placement=placement
        )
        ids, labels = sequence()
        torch.manual_seed(11)
        module(ids, labels, torch.arange(70)[None], PackedSequence((70,))).backward()
        return {name: p.grad for name, p in trainable.items() if "lora_B" in name}

    got = gradients(placement)
    kept = lambda x, anchor, call, rows, mlp: torch.cat([call(tile) for tile in x.split(rows, dim=1)], dim=1)  # noqa: E731
    monkeypatch.setattr(tiling, "_TiledRows", SimpleNamespace(apply=kept))
    compare(got, gradients(), 1e-5)


def test_an_unknown_target_module_names_real_ones(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    causal = load_model(str(folder), revision=None, dtype=torch.float32, device=CPU)
    with pytest.raises(JobError, match="the adapter does not match the model") as caught:
        add_adapter(causal, LoRA(target_modules=("query",)), seed=0)
    assert "q_proj" in caught.value.try_


def test_an_adapter_on_the_output_projection_is_refused(tmp_path: Path) -> None:
    causal = load_model(str(folder_of(tmp_path, "llama")), revision=None, dtype=torch.float32, device=CPU)
    with pytest.raises(JobError, match="output projection"):
        prepare_model(causal, adapter=LoRA(target_modules=("lm_head",)), memory=MemoryBudget(), seed=0)


def test_a_missing_model_is_one_clear_error() -> None:
    with pytest.raises(JobError, match="cannot be loaded"):
        load_model("/nowhere/at/all", revision=None, dtype=torch.float32, device=CPU)


def test_tiles_keep_fewer_rows_alive(tmp_path: Path) -> None:
    """What the MLP tiles are for: bytes autograd saves, counted, fall by the intermediates' share."""
    folder = folder_of(tmp_path, "llama")
    stored = {}
    for name, memory in (("whole", MemoryBudget()), ("tiled", MemoryBudget(mlp_tile=16))):
        causal = load_model(str(folder), revision=None, dtype=torch.float32, device=CPU)
        module, _ = prepare_model(causal, adapter=FullFineTune(), memory=memory, seed=0)
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        storages: dict[int, int] = {}

        def note(x: torch.Tensor, storages: dict[int, int] = storages, weights: set[int] = weights) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        ids, labels = sequence()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            module(ids, labels, torch.arange(70)[None], PackedSequence((70,)))
        stored[name] = sum(storages.values())
    gate_up_act_product = 2 * 4 * 70 * 48 * 4  # layers x tensors x rows x ffn x fp32
    assert stored["whole"] - stored["tiled"] >= gate_up_act_product * 0.9, stored


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_start_at_the_base_and_open_in_peft(tmp_path: Path, init: Any, rslora: bool) -> None:
    from peft import PeftModel

    folder = folder_of(tmp_path, "llama")
    ids, _ = sequence()

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    adapter = LoRA(rank=16, rslora=rslora, init=init)
    made: Any = add_adapter(base(), adapter, seed=0)
    layer = made.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == pytest.approx(2.0), "the default alpha scales by two either way"
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert bool(b.detach().any()) == (init == "orthogonal")
    torch.testing.assert_close(made(ids).logits, base()(ids).logits, rtol=1e-4, atol=1e-5)
    b.data.add_(torch.randn_like(b) * 0.1)
    made.save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    torch.testing.assert_close(opened(ids).logits, made(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made(ids).logits, base()(ids).logits)
    again: Any = add_adapter(base(), adapter, seed=0)
    assert torch.equal(again.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight, a)
