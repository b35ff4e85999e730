"""NormalFloat in 2, 3, 4 and 8 bits with two levels of scales: codes, sizes, rounding, the layer that holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bases import beside_bitsandbytes
from torch import nn

from farspan.kernels.quantized.formats import FULL, SMALL, STEP_BITS, Format, every, named
from farspan.kernels.quantized.normal_float import normal_float_table
from farspan.kernels.quantized.two_level import STEP_DTYPES, TwoLevel, pack_codes, quantize_two_level, unpack_codes
from farspan.trainer.bases.config import LQ, Grid
from farspan.trainer.bases.linear import quantized, restored, stored_parts

FORMATS = every((2, 3, 4, 8), (2, 3, 4, 8), ("bf16", "fp16", "fp32"), (16, 32, 64), (16, 64, 256))


def bytes_of(stored: TwoLevel) -> int:
    return sum(t.nbytes for t in (stored.codes, stored.scale_codes, stored.steps, stored.offset))


def test_the_grid_is_the_paper_s() -> None:
    """4 x 4 x 3 x 3 x 3, and b + b0 / B0 + b1 / (B0 B1) bits of each."""
    assert len(set(FULL)) == 432 and set(SMALL) <= set(FULL)
    assert all(
        f.bits_per_weight == f.bits + f.scale_bits / f.block + STEP_BITS[f.step] / (f.block * f.scales_block)
        for f in FULL
    )
    assert Format(4, 8, "fp32", 64, 256).bits_per_weight == pytest.approx(4.126953125)
    assert LQ().formats == SMALL and LQ(grid="full").formats == FULL
    own = Grid(bits=(2, 3), blocks=(32, 64))
    assert len(LQ(grid=own).formats) == 4 and LQ(grid=own, bits=2.2).uniform == Format(2, 8, "bf16", 64, 256)
    assert LQ(bits=2.01).uniform == Format(2, 4, "bf16", 64, 256), "the narrowest there is"


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 40), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_packing_is_one_to_one(bits: int, eights: int, random: object) -> None:
    codes = torch.tensor([random.randrange(2**bits) for _ in range(8 * eights)], dtype=torch.uint8)  # type: ignore[attr-defined]
    packed = pack_codes(codes, bits)
    assert packed.numel() == eights * bits and torch.equal(unpack_codes(packed, bits), codes)


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 9),
    st.integers(1, 70),
    st.floats(1e-3, 1e3),
    st.integers(0, 10**6),
)
@settings(max_examples=120, deadline=None)
def test_rounding(form: Format, rows: int, columns: int, size: float, seed: int) -> None:
    """Of any shape: bytes as counted, the nearest code for the scales that are stored, scales within half a step."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) * size
    stored = quantize_two_level(weight, form)
    assert bytes_of(stored) == form.bytes(weight.numel())
    back = stored.values((rows, columns), torch.float32)
    assert bool(torch.isfinite(back).all())
    scales = stored.scale_of_blocks()
    of_each = scales.repeat_interleave(form.block)[: weight.numel()].view(rows, columns)
    table = normal_float_table(form.bits)
    nearest = (weight[..., None].double() - table.double() * of_each[..., None].double()).abs().amin(-1)
    torch.testing.assert_close((back.double() - weight.double()).abs(), nearest, rtol=1e-5, atol=1e-5 * size)
    padded = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % form.block)).view(-1, form.block)
    absmax = padded.abs().amax(1)
    step = stored.steps.float().repeat_interleave(form.scales_block)[: absmax.numel()]
    # the largest scale of a group may lie above the last step where the step was rounded down
    above = 2**form.scale_bits * torch.finfo(STEP_DTYPES[form.step]).eps * step + 1e-6 * size
    assert bool(((scales - absmax).abs() <= step / 2 + above).all())
    again = quantize_two_level(back, form).values((rows, columns), torch.float32)
    if rows * columns <= form.block:  # one block: its scale is the offset, exactly
        assert torch.equal(again, back)
    assert named(form.name) == form


def test_zeros_and_one_weight_that_is_not() -> None:
    for form in (Format(2, 2, "fp16", 16, 16), Format(3, 8, "bf16", 64, 256), Format(8, 4, "fp32", 32, 64)):
        assert not quantize_two_level(torch.zeros(8, 64), form).values((8, 64), torch.float32).any()
        weight = torch.zeros(8, 64)
        weight[5, 7] = -3.0
        back = quantize_two_level(weight, form).values((8, 64), torch.float32)
        assert float(back[5, 7]) == pytest.approx(-3.0, rel=2**-7) and int((back != 0).sum()) == 1


def test_the_error_on_a_normal_distribution() -> None:
    """9.19 % in 4 bits and blocks of 64; scales in 8 bits add less than a thousandth of it."""
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    errors = {
        bits: float((quantize_two_level(w, Format(bits, 8, "fp32", 64, 256)).values(w.shape, w.dtype) - w).norm())
        / float(w.norm())
        for bits in (2, 3, 4, 8)
    }
    assert errors[4] == pytest.approx(0.0919, abs=0.0005)
    assert errors[2] > errors[3] > errors[4] > errors[8] and errors[8] < 0.006
    few = {b0: quantize_two_level(w, Format(4, b0, "bf16", 64, 16)).values(w.shape, w.dtype) for b0 in (8, 4, 2)}
    off = [float((each - w).norm()) for each in few.values()]
    assert off == sorted(off)


TABLE = """
import json, torch
import bitsandbytes.functional as F
from farspan.kernels.quantized.formats import Format
from farspan.kernels.quantized.two_level import quantize_two_level
torch.manual_seed(0)
w = torch.randn(64, 256)
codes, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
whole = F.dequantize_4bit(codes, state)
ours = quantize_two_level(w, Format(4, 8, "fp32", 64, 16))
print(json.dumps({
    "levels": sorted(set((whole.view(-1, 64) / state.absmax.view(-1, 1)).flatten().tolist())),
    "same": float((ours.codes == codes.view(-1)).float().mean()),
    "off": float((ours.values((64, 256), torch.float32) - whole).norm() / whole.norm()),
}))
"""


def test_levels_are_those_of_bitsandbytes() -> None:
    """The 16 values, the order in a byte, and codes, of which a few in a thousand follow the rounded scales."""
    found = beside_bitsandbytes(TABLE)
    levels = torch.tensor(found["levels"])
    distinct = levels[torch.cat([torch.tensor([True]), levels.diff() > 1e-4])]
    torch.testing.assert_close(distinct, normal_float_table(4), rtol=0, atol=1e-6)
    assert found["same"] > 0.98 and found["off"] < 0.02, "a code that moves is a step off"


@pytest.mark.parametrize("form", [Format(2, 4, "bf16", 64, 256), Format(3, 8, "fp16", 32, 16)], ids=lambda f: f.name)
def test_a_layer_is_the_plain_one_with_the_weights_it_stands_for(form: Format) -> None:
    """Its gradient too; it comes back from what is written of it, and making a model bf16 changes no bit."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 48)
    layer = quantized(plain.weight, form, plain.bias)
    assert layer.stored_bytes == form.bytes(128 * 48)
    plain.weight.data = layer.weight
    x = torch.randn(2, 5, 128)
    read, ours = (x.clone().requires_grad_() for _ in range(2))
    plain(read).sum().backward()
    layer(ours).sum().backward()
    assert read.grad is not None and ours.grad is not None and torch.equal(read.grad, ours.grad)
    told, tensors = stored_parts(layer)
    again = restored(told, {name: t.clone() for name, t in tensors.items()}, plain.bias, torch.float32)
    assert torch.equal(again.weight, layer.weight)
    before = layer.weight
    nn.Sequential(layer).bfloat16()
    assert torch.equal(layer.weight, before) and layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_other_layers_keep_their_bits_too(base: str) -> None:
    from farspan.trainer.bases.config import NF4, Int8

    torch.manual_seed(0)
    layer = quantized(torch.randn(64, 128), NF4() if base == "nf4" else Int8(), None)
    before = layer.weight
    told, tensors = stored_parts(layer)
    assert torch.equal(restored(told, tensors, None, torch.float32).weight, before)
    nn.Sequential(layer).bfloat16()
    assert torch.equal(layer.weight, before)
    with pytest.raises(KeyError, match="kind"):
        restored({**told, "kind": "?"}, tensors, None, torch.float32)
