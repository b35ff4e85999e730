"""Exact causal attention over packed documents: forward with log-sum-exp, and backward for an output that is given.

Every flash kernel's backward takes the output O and its log-sum-exp as inputs. A caller that stored the late rows of
both (`KnownRows`) has only the early rows computed again, and these come out bit for bit as in the first run because
the kernel is called on whole blocks of rows: its inner matrix sizes then do not change. Which kernels there are is told
in `kernels.attention_backends`. Which one runs is decided once for a process (`use`; `fastest` measures), since two of
them do not agree in the last bit.

B batch, H query heads, K KV heads, S rows of the whole pack, D head size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention_backends import BACKENDS, Backend, Pack


@dataclass(frozen=True)
class KnownRows:
    """Attention output whose rows from `first` on are known; the rows before are filled in by whoever computes them."""

    out_BHSD: Tensor
    lse_BHS: Tensor
    first: int


def causal_attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    known: KnownRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which row i of a document sees rows 0..i of the same document, or the last `window` of them.

    Args:
        q_BHSD: queries [B, H, S, D]; any float dtype.
        k_BKSD, v_BKSD: keys and values [B, K, S, D]; K divides H.
        lengths: rows of each document, in order; they add up to S.
        scale: factor on q k^T.
        window: rows a query may look back on, itself included; None: all.
        known: rows not to be computed again; its tensors are completed in place.

    Returns:
        output [B, H, S, D] in the dtype of q, differentiable, and log-sum-exp [B, H, S] (fp32; fp64 for fp64 inputs),
        which is not.
    """
    assert sum(lengths) == q_BHSD.shape[2] == k_BKSD.shape[2], (tuple(lengths), q_BHSD.shape, k_BKSD.shape)
    return _Attention.apply(q_BHSD, k_BKSD, v_BKSD, Pack(tuple(lengths), scale, window), known)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pack: Pack, known: KnownRows | None
    ) -> tuple[Tensor, Tensor]:
        backend = backend_for(q, k, pack)
        if known is None:
            out, lse = backend.forward(q, k, v, pack)
        else:
            out, lse = known.out_BHSD, known.lse_BHS
            backend.prefix(q, k, v, pack, known.first, out, lse)
        # views: autograd marks what a Function returns, and these may be tensors of whoever stored the rows
        out, lse = out.view_as(out), lse.view_as(lse)
        ctx.pack = pack
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *backend_for(q, k, ctx.pack).backward(grad, q, k, v, out, lse, ctx.pack), None, None


_chosen: list[str] = []
"""Names in order of preference; empty: the order of `BACKENDS`."""


def use(*names: str) -> None:
    """Back ends of this process in order of preference, those it does not name after them; none: the usual order.

    Raises:
        KeyError: there is no such back end.
    """
    _chosen[:] = [BACKENDS[name].name for name in names]


def backend_for(q: Tensor, k: Tensor, pack: Pack) -> Backend:
    """The back end that runs for such tensors: the first that takes them.

    Raises:
        NotImplementedError: none does.
    """
    found = refusals(q, k, pack)
    name = next((name for name, why in found.items() if why is None), None)
    if name is None:
        raise NotImplementedError(f"no attention kernel for {q.dtype} on {q.device.type}: {found}")
    return BACKENDS[name]


def refusals(q: Tensor, k: Tensor, pack: Pack) -> dict[str, str | None]:
    """Why each back end cannot run for such tensors, up to the first that can (None)."""
    found: dict[str, str | None] = {}
    for name in [*_chosen, *(name for name in BACKENDS if name not in _chosen)]:
        found[name] = BACKENDS[name].refusal(q, k, pack)
        if found[name] is None:
            break
    return found


def timings(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, repeats: int = 3, names: Sequence[str] = tuple(BACKENDS)
) -> dict[str, tuple[float, float] | str]:
    """Median seconds of forward and of backward by back end, or why one does not run, also if its kernel fails."""
    found: dict[str, tuple[float, float] | str] = {}
    for name in names:
        backend = BACKENDS[name]
        if (why := backend.refusal(q, k, pack)) is not None:
            found[name] = why
            continue
        try:
            out, lse = backend.forward(q, k, v, pack)
            forward_s = _median_s(partial(backend.forward, q, k, v, pack), q.device, repeats)
            backward_s = _median_s(partial(backend.backward, out, q, k, v, out, lse, pack), q.device, repeats)
            found[name] = forward_s, backward_s
        except (RuntimeError, NotImplementedError) as error:
            found[name] = " ".join(str(error).split())[:200]
    return found


def fastest(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> list[str]:
    """Names of the back ends that run for such tensors, quickest first (forward and backward together)."""
    told = {
        name: sum(seconds)
        for name, seconds in timings(q, k, v, pack, names=tuple(BACKENDS)).items()
        if isinstance(seconds, tuple)
    }
    return sorted(told, key=lambda name: told[name])


def _median_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    def once() -> float:
        _synchronize(device)
        start_s = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start_s

    once()
    return statistics.median(once() for _ in range(repeats))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
