"""S2A's parts: gradients against torch's autograd and peft, bytes against the formula, files that open elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, tokens
from test_export import TOKENS, Trained, _logits, _opened
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from farspan import SFTJob, TextData
from farspan.errors import CheckpointError, JobError
from farspan.jobs.facts import Machine, model_facts
from farspan.jobs.plan import shape_of, training_of
from farspan.jobs.resolve import resolve
from farspan.kernels.attention import KnownRows, causal_attention
from farspan.kernels.prefix_attention import Prefix, prefixed_attention
from farspan.memory.profile import Profile
from farspan.memory.states import weights_of
from farspan.trainer.adapters.s2a.apply import BIAS, SIDE
from farspan.trainer.adapters.s2a.files import load
from farspan.trainer.attention import NAME, PREFIX_KEYS, PREFIX_VALUES, PackedSequence
from farspan.trainer.bases.config import NF4
from farspan.trainer.bases.linear import QuantizedLinear
from farspan.trainer.calibrate import profile_of
from farspan.trainer.config import S2A, CalibrationRequest, FullFineTune, RandomModel
from farspan.trainer.export import export_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LENGTHS = [40, 56]
PROJECTIONS = 7
RANDOM = RandomModel(hidden=64, layers=LAYERS, heads=4, kv_heads=2, ffn=160, vocab=300)


def test_biases_have_the_gradients_of_torch_s_own() -> None:
    """An ordinary Llama with biases, all else frozen, fp64."""
    theirs = Model(adapter=FullFineTune(), attention_bias=True, mlp_bias=True)
    ours = Model(adapter=S2A())
    for made in (theirs, ours):
        made.causal.double()
    theirs.causal.load_state_dict(ours.causal.state_dict(), strict=False)
    trainable = ours.trainable()
    assert len(trainable) == PROJECTIONS * LAYERS
    for index, (name, p) in enumerate(trainable.items()):
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
        theirs.causal.get_parameter(name.replace(BIAS, "bias")).data.copy_(p.data)
    for name, p in theirs.causal.named_parameters():
        p.requires_grad_(name.endswith("proj.bias"))
    want, got = theirs.gradients(LENGTHS), ours.gradients(LENGTHS)
    for name in trainable:
        expected = want[name.replace(BIAS, "bias")]
        torch.testing.assert_close(got[name], expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(got["loss 0"], want["loss 0"], rtol=1e-14, atol=0)


def test_on_a_quantized_base_too() -> None:
    """Against plain layers with the matrices that the codes stand for."""
    ours = Model(adapter=S2A(), base=NF4())
    plain = Model(adapter=S2A())
    for name, module in ours.causal.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.causal.get_submodule(name).weight.data.copy_(module.whole())
    want, got = plain.gradients(LENGTHS), ours.gradients(LENGTHS)
    assert got.keys() == want.keys() and sum(BIAS in name for name in got) == PROJECTIONS * LAYERS
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def stored(adapter: Any, activations: Any) -> dict[int, int]:
    """Bytes of storages that autograd keeps of the decoder layers, parameters left out."""
    model = Model(precision="bf16", adapter=adapter, activations=activations)
    if adapter is None:
        model.model.requires_grad_(False)
    ids, positions = tokens(LENGTHS)
    hidden = model.causal.get_input_embeddings()(ids).detach().requires_grad_()
    embeddings = model.causal.get_decoder().rotary_emb(hidden, positions)
    beside = (*model.model.parameters(), *model.model.buffers(), hidden, *embeddings)
    foreign = {t.untyped_storage().data_ptr() for t in beside}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in foreign:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, held = hidden, []
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in model.layers:
            x = layer(
                x,
                position_embeddings=embeddings,
                position_ids=positions,
                packed_sequence=PackedSequence(tuple(LENGTHS)),
            )
            held.append(x)
    return seen


def test_stored_bytes_are_those_of_the_formula() -> None:
    """2 (4d + 2g + 2f) for a row and layer, two roots of norms and attention's log-sum-exps, where each norm and the
    gated unit is one node; what biases add to a frozen model: nothing."""
    d, g, f, heads, rows = 64, 32, 160, 4, sum(LENGTHS)
    formula = 2 * (4 * d + 2 * g + 2 * f) + 2 * 4 + 4 * heads
    assert sum(stored(S2A(), "fused").values()) == formula * rows * LAYERS
    prompt = sum(stored(S2A(bias=False, prompt=5), "fused").values())
    assert prompt == formula * rows * LAYERS
    for activations in ("autograd", "fused", "int4"):
        frozen = sum(stored(None, activations).values())
        assert sum(stored(S2A(), activations).values()) == frozen
        assert sum(stored(S2A(side=8), activations).values()) == frozen + 2 * 8 * rows * LAYERS
    # of attention the same; norms and gated unit in 4 bits, with 4 bytes for a group of 64, of 32 where rows are of 160
    codes = 2 * (2 * d + 2 * g) + 4 * heads + 2 * 4 + 2 * d * 0.5625 + f * (0.5 + 2 * 0.625)
    assert sum(stored(S2A(), "int4").values()) == codes * rows * LAYERS


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_attention_behind_a_prefix(heads: int, kv_heads: int) -> None:
    """Against softmax over [prefix; document] written out, fp64; and with some rows known."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    lengths, size, n = (300, 1, 299), 8, 5
    q, k, v = drawn(1, heads, 600, size), drawn(1, kv_heads, 600, size), drawn(1, kv_heads, 600, size)
    keys, values = drawn(kv_heads, n, size), drawn(kv_heads, n, size)
    inputs, dy = (q, k, v, keys, values), torch.randn(1, heads, 600, size, generator=draw, dtype=torch.float64)
    out, lse = prefixed_attention(q, k, v, prefix=Prefix(keys, values), lengths=lengths, scale=0.3)
    got = torch.autograd.grad(out, inputs, dy)

    def wide(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // kv_heads, -3)

    document = torch.cat([torch.full((m,), i) for i, m in enumerate(lengths)])
    seen = (document[:, None] == document) & torch.ones(600, 600, dtype=torch.bool).tril()
    scores = (q @ wide(k).transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf)
    scores = torch.cat([q @ wide(keys).transpose(-1, -2) * 0.3, scores], -1)
    want = scores.softmax(-1) @ torch.cat([wide(values)[None], wide(v)], -2)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(got, torch.autograd.grad(want, inputs, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for first in (0, 130, 256, 600):
        rest = torch.full_like(out.detach(), torch.nan), torch.full_like(lse, torch.nan)
        for given, whole in zip(rest, (out.detach(), lse)):
            given[:, :, first:] = whole[:, :, first:]
        again, lse_again = prefixed_attention(
            q, k, v, prefix=Prefix(keys, values), lengths=lengths, scale=0.3, known=KnownRows(*rest, first)
        )
        assert torch.equal(again, out) and torch.equal(lse_again, lse)
    assert not torch.allclose(out, causal_attention(q, k, v, lengths=lengths, scale=0.3)[0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_prompt_is_peft_s_prefix_tuning(family: str) -> None:
    """Documents in one pack against peft on each alone: losses and gradients, fp64."""
    from peft import PrefixTuningConfig, get_peft_model

    ours, n = Model(family, adapter=S2A(bias=False, prompt=6)), 6
    ours.causal.double()
    for p in ours.trainable().values():
        p.data.normal_(std=0.5)
    ids, positions = tokens(LENGTHS)
    labels = ids.roll(-1, 1)
    loss = ours.loss(ids, labels, positions, PackedSequence(tuple(LENGTHS)))
    loss.backward()

    plain = Model(family, attention="eager")
    plain.causal.double().load_state_dict(ours.causal.state_dict(), strict=False)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, token_dim=32, num_attention_heads=2, num_layers=LAYERS
    )
    theirs = get_peft_model(plain.causal, config)
    weight: Any = theirs.prompt_encoder["default"].embedding.weight
    weight.data = weight.data.double()

    def prefixes(of: Any) -> Tensor:
        parts = [of(getattr(layer.self_attn, name)) for layer in ours.layers for name in (PREFIX_KEYS, PREFIX_VALUES)]
        return torch.stack(parts).permute(2, 0, 1, 3).flatten(1)

    weight.data.copy_(prefixes(lambda p: p.data))
    total, first = torch.zeros((), dtype=torch.float64), 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        logits = theirs(input_ids=ids[:, rows]).logits[0]
        total = total + nn.functional.cross_entropy(logits, labels[0, rows], reduction="sum")
        first += length
    total.backward()
    # eager attention takes its softmax in fp32
    torch.testing.assert_close(loss, total, rtol=1e-8, atol=0)
    torch.testing.assert_close(prefixes(lambda p: p.grad), weight.grad, rtol=1e-5, atol=1e-6)


def test_side_modules_have_the_gradients_of_the_formula() -> None:
    """Autograd through y + R S P x in torch's operators, fp64."""
    ours, plain, width = Model(adapter=S2A(bias=False, side=16)), Model(), 16
    for made in (ours, plain):
        made.causal.double()
    plain.causal.load_state_dict(ours.causal.state_dict(), strict=False)
    plain.causal.requires_grad_(False)
    start = plain.forward(LENGTHS, 0)
    assert torch.equal(ours.forward(LENGTHS, 0).detach(), start)
    leaves = []
    for layer, other in zip(ours.layers, plain.layers):
        getattr(layer, SIDE).data.normal_(std=0.3)
        leaves.append(getattr(layer, SIDE).detach().clone().requires_grad_())

        def beside(_: Any, x: tuple[Tensor], y: Tensor, s: Tensor = leaves[-1]) -> Tensor:
            pool = torch.kron(torch.eye(width).double(), torch.ones(1, 64 // width).double())
            return y + x[0] @ (pool.t() @ s @ pool / (64 // width)).t()

        other.mlp.register_forward_hook(beside)
    plain.forward(LENGTHS, 0).backward()
    got = ours.gradients(LENGTHS, micro_batches=1)
    for index, leaf in enumerate(leaves):
        torch.testing.assert_close(got[f"model.layers.{index}.{SIDE}"], leaf.grad, rtol=1e-10, atol=1e-11)


def test_every_rank_draws_the_same_prompt() -> None:
    first, second = (Model(adapter=S2A(prompt=3)).trainable() for _ in range(2))
    drawn = [name for name in first if name.endswith((PREFIX_KEYS, PREFIX_VALUES))]
    assert len(drawn) == 2 * LAYERS and all(torch.equal(first[n], second[n]) and first[n].any() for n in drawn)


def by_farspan(trained: Trained) -> Tensor:
    """Logits as training computes them."""
    trained.base.config._attn_implementation = NAME
    rows = TOKENS.shape[1]
    trained.base.eval()
    with torch.no_grad():
        hidden = trained.base.get_decoder()(
            input_ids=TOKENS,
            position_ids=torch.arange(rows)[None],
            use_cache=False,
            packed_sequence=PackedSequence((rows,)),
        ).last_hidden_state
        return trained.base.get_output_embeddings()(hidden)


@pytest.mark.parametrize("adapter", [S2A(), S2A(prompt=3), S2A(side=8), S2A(prompt=4, side=4)])
def test_exported_parts_open_again(tmp_path: Path, adapter: S2A) -> None:
    trained = Trained(tmp_path / "run", adapter=adapter)
    want = by_farspan(trained)
    report = trained.export(tmp_path / "out")
    assert "a finite forward" in report.compared and "s2a.json" in report.files
    assert ("adapter_model.safetensors" in report.files) == bool(adapter.prompt)
    for base in (None, _opened(trained.folder.base_model, torch.float32)):
        options = {"attn_implementation": "eager"} if base is None else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, that attention masks are extended
            found = _logits(load(tmp_path / "out", base=base, **options))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-6)


def test_a_prompt_alone_is_a_peft_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    trained = Trained(tmp_path / "run", adapter=S2A(bias=False, prompt=4))
    want = by_farspan(trained)
    trained.export(tmp_path / "out")
    model = PeftModel.from_pretrained(_opened(trained.folder.base_model, torch.float32), tmp_path / "out")
    torch.testing.assert_close(_logits(model), want, rtol=1e-5, atol=2e-6)
    written = model.generate(input_ids=TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 7)


def test_biases_are_merged_where_the_family_has_them(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", adapter=S2A(target_modules=("q_proj", "down_proj")))
    want = trained.logits()
    assert trained.export(tmp_path / "out", merged=True).kind == "merged"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(_logits(plain), want, rtol=1e-5, atol=1e-6)
    for family, adapter, what in (("qwen3", S2A(), "has no bias on"), ("llama", S2A(prompt=2), "has no prompt")):
        other = Trained(tmp_path / family, family=family, adapter=adapter)
        with pytest.raises(CheckpointError, match="do not fit into a plain model") as refused:
            other.export(tmp_path / "merged", merged=True)
        assert what in refused.value.why


def test_an_export_that_changes_nothing_is_none(tmp_path: Path) -> None:
    def undo(masters: dict[str, Tensor]) -> None:
        for master in masters.values():
            master.zero_()

    trained = Trained(tmp_path / "run", adapter=S2A(), change=undo)
    with pytest.raises(CheckpointError, match="not what was saved"):
        trained.export(tmp_path / "out")
    other = Trained(tmp_path / "other", adapter=S2A())
    other.export(tmp_path / "fine")
    with pytest.raises(CheckpointError, match="no trained parts"):
        load(tmp_path / "fine", base=AutoModelForCausalLM.from_config(Model(layers=1).causal.config))
    with pytest.raises(CheckpointError, match="parameters are not"):
        export_checkpoint(
            other.checkpoint,
            tmp_path / "wrong",
            model=RandomModel(),
            adapter=S2A(prompt=2),
            base_model_dir=other.folder.base_model,
            dtype="fp32",
        )


def test_what_cannot_be_trained() -> None:
    with pytest.raises(JobError, match="gets no bias"):
        Model(adapter=S2A(target_modules=("q_proj", "lm_head")))
    with pytest.raises(JobError, match="side module of width 7"):
        Model(adapter=S2A(side=7))
    assert sum(BIAS in n for n in Model(adapter=S2A(target_modules=("v_proj",))).trainable()) == LAYERS


@pytest.mark.parametrize(
    "adapter", [S2A(), S2A(target_modules=("q_proj", "up_proj"), prompt=3), S2A(bias=False, side=8)]
)
def test_planned_weights_are_the_model_s(adapter: S2A) -> None:
    made, facts = Model(precision="bf16", adapter=adapter), model_facts(RANDOM)
    job = SFTJob(name="t", model=RANDOM, data=TextData("stdlib", context=4096), adapter=adapter)
    machine = Machine(nodes=({"CPU": 1.0},), cpu_memory_bytes=1 << 33)
    training = training_of(resolve(job, facts, machine, {}).train, facts)
    assert (
        training.trained(shape_of(facts))
        == facts.trainable(adapter)
        == sum(map(Tensor.numel, made.trainable().values()))
    )
    assert weights_of(shape_of(facts), training).bytes == sum(p.nbytes for p in made.model.parameters())


def test_a_prompt_and_side_modules_are_measured() -> None:
    """Where no formula counts them: the profile is read off a layer that has them."""
    model = RANDOM.model_copy(update={"layers": 2})
    found: list[Profile] = []
    for adapter in (S2A(), S2A(prompt=4, side=16)):
        request = CalibrationRequest.model_validate(
            {
                "model": model,
                "adapter": adapter,
                "precision": "bf16",
                "memory": {},
                "context": 2048,
                "sp": 1,
                "kinds": ("full", "full"),
                "gradients": "handed on",
            }
        )
        found.append(profile_of(request, torch.device("cpu")))
    without, having = (profile.kinds[0].keep_bytes.at(2048) for profile in found)
    assert having - without == pytest.approx(2 * 16 * 2048, rel=1e-3)
