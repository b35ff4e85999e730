"""L4Q: its gradients against autograd through the rounding itself, and integers that are the training forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from farspan.errors import JobError
from farspan.kernels.quantized import CHUNK_ELEMENTS
from farspan.memory.shape import AdapterShape, ModelShape, Training
from farspan.memory.states import weights_of
from farspan.trainer.adapters.integer_files import round_off
from farspan.trainer.adapters.l4q.apply import TRAINED, L4QLinear
from farspan.trainer.bases.linear import IntegerLinear
from farspan.trainer.config import L4Q, Optim
from farspan.trainer.engine_plain import PlainEngine

S = 96


def layer_of(
    adapter: L4Q, *, inputs: int = 48, outputs: int = 10, bias: bool = True, clipped: float = 0.8, seed: int = 0
) -> L4QLinear:
    """In fp64, with A B that is not zero, steps so small that some places are clipped, and offsets."""
    torch.manual_seed(seed)
    layer = L4QLinear(nn.Linear(inputs, outputs, bias=bias).double(), adapter, torch.Generator().manual_seed(seed))
    layer.requires_grad_(False)
    for name in TRAINED:
        parameter = getattr(layer, name)
        parameter.data = parameter.data.double()
        parameter.requires_grad_()
    layer.lora_B.data.normal_().mul_(0.05)
    layer.step.data.mul_(clipped * (1 + 0.2 * torch.rand_like(layer.step)))
    layer.offset.data.add_(0.3 * torch.randn_like(layer.offset))
    return layer


def explicit(layer: L4QLinear, x: Tensor, trained: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The formula, written down for autograd: rounding passes gradients straight, clipping stops them."""
    a, b, step, offset = trained
    shape = (layer.out_features, layer.groups, -1)
    t, o = (layer.unit * p.view(layer.out_features, layer.groups, 1) for p in (step, offset))
    v = ((layer.original + layer.scale * b @ a).view(shape) - o) / t
    low, high = -(2 ** (layer.bits - 1)), 2 ** (layer.bits - 1) - 1
    clipped = v.clamp(low, high)
    q = clipped + (clipped.round() - clipped).detach()
    beyond = ((v < low) | (v > high)).double().mean()
    return nn.functional.linear(x, (t * q + o).reshape_as(layer.original), layer.bias), beyond


def compare(layer: L4QLinear, x: Tensor, dy: Tensor) -> Tensor:
    """Gradients of the layer against those of the formula; returns the share that is clipped."""
    x = x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    read = x.detach().clone().requires_grad_()
    trained = [getattr(layer, name).detach().clone().requires_grad_() for name in TRAINED]
    want, beyond = explicit(layer, read, trained)
    want.backward(dy)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, want, **close)
    torch.testing.assert_close(x.grad, read.grad, **close)
    for name, mine in zip(TRAINED, trained):
        assert mine.grad is not None
        # steps and offsets: with the gradient scale of LSQ
        n = layer.in_features // layer.groups
        c = (n * (2 ** (layer.bits - 1) - 1)) ** -0.5 if name in ("step", "offset") else 1.0
        torch.testing.assert_close(getattr(layer, name).grad, c * mine.grad, **close, msg=lambda m, n=name: f"{n}: {m}")
    return beyond


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48)])
def test_gradients_are_those_of_the_formula(group: int | None, bias: bool, shape: tuple[int, ...]) -> None:
    layer = layer_of(L4Q(rank=3, bits=3, group=group), bias=bias)
    beyond = compare(layer, torch.randn(shape).double(), torch.randn(*shape[:-1], 10).double())
    assert 0.02 < beyond < 0.6
    assert bool(layer.offset.any()) and bool(layer.offset.grad.any())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 24]),
    outputs=st.integers(1, 9),
    lead=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    start=st.sampled_from(["minmax", "lsq"]),
    rank=st.integers(1, 5),
    clipped=st.floats(0.3, 1.2),
    seed=st.integers(0, 2**31),
)
def test_gradients_at_any_shape(
    bits: int, group: int | None, outputs: int, lead: list[int], start: Any, rank: int, clipped: float, seed: int
) -> None:
    adapter = L4Q(rank=rank, bits=bits, group=group, start=start)
    layer = layer_of(adapter, outputs=outputs, clipped=clipped, seed=seed)
    compare(layer, torch.randn(*lead, 48).double(), torch.randn(*lead, outputs).double())


def test_rows_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * 48)
    layer = layer_of(L4Q(rank=3, bits=3, group=8))
    assert len(layer.row_chunks()) == 4
    compare(layer, torch.randn(2, 5, 48).double(), torch.randn(2, 5, 10).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["minmax", "lsq"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_starts_at_plain_rounding(bits: int, group: int | None, start: Any, dtype: torch.dtype) -> None:
    """The nearest of the integers' values to every weight, by trying them all."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 6).to(dtype)
    plain.weight.data[2] = 0.25
    weight = plain.weight.detach().clone()
    layer = L4QLinear(plain, L4Q(rank=2, bits=bits, group=group, start=start), torch.Generator())
    t, o = layer.steps()
    grid = t * torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + o
    blocks = weight.float().view(6, -1, group or 64)
    nearest = (blocks[..., None] - grid[:, :, None, :]).abs().amin(-1)
    got = layer.whole().float().view_as(blocks)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    torch.testing.assert_close((got - blocks).abs(), nearest, rtol=0, atol=rounding * float(blocks.abs().max()))
    if start == "minmax":
        assert float((t[:2, :, 0] * (2**bits - 1) - (blocks.amax(-1) - blocks.amin(-1))[:2]).abs().max()) < 1e-6
        assert torch.equal(layer.whole()[2].float(), weight[2].float())
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.whole(), plain.bias))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [None, 16])
def test_what_trained_is_what_runs_as_integers(group: int | None, precision: str) -> None:
    model = Model(adapter=L4Q(rank=4, bits=3, group=group), precision=precision)
    first = {n: p.detach().clone() for n, p in model.trainable().items()}
    frozen = {n: p.detach().clone() for n, p in model.model.named_parameters() if not p.requires_grad}
    assert len(first) == 4 * 7 * LAYERS and all(p.dtype == torch.float32 for p in first.values())
    engine = PlainEngine(model.loss, model.trainable(), Optim(lr=2e-3), "cpu")
    losses = []
    for _ in range(5):
        loss = model.forward([S], 0)
        engine.backward(loss / S, last=True)
        engine.step(lr=2e-3, clip_norm=1.0)
        losses.append(float(loss.detach()))
    engine.close()
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.trainable().items() if not torch.equal(p, first[n])}
    assert {n for n in first if not n.endswith(".offset")} <= moved  # of offsets, those of groups with clipped places
    assert all(torch.equal(model.model.get_parameter(n), before) for n, before in frozen.items())
    with torch.no_grad():
        want = model.forward([S], 0)
    made = round_off(model.model)
    assert len(made) == 7 * LAYERS and all(isinstance(layer, IntegerLinear) for layer in made.values())
    with torch.no_grad():
        assert torch.equal(model.forward([S], 0), want)
    some = made["model.layers.0.self_attn.q_proj"]
    assert some.packed.numel() == 64 * 64 * 3 // 8 and some.packed.dtype == torch.uint8


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_weights_are_the_model_s(precision: Any, group: int | None) -> None:
    model = Model(adapter=L4Q(rank=4, bits=4, group=group), precision=precision)
    shape = ModelShape(hidden=64, layers=LAYERS, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=300)
    adapter = AdapterShape(kind="learned", rank=4, group=group, precision="fp32")
    training = Training(precision=precision, adapter=adapter)
    assert weights_of(shape, training).bytes == sum(p.nbytes for p in model.model.parameters())
    assert training.trained(shape) == sum(p.numel() for p in model.trainable().values())


def test_q_k_and_v_store_their_input_once() -> None:
    """In the bytes of one x: nothing else of size is kept."""
    layers = [layer_of(L4Q(rank=2, bits=4), outputs=n) for n in (10, 12, 14)]
    x, kept = torch.randn(2, 5, 48).double().requires_grad_(), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for layer in layers:
            layer(x)
    assert [*kept.values()] == [x.nbytes]


def test_the_same_draw_and_what_does_not_split() -> None:
    one, two = (Model(adapter=L4Q(rank=2)).trainable() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(JobError, match="groups of 48"):
        Model(adapter=L4Q(group=48))
