"""The published form of reversible layers: gradients against autograd on the paper's equations, the growth of the error
against eigenvalues and float64, what is stored, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from executor_models import Model, differing, tokens
from hypothesis import given
from hypothesis import strategies as st
from test_reversible import ALONE, LORA, S, double, made
from torch import Tensor

from farspan.errors import JobError
from farspan.memory.amplification import PUBLISHED, amplification, error_after, most_layers
from farspan.memory.anchors import anchor_errors
from farspan.memory.build import problem_for
from farspan.memory.coupling import halves
from farspan.memory.float_streams import FloatStreams, StreamsDrift
from farspan.memory.hardware import load_hardware
from farspan.memory.plan import LayerPlan, Placement
from farspan.memory.plan import Rows as Share
from farspan.memory.shape import AdapterShape, CouplingShape, ModelShape, Training
from farspan.memory.tiers import Store
from farspan.trainer.attention import PackedSequence
from farspan.trainer.batch import Rows
from farspan.trainer.config import FullFineTune, LoRA, Reversible
from farspan.trainer.self_test import check_rebuilding, reversible_anchors


def floating(wiring: Any, **more: Any) -> Reversible:
    return Reversible(form="float", wiring=wiring, **{"inside": LORA, **more})


ADAPTERS = [
    floating(1, width=8),
    floating(1, factors=(0.3, 0.8)),
    floating(1, factors=(0.5, 0.5), width=8, inside=LoRA(rank=4, dropout=0.1)),
    floating(2, width=8),
    floating(2, factors=(0.7, 0.4), width=8),
    floating(2, factors=(0.7, 0.4)),
    floating(3),
    floating(3, factors=(0.8, 0.3), inside=FullFineTune()),
]
NAMES = [f"{a.wiring}-{a.lambda_beta[0]}-{a.lambda_beta[1]}-{a.width}" for a in ADAPTERS]


def by_autograd(model: Model, adapter: Reversible) -> dict[str, Tensor]:
    """Losses and gradients with autograd all the way, from the paper's two equations."""
    coupling = model.coupling
    assert coupling is not None
    lam, beta = adapter.lambda_beta
    ends: dict[str, Tensor] = {}

    def bottleneck(index: int, x: Tensor) -> Tensor:
        found = coupling.adapters[index]
        return found(x) if found is not None else torch.zeros_like(x)

    def layer(index: int, call: partial[Any], hidden: Tensor) -> Tensor:
        x1, x2 = (ends["x1"], ends["x2"]) if index else (hidden, hidden)
        with coupling.running():
            if adapter.wiring == 1:
                y1 = lam * x1 + call(x2)
                y2 = beta * x2 + bottleneck(index, y1)
                ends["x1"], ends["x2"] = y2, y1
                return y1
            if adapter.wiring == 2:  # after the swap x1 is what the last layer left
                y1 = lam * x1 + bottleneck(index, x2)
                y2 = beta * x2 + call(y1)
                ends["x1"], ends["x2"] = y2, y1
                return y2
            attention, mlp = halves(model.layers[index])
            y1 = lam * x1 + attention(x2, **call.keywords)
            ends["x1"], ends["x2"] = y1, beta * x2 + mlp(y1)
            return ends["x2"]

    for index, module in enumerate(model.layers):
        module.gradient_checkpointing, module._gradient_checkpointing_func = True, partial(layer, index)
    return model.gradients([S], micro_batches=1)


def rows() -> Rows:
    torch.manual_seed(7)
    ids, positions = tokens([S])
    return Rows(ids, ids.roll(-1, 1), positions, PackedSequence((S,)))


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(host_bytes=16 << 20, checksum=True, test_seed=0) as opened:
        yield opened


def every(model: Model, layers: int) -> Model:
    assert model.coupling is not None
    model.coupling.anchor_every = model.coupling.anchors_planned = layers
    return model


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
@pytest.mark.parametrize("anchors", [1, 2, 5])
def test_gradients_are_those_of_the_formula(adapter: Reversible, anchors: int) -> None:
    """fp64 layers and streams, anchors at every, some and no layer above the first: what autograd gives.

    To 1e-9 where nothing is undone twice; norms compute in fp32, so that an error of 1e-16 becomes one of 1e-11 there.
    """
    if adapter.inside.type == "lora":
        adapter = adapter.model_copy(update={"inside": LORA})  # no dropout: autograd draws at other places
    ours = every(double(made(adapter, layers=5)), anchors).gradients([S], micro_batches=1)
    want = by_autograd(double(Model(adapter=adapter, layers=5)), adapter)
    assert ours.keys() == want.keys()
    allowed = 1e-9 if anchors == 1 else 1e-6 if adapter.kappa < 100 else 1e-4
    for name, gradient in want.items():
        off = float((ours[name] - gradient).norm() / gradient.norm())
        assert off <= allowed, (name, off)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_single_precision_keeps_the_tolerance(adapter: Reversible, family: str) -> None:
    """fp32 with as many layers between anchors as measured at 1e-3: gradients within 3e-3 of autograd's.

    What layers read is within 1e-3; a small gradient may be off by more, by how much differs between processors. One
    layer more between anchors makes the error some 12 times as large.
    """
    if adapter.inside.type == "lora":
        adapter = adapter.model_copy(update={"inside": LORA})
    model = made(adapter, layers=6, family=family)
    anchors, error = reversible_anchors(model.loss, model.loss, rows(), ALONE)
    assert 1 <= anchors <= max(1, most_layers(adapter.kappa, 1e-3)) and (0 < error <= 1e-3 or anchors == 1)
    every(model, anchors)
    ours = model.gradients([S], micro_batches=1)
    want = by_autograd(Model(adapter=adapter, layers=6, family=family), adapter)
    for name, gradient in want.items():
        off = float((ours[name] - gradient).norm() / gradient.norm())
        assert off <= 3e-3, (name, off)


def matrix(wiring: int, lam: float, beta: float) -> Any:
    """A coupled layer of identities on (main, other), step by step."""
    if wiring == 1:
        return np.array([[1, lam], [beta, 0]])
    if wiring == 2:
        first = np.array([[lam, 0], [0, 1]])
        return np.array([[1, beta], [1, 0]]) @ first
    return np.array([[1, beta], [1, 0]]) @ np.array([[1, lam], [1, 0]])


FACTORS = st.floats(0.02, 1.0)


@given(st.sampled_from([1, 2, 3]), FACTORS, FACTORS)
def test_kappa_is_the_ratio_of_eigenvalues(wiring: Any, lam: float, beta: float) -> None:
    sizes = sorted(abs(np.linalg.eigvals(matrix(wiring, lam, beta))))
    assert amplification(wiring, (lam, beta)) == pytest.approx(sizes[1] / sizes[0], rel=1e-6)


def test_kappa_of_the_paper_s_factors() -> None:
    assert amplification(1, PUBLISHED[1]) == pytest.approx(11.9, abs=0.05)
    assert amplification(2, PUBLISHED[2]) == pytest.approx(11.9, abs=0.05)
    assert amplification(3, PUBLISHED[3]) == pytest.approx(142, abs=0.5)
    assert amplification(1, (1.0, 1.0)) == pytest.approx(2.618, abs=1e-3)
    assert most_layers(amplification(1, PUBLISHED[1]), 1e-2) == 4 and most_layers(142, 1e-3) == 1


@pytest.mark.parametrize(
    "adapter", [floating(1), floating(2), floating(1, factors=(0.3, 1.0)), floating(3), floating(3, factors=(1.0, 1.0))]
)
def test_the_error_grows_as_the_formula_says(adapter: Reversible) -> None:
    """fp32 streams against what they were: within a constant of eps kappa^L at each depth L, up to 1 %."""
    model = made(adapter, layers=8)
    assert model.coupling is not None
    for layers in range(1, 8):
        bound = error_after(layers, adapter.kappa)
        if bound > 1e-2:
            break
        worst = float(measured(model, layers))
        assert bound / 100 <= worst <= 4 * bound, (layers, worst, bound)
    assert layers > 2


def measured(model: Model, layers: int) -> Tensor:
    """The largest error at an anchor."""
    assert model.coupling is not None
    model.loss.eval()
    ids, positions = tokens([S])

    def run() -> None:
        with torch.no_grad():
            model.loss(ids, ids.roll(-1, 1), positions, PackedSequence((S,)))

    found = anchor_errors(model.coupling, run, layers)
    model.loss.train()
    assert found.shape == (-(-len(model.layers) // layers), 2, 2) and bool((found[..., 1] == S).all())
    return (found[..., 0] / found[..., 1]).sqrt().max()


def test_a_step_sees_the_error_that_was_measured() -> None:
    """At its anchors, on the same rows, less the growth in one layer: there the anchor itself is read.

    With fp64 streams there is next to none.
    """
    model = every(made(floating(1), layers=6), 3)
    seen = []
    original = FloatStreams.check_anchors
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FloatStreams, "check_anchors", lambda self, *how: seen.append(self) or original(self, *how))
        model.forward([S], 0).backward()
        torch.manual_seed(100)
        want = float(measured(model, 3))
        double(every(made(floating(1), layers=6), 3)).forward([S], 0).backward()
    assert want / 30 <= float(seen[0].worst) <= want
    assert float(seen[1].worst) < 1e-4 * float(seen[0].worst)


def test_a_layer_that_drifts_stops_before_the_update() -> None:
    model = every(made(floating(1), layers=6), 2)
    whole = model.layers[3].mlp.forward
    model.layers[3].mlp.forward = lambda x: whole(x) * (1 + 0.1 * torch.is_grad_enabled())
    loss = model.forward([S], 0)
    with pytest.raises(StreamsDrift, match=r"off by .*\n.*anchor_every"):
        loss.backward()


def test_a_number_of_layers_that_was_asked_for_must_do() -> None:
    """In bf16 what layers read is rounded, and a small error moves roundings: two layers are already too many."""
    model = made(floating(3), layers=4, precision="bf16")
    assert reversible_anchors(model.loss, model.loss, rows(), ALONE) == (1, 0.0)
    with pytest.raises(JobError, match=r"every 2 layers come back off by .*\n.*\n.*0.001.*\n.*anchor_every=1"):
        reversible_anchors(model.loss, model.loss, rows(), ALONE, asked=2)


def test_anchors_away_from_the_device_stay_where_they_were_planned(store: Store) -> None:
    """A run that would need others than its host tier was planned for is refused."""
    placement = Placement(rows=S, attention_rows=S, layers=(LayerPlan(x=Share(host=S)),) * 6)
    want = every(made(floating(1), layers=6), 2).gradients([S])
    model = every(made(floating(1), layers=6, placement=placement, store=store), 2)
    assert reversible_anchors(model.loss, model.loss, rows(), ALONE)[0] == 2
    assert differing(model.gradients([S]), want) == []
    assert not store.statistics().held_bytes["host"]
    every(model, 5)
    with pytest.raises(JobError, match="every 5 layers"):
        reversible_anchors(model.loss, model.loss, rows(), ALONE)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_with_every_layer_an_anchor_it_is_the_step_that_stores_inputs(adapter: Reversible) -> None:
    """Nothing is undone twice: where no adapter or half comes between, the same bits."""
    want = made(adapter.model_copy(update={"store": "inputs"}), precision="bf16").gradients([S])
    got = every(made(adapter, precision="bf16"), 1).gradients([S])
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("wiring", "anchors"), [(1, 1), (1, 3), (2, 2), (3, 3), (1, 9)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_bytes_are_the_formula(wiring: Any, anchors: int, precision: str) -> None:
    """8 d N at every anchor but the first layer, which stores what it read; nothing else until backward."""
    model = every(made(floating(wiring, tolerance=0.1), precision=precision, layers=7), anchors)
    executor = model.loss.executor
    assert executor is not None
    assert model.coupling is not None
    model.coupling.tolerance = math.inf
    loss = model.forward([S], 0)
    width = 4 if precision == "fp32" else 2
    assert executor.ledger.bytes == 64 * S * (width + 8 * (-(-7 // anchors) - 1))
    loss.backward()
    assert executor.ledger.bytes == 0


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_evaluation_is_the_forward_of_training(adapter: Reversible) -> None:
    adapter = adapter.model_copy(update={"inside": LORA})
    model = made(adapter)
    trained = model.forward([S], 0).detach()
    for module in (model.loss.eval(), model.loss.train()):
        with torch.no_grad():
            torch.manual_seed(100)
            ids, positions = tokens([S])
            assert torch.equal(module(ids, ids.roll(-1, 1), positions, PackedSequence((S,))), trained)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_the_self_test_passes(adapter: Reversible) -> None:
    model = every(made(adapter), 3)
    found = check_rebuilding(model.loss, ALONE, None, zero=0, seed=0)
    assert found is not None and found.exact
    assert model.coupling is not None and model.coupling.store == "bits"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "adapter",
    [floating(1), floating(2, factors=(1.0, 0.5)), floating(3), floating(1, store="inputs"), floating(1, width=8)],
    ids=["1", "2", "3", "inputs", "width"],
)
def test_planned_bytes_are_those_stored(adapter: Reversible, precision: Any) -> None:
    """Layer by layer, to the byte; and the streams beside them."""
    model = made(adapter, precision=precision, layers=7)
    assert model.coupling is not None and model.loss.executor is not None
    shape = ModelShape(hidden=64, layers=7, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=300)
    coupling = CouplingShape(
        wiring=adapter.wiring,
        bits=3,
        form="float",
        anchor_every=adapter.anchors_planned(precision),
        width=adapter.width,
        store=adapter.store,
    )
    bare = Training(precision=precision, adapter=AdapterShape(rank=4))
    training = bare.model_copy(update={"coupling": coupling})
    problem, plain = (problem_for(shape, one, load_hardware("cpu"), S) for one in (training, bare))
    model.forward([S], 0)
    assert sum(problem.kind(layer).stored_x_bytes for layer in range(7)) == model.loss.executor.ledger.peak_bytes
    streams = 0 if adapter.store == "inputs" else 2 * 4 * 64 * S
    assert problem.head.held_bytes - plain.head.held_bytes == streams
    assert problem.reversible and len(problem.layers) == 7
