"""Rows on host and disk in codes: what comes back, what it takes, what it does to gradients, and that a plan knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, differing, step_on_rank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sp_ranks import on_ranks
from test_plan_job import LLAMA_8B, planned
from torch import Tensor

from farspan import LoRA, RandomModel
from farspan.errors import DoesNotFit, JobError
from farspan.jobs.plan_view import part_rows, tier_error_line, to_json
from farspan.kernels.activation_codecs.codes import Encoder, Groups4, Groups8
from farspan.memory.build import problem_for
from farspan.memory.coded_rows import row_codec
from farspan.memory.evaluate import evaluate
from farspan.memory.executor import Executor
from farspan.memory.hardware import load_hardware
from farspan.memory.plan import LayerPlan, Placement, Rows, TierCodec
from farspan.memory.policies import fixed_policy
from farspan.memory.problem import GradientError, LayerKind
from farspan.memory.replay import replay
from farspan.memory.self_test import scaled
from farspan.memory.shape import ModelShape, Training
from farspan.memory.single_layers import calls_of, hooked
from farspan.memory.tier_codes import coded_row_bytes
from farspan.memory.tier_error import layer_error, measure_codes
from farspan.memory.tiered import DeviceLedger, TieredRows
from farspan.memory.tiers import Store
from farspan.trainer.attention import KEYWORD, PackedSequence
from farspan.trainer.config import FullFineTune, Mesh, Reversible
from farspan.trainer.models import hollow_layers
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.self_test import check_rebuilding, tier_errors

CODECS: tuple[TierCodec, ...] = ("fp8", "int4")
ALONE = RankGrid(Mesh(), 0, torch.device("cpu"), None)
PAGE = 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("disk")
    with Store(host_bytes=16 << 20, disk_dir=folder, disk_bytes=16 << 20, checksum=True, test_seed=0) as made:
        yield made


def through(kind: TierCodec, rows: Tensor, key: int, label: str, first: int) -> Tensor:
    """Rows [B, n, ...] as codes bring them back, made by the codes alone."""
    made = row_codec(kind, math.prod(rows.shape[2:]), key, label)
    assert made is not None
    back = torch.empty_like(rows)
    made.decode(made.encode(rows, first), back)
    return back


def pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE) * PAGE


@given(
    data=st.data(),
    kind=st.sampled_from(["exact", *CODECS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(16,), (48,), (2, 8), (4, 64)]),
    batches=st.integers(1, 2),
    rows=st.integers(1, 70),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_back_as_their_codes_say(
    store: Store,
    data: st.DataObject,
    kind: TierCodec,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    batches: int,
    rows: int,
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=3, max_size=3)))
    where, ahead = Rows(device=cuts[0], host=cuts[1] - cuts[0], disk=cuts[2] - cuts[1]), data.draw(st.booleans())
    x = torch.randn(batches, rows, *shape, generator=torch.Generator().manual_seed(rows)).to(dtype)
    width = math.prod(shape)
    codec = row_codec(kind, width, 7, "x")
    tiered = TieredRows(x, where, store, DeviceLedger(), "x", codec)
    store.drain()
    held, row_bytes = store.statistics().held_bytes, coded_row_bytes(kind, width, x.element_size())
    assert held["host"] - held["staging"] == pages(batches * where.host * row_bytes)
    assert held["disk"] == pages(batches * where.disk * row_bytes)
    if ahead:
        tiered.fetch()
    got, spans = tiered.take(), where.spans(rows)
    for tier, (first, end) in spans.items():
        want = x[:, first:end]
        if tier != "device" and kind != "exact":
            want = through(kind, want, 7, "x", first)
        assert torch.equal(got[:, first:end], want), tier
    held = store.statistics().held_bytes
    assert not held["host"] and not held["disk"]


@pytest.mark.parametrize("kind", CODECS)
def test_a_block_is_what_the_codec_makes_of_each_row(kind: TierCodec) -> None:
    """Against the codec itself, run over all rows as one matrix."""
    x = torch.randn(2, 9, 4, 32) * torch.tensor([1e-3, 1.0, 30.0, 1e4])[:, None]
    made = row_codec(kind, 128, 5, "O of layer 1")
    assert made is not None
    block = made.encode(x)
    flat = x.reshape(18, 128)
    codec = Groups8(16) if kind == "fp8" else Groups4(64)
    back = torch.empty_like(x)
    made.decode(block, back)
    if kind == "fp8":
        encoder = Encoder(codec, flat, None)
        encoder.put(slice(0, 18), flat)
        assert torch.equal(block, torch.cat([part.contiguous().view(torch.uint8).flatten() for part in encoder.parts]))
        assert torch.equal(back.view(18, 128), codec.decode(*encoder.parts))
    else:
        span = flat.view(18, 2, 64).amax(-1) - flat.view(18, 2, 64).amin(-1)
        off = (back.view(18, 2, 64) - flat.view(18, 2, 64)).abs().amax(-1)
        assert (off <= span / 15 * 1.02).all()


def test_rounding_at_random_is_fair_and_repeats() -> None:
    x = torch.randn(1, 4, 64)
    one = through("int4", x, 1, "x", 0)
    assert torch.equal(one, through("int4", x, 1, "x", 0))
    for other in (through("int4", x, 2, "x", 0), through("int4", x, 1, "O", 0), through("int4", x, 1, "x", 4)):
        assert not torch.equal(one, other)
    mean = torch.stack([through("int4", x, key, "x", 0) for key in range(2000)]).mean(0)
    step = float((x.amax() - x.amin()) / 15)
    assert float((mean - x).abs().max()) < 0.06 * step


def placed(kind: TierCodec, rows: int = 300, **rest: Any) -> Placement:
    """Segments of two with rows of everything everywhere."""
    head = LayerPlan(
        x=Rows(device=60, host=rows - 100, disk=40),
        o=Rows(device=50, host=100, disk=30),
        linear={"q_proj": Rows(host=rows), "up_proj": Rows(device=100, disk=rows - 100)},
    )
    inner = LayerPlan(o=Rows(host=130), linear={"o_proj": Rows(host=rows)})
    layers = tuple(head if index % 2 == 0 else inner for index in range(LAYERS))
    return Placement(rows=rows, attention_rows=rows, layers=layers, tier_codec=kind, **rest)


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("adapter", [FullFineTune(), LoRA(rank=4, dropout=0.1)])
def test_gradients_are_those_of_the_rows_that_come_back(kind: TierCodec, adapter: Any, store: Store) -> None:
    """One layer at a time, x alone in codes: autograd of the layer at x as it comes back has the same bits."""
    rows = 256
    made = Model(adapter=adapter, precision="bf16")
    placement = Placement(
        rows=rows, attention_rows=rows, layers=(LayerPlan(x=Rows(host=rows)),) * LAYERS, tier_codec=kind
    )
    executor = Executor(made.layers, placement, store, hollow=hollow_layers(made.causal))
    calls, x = calls_of(made.layers, lambda: made.forward([rows], 0))
    x = torch.randn_like(x)

    def gradients(run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
        made.model.zero_grad()
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        torch.manual_seed(3)
        y.backward(torch.randn_like(y))
        found = {name: p.grad.clone() for name, p in made.layers[1].named_parameters() if p.grad is not None}
        return found | {"input": leaf.grad}  # type: ignore[dict-item]

    torch.manual_seed(11)
    key = int(torch.randint(1 << 62, ()).item()) if kind == "int4" else 0
    generator = torch.get_rng_state()
    torch.manual_seed(11)
    got = gradients(lambda leaf: executor.placed(1)(calls[1], leaf), x)  # type: ignore[arg-type]
    torch.set_rng_state(generator)
    want = gradients(calls[1], through(kind, x, key, "x of layer 1", 0))
    assert not differing(got, want)
    torch.set_rng_state(generator)
    assert "input" in differing(got, gradients(calls[1], x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_keep_their_bits_and_a_step_repeats(precision: str, store: Store) -> None:
    lengths = [130, 170]
    want = Model(precision=precision).gradients(lengths)
    peaks, off = {}, {}
    for kind in ("exact", *CODECS):
        made = Model(precision=precision)
        executor = Executor(made.layers, placed(kind), store, hollow=True)  # type: ignore[arg-type]
        store.statistics(restart=True)
        got = made.gradients(lengths)
        peaks[kind] = store.statistics().peak_bytes["host"]
        assert not differing(got, made.gradients(lengths)), "the same seeds, the same codes"
        assert all(torch.equal(got[name], want[name]) for name in want if name.startswith("loss"))
        names = [name for name in want if not name.startswith("loss")]
        distance = sum(float((got[n] - want[n]).float().square().sum()) for n in names)
        off[kind] = (distance / sum(float(want[n].float().square().sum()) for n in names)) ** 0.5
        assert executor.ledger.bytes == 0 and not store.statistics().held_bytes["host"]
    assert off["exact"] == 0 and 1e-3 < off["fp8"] < 0.05 < off["int4"] < 0.25
    assert peaks["int4"] < peaks["fp8"] < peaks["exact"]


def test_the_error_that_is_told_is_the_error(store: Store) -> None:
    """Each segment's, against gradients of the whole run both ways."""
    made = Model(adapter=LoRA(rank=4))
    made.loss.executor = executor = Executor(made.layers, placed("fp8"), store, hollow=hollow_layers(made.causal))
    ids = torch.randint(2, 300, (1, 256))
    before = torch.get_rng_state()
    told = tier_errors(made.loss, ids, ALONE, None, zero=0, seed=4)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in made.model.parameters())
    assert [*told] == [range(2), range(2, 4)] and executor.placement == placed("fp8")
    assert all(0.002 < error.weights < 0.1 and 0.001 < error.input < 0.1 for error in told.values() if error.weights)
    assert store.statistics().peak_bytes["host"] == 0 == executor.ledger.bytes

    xs: dict[int, Tensor] = {}

    def catch(index: int, call: Any, x: Tensor) -> Tensor:
        xs[index] = x
        return call(x)

    calls, _ = calls_of(made.layers, partial(decode, made, ids))
    with torch.no_grad(), hooked(made.layers, {index: partial(catch, index) for index in range(LAYERS)}):
        decode(made, ids)

    def gradients(kind: TierCodec) -> list[Tensor]:
        placement = scaled(placed(kind), 256)
        with executor.with_rows_of(placement):
            torch.manual_seed(4)
            dy, leaf = torch.randn_like(xs[2]), xs[2].detach().requires_grad_()
            y = leaf
            for index in (2, 3):
                y = executor.placed(index)(calls[index], y)  # type: ignore[arg-type]
            y.backward(dy)
        found = [p.grad for index in (2, 3) for p in made.layers[index].parameters() if p.grad is not None]
        made.model.zero_grad()
        return found

    got, want = gradients("fp8"), gradients("exact")
    distance = sum(float((a - b).square().sum()) for a, b in zip(got, want))
    off = (distance / sum(float(b.square().sum()) for b in want)) ** 0.5
    assert told[range(2, 4)].weights == pytest.approx(off, rel=1e-4)


def test_the_error_is_that_of_codes_and_not_of_dropout(store: Store) -> None:
    """Both ways draw the same masks, whether or not codes draw a key before."""
    made = Model(adapter=LoRA(rank=4, dropout=0.5))
    made.loss.executor = Executor(made.layers, placed("int4"), store, hollow=hollow_layers(made.causal))
    told = tier_errors(made.loss, torch.randint(2, 300, (1, 256)), ALONE, None, zero=0, seed=4)
    assert len(told) == 2 and all(0.02 < (error.weights or 0.0) < 0.4 for error in told.values())


def decode(made: Model, ids: Tensor) -> None:
    rows = ids.shape[1]
    sequence = {KEYWORD: PackedSequence((rows,), None)}
    made.loss.decoder(input_ids=ids, position_ids=torch.arange(rows)[None], use_cache=False, **sequence)


@pytest.mark.parametrize("kind", CODECS)
def test_a_layer_is_measured_and_left_as_it_was(kind: TierCodec) -> None:
    made = Model(adapter=LoRA(rank=4))
    layer, told = made.layers[1], []

    def attributes() -> list[dict[str, Any]]:
        return [{name: id(value) for name, value in vars(module).items()} for module in layer.modules()]

    def ask(call: Any, x: Tensor) -> Tensor:
        before = attributes()
        assert layer_error(layer, call, x, "exact", attention_rows=256, hollow=True) is None
        told.append(layer_error(layer, call, x, kind, attention_rows=256, hollow=True))
        assert attributes() == before
        return x

    with torch.no_grad(), hooked(made.layers, {1: ask}):
        made.forward([256], 0)
    low, high = {"fp8": (0.005, 0.08), "int4": (0.05, 0.6)}[kind]
    assert low < told[0].weights < high and low / 5 < told[0].input < high


def test_codes_are_timed() -> None:
    found = measure_codes("fp8", 256, torch.bfloat16, torch.device("cpu"))
    assert found.kind == "fp8" and found.encode_bytes_per_s > 1e6 and found.decode_bytes_per_s > 1e6


@pytest.mark.parametrize("kind", CODECS)
def test_the_self_test_proves_the_placement_without_codes(kind: TierCodec) -> None:
    """In tiers that hold no more than the codes: there it takes fewer rows."""
    rows = 1024
    layers = (LayerPlan(x=Rows(host=rows), linear={"q_proj": Rows(host=rows)}), *[LayerPlan()] * (LAYERS - 1))
    placement = Placement(rows=rows, attention_rows=rows, layers=layers, tier_codec=kind)
    made = Model()
    with Store(host_bytes=2 * pages(rows * coded_row_bytes(kind, 64, 4))) as small:
        made.loss.executor = Executor(made.layers, placement, small, hollow=hollow_layers(made.causal))
        found = check_rebuilding(made.loss, ALONE, None, zero=0, seed=3)
        assert found is not None and found.rows == rows // 8 and found.exact
        assert f"gradients bit-equal to keep before rows on other tiers become {kind}" in str(found)
        assert made.loss.executor.placement == placement
        made.gradients([rows], micro_batches=1)
    exact = replace(found, codec="exact")
    assert "become" not in str(exact)


@pytest.mark.timeout(300)
def test_two_ranks_have_the_rows_of_one_up_to_their_codes() -> None:
    """sp=2: the same losses, gradients of fp8 near those without, and nothing left on the host."""
    rows = 150

    def cases(kind: TierCodec) -> dict[str, Any]:
        plan = LayerPlan(x=Rows(host=rows), o=Rows(host=200), linear={"gate_proj": Rows(host=rows)})
        return {
            "adapter": None,
            "placement": Placement(rows=rows, attention_rows=300, layers=(plan,) * LAYERS, tier_codec=kind),
            "self_test": kind != "exact",
        }

    kept, coded, exact = on_ranks(
        step_on_rank, 2, (1, 2), [cases("exact") | {"placement": None}, cases("fp8"), cases("exact")]
    )[0]
    assert not differing(kept, exact)
    names = [name for name in kept if name.startswith(("model", "lm_head")) and name.endswith("weight")]
    assert names and all(torch.equal(kept[name], coded[name]) for name in kept if name.startswith("loss"))
    off = sum(float((coded[n] - kept[n]).square().sum()) for n in names)
    off = (off / sum(float(kept[n].square().sum()) for n in names)) ** 0.5
    assert 1e-3 < off < 0.1


@pytest.mark.parametrize(("kind", "share"), [("fp8", 0.5625), ("int4", 0.28125)])
def test_plans_count_codes(kind: TierCodec, share: float) -> None:
    exact, coded = (planned("32k", plan="offload-inputs", tier_codec=each) for each in ("exact", kind))
    assert coded.prediction.host_bytes == share * exact.prediction.host_bytes
    for lane in ("copy_out", "copy_in"):
        assert coded.prediction.moved_bytes[lane] == share * exact.prediction.moved_bytes[lane]
    assert coded.prediction.parts.forward_codes_s > 0 < coded.prediction.parts.backward_codes_s
    assert sum(seconds for _, seconds in part_rows(coded)) == pytest.approx(coded.prediction.step_s)
    (of_exact,), (of_coded,) = exact.problem.kinds, coded.problem.kinds
    rows, heads = coded.problem.rows, 32
    assert of_coded.o_bytes == of_exact.o_bytes == rows * heads * (2 * 128 + 4)
    assert of_coded.coded_o_bytes == rows * (share * heads * 2 * 128 + 4 * heads)
    assert of_exact.coded_x_bytes is None and exact.placement.tier_codec == "exact"


def test_what_the_store_holds_is_what_was_planned(store: Store) -> None:
    """A placement evaluated, walked by the simulator and carried out: the same bytes on each tier, up to pages."""
    rows = 1024
    shape = ModelShape(hidden=64, layers=LAYERS, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=300)
    for kind in CODECS:
        training = Training(precision="fp32", tier_codec=kind)
        problem = problem_for(shape, training, load_hardware("cpu"), rows)
        placement = placed(kind, rows)
        predicted = evaluate(problem, placement)
        at_rest = sum(
            row_bytes * count
            for plan in placement.layers
            for row_bytes, count in _on_host(problem.kinds[0], plan, rows)
        )
        fixed = sum(state.bytes for state in problem.states if state.tier == "host")
        assert at_rest <= predicted.host_bytes - fixed <= at_rest + predicted.disk_bytes
        assert predicted.disk_bytes == replay(problem, placement).peaks["disk"].bytes
        made = Model()
        Executor(made.layers, placement, store, hollow=True)
        store.statistics(restart=True)
        loss = made.forward([rows], 0)
        store.drain()
        peak, more = store.statistics().peak_bytes, 8 * LAYERS * PAGE
        assert at_rest <= peak["host"] <= at_rest + predicted.disk_bytes + more
        assert predicted.disk_bytes <= peak["disk"] <= predicted.disk_bytes + more
        loss.backward()


def _on_host(kind: LayerKind, plan: LayerPlan, rows: int) -> Iterator[tuple[int, int]]:
    """Bytes of a row in codes, and rows, of each tensor of a layer."""
    parts = {"x": plan.x or Rows(), "o": plan.o, **plan.linear}
    whole = {"x": kind.x_bytes_on("host"), "o": kind.o_bytes_on("host")}
    whole |= {linear.name: linear.bytes_on("host") for linear in kind.linear}
    for name, stored in parts.items():
        assert whole[name] % rows == 0
        yield whole[name] // rows, stored.host


def test_a_job_fits_that_did_not() -> None:
    over = planned("128k", plan="offload-inputs", host="20GiB").prediction
    assert set(over.over_bytes) == {"host"}
    assert planned("128k", plan="offload-inputs", host="20GiB", tier_codec="fp8").prediction.fits
    short: dict[str, Any] = {"model": LLAMA_8B.model_copy(update={"layers": 8}), "host": "4GiB", "mlp_tile": 2048}
    with pytest.raises(DoesNotFit, match="GiB are given"):
        planned("128k", device="28.5GiB", **short)
    found = planned("128k", device="28.5GiB", tier_codec="fp8", **short)
    assert found.prediction.fits and found.placement.tier_codec == "fp8"
    assert any(layer.leaves for layer in found.placement.layers)


def test_what_codes_of_rows_do_is_told() -> None:
    found = planned("32k", plan="offload-inputs", tier_codec="int4")
    assert "not measured" in (tier_error_line(found) or "") and to_json(found)["tier_errors"] == {}
    assert to_json(found)["tier_codec"] == "int4"
    (kind,) = found.problem.kinds
    measured = kind.model_copy(update={"tier_error": GradientError(weights=0.071, input=0.042)})
    known = replace(found, problem=found.problem.model_copy(update={"kinds": (measured,)}))
    assert "are off by 7.1%, of its input by 4.2%" in (tier_error_line(known) or "")
    assert to_json(known)["tier_errors"] == {kind.name: {"weights": 0.071, "input": 0.042}}
    here = fixed_policy(found.problem, "recompute")
    assert "its gradients are exact" in (tier_error_line(replace(found, placement=here)) or "")
    assert tier_error_line(planned("8k")) is None


def test_layers_and_widths_without_codes_are_refused() -> None:
    with pytest.raises(JobError, match="do not split into groups") as refused:
        planned("4k", model=RandomModel(hidden=104, heads=4, kv_heads=2, ffn=160, layers=2), tier_codec="fp8")
    assert "a layer's input: 104 / 16 leaves 8" in refused.value.why
    from test_plan_job import (
        MemoryBudget,
        SFTJob,
        TextData,
        hardware_of,
        machine_beside,
        model_facts,
        origins_in_python,
        plan,
        resolve,
    )

    job = SFTJob(
        name="p",
        model=LLAMA_8B,
        data=TextData("stdlib", context="8k"),
        adapter=Reversible(inside=LoRA()),
        memory=MemoryBudget(hardware="h200", tier_codec="fp8"),
    )
    facts, machine = model_facts(job.model), machine_beside(job)
    resolved = resolve(job, facts, machine, origins_in_python(job))
    with pytest.raises(JobError, match="reversible layers do not go with rows in fp8") as refused:
        plan(job, resolved.train, facts, hardware_of(job, machine, ranks=1, use_gpu=True))
    assert "memory.tier_codec=exact" in refused.value.try_
