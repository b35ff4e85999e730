"""What a decoder layer's attention and linear layers do while the executor runs it.

An unmodified layer calls its attention function and its linear layers as ever. While the executor runs the layer, a
`Frame` is active in the thread, and these calls go through it: a first forward hands over what is to be stored, a
rebuild takes the stored rows as given. Without a frame they compute as usual.

B batch, H query heads, K KV heads, S rows attention sees, s rows of this rank, D head size, C and N widths.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from farspan.kernels.attention import KnownRows, causal_attention
from farspan.kernels.prefix_attention import Prefix, prefixed_attention

TILED_MLP = "mlp"
"""Class of a whole MLP's output where it runs in row tiles; needed for the next layer's input only."""
HOLLOW = "down_proj"
"""The last linear layer of a decoder layer: when the layer is rebuilt nobody reads its output, only its inputs."""

DRAWS = "draws_in_training"
"""Attribute of modules that draw at random in training, dropout aside."""


@dataclass
class Frame:
    """One run of one layer."""

    known: Callable[[], KnownRows | None] | None = None
    """Makes the rows of O that need not be computed; None: all are."""
    attended: Callable[[Tensor, Tensor], None] | None = None
    """Receives O [B, H, S, D] and log-sum-exp [B, H, S]; None: nobody wants them."""
    given: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Makes the output of a linear layer, by class."""
    produced: Mapping[str, Callable[[Tensor], None]] = field(default_factory=dict)
    """Receives the output of a linear layer, by class."""
    caught: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], None] | None = None
    """Receives what attention is called with; for measurements."""
    hollow: frozenset[str] = frozenset()
    """Linear layers whose output nobody reads in this run."""
    again: bool = False
    """The layer will run once more with the outputs that are given now."""
    output_is_held: bool = False
    """Whether somebody keeps what the last linear layer returned: nobody may write into it then."""
    _rows: KnownRows | None = None

    def rows(self) -> KnownRows | None:
        """The known rows, made once."""
        if self._rows is None and self.known is not None:
            self._rows = self.known()
        return self._rows

    @contextmanager
    def active(self) -> Iterator[None]:
        before = getattr(_current, "frame", None)
        _current.frame = self
        try:
            yield
        finally:
            _current.frame = before


_current = threading.local()


def current() -> Frame | None:
    """The frame of the layer this thread runs, if any."""
    return getattr(_current, "frame", None)


def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Output of `causal_attention` or `prefixed_attention`, with stored rows as given where the frame has them."""
    frame = current()
    run: Callable[..., tuple[Tensor, Tensor]] = causal_attention
    if prefix is not None:
        run = partial(prefixed_attention, prefix=prefix)

    if frame is None:
        return run(q_BHSD, k_BKSD, v_BKSD, lengths=lengths, scale=scale, window=window)[0]
    if frame.caught is not None:
        frame.caught(q_BHSD, k_BKSD, v_BKSD, {"lengths": lengths, "scale": scale, "window": window})
    out, lse = run(q_BHSD, k_BKSD, v_BKSD, lengths=lengths, scale=scale, window=window, known=frame.rows())
    if frame.attended is not None:
        frame.attended(out, lse)
    return out


def known_output() -> Tensor | None:
    """All of O [B, H, S, D] where it is known and no gradient is wanted: then q, k and v need not be exchanged."""
    frame = current()
    known = frame.rows() if frame is not None and not torch.is_grad_enabled() else None
    if frame is None or known is None or known.first > 0:
        return None
    if frame.attended is not None:
        frame.attended(known.out_BHSD, known.lse_BHS)
    return known.out_BHSD


class _GivenLinear(torch.autograd.Function):
    """A linear layer whose output is at hand: no matmul forward, the usual two backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, layer: nn.Linear) -> Tensor:
        # the weight is looked up again in backward: under ZeRO-3 the tensor seen here is gone by then
        ctx.layer = layer
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy_BSN: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        dy_RN = dy_BSN.reshape(-1, dy_BSN.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy_RN @ ctx.layer.weight).view(*dy_BSN.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dw = dy_RN.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = dy_RN.sum(0)
        return dx, dw, db, None, None


def route_linear(layer: nn.Linear, name: str) -> None:
    """Send the calls of this linear layer through the active frame, on the instance, as class `name`.

    A layer that is not trained as a plain one has `node_of(x, y)`, which makes its node from an output at hand.
    """
    whole = layer.forward
    node_of: Callable[[Tensor, Tensor], Tensor] | None = getattr(layer, "node_of", None)

    def forward(x: Tensor) -> Tensor:
        frame = current()
        if frame is None:
            return whole(x)
        frame.output_is_held = name in frame.produced or (name in frame.given and frame.again)
        if name in frame.given or name in frame.hollow:
            y = frame.given[name]() if name in frame.given else x.new_empty((*x.shape[:-1], layer.out_features))
            if not torch.is_grad_enabled():
                return y
            if node_of is not None:
                return node_of(x, y)
            return _GivenLinear.apply(x, layer.weight, layer.bias, y, layer)
        y = whole(x)
        if name in frame.produced:
            frame.produced[name](y)
        return y

    layer.forward = forward  # type: ignore[method-assign, assignment]


def draws(module: nn.Module) -> bool:
    """Whether something in a module draws at random, so that a second run needs the generators as they were."""
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0) or getattr(part, DRAWS, False)
        for part in module.modules()
        if part.training
    )


def reads_last(layer: nn.Module) -> bool:
    """Whether the backward of a layer's last linear layer needs its own output."""
    last = linear_classes(layer).get(HOLLOW)
    return bool(getattr(last, "reads_output", False))


def linear_classes(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a decoder layer by class: the last part of their name, adapters' base layers included.

    Left out are names that stand for several linear layers (experts, say) and what runs in row tiles: there the rows
    of a call are not the rows of the layer.
    """
    found: dict[str, list[nn.Linear]] = {}
    tiled = [path for path, module in layer.named_modules() if getattr(module, "tiled_rows", None) is not None]
    for path, module in layer.named_modules():
        parts = path.split(".")
        if not isinstance(module, nn.Linear) or any(part.startswith("lora_") for part in parts):
            continue
        if any(path.startswith(f"{inside}.") for inside in tiled):
            continue
        name = parts[-2] if parts[-1] == "base_layer" else parts[-1]
        found.setdefault(name, []).append(module)
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1}
