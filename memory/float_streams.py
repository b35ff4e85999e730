"""The published floating-point form of reversible streams: undone by division, within a tolerance.

Source: Liao et al., Make Pre-trained Model Reversible (MEFT), 2023, https://arxiv.org/abs/2306.00477: y1 = lambda x1 +
F(x2), y2 = beta x2 + G(y1). In the words of `memory.coupling`, whose wirings are the same:

    leap(f):    new = factor other + f(main);  main, other = new, main
    undone:     other, main = (main - f(other)) / factor, other

Streams are at least fp32, whatever layers compute in. Each layer undone multiplies their error
(`memory.amplification`), so that the streams before every k-th layer, the *anchors*, are stored whole: 8 bytes of an
element and k layers. Where backward comes to an anchor the streams computed back are compared with it, then given up
for it, so that every step measures the error that it had.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from farspan.errors import RunFailed

DRIFT_ALLOWED = 10.0
"""Times the tolerance that a step may miss an anchor by: anchors were placed by the first rows of a run."""


class StreamsDrift(RunFailed):
    """Streams that were computed back are further from what they were than the job allows."""


class FloatStreams:
    """The two streams between layers. fp32, or fp64 of an fp64 model, [1, s, d].

    Args:
        x: what the first layer reads, [1, s, d].
        leap_factors: what each leap of a layer multiplies the other stream by.
        add_factor: what an adapter's sum multiplies the stream by that it goes into.
    """

    def __init__(self, x: Tensor, leap_factors: tuple[float, ...], add_factor: float) -> None:
        self.leap_factors, self.add_factor, self.dtype = leap_factors, add_factor, x.dtype
        self.main = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        self.other = self.main.clone()
        self.worst = torch.zeros((), dtype=self.main.dtype, device=x.device)
        """The largest error that was seen at an anchor."""

    def floating(self, stream: Tensor) -> Tensor:
        """A stream as what layers read; never the stream itself, which changes in place."""
        return stream.to(self.dtype, copy=True)

    def leap(self, y: Tensor, place: int) -> None:
        """One step with the output of a layer's function number `place`. Nothing is lost that could be stored."""
        torch.add(y.detach(), self.other, alpha=self.leap_factors[place], out=self.other)
        self.main, self.other = self.other, self.main

    def leap_back(self, y: Tensor, side: Tensor | None, place: int) -> None:
        del side
        self.main, self.other = self.other, self.main
        torch.sub(self.other, y.detach(), out=self.other).div_(self.leap_factors[place])

    def add(self, stream: Tensor, y: Tensor | None, *, subtract: bool = False) -> None:
        """stream = factor stream + y, in place; `subtract` undoes it. None: there is no adapter."""
        if subtract:
            if y is not None:
                stream.sub_(y.detach())
            stream.div_(self.add_factor)
        else:
            stream.mul_(self.add_factor)
            if y is not None:
                stream.add_(y.detach())

    def settle(self, name: Literal["main", "other"], stored: Tensor) -> None:
        """Puts what was stored in the place of what was computed back, whose error is noted."""
        total = squared_error(getattr(self, name), stored)
        setattr(self, name, stored)
        self.worst = torch.maximum(self.worst, (total / stored[..., 0].numel()).sqrt())

    def check_anchors(self, tolerance: float, every: int) -> None:
        """After backward. Waits for the device.

        Raises:
            StreamsDrift: the streams missed an anchor by more than `DRIFT_ALLOWED` tolerances, or are not numbers.
        """
        error = float(self.worst)
        if not error <= DRIFT_ALLOWED * tolerance:
            raise StreamsDrift(
                f"hidden states computed back are off by {error:.2g}, where {tolerance:g} was to be kept",
                at="adapter.anchor_every",
                why=f"relative to their length, root mean square over the rows, at one of the anchors every {every} "
                "layers; the step was not applied",
                try_=f"--set adapter.anchor_every={max(1, every - 1)}, --set adapter.store=inputs, or "
                "--set adapter.form=exact, which has no such error",
            )

    def check(self) -> None:
        """Nothing overflows before the model does."""


def squared_error(back: Tensor, true: Tensor) -> Tensor:
    """Sum over the rows of |back - true|^2 / |true|^2, in back's dtype, []. `back` is used up."""
    off = torch.linalg.vector_norm(back.sub_(true), dim=-1)
    length = torch.linalg.vector_norm(true, dim=-1, dtype=back.dtype)
    return (off / length.clamp_min(torch.finfo(torch.float32).tiny)).square().sum()
