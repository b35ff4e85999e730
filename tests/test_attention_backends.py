"""The contract of every attention back end: what a memory plan relies on.

Those of the device at hand run for real (on a machine with a GPU, its kernels too). Of the CUDA ones, where there is no
GPU, the argument lists and shapes are held against torch's own shape functions, and everything around the kernels
(layouts, packs, prefixes, parts of the heads) against the explicit formula, with the kernel itself played by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import explicit
from torch import Tensor

from farspan.errors import JobError
from farspan.kernels import attention, attention_backends
from farspan.kernels.attention_backends import BACKENDS, Backend, Pack, packing
from farspan.kernels.attention_backends.packing import Packing, TorchFlash, in_small_parts
from farspan.kernels.attention_backends.per_document import CpuFlash
from farspan.memory.layer_backward import LEAST_ROW_HEADS
from farspan.trainer.attention_choice import choose_attention
from farspan.trainer.config import Mesh
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.run_folder import RunFolder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16


class Formula(Packing):
    """FlashAttention's interface, played by the formula in fp64. What it is called with is written down."""

    name = "formula"

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        return None

    def packed(self, q: Tensor, k: Tensor, v: Tensor, at: Any, pack: Pack) -> tuple[Tensor, Tensor]:
        assert all(x.is_contiguous() for x in (q, k, v))
        self.calls.append((tuple(q.shape), tuple(at.cumulative.tolist())))
        return _formula(q, k, v, at, pack)

    def packed_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Any, pack: Pack
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert lse.is_contiguous() and all(x.stride(-1) == 1 for x in (grad, q, k, v, out))
        self.calls.append((tuple(q.shape), tuple(at.cumulative.tolist())))
        inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            made, made_lse = _formula(*inputs, at, pack)
        assert torch.allclose(made, out.double(), atol=1e-6) and torch.allclose(made_lse, lse.double(), atol=1e-5)
        grads = torch.autograd.grad(made, inputs, grad.double())
        return tuple(x.to(q.dtype) for x in grads)  # type: ignore[return-value]


def _formula(q: Tensor, k: Tensor, v: Tensor, at: Any, pack: Pack) -> tuple[Tensor, Tensor]:
    ends = at.cumulative.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    assert at.longest == max(lengths)
    shaped = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = explicit(*shaped, lengths, pack.scale, pack.window)[0].transpose(0, 1).contiguous()
    ones = [shaped[0], shaped[1]]
    group = q.shape[1] // k.shape[1]
    scores = ones[0][0] @ ones[1][0].repeat_interleave(group, 0).transpose(1, 2) * pack.scale
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = torch.arange(len(document))
    seen = (document[:, None] == document) & (rows[:, None] >= rows)
    if pack.window is not None:
        seen &= rows[:, None] - rows < pack.window
    return out, scores.masked_fill(~seen, float("-inf")).logsumexp(-1).contiguous()


def tensors(
    lengths: list[int], heads: int, kv_heads: int, *, batch: int = 1, size: int = 16, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v and a gradient, rows before heads in memory, as transformers leaves them."""
    generator, S = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    shapes = (heads, kv_heads, kv_heads, heads)
    return [
        torch.randn(batch, S, n, size, generator=generator).to(DEVICE, dtype).transpose(1, 2).requires_grad_(False)
        for n in shapes
    ]


def runs(q: Tensor, k: Tensor, pack: Pack) -> list[Backend]:
    """The back ends that take such tensors here."""
    return [backend for backend in BACKENDS.values() if backend.refusal(q, k, pack) is None]


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    batch=st.integers(1, 2),
    window=st.none() | st.integers(1, 80),
    least=st.sampled_from([1, 100, 10**9]),
    data=st.data(),
)
def test_everything_around_a_packing_kernel(
    lengths: list[int], kv_heads: int, group: int, batch: int, window: int | None, least: int, data: st.DataObject
) -> None:
    """Against the formula: output, log-sum-exp, gradients by parts of the heads, and a prefix that goes anywhere."""
    backend, S = Formula(), sum(lengths)
    backend.least_row_heads, backend.block_rows = least, 16  # type: ignore[misc]
    q, k, v, grad = tensors(lengths, kv_heads * group, kv_heads, batch=batch)
    pack = Pack(tuple(lengths), 0.2, window)
    out, lse = backend.forward(q, k, v, pack)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    want = explicit(*inputs, lengths, 0.2, window)
    torch.testing.assert_close(out, want.detach(), rtol=1e-9, atol=1e-11)
    want.backward(grad)
    got = backend.backward(grad, q, k, v, out, lse, pack)
    for mine, theirs in zip(got, inputs):
        assert theirs.grad is not None and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-9, atol=1e-11)
    groups = backend.head_groups(q, k)
    assert groups == 1 or batch * S * kv_heads * group // groups >= least
    assert len(backend.calls) == 1 + groups
    first = data.draw(st.integers(0, S))
    into = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
    backend.prefix(q, k, v, pack, first, *into)
    torch.testing.assert_close(into[0][:, :, :first], out[:, :, :first], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(into[1][:, :, :first], lse[:, :, :first], rtol=1e-9, atol=1e-11)
    assert into[0][:, :, first:].isnan().all() and into[1][:, :, first:].isnan().all()


@pytest.mark.parametrize(
    ("lengths", "rows", "cut"),
    [([40], 5, (16,)), ([40], 33, (40,)), ([10, 40], 10, (10,)), ([10, 40], 11, (10, 16)), ([40, 9], 45, (40, 9))],
)
def test_a_prefix_is_whole_blocks_of_the_document_it_ends_in(
    lengths: list[int], rows: int, cut: tuple[int, ...]
) -> None:
    backend = Formula()
    backend.block_rows = 16  # type: ignore[misc]
    q, k, v, _ = tensors(lengths, 2, 1)
    pack = Pack(tuple(lengths), 1.0)
    out, lse = backend.forward(q, k, v, pack)
    backend.calls.clear()
    backend.prefix(q, k, v, pack, rows, out, lse)
    ends = [0]
    for length in cut:
        ends.append(ends[-1] + length)
    assert backend.calls == [((ends[-1], 2, 16), tuple(ends))]


def test_parts_of_the_heads_are_as_planned() -> None:
    assert Packing.least_row_heads == LEAST_ROW_HEADS
    counted = {
        rows: Formula().head_groups(torch.empty(1, 32, rows, 8, device="meta"), torch.empty(1, 8, rows, 8))
        for rows in (1024, 2048, 4096, 8192, 16384, 1 << 20)
    }
    with in_small_parts():
        assert Formula().head_groups(torch.empty(1, 32, 100, 8, device="meta"), torch.empty(1, 8, 100, 8)) == 8
    assert counted == {1024: 1, 2048: 1, 4096: 2, 8192: 4, 16384: 8, 1 << 20: 8}


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("lengths", [(300,), (100, 200)])
@pytest.mark.parametrize("window", [None, 40])
def test_kernels_of_torch_are_called_as_torch_declares_them(
    name: str, lengths: tuple[int, ...], window: int | None
) -> None:
    """Argument lists and shapes, by torch's shape functions; no kernel runs."""
    backend, pack = BACKENDS[name], Pack(lengths, 0.1, window)
    q, k = (torch.empty(1, 300, n, 64, device="meta", dtype=HALF).transpose(1, 2) for n in (8, 2))
    if name == "cudnn" and window is not None:
        q_here, k_here = (torch.empty(1, n, 300, 64, dtype=HALF) for n in (8, 2))
        assert backend.refusal(q_here, k_here, pack) is not None
        return
    out, lse = backend.forward(q, k, k, pack)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, HALF, q.shape[:3], torch.float32)
    assert out.transpose(1, 2).is_contiguous(), "rows before heads, as the layer goes on with it"
    backend.prefix(q, k, k, pack, 120, out, lse)
    assert [g.shape for g in backend.backward(out, q, k, k, out, lse, pack)] == [q.shape, k.shape, k.shape]


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A package `flash_attn` with the functions of flash-attn 2.8, played by the formula."""
    called: list[str] = []

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        called.append("forward")
        assert causal and window_size_right == 0 and dropout_p == 0.0 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        window = None if window_size_left < 0 else window_size_left + 1
        out, lse = _formula(q, k, v, _at(cu_seqlens_q, max_seqlen_q), Pack((), softmax_scale, window))
        return out, lse, None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        called.append("backward")
        window = None if window_size_left < 0 else window_size_left + 1
        at, pack = _at(cu_seqlens_q, max_seqlen_q), Pack((), softmax_scale, window)
        for into, found in zip((dq, dk, dv), Formula().packed_backward(dout, q, k, v, out, softmax_lse, at, pack)):
            into.copy_(found)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    yield called


def _at(cumulative: Tensor, longest: int) -> SimpleNamespace:
    return SimpleNamespace(cumulative=cumulative, longest=longest)


@pytest.mark.parametrize("window", [None, 30])
def test_the_package_flash_attn(flash_attn: list[str], window: int | None) -> None:
    backend, lengths = BACKENDS["flash-attn"], [50, 41]
    q, k, v, grad = tensors(lengths, 4, 2)
    pack = Pack(tuple(lengths), 0.3, window)
    out, lse = backend.forward(q, k, v, pack)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    explicit(*inputs, lengths, 0.3, window).backward(grad)
    for mine, theirs in zip(backend.backward(grad, q, k, v, out, lse, pack), inputs):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-9, atol=1e-11)
    assert flash_attn == ["forward", "backward"]


# What runs here


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (8, 2, 64), (4, 1, 128)])
@pytest.mark.parametrize("lengths", [[1100], [700, 60, 513]])
def test_back_ends_at_hand_against_fp64(heads: int, kv_heads: int, size: int, lengths: list[int]) -> None:
    pack, scale = Pack(tuple(lengths), size**-0.5), size**-0.5
    q, k, v, grad = tensors(lengths, heads, kv_heads, size=size, dtype=HALF)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    want = explicit(*inputs, lengths, scale, None)
    want.backward(grad.double())
    found = runs(q, k, pack)
    assert found
    for backend in found:
        out, lse = backend.forward(q, k, v, pack)
        assert error(out, want) < 5e-3, backend.name
        grads = backend.backward(grad, q, k, v, out, lse, pack)
        for mine, theirs in zip(grads, inputs):
            assert error(mine, theirs.grad) < 2e-2, backend.name
        given = backend.backward(grad, q, k, v, out.clone(), lse.clone(), pack)
        if DEVICE.type == "cpu":  # elsewhere only in deterministic mode
            assert all(map(torch.equal, grads, given)), (backend.name, "an output that is given changes no bit")


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 511, 512, 513, 768, 1023, 1024])
def test_a_prefix_has_the_bits_of_the_whole(rows: int) -> None:
    for lengths in ([1500], [300, 1200]):
        pack = Pack(tuple(lengths), 0.125)
        q, k, v, _ = tensors(lengths, 8, 2, size=64, dtype=HALF)
        for backend in runs(q, k, pack):
            out, lse = backend.forward(q, k, v, pack)
            into = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
            backend.prefix(q, k, v, pack, rows, *into)
            assert torch.equal(into[0][:, :, :rows], out[:, :, :rows]), (backend.name, rows)
            assert torch.equal(into[1][:, :, :rows], lse[:, :, :rows]), (backend.name, rows)


def error(got: Tensor, want: Tensor | None) -> float:
    assert want is not None
    return float((got.double() - want.detach()).norm() / want.detach().norm())


# Which one runs


class Slow(CpuFlash):
    name = "slow"

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        for _ in range(5):
            found = super().dense(q, k, v, scale)
        return found


class Broken(CpuFlash):
    name = "broken"

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise RuntimeError("CUDA error: no kernel image is available")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "BACKENDS", {"broken": Broken(), "slow": Slow(), **BACKENDS})
    monkeypatch.setattr(attention_backends, "BACKENDS", attention.BACKENDS)
    monkeypatch.setattr("farspan.trainer.attention_choice.BACKENDS", attention.BACKENDS)
    yield
    attention.use()


CONFIG = SimpleNamespace(
    get_text_config=lambda: SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
)
GRID = RankGrid(Mesh(), 0, torch.device("cpu"), None)


def test_the_fastest_is_taken_and_kept_for_the_run(three: None, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert choose_attention("fastest", CONFIG, torch.float32, GRID, folder, 2048) == "cpu"
    q = torch.empty(1, 4, 64, 16)
    assert attention.backend_for(q, q, Pack((64,), 1.0)).name == "cpu"
    folder.kernels.write_text('{"attention": ["slow", "cpu"]}')
    assert choose_attention("fastest", CONFIG, torch.float32, GRID, folder, 2048) == "slow", "as the attempt before"
    assert attention.backend_for(q, q, Pack((64,), 1.0)).name == "slow"


def test_one_that_cannot_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="flash cannot be used") as caught:
        choose_attention("flash", CONFIG, torch.float32, GRID, RunFolder(tmp_path), 2048)
    assert "tensors on cpu" in str(caught.value) and "memory.attention=fastest" in str(caught.value)


def test_no_kernel_at_all_says_why_for_each() -> None:
    q = torch.empty(1, 4, 64, 16, device="meta")
    with pytest.raises(NotImplementedError, match=r"no attention kernel .*'cpu': 'tensors on meta'"):
        attention.backend_for(q, q, Pack((64,), 1.0))


def test_torch_is_told_whose_flash_attention_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention as of_torch

    calls: list[str | None] = []
    monkeypatch.setattr(of_torch, "current_flash_attention_impl", lambda: calls[-1] if calls else None)
    monkeypatch.setattr(of_torch, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(of_torch, "restore_flash_attention_impl", lambda: calls.append(None))
    monkeypatch.setattr(Packing, "refusal", lambda *_: None)
    monkeypatch.setattr(packing, "_installed", lambda _: True)
    q, pack = torch.empty(1, 1, 1, 8), Pack((1,), 1.0)
    for name, current in (("flash3", "FA3"), ("flash3", "FA3"), ("flash4", "FA4"), ("flash", None), ("flash", None)):
        assert BACKENDS[name].refusal(q, q, pack) is None
        assert of_torch.current_flash_attention_impl() == current
    assert calls == ["FA3", "FA4", None]
    monkeypatch.setattr(of_torch, "activate_flash_attention_impl", _unknown)
    assert "no FA3 kernels" in str(BACKENDS["flash3"].refusal(q, q, pack))
    assert isinstance(BACKENDS["flash3"], TorchFlash)


def _unknown(_: str) -> None:
    raise RuntimeError("no FA3 kernels")
