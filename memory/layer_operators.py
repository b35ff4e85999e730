"""What `memory.operators` make, keep and let go, in the ledger of a decoder layer: the counterparts of the operators
that `layer_forward` and `layer_backward` book for transformers' own code.

Codes are made some rows at a time: what that takes beside them does not grow with the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farspan.kernels.activation_codecs import CHUNK_ELEMENTS, derivative_bytes, values_bytes

if TYPE_CHECKING:
    from farspan.memory.layer_backward import LayerRun
    from farspan.memory.layer_forward import LayerForward

FP32 = 4
CHUNK_BYTES = {
    "fp8": {"norm": 10, "norm backward": 12, "gated": 10, "gated backward": 20, "again": 16},
    "int4": {"norm": 18, "norm backward": 12, "gated": 21, "gated backward": 16, "again": 12},
}
"""For each element of a chunk: what exists of it at one time, read off the allocator."""


def norm(run: LayerForward, name: str, n: int, groups: int) -> str:
    """y, and for backward 1 / rms with y itself or codes of x / rms."""
    out = run.make(f"{name} out", run.e * n, reads=run.e * n)
    if not run.grad:
        chunk(run, "norm")
        return out
    kept: tuple[str, ...] = (out,)
    kind = run.training.activations
    if kind != "fused":
        sizes = values_bytes(kind, n // groups)
        kept = tuple(run.make(f"{name} {c}", size * groups, reads=0.0) for c, size in zip(("codes", "scales"), sizes))
        run.stands_for[out] = kept
    run.make(f"{name} 1/rms", FP32 * groups)
    chunk(run, "norm")
    run.keep_for_backward(name, f"{name} 1/rms", *kept)
    run.drop(f"{name} 1/rms", *run.stands_for.get(out, ()))
    return out


def norm_backward(run: LayerRun, name: str, g: str, n: int, source: str, *, keep: bool) -> str:
    kept = (f"{name} 1/rms", *run.kept_of(f"{name} out"))
    run.need(*kept)
    piece = run.make(f"d {name} in", run.e * n, reads=3 * run.e * n)
    chunk(run, "norm backward")
    run.drop(*[g] * (not keep))
    run.used(*kept)
    run.arrive(source, piece, run.e * n, owns=True)
    return run.gradient_of[source]


def gated(run: LayerForward, source: str) -> str:
    """Gate and up, both, then their product; kept are gate and up, or codes of them."""
    e, f, kind = run.e, run.f, run.training.activations
    gate = run.linear("gate_up_proj" if run.shape.fused else "gate_proj", source)
    up = gate if run.shape.fused else run.linear("up_proj", source)
    run.gate, run.up = gate, up
    both = tuple(dict.fromkeys((gate, up)))
    run.make("product", e * f, reads=2 * e * f)
    if run.grad:
        kept = both
        if kind != "fused":
            sizes = [*values_bytes(kind, f) * 2, *derivative_bytes(f) * (kind == "int4")]
            kept = tuple(run.make(f"gated unit, code {i}", size, reads=0.0) for i, size in enumerate(sizes))
        chunk(run, "gated")
        run.keep_for_backward("gated unit", *kept)
        run.stands_for["product"] = kept
        run.drop(*(kept if kind != "fused" else ()))
    run.drop(*both)
    out = run.linear("down_proj", "product")
    run.drop("product")
    return out


def gated_backward(run: LayerRun, g: str, source: str, *, keep: bool) -> None:
    e, f = run.e, run.f
    run.linear_backward("down_proj", g, "product", keep=keep)
    kept = run.kept_of("product")
    run.need(*kept)
    run.make("d gate", e * f, reads=2 * e * f)
    run.make("d up", e * f, reads=2 * e * f)
    chunk(run, "gated backward")
    if run.training.density:
        density_chunk(run)
    run.drop(run.gradient_of.pop("product"))
    run.used(*kept)
    if not run.shape.fused:
        run.linear_backward("up_proj", "d up", source)
        run.linear_backward("gate_proj", "d gate", source)
        return
    whole = run.make("d gate and up", 2 * e * f, reads=2 * e * f)
    run.drop("d gate", "d up")
    run.linear_backward("gate_up_proj", whole, source)


def density_chunk(run: LayerForward) -> None:
    """A few tensors in fp32, as large as a chunk, while the penalty's gradient is made."""
    each = {"autograd": 4 * FP32, "fused": run.e + 4 * FP32, "fp8": 28, "int4": 24}[run.training.activations]
    run.drop(run.make("a chunk of the penalty", 0.0, constant=CHUNK_ELEMENTS[run.device] * each))


def chunk(run: LayerForward, doing: str) -> None:
    """Made and freed while an operator runs."""
    if run.training.activations == "fused":
        each = {"norm": 8, "norm backward": 12, "gated": run.e}.get(doing, 2 * run.e)
    else:
        each = CHUNK_BYTES[run.training.activations][doing]
    run.drop(run.make("a chunk", 0.0, constant=CHUNK_ELEMENTS[run.device] * each))
