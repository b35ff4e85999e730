"""Reversible layers: streams bit for bit, gradients against autograd on the formula, what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from executor_models import VOCAB, Model, coupled_on_rank, differing, tokens
from sp_ranks import on_ranks
from torch import Tensor

from farspan.errors import JobError
from farspan.memory.coupling import (
    Coupling,
    StreamOverflow,
    Streams,
    StreamsDiffer,
    fraction_for,
    halves,
)
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.tiers import Store
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import FullFineTune, LoRA, Mesh, Reversible
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.self_test import check_rebuilding

S = 96
LORA = LoRA(rank=4)
ALONE = RankGrid(Mesh(), 0, torch.device("cpu"), None)


def bits_of_each(layers: int, rows: int = S, **layer: Any) -> Placement:
    plan = LayerPlan(x=Rows(device=rows), **layer)
    return Placement(rows=rows, attention_rows=rows, layers=(plan,) * layers)


def made(adapter: Reversible, *, layers: int = 4, placement: Placement | None = None, **more: Any) -> Model:
    store = more.pop("store", None)
    model = Model(adapter=adapter, layers=layers, **more)
    model.loss.executor = Executor(
        model.layers, placement or bits_of_each(layers), store, hollow=True, coupling=model.coupling
    )
    model.loss.coupling = model.coupling
    return model


def watched(coupling: Coupling) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Streams before each layer, as forward and then backward saw them."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def observe(index: int, streams: Streams) -> None:
        seen.setdefault(index, []).append((streams.main.clone(), streams.other.clone()))

    coupling.observer = observe
    return seen


@pytest.mark.parametrize("layers", [1, 2, 8, 64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "adapter",
    [
        Reversible(wiring=1, bits=3, width=8, inside=LoRA(rank=4, dropout=0.1)),
        Reversible(wiring=2, bits=3, width=8, inside=LORA),
        Reversible(wiring=3, bits=3, inside=LoRA(rank=4, dropout=0.1)),
        Reversible(wiring=1, bits=1, inside=FullFineTune()),
    ],
    ids=["1", "2", "3", "full"],
)
def test_streams_come_back_bit_for_bit(layers: int, precision: str, adapter: Reversible) -> None:
    model = made(adapter, layers=layers, precision=precision)
    assert model.coupling is not None
    seen = watched(model.coupling)
    model.forward([S], 0).backward()
    assert sorted(seen) == list(range(layers)) and all(len(pair) == 2 for pair in seen.values())
    for forward, backward in seen.values():
        assert all(map(torch.equal, forward, backward))


FRACTION = 20
"""What `auto` gives to a model with hidden states of this size."""


class Rounded(torch.autograd.Function):
    """To multiples of 2^-fraction; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fraction: int) -> Tensor:
        return (x * 2.0**fraction).round() / 2.0**fraction

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class Shifted(torch.autograd.Function):
    """Multiples of 2^-fraction, times 2^-bits, rounded down; the gradient is that of the multiplication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, fraction: int) -> Tensor:
        ctx.bits = bits
        return (x * 2.0 ** (fraction - bits)).floor() / 2.0**fraction

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy * 2.0**-ctx.bits, None, None


def by_autograd(model: Model, adapter: Reversible, *, rounded: bool) -> dict[str, Tensor]:
    """The coupling's formula on the same layers with autograd all the way, from the paper's two equations."""
    coupling, s = model.coupling, FRACTION
    assert coupling is not None
    lam = 2.0**-adapter.bits

    def q(x: Tensor) -> Tensor:
        return Rounded.apply(x, s) if rounded else x

    def shifted(x: Tensor) -> Tensor:
        return Shifted.apply(x, adapter.bits, s) if rounded else x * lam

    def g(index: int, x: Tensor) -> Tensor:
        bottleneck = coupling.adapters[index]
        return q(bottleneck(x)) if bottleneck is not None else torch.zeros_like(x)

    ends: dict[str, Tensor] = {}

    def layer(index: int, call: partial[Any], hidden: Tensor) -> Tensor:
        x1, x2 = (ends["x1"], ends["x2"]) if index else (q(hidden), q(hidden))
        with coupling.running():
            if adapter.wiring == 1:  # y1 = lambda x1 + F(x2), y2 = x2 + G(y1), swapped; F = layer - lambda
                y1 = shifted(x1) + q(call(x2)) - shifted(x2)
                ends["x1"], ends["x2"] = x2 + g(index, y1), y1
                return y1
            if adapter.wiring == 2:  # y1 = x1 + F(x2), y2 = beta x2 + G(y1), swapped
                x1, x2 = x2, x1
                y1 = x1 + g(index, x2)
                y2 = shifted(x2) + q(call(y1)) - shifted(y1)
                ends["x1"], ends["x2"] = y1, y2
                return y2
            attention, mlp = halves(model.layers[index])
            y1 = shifted(x1) + q(attention(x2, **call.keywords)) - shifted(x2)
            ends["x1"], ends["x2"] = y1, shifted(x2) + q(mlp(y1)) - shifted(y1)
            return ends["x2"]

    for index, module in enumerate(model.layers):
        module.gradient_checkpointing, module._gradient_checkpointing_func = True, partial(layer, index)
    return model.gradients([S], micro_batches=1)


ADAPTERS = [
    Reversible(wiring=1, bits=3, width=8, inside=LORA),
    Reversible(wiring=1, bits=6, inside=FullFineTune()),
    Reversible(wiring=2, bits=2, width=8, inside=LORA),
    Reversible(wiring=3, bits=4, inside=LORA),
]
NAMES = [f"{a.wiring}-{a.bits}-{a.inside.type}" for a in ADAPTERS]


def double(model: Model) -> Model:
    model.causal.double()
    model.model.double()
    return model


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_gradients_are_those_of_the_formula(adapter: Reversible, family: str) -> None:
    """fp64 layers: autograd through the rounded streams to 1e-10, through streams that are not rounded to 1e-3."""
    model = double(made(adapter, family=family))
    assert model.coupling is not None
    model.coupling.fraction = FRACTION
    ours = model.gradients([S], micro_batches=1)
    for rounded, allowed in ((True, 1e-10), (False, 1e-3)):
        want = by_autograd(double(Model(adapter=adapter, family=family)), adapter, rounded=rounded)
        assert ours.keys() == want.keys()
        for name, gradient in want.items():
            off = float((ours[name] - gradient).norm() / gradient.norm())
            assert off <= allowed, (name, rounded, off)


def test_that_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side bits that are lost show in the streams."""
    original = Streams.leap_back
    monkeypatch.setattr(
        Streams, "leap_back", lambda self, y, side, place: original(self, y, torch.zeros_like(side), place)
    )
    model = made(ADAPTERS[0])
    assert model.coupling is not None
    seen = watched(model.coupling)
    loss = model.forward([S], 0)
    with pytest.raises(StreamsDiffer):
        loss.backward()
    assert not all(torch.equal(pair[0][0], pair[1][0]) for pair in seen.values() if len(pair) == 2)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_storing_inputs_is_the_same_step(adapter: Reversible) -> None:
    """What is computed back is what was there, so that storing it changes no bit of loss or gradient."""
    want = made(adapter.model_copy(update={"store": "inputs"}), precision="bf16").gradients([S])
    assert differing(made(adapter, precision="bf16").gradients([S]), want) == []


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(host_bytes=16 << 20, checksum=True, test_seed=0) as opened:
        yield opened


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_every_placement_is_bit_equal(adapter: Reversible, store: Store) -> None:
    """Side bits on the host; O and outputs of linear layers given; saved tensors on the host."""
    want = made(adapter).gradients([40, S - 40])
    some = LayerPlan(x=Rows(host=S), o=Rows(device=32, host=32), linear={"gate_proj": Rows(host=S)})
    other = LayerPlan(x=Rows(device=S - 10, host=10), o=Rows(host=S))
    for saved, plans in (("device", (some, other, some, other)), ("host", (other,) * 4)):
        placement = Placement(rows=S, attention_rows=S, layers=plans, saved=saved)  # type: ignore[arg-type]
        model = made(adapter, placement=placement, store=store)
        assert differing(model.gradients([40, S - 40]), want) == []
        assert model.loss.executor is not None and model.loss.executor.ledger.bytes == 0
        assert not store.statistics().held_bytes["host"]


@pytest.mark.parametrize(("wiring", "bits"), [(1, 3), (1, 1), (2, 8), (3, 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_side_bits_are_the_formula(wiring: Any, bits: int, precision: str) -> None:
    """m d N / 8 bytes a layer, and nothing else until backward; twice for halves."""
    model = made(Reversible(wiring=wiring, bits=bits, inside=LORA), precision=precision, layers=3)
    executor = model.loss.executor
    assert executor is not None
    loss = model.forward([S], 0)
    assert executor.ledger.bytes == 3 * (2 if wiring == 3 else 1) * bits * 64 * S // 8
    loss.backward()
    assert executor.ledger.bytes == 0


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_evaluation_is_the_forward_of_training(adapter: Reversible) -> None:
    model = made(adapter)
    trained = model.forward([S], 0).detach()
    for module in (model.loss.eval(), model.loss.train()):
        with torch.no_grad():
            torch.manual_seed(100)
            ids, positions = tokens([S])
            assert torch.equal(module(ids, ids.roll(-1, 1), positions, PackedSequence((S,))), trained)


def test_more_bits_come_nearer_to_the_model() -> None:
    """The start: with a share of 2^-m of another hidden state, the loss nears the model's own."""
    base = Model(adapter=FullFineTune())
    want = float(base.forward([S], 0).detach())
    off = []
    for bits in (1, 2, 4, 8):
        model = Model(adapter=Reversible(bits=bits, inside=FullFineTune()))
        model.loss.eval()
        with torch.no_grad():
            torch.manual_seed(100)
            ids, positions = tokens([S])
            off.append(abs(float(model.loss(ids, ids.roll(-1, 1), positions, PackedSequence((S,)))) - want))
    assert off == sorted(off, reverse=True) and off[-1] < 0.02 * off[0]


def test_generation_with_a_cache() -> None:
    """Token by token with a KV cache: the streams of a token are its own."""
    model = Model(adapter=Reversible(bits=4, inside=LORA), attention="eager")
    model.loss.eval()
    ids = torch.randint(2, VOCAB, (1, 12))
    with torch.no_grad():
        whole = model.causal(input_ids=ids, use_cache=False).logits
        cache, steps = None, []
        for position in range(12):
            out = model.causal(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(400)
def test_ranks_and_zero_stages() -> None:
    """sp=2 (Ulysses), ZeRO 0, 2, 3, accumulation 2: streams, losses, gradients and updated state, bit for bit."""
    dropout = LoRA(rank=4, dropout=0.1)
    cases = []
    for how in (
        {"adapter": Reversible(bits=3, width=8, inside=dropout), "mesh": (1, 2), "precision": "bf16"},
        {"adapter": Reversible(wiring=2, bits=3, width=8, inside=LORA), "mesh": (1, 2), "zero": 3},
        {"adapter": Reversible(wiring=3, bits=2, inside=dropout), "mesh": (1, 2), "family": "qwen3"},
        {"adapter": Reversible(bits=4, inside=FullFineTune()), "mesh": (2, 1), "zero": 2, "precision": "bf16"},
    ):
        rows = 300 // how["mesh"][1]  # type: ignore[index]
        plans = [LayerPlan(x=Rows(device=rows)), LayerPlan(x=Rows(device=rows), o=Rows(device=100))]
        placements = [
            Placement(rows=rows, attention_rows=300, layers=(plan,) * 4, saved=saved)  # type: ignore[arg-type]
            for plan, saved in zip(plans, ("device", "host"))
        ]
        cases.append({"lengths": [100, 200], "placements": placements, "self_test": True, **how})
    for rank, wrong in enumerate(on_ranks(coupled_on_rank, 2, cases)):
        assert wrong == [[] for _ in cases], rank


def test_layers_that_differ_the_second_time_store_their_inputs() -> None:
    """The self-test at start finds it, and the steps are those of a job that asked for it."""

    def trained(adapter: Reversible, noise: float) -> tuple[str, dict[str, Tensor]]:
        model = made(adapter)
        whole = model.layers[2].mlp.forward
        model.layers[2].mlp.forward = lambda x: whole(x) * (1 + noise * torch.is_grad_enabled())
        assert check_rebuilding(model.loss, ALONE, None, zero=0, seed=0) is not None
        assert model.coupling is not None
        return model.coupling.store, model.gradients([S])

    assert trained(ADAPTERS[0], 0.0)[0] == "bits"
    store, gradients = trained(ADAPTERS[0], 1e-3)
    assert store == "inputs"
    asked = ADAPTERS[0].model_copy(update={"store": "inputs"})
    assert differing(gradients, trained(asked, 1e-3)[1]) == []


def test_a_layer_that_drifts_later_stops_before_the_update() -> None:
    """After the self-test too: streams that begin as one end as one in backward, or nothing is applied."""
    model = made(ADAPTERS[0])
    noise = [0.0]
    whole = model.layers[1].mlp.forward
    model.layers[1].mlp.forward = lambda x: whole(x) * (1 + noise[0] * torch.is_grad_enabled())
    assert check_rebuilding(model.loss, ALONE, None, zero=0, seed=0) is not None
    model.forward([S], 0).backward()
    noise[0] = 1e-3
    loss = model.forward([S], 0)
    with pytest.raises(StreamsDiffer, match="bit for bit"):
        loss.backward()


def test_halves_that_are_not_the_layer_are_refused() -> None:
    """Some models scale what they add between their parts."""
    model = made(ADAPTERS[3])
    assert model.coupling is not None
    attention, mlp = model.coupling._halves[0]
    model.coupling._halves = [(lambda x, **more: attention(x, **more) * 1.001, mlp)] * 4
    with pytest.raises(JobError, match="halves of decoder layer"):
        check_rebuilding(model.loss, ALONE, None, zero=0, seed=0)


def test_hidden_states_beyond_the_first_range_pass_the_self_test() -> None:
    """It runs before the range is known, on rows of its own."""
    model = made(ADAPTERS[0])
    model.layers[-1].mlp.down_proj.get_base_layer().weight.data.mul_(1e6)
    assert check_rebuilding(model.loss, ALONE, None, zero=0, seed=0) is not None


def test_overflow_stops_before_the_update() -> None:
    model = made(ADAPTERS[0])
    assert model.coupling is not None
    model.coupling.fraction = 29
    model.causal.get_input_embeddings().weight.data.mul_(1000)
    with pytest.raises(StreamOverflow, match=r"2 or more.*\n.*fraction_bits"):
        model.forward([S], 0)
    assert [fraction_for(x) for x in (0.001, 60.0, 70.0, 4000.0, 1e9)] == [20, 20, 19, 14, 0]


def test_what_cannot_be_coupled() -> None:
    with pytest.raises(JobError, match="no place for bottleneck"):
        Model(adapter=Reversible(wiring=3, width=8))
    with pytest.raises(JobError, match="no executor"):
        Model(adapter=Reversible()).forward([S], 0)
    with pytest.raises(JobError, match="does not come apart"):
        halves(torch.nn.Sequential())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "granite", "smollm3"])
def test_halves_are_the_layer(family: str) -> None:
    """Composed they are the layer itself, to the bit."""
    model = Model(family)
    calls: list[partial[Any]] = []
    layer = model.layers[1]
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda call, x: calls.append(call) or call(x)
    model.forward([S], 0)
    x = torch.randn(1, S, 64)
    attention, mlp = halves(layer)
    with torch.no_grad():
        assert torch.equal(mlp(attention(x, **calls[0].keywords)), calls[0](x))
