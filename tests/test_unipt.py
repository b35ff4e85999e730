"""UniPT: its formula, what no token may see, and that the frozen model stores nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, step_on_rank, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from sp_ranks import on_ranks
from test_export import TOKENS, Trained, _logits, _opened
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from farspan import SFTJob, TextData
from farspan.errors import CheckpointError, JobError
from farspan.jobs.facts import Machine, model_facts
from farspan.jobs.plan import plan, shape_of, training_of
from farspan.jobs.resolve import resolve
from farspan.kernels import causal_merge as kernel
from farspan.kernels.causal_merge import causal_merge, running_mean
from farspan.memory.allocations import footprint
from farspan.memory.hardware import load_hardware
from farspan.memory.shape import AdapterShape, Training
from farspan.memory.side_network import kept_tensors
from farspan.memory.states import weights_of
from farspan.trainer.adapters.unipt.apply import CHILD
from farspan.trainer.adapters.unipt.files import load
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.config import NF4, Int8
from farspan.trainer.config import Optim, RandomModel, UniPT
from farspan.trainer.engine_plain import PlainEngine

LENGTHS = [40, 56]
HIDDEN, REDUCTION = 64, 4
WIDTH = HIDDEN // REDUCTION
UNIPT = UniPT(reduction=REDUCTION)
RANDOM = RandomModel(hidden=HIDDEN, layers=LAYERS, heads=4, kv_heads=2, ffn=160, vocab=300)


def seen_by(lengths: list[int]) -> Tensor:
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return (document[:, None] == document) & torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).tril()


def merged(a: Tensor, h: Tensor, seen: Tensor) -> Tensor:
    """As the paper writes it, with a matrix of rows x rows, masked."""
    c = torch.relu(a @ h.transpose(-1, -2)) * seen
    return nn.functional.normalize(c, p=1.0, dim=-1) @ h + h


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    layers=st.integers(0, 3),
    block=st.sampled_from([1, 7, 16, 64]),
    seed=st.integers(0, 2**31),
)
def test_merging_is_the_formula(lengths: list[int], layers: int, block: int, seed: int) -> None:
    """Rows and gradients, fp64; a row to which nothing is alike, too."""
    draw = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    a = torch.randn(rows, 5, generator=draw, dtype=torch.float64)
    a[rows // 2] = -a[: rows // 2 + 1].abs().sum(0) * 0  # all scores of it are zero
    h = torch.randn(layers, rows, 5, generator=draw, dtype=torch.float64)
    a.requires_grad_(), h.requires_grad_()
    d = torch.randn(layers, rows, 5, generator=draw, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.BLOCK_ELEMENTS, "cpu", block**2 * max(1, layers))
        out = causal_merge(a, h, lengths=lengths)
        got = torch.autograd.grad(out, (a, h), d)
    want = merged(a, h, seen_by(lengths))
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(got, torch.autograd.grad(want, (a, h), d)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    means = running_mean(h, lengths=lengths)
    seen = seen_by(lengths).double()
    torch.testing.assert_close(means, (seen / seen.sum(1, keepdim=True)) @ h, rtol=1e-11, atol=1e-12)


def drawn(model: Model) -> Model:
    """Every trained weight at random, fp64."""
    model.causal.double()
    for index, p in enumerate(model.trainable().values()):
        p.data.normal_(std=p.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(index))
    return model


@pytest.mark.parametrize("store", ["nothing", "inputs"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_model_is_the_formula(family: str, store: Any) -> None:
    """Loss and gradients of all that is trained, against autograd through the formula written out."""
    ours = drawn(Model(family, adapter=UniPT(reduction=REDUCTION, store=store)))
    got = ours.gradients(LENGTHS, micro_batches=1)

    plain = Model(family)
    plain.causal.double()
    given = {name: p for name, p in ours.causal.state_dict().items() if not name.startswith(CHILD)}
    plain.causal.load_state_dict(given)
    outputs: list[Tensor] = []
    for layer in plain.layers:
        layer.register_forward_hook(lambda _l, _i, y: outputs.append(y))
    torch.manual_seed(100)
    ids, positions = tokens(LENGTHS)
    with torch.no_grad():
        final = plain.causal.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, packed_sequence=PackedSequence(tuple(LENGTHS))
        ).last_hidden_state[0]
    weights = {n: p.detach().clone().requires_grad_() for n, p in ours.causal.unipt.named_parameters()}
    z = [
        nn.functional.layer_norm(
            h[0] @ weights["down"][i].t(), (WIDTH,), weights["norm_weight"][i], weights["norm_bias"][i]
        )
        for i, h in enumerate(outputs)
    ]
    seen = seen_by(LENGTHS)
    mean = seen.double() / seen.sum(1, keepdim=True)
    scores = torch.stack([(mean @ z[-1] * (mean @ h)) @ weights["gate"] for h in z[:-1]])
    share = scores.softmax(0)
    mixed = sum(share[i][:, None] * merged(z[-1], h, seen) for i, h in enumerate(z[:-1]))
    hidden = final + torch.relu(z[-1] + mixed @ weights["proj"].t()) @ weights["up"].t()
    loss = nn.functional.cross_entropy(hidden @ plain.causal.lm_head.weight.t(), ids.roll(-1, 1)[0], reduction="sum")
    loss.backward()
    torch.testing.assert_close(got["loss 0"], loss.detach(), rtol=1e-12, atol=0)
    assert len(got) == len(weights) + 1 == 7
    for name, weight in weights.items():
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(got[f"{CHILD}.{name}"], weight.grad, rtol=0, atol=1e-10 * scale)


def hidden_states(model: Model, ids: Tensor, lengths: list[int]) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        return model.causal.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, packed_sequence=PackedSequence(tuple(lengths))
        ).last_hidden_state[0]


def test_no_token_sees_a_later_one_or_another_document() -> None:
    model = drawn(Model(adapter=UNIPT))
    ids, _ = tokens(LENGTHS)
    whole = hidden_states(model, ids, LENGTHS)
    for changed in (60, 95):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 7) % 290 + 2
        found = hidden_states(model, other, LENGTHS)
        torch.testing.assert_close(found[:changed], whole[:changed], rtol=1e-12, atol=1e-12)
        assert float((found[changed] - whole[changed]).abs().max()) > 1e-3
    first = 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        alone = hidden_states(model, ids[:, rows], [length])
        torch.testing.assert_close(alone, whole[rows], rtol=1e-11, atol=1e-11)
        first += length
    cut = hidden_states(model, ids[:, :50], [40, 10])
    torch.testing.assert_close(cut, whole[:50], rtol=1e-11, atol=1e-11)


def test_more_ranks_than_layers_to_merge() -> None:
    """Four ranks, three layers beside the anchor: one of them has rows and no layer."""
    (alone,) = on_ranks(step_on_rank, 1, (1, 1), [{"adapter": UNIPT, "placement": None}])
    shared = on_ranks(step_on_rank, 4, (1, 4), [{"adapter": UNIPT, "placement": None}])[0]
    names = [name for name in alone[0] if name.startswith("loss") or name in Model(adapter=UNIPT).trainable()]
    assert len(names) == 8
    for name in names:
        scale = float(alone[0][name].abs().max())
        torch.testing.assert_close(shared[0][name], alone[0][name], rtol=0, atol=1e-5 * scale)


def test_training_starts_at_the_base_and_learns() -> None:
    base, model = Model(precision="bf16"), Model(precision="bf16", adapter=UNIPT)
    model.causal.unipt.up.data.zero_()
    assert torch.equal(model.forward(LENGTHS, 0).detach(), base.forward(LENGTHS, 0).detach())
    frozen = {n: p.clone() for n, p in model.causal.named_parameters() if CHILD not in n}
    engine = PlainEngine(model.loss, model.trainable(), Optim(lr=1e-2), "cpu")
    losses = []
    for _ in range(8):
        loss = model.forward(LENGTHS, 0)
        engine.backward(loss / sum(LENGTHS), last=True)
        engine.step(lr=1e-2, clip_norm=None)
        losses.append(float(loss.detach()))
    engine.close()
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.causal.named_parameters() if CHILD not in n)


def stored_bytes(layers: int, rows: int, store: Any = "nothing", base: Any = None) -> int:
    """Of storages that autograd keeps of a whole model's hidden states; weights left out."""
    how = {"base": base} if base is not None else {}
    model = Model(precision="bf16", adapter=UniPT(reduction=REDUCTION, store=store), layers=layers, **how)
    ids, positions = tokens([rows])
    foreign = {t.untyped_storage().data_ptr() for t in (*model.model.parameters(), *model.model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in foreign:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.causal.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, packed_sequence=PackedSequence((rows,))
        ).last_hidden_state
    assert hidden.requires_grad
    return sum(seen.values())


def test_the_frozen_model_stores_nothing() -> None:
    """What a further layer adds to what is kept: rows of the network's width, and nothing of the model's."""
    rows = 512
    kept = [stored_bytes(layers, rows) for layers in (2, 4, 6)]
    per_layer = (kept[1] - kept[0]) / 2 / rows
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=1e-3)
    facts = model_facts(RANDOM)
    shape = shape_of(facts)
    assert per_layer == sum(t.bytes_per_row for t in kept_tensors(shape, training(UNIPT), shaped(UNIPT)))
    assert stored_bytes(4, rows, store="inputs") - kept[1] == 4 * rows * 2 * HIDDEN
    assert stored_bytes(4, rows, base=NF4()) == stored_bytes(4, rows, base=Int8()) == kept[1]
    frozen = Model(precision="bf16", adapter=UNIPT)
    seen: list[bool] = []
    for layer in frozen.layers:
        layer.register_forward_hook(lambda _l, _i, y: seen.append(y.requires_grad or y.grad_fn is not None))
    frozen.forward([rows], 0)
    assert seen == [False] * LAYERS


def resolved(adapter: UniPT, **more: Any) -> Any:
    job = SFTJob(name="t", model=RANDOM, data=TextData("stdlib", context=4096), adapter=adapter, **more)
    machine = Machine(nodes=({"CPU": 1.0},), cpu_memory_bytes=1 << 33)
    return job, resolve(job, model_facts(RANDOM), machine, {})


def training(adapter: UniPT) -> Training:
    return training_of(resolved(adapter)[1].train, model_facts(RANDOM))


def shaped(adapter: UniPT) -> AdapterShape:
    found = training(adapter).adapter
    assert found is not None
    return found


def test_planned_weights_and_stored_bytes_are_the_model_s() -> None:
    facts = model_facts(RANDOM)
    made = Model(precision="bf16", adapter=UNIPT)
    found = training(UNIPT)
    trained = sum(p.numel() for p in made.trainable().values())
    assert found.trained(shape_of(facts)) == facts.trainable(UNIPT) == trained
    assert weights_of(shape_of(facts), found).bytes == sum(p.nbytes for p in made.model.parameters())
    for store in ("nothing", "inputs"):
        adapter = UniPT(reduction=REDUCTION, store=store)  # type: ignore[arg-type]
        job, told = resolved(adapter)
        planned = plan(job, told.train, facts, load_hardware("cpu"))
        assert planned.placement.keeps_everything and told.values["memory.plan"].value == "keep"
        kept = planned.problem.kinds[0].keep_bytes
        assert kept == pytest.approx(4096 * (4 * 2 * WIDTH + 14 + 2 * HIDDEN * (store == "inputs")))


def test_memory_is_flat_in_depth() -> None:
    """A step's peak, counted by the allocator: what a further layer adds is the network's rows, in a deep model too."""
    peaks = {}
    for layers in (2, 4, 8):
        model = Model(precision="bf16", adapter=UNIPT, layers=layers)
        model.forward([1024], 0).backward()
        took = footprint(lambda m=model: m.forward([1024], 0).backward(), torch.device("cpu"))  # type: ignore[misc]
        peaks[layers] = took.peak_bytes
    added = (peaks[8] - peaks[4]) / 4 / 1024
    assert added < 12 * 2 * WIDTH < 2 * 2 * 4 * HIDDEN, added


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_opens_again(tmp_path: Path, precision: Any) -> None:
    trained = Trained(tmp_path / "run", adapter=UniPT(reduction=4), precision=precision)
    want = trained.logits()
    report = trained.export(tmp_path / "out")
    assert {"unipt.json", "unipt.safetensors"} <= set(report.files) and "a finite forward" in report.compared
    for base in (None, _opened(trained.folder.base_model, trained.dtype)):
        model: Any = load(tmp_path / "out", base=base, **({"attn_implementation": "eager"} if base is None else {}))
        assert torch.equal(_logits(model), want)
    written = model.generate(input_ids=TOKENS[:, 5:9], max_new_tokens=3, do_sample=False)
    again = _logits_of(model, written)[0, 3:-1].argmax(-1)
    assert torch.equal(written[0, 4:], again)
    with pytest.raises(CheckpointError, match="cannot be merged"):
        trained.export(tmp_path / "merged", merged=True)
    with pytest.raises(CheckpointError, match="no trained network"):
        load(tmp_path / "out", base=Model().causal)


def _logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_an_export_that_adds_nothing_is_none(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", adapter=UniPT(reduction=4), change=lambda m: m["unipt.up"].zero_())
    with pytest.raises(CheckpointError, match="not what was saved"):
        trained.export(tmp_path / "out")


def test_what_cannot_be() -> None:
    with pytest.raises(JobError, match="no room for a UniPT"):
        Model(adapter=UniPT(reduction=5))
    with pytest.raises(JobError, match="no room for a UniPT"):
        Model(adapter=UNIPT, layers=1)
    model = Model(adapter=UNIPT)
    ids = tokens([8])[0]
    with pytest.raises(JobError, match="from a cache"):
        model.causal.get_decoder()(input_ids=ids, use_cache=True)


def test_every_rank_draws_the_same() -> None:
    one, two = (Model(adapter=UNIPT).trainable() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
