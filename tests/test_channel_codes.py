"""Codes of channels against numpy and the formula: sizes, levels, noise, what cannot be coded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.kernels.channel_codes.codes import Planes, decode, encode, rounding_error

CPU = torch.device("cpu")


def coded(x: torch.Tensor, bits: torch.Tensor, noise: torch.Generator | None = None) -> tuple[torch.Tensor, Planes]:
    planes = Planes.of(bits, CPU)
    message = torch.empty(planes.bytes(x.shape[1]), dtype=torch.uint8)
    encode(x, planes, message, noise)
    return message, planes


def back(message: torch.Tensor, planes: Planes, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like)
    decode(message, planes, out)
    return out


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_each_channel_comes_back_at_its_own_levels(N: int, D: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(1, 9, (N, D), generator=draw)
    x = (torch.randn(N, rows, D, generator=draw) * torch.randn(D, generator=draw).exp()).to(dtype)
    message, planes = coded(x, bits)
    found = back(message, planes, x.float())
    want, values = np.empty((N, rows, D)), x.double().numpy()
    for n in range(N):
        for d in range(D):
            low, high = values[n, :, d].min(), values[n, :, d].max()
            step = (high - low) / (2 ** int(bits[n, d]) - 1)
            want[n, :, d] = low if step == 0 else low + np.floor((values[n, :, d] - low) / step + 0.5) * step
    span = values.max(1) - values.min(1)
    # a number half-way between two levels may go to either
    off = np.abs(found.double().numpy() - want) / np.maximum(span, 1e-30)[:, None]
    step = 1 / (2.0 ** bits.numpy() - 1)[:, None]
    half_way = np.abs(np.abs(values - want) / np.maximum(span[:, None] * step, 1e-30) - 0.5) < 1e-3
    assert (off[~half_way] < 1e-5).all() and (off <= step + 1e-5).all()
    error = rounding_error(x, message, planes, rows)
    torch.testing.assert_close(found - x.float(), error, rtol=0, atol=1e-6)
    exact = int(bits.sum()) * -(-rows // 8) + 8 * N * D
    assert len(message) == -(-exact // 8) * 8


def test_a_message_is_packed_as_the_format_says() -> None:
    """Bit planes written out by numpy's own packing."""
    x = torch.randint(0, 8, (1, 19, 3), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0], x[0, 1] = 0.0, 7.0  # the range of 3 bits, so that a code is the number itself
    message, planes = coded(x, torch.full((1, 3), 3))
    scales, packed = planes.parts(message, 19)
    assert scales[0].tolist() == [[0.0] * 3] and scales[1].tolist() == [[1.0] * 3]
    for channel in range(3):
        codes = x[0, :, channel].numpy().astype(np.uint8)
        for bit in range(3):
            want = np.packbits(codes >> bit & 1, bitorder="little")
            np.testing.assert_array_equal(packed[3 * channel + bit].numpy(), want)


def test_rounding_at_random_is_right_on_average() -> None:
    x = torch.linspace(-1, 1, 41)[None, :, None].repeat(1, 1, 2)
    draw, total = torch.Generator().manual_seed(1), torch.zeros_like(x)
    for _ in range(2000):
        message, planes = coded(x, torch.tensor([[2, 3]]), draw)
        total += back(message, planes, x)
    assert float((total / 2000 - x).abs().max()) < 4 * (2 / 3) / 2 / 2000**0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_does_not_come_back_as_one(bad: float) -> None:
    x = torch.ones(2, 9, 2)
    x[0, 3, 1] = bad
    found = back(*coded(x, torch.full((2, 2), 4)), x)
    assert torch.isnan(found[0, :, 1]).all() and torch.equal(found[0, :, 0], x[0, :, 0])
    assert torch.equal(found[1], x[1])


def test_channels_of_one_value_come_back_exactly() -> None:
    x = torch.tensor([3.25, -1e-30, 0.0])[None, None].repeat(1, 11, 1)
    assert torch.equal(back(*coded(x, torch.tensor([[1, 4, 8]])), x), x)
