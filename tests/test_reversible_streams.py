"""Fixed-point streams: forwards and backwards, side bits, limits; the GPU's kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_process import in_process

from farspan.kernels import reversible_streams as streams
from farspan.kernels.reversible_streams import LIMIT


def fresh() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    width=st.sampled_from([8, 24, 64]),
    bits=st.integers(1, 8),
    fraction=st.integers(0, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    steps=st.integers(1, 6),
)
def test_any_number_of_steps_is_undone(
    seed: int, rows: int, width: int, bits: int, fraction: int, dtype: torch.dtype, steps: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    stream, main = torch.randint(-LIMIT + 1, LIMIT, (2, 1, rows, width), generator=draw, dtype=torch.int32)
    added = [(torch.randn(1, rows, width, generator=draw) * 3).to(dtype) for _ in range(steps)]
    states, sides, overflow = [stream.clone()], [], fresh()
    for y in added:
        sides.append(streams.advance_(stream, main, y, bits, fraction, overflow))
        states.append(stream.clone())
        assert sides[-1].dtype == torch.uint8 and sides[-1].numel() * 8 == bits * stream.numel()
    assert not overflow
    for y, side, before in zip(reversed(added), reversed(sides), states[-2::-1]):
        streams.retreat_(stream, main, y, bits, fraction, side)
        assert torch.equal(stream, before)


def test_against_integers_of_python() -> None:
    """The formula, element by element, in arbitrary precision."""
    draw = torch.Generator().manual_seed(3)
    stream, main = torch.randint(-(2**28), 2**28, (2, 4, 16), generator=draw, dtype=torch.int32)
    y = torch.randn(4, 16, generator=draw, dtype=torch.float64) * 100
    before, bits, fraction = stream.clone(), 3, 16
    side = streams.advance_(stream, main, y, bits, fraction, fresh())
    for old, beside, new, added in zip(*(t.flatten().tolist() for t in (before, main, stream, y))):
        assert new == (old >> bits) - (beside >> bits) + round(added * 2**fraction)
    low = (before & 7).numpy().astype(np.uint8)
    unpacked = np.unpackbits(side.numpy(), axis=-1, bitorder="little").reshape(4, 2, bits, 8)
    assert np.array_equal((unpacked * (1 << np.arange(bits))[:, None]).sum(2).reshape(4, 16), low)


def test_fixed_and_floating() -> None:
    x = torch.randn(3, 40, dtype=torch.float64)
    stream = streams.to_fixed(x, 20, fresh())
    assert float((streams.to_float(stream, 20, torch.float64) - x).abs().max()) <= 2.0**-21
    exact = (torch.randint(-1000, 1000, (3, 40)) / 16).to(torch.bfloat16)
    assert torch.equal(streams.to_float(streams.to_fixed(exact, 16, fresh()), 16, torch.bfloat16), exact)
    streams.add_(stream, x, 20, fresh(), subtract=True)
    assert not stream.any()


@pytest.mark.parametrize("value", [2.0**14, -(2.0**14), float("nan"), float("inf"), 1e30])
def test_overflow_is_seen(value: float) -> None:
    """2^14 at 16 bits of fraction is the limit."""
    y = torch.zeros(2, 8)
    y[1, 3] = value
    overflow = fresh()
    zero = torch.zeros(2, 8, dtype=torch.int32)
    streams.advance_(zero.clone(), zero, y, 3, 16, overflow)
    assert overflow.item() == 1
    overflow = fresh()
    streams.to_fixed(y, 16, overflow)
    assert overflow.item() == 1
    overflow = fresh()
    streams.add_(torch.full((2, 8), LIMIT - 1, dtype=torch.int32), torch.ones(2, 8), 0, overflow)
    assert overflow.item() == 1, "the sum, where both parts are within"
    overflow = fresh()
    streams.advance_(torch.full((2, 8), LIMIT - 1, dtype=torch.int32), zero, torch.full((2, 8), 100.0), 3, 16, overflow)
    assert overflow.item() == 0


INTERPRETED = """
import json, torch
from farspan.kernels.reversible_streams import reference, triton_kernels
from farspan.kernels.reversible_streams.reference import LIMIT
draw, wrong, cases = torch.Generator().manual_seed(0), [], 0
for dtype in (torch.float32, torch.float16):
    for bits in (1, 3, 8):
        for rows, width in ((1, 8), (37, 72)):
            for fraction in (0, 16):
                stream, main = torch.randint(-LIMIT // 2, LIMIT // 2, (2, rows, width), generator=draw).int()
                y = (torch.randn(rows, width, generator=draw) * 3).to(dtype)
                y[0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -1e-7, 300.0]) * 2.0**-fraction
                ours, want = stream.clone(), stream.clone()
                flag, flag_want = torch.zeros(1, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
                side = triton_kernels.advance_(ours, main, y, bits, fraction, flag)
                side_want = reference.advance_(want, main, y, bits, fraction, flag_want)
                same = torch.equal(ours, want) and torch.equal(side, side_want) and int(flag) == int(flag_want)
                triton_kernels.retreat_(ours, main, y, bits, fraction, side)
                cases += 1
                if not same or not torch.equal(ours, stream):
                    wrong.append([str(dtype), bits, rows, fraction])
flag = torch.zeros(1, dtype=torch.int32)
zero = torch.zeros(2, 8, dtype=torch.int32)
triton_kernels.advance_(zero.clone(), zero, torch.full((2, 8), float("nan")), 3, 16, flag)
print(json.dumps({"wrong": wrong, "cases": cases, "flag": int(flag)}))
"""


def test_the_kernels_agree_with_the_reference() -> None:
    """Under Triton's interpreter, ties and cut blocks included."""
    assert in_process(INTERPRETED, TRITON_INTERPRET="1") == {"wrong": [], "cases": 24, "flag": 1}


COMPILED = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from farspan.kernels.reversible_streams import triton_kernels as k
sizes = {}
for arch in (80, 90):
    for width in ("bf16", "fp32"):
        pointers = {"other": "*i32", "main": "*i32", "y": f"*{width}", "side": "*u8", "overflow": "*i32"}
        for kernel, names in ((k.advance_kernel, [*pointers]), (k.retreat_kernel, [*pointers][:4])):
            constants = {"BITS": "constexpr", "GROUPS": "constexpr"}
            signature = {**{n: pointers[n] for n in names}, "groups": "i32", "scale": "fp32", **constants}
            source = ASTSource(
                fn=kernel, signature=signature, constexprs={"BITS": 3, "GROUPS": 256},
                attrs={(i,): [["tt.divisibility", 16]] for i in range(len(names))},
            )
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
            sizes[f"{kernel.__name__} {width} sm_{arch}"] = len(made.asm["cubin"])
print(json.dumps(sizes))
"""


def test_the_kernels_compile_for_gpus() -> None:
    sizes = in_process(COMPILED)
    assert len(sizes) == 8 and all(size for size in sizes.values())
