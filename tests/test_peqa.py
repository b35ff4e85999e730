"""PEQA: the gradient of the scales against autograd on the formula, and integers that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from farspan.errors import JobError
from farspan.kernels.quantized.integers import pack, quantize_rows, unpack
from farspan.memory.shape import AdapterShape, ModelShape, StoredAs, Training
from farspan.memory.states import weights_of
from farspan.trainer.adapters.peqa.apply import PeqaLinear
from farspan.trainer.bases.linear import QuantizedLinear
from farspan.trainer.config import PEQA, Optim
from farspan.trainer.engine_plain import PlainEngine

S = 96


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), width=st.sampled_from([8, 24, 64]), seed=st.integers(0, 2**31))
def test_packing_is_undone(bits: int, rows: int, width: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, width * bits // 8)
    assert torch.equal(unpack(packed, bits), values)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
def test_rounding_is_to_the_nearest_step(bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    weight[2] = weight[2].abs() + 1  # all on one side of zero
    weight[3] = 0
    integers, scale, zero = quantize_rows(weight, bits, group)
    blocks = weight.view(6, -1, group or 64)
    grid = (torch.arange(2**bits) - zero[..., None].float()) * scale[..., None]
    nearest = (blocks[..., None] - grid[:, :, None, :]).abs().amin(-1)
    stored = (integers.view_as(blocks).float() - zero[..., None]) * scale[..., None]
    torch.testing.assert_close((stored - blocks).abs(), nearest, rtol=0, atol=1e-6)
    assert not stored[3].any()


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_gradients_are_those_of_the_formula(group: int | None, bias: bool, shape: tuple[int, ...]) -> None:
    """Autograd through W = s (I - z), fp64."""
    torch.manual_seed(0)
    layer = PeqaLinear(nn.Linear(24, 10, bias=bias).double().requires_grad_(False), 3, group)
    layer.scale.data = layer.scale.data.double()
    x = torch.randn(shape).double().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    scale = layer.scale.detach().clone().requires_grad_()
    read = x.detach().clone().requires_grad_()
    weight = (layer.integers().double() * scale[..., None]).view(10, 24)
    want = nn.functional.linear(read, weight, layer.bias)
    want.backward(dy)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.scale.grad, scale.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, read.grad, rtol=1e-12, atol=1e-13)


def test_training_changes_scales_and_no_integer() -> None:
    model = Model(adapter=PEQA(bits=3), precision="bf16")
    integers = {n: b.clone() for n, b in model.model.named_buffers() if n.endswith((".packed", ".zero"))}
    scales = {n: p.detach().clone() for n, p in model.trainable().items()}
    assert len(integers) == 2 * 7 * LAYERS and len(scales) == 7 * LAYERS
    assert all(name.endswith(".scale") and p.dtype == torch.float32 for name, p in model.trainable().items())
    engine = PlainEngine(model.loss, model.trainable(), Optim(lr=1e-3), "cpu")
    losses = []
    for _ in range(4):
        loss = model.forward([S], 0)
        engine.backward(loss / S, last=True)
        engine.step(lr=1e-3, clip_norm=None)
        losses.append(float(loss.detach()))
    engine.close()
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(model.model.get_buffer(name), before) for name, before in integers.items())
    assert all(not torch.equal(p, scales[name]) for name, p in model.trainable().items())


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_planned_weights_are_the_model_s(bits: int, group: int | None) -> None:
    model = Model(adapter=PEQA(bits=bits, group=group), precision="bf16")
    tensors: list[Tensor] = [*model.model.parameters()]
    tensors += [b for layer in model.model.modules() if isinstance(layer, QuantizedLinear) for b in layer.buffers()]
    shape = ModelShape(hidden=64, layers=LAYERS, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=300)
    training = Training(
        precision="bf16",
        adapter=AdapterShape(kind="scales", rank=1, group=group, precision="fp32"),
        base=StoredAs(type="integers", bits=bits, group=group),
    )
    assert weights_of(shape, training).bytes == sum(t.nbytes for t in tensors)
    assert training.trained(shape) == sum(p.numel() for p in model.trainable().values())


def test_what_does_not_split() -> None:
    with pytest.raises(JobError, match="groups of 48"):
        Model(adapter=PEQA(group=48))
    some: Any = Model(adapter=PEQA(target_modules=("q_proj",)))
    assert sum(isinstance(m, PeqaLinear) for m in some.model.modules()) == LAYERS
