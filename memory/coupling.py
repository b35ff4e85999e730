"""Reversible residual streams around the decoder layers of a model: what a layer reads is computed back from what it
left, so that only a few bits of it are stored.

Source: Liao et al., Make Pre-trained Model Reversible (MEFT), 2023, https://arxiv.org/abs/2306.00477. There two streams
are coupled in floating point, y1 = lambda x1 + F(x2), y2 = beta x2 + G(y1), and undone by division, which multiplies
the error about 12 times a layer. Here streams are integers (`kernels.reversible_streams`), lambda is 2^-bits, beta is
1, and the bits that the shift loses are stored: undoing is exact at any depth, in any precision of the layer itself,
as long as the layer gives the same bits for the same input.

All three wirings of the paper are one rule. Of the streams `main` and `other`, main is what the next function reads:

    leap(f):  new = (other >> bits) - (main >> bits) + round(f(main));   main, other = new, main

    wiring 1  leap(layer), then other += adapter(main)     F is the layer, G an adapter on its output
    wiring 2  main += adapter(other), then leap(layer)     F is an adapter, G the layer
    wiring 3  leap(attention half), leap(MLP half)         F and G are the halves, residual additions included

The subtraction is part of the paper's F. A pretrained layer has the identity inside, so that lambda x1 on top of it
would let hidden states grow by about lambda in every layer (760 times in 64 layers at 3 bits); with it a leap is
main = layer(main) - lambda (main - other), which departs from the model by a share of the last layer's change only.
The streams start equal; the model goes on with main, which carries the layer's output, and not with the average that
the paper takes.

The published form, with both factors and in floating point, is there too (`memory.float_streams`): nothing is taken
away, undoing divides, and the streams of every k-th layer are stored whole.

While the memory executor runs a layer (`memory.coupled_tape`) it does the steps itself. In any other call (evaluation,
generation) the layers' own forward does them, storing nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from farspan.errors import JobError, RunFailed
from farspan.kernels import reversible_streams as kernels
from farspan.memory.amplification import Wiring
from farspan.memory.float_streams import FloatStreams

Form = Literal["exact", "float"]
Store = Literal["bits", "inputs"]
Function = Callable[[Tensor], Tensor]
START_FRACTION = 16
"""Bits behind the point until a model's range is known."""
MOST_FRACTION = 20
HEADROOM = 16
"""Streams may grow to so many times the largest hidden state that was seen."""


class StreamOverflow(RunFailed):
    """A hidden state left the range of the fixed-point streams, or is not a number."""


class StreamsDiffer(RunFailed):
    """A layer gave other bits when it ran again."""


class Streams:
    """The two streams between layers. int32 [1, s, d]."""

    def __init__(self, x: Tensor, bits: int, fraction: int) -> None:
        self.bits, self.fraction, self.dtype = bits, fraction, x.dtype
        self.overflow = torch.zeros((), dtype=torch.int32, device=x.device)
        self.main = kernels.to_fixed(x, fraction, self.overflow)
        self.other = self.main.clone()

    def floating(self, stream: Tensor) -> Tensor:
        """A stream as what layers read."""
        return kernels.to_float(stream, self.fraction, self.dtype)

    def leap(self, y: Tensor, place: int = 0) -> Tensor:
        """One step with the function's output; returns the side bits. All places of a layer are alike."""
        side = kernels.advance_(self.other, self.main, y.detach(), self.bits, self.fraction, self.overflow)
        self.main, self.other = self.other, self.main
        return side

    def leap_back(self, y: Tensor, side: Tensor | None, place: int = 0) -> None:
        assert side is not None
        self.main, self.other = self.other, self.main
        kernels.retreat_(self.other, self.main, y.detach(), self.bits, self.fraction, side)

    def add(self, stream: Tensor, y: Tensor | None, *, subtract: bool = False) -> None:
        assert y is not None
        kernels.add_(stream, y.detach(), self.fraction, self.overflow, subtract=subtract)

    def check_start(self) -> None:
        """After backward has undone the first layer: both streams began as one. Waits for the device.

        Raises:
            StreamsDiffer: they are not equal, so that some layer did not give the same bits twice.
        """
        if not torch.equal(self.main, self.other):
            raise StreamsDiffer(
                "hidden states did not come back bit for bit in backward",
                at="adapter.store",
                why="the streams begin equal and were computed back to something else: a layer gave other bits the "
                "second time; the step was not applied",
                try_="--set adapter.store=inputs, which stores what layers read",
            )

    def check(self) -> None:
        """Waits for the device.

        Raises:
            StreamOverflow: something that was added did not fit.
        """
        if self.overflow.item():
            raise StreamOverflow(
                f"a hidden state is {kernels.LIMIT >> self.fraction} or more, or not a number",
                at="adapter.fraction_bits",
                why=f"reversible streams have {self.fraction} bits behind the point and 30 in all; the step was not "
                "applied",
                try_=f"--set adapter.fraction_bits={max(self.fraction - 4, 0)}, or a lower optim.lr",
            )


class Coupling:
    """The streams' wiring through the decoder layers of one model.

    Args:
        layers: decoder layers, bottom first. Their forward is replaced, on the instances.
        adapters: of each layer; None: without one. Called with a stream as floating point; no dropout inside.
        bits: lambda = 2^-bits; 1 to 8.
        form: `exact`: integers; `float`: the published form with `factors`, lambda and beta.
        anchor_every: of the float form, the layers from one whose streams are stored whole to the next.
        tolerance: relative error of streams that were computed back, at an anchor.

    Raises:
        JobError: the layers cannot be coupled this way.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        wiring: Wiring,
        bits: int,
        adapters: Sequence[nn.Module | None],
        store: Store = "bits",
        form: Form = "exact",
        factors: tuple[float, float] = (1.0, 1.0),
        anchor_every: int = 1,
        tolerance: float = 0.0,
    ) -> None:
        assert len(adapters) == len(layers)
        self.form, self.factors, self.tolerance = form, factors, tolerance
        self.anchor_every = self.anchors_planned = anchor_every
        lam, beta = factors
        by_wiring = {1: ((lam,), beta), 2: ((beta,), lam), 3: ((lam, beta), 1.0)}
        exact = ((2.0**-bits,) * (2 if wiring == 3 else 1), 1.0)
        self.leap_factors, self.add_factor = by_wiring[wiring] if form == "float" else exact
        """What a layer's leaps multiply the other stream by, and an adapter's sum the stream that it goes into."""
        self.layers, self.adapters, self.wiring, self.bits, self.store = list(layers), adapters, wiring, bits, store
        self.fraction = START_FRACTION
        self.on = True
        """Off: the layers run as if they were not coupled."""
        self.tested = False
        """In a self-test hidden states are random, and out of range where a model's own are not: not looked at."""
        self.observer: Callable[[int, Streams | FloatStreams], None] | None = None
        """Sees the streams before each layer: in forward, and again in backward when they have been computed back."""
        self.probe: Callable[[int, partial[Any], Streams | FloatStreams, bool], None] | None = None
        """Sees layers in forwards without autograd, with their own forward, before (False) and after (True) each."""
        self._running = False
        self._passing: Streams | FloatStreams | None = None
        self._halves = [halves(layer) for layer in layers] if wiring == 3 else []
        for index, layer in enumerate(layers):
            layer.forward = partial(self._forward, index, layer.forward)

    @property
    def leaps(self) -> int:
        """Steps of a layer that lose bits."""
        return 2 if self.wiring == 3 else 1

    def is_anchor(self, index: int, first: int = 0) -> bool:
        """Whether the streams before this layer are stored whole; the first that runs is one."""
        return index == first or index % self.anchor_every == 0

    def start(self, x: Tensor) -> Streams | FloatStreams:
        if self.form == "float":
            return FloatStreams(x.detach(), self.leap_factors, self.add_factor)
        width = x.shape[-1]
        if width % 8:
            raise JobError(
                f"a hidden size of {width} does not pack into bytes",
                at="adapter",
                why="side bits of 8 elements make whole bytes",
                try_="use another adapter with this model",
            )
        return Streams(x.detach(), self.bits, self.fraction)

    def functions(self, index: int, call: partial[Any]) -> tuple[Function, ...]:
        """What a layer leaps with. `call`: the layer's own forward, all arguments bound but hidden states."""
        if self.wiring < 3:
            return (call,)
        attention, mlp = self._halves[index]
        return partial(attention, **call.keywords), mlp

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, layers run as they are: whoever calls them does the steps."""
        before, self._running = self._running, True
        try:
            yield
        finally:
            self._running = before

    def _forward(self, index: int, whole: Function, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layers[index]
        hooked = layer.gradient_checkpointing and layer.training  # then it comes back through the executor
        if self._running or not self.on or hooked:
            return whole(hidden_states, *args, **kwargs)
        return self.pass_through(index, partial(whole, *args, **kwargs), hidden_states)

    def pass_through(self, index: int, call: partial[Any], x: Tensor) -> Tensor:
        """A layer in a forward that no backward will follow: its steps, nothing stored.

        Raises:
            JobError: autograd would want to follow.
        """
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.layers[index].parameters())
        ):
            raise JobError(
                "a reversible layer was called with autograd on and no executor",
                at=f"decoder layer {index}",
                why="gradients do not pass through integers; the memory executor carries them around",
                try_="call the model under torch.no_grad(), or train it through farspan.trainer",
            )
        if index == 0:
            self._passing = self.start(x)
        streams = self._passing
        assert streams is not None, "layers run in order"
        if self.probe is not None:
            self.probe(index, call, streams, False)
        self.before(index, streams)
        for place, function in enumerate(self.functions(index, call)):
            with self.running():
                y = function(streams.floating(streams.main))
            streams.leap(y, place)
        self.after(index, streams)
        if self.probe is not None:
            self.probe(index, call, streams, True)
        if index == len(self.layers) - 1:
            self._passing = None
            streams.check()
        return streams.floating(streams.main)

    def before(self, index: int, streams: Streams | FloatStreams) -> None:
        """Wiring 2's adapter."""
        if self.wiring == 2:
            self._add(index, streams, streams.main, streams.other)

    def after(self, index: int, streams: Streams | FloatStreams) -> None:
        """Wiring 1's adapter."""
        if self.wiring == 1:
            self._add(index, streams, streams.other, streams.main)

    @property
    def scales(self) -> bool:
        """Whether a layer without an adapter changes the stream that one would go into."""
        return self.add_factor != 1.0

    def _add(
        self, index: int, streams: Streams | FloatStreams, into: Tensor, read: Tensor, *, subtract: bool = False
    ) -> None:
        adapter = self.adapters[index]
        if adapter is not None or self.scales:
            with torch.no_grad():
                y = None if adapter is None else adapter(streams.floating(read))
                streams.add(into, y, subtract=subtract)

    def undo(self, index: int, call: partial[Any], streams: FloatStreams) -> None:
        """A layer's steps taken back without autograd."""
        with torch.no_grad(), self.running():
            if self.wiring == 1:
                self._add(index, streams, streams.other, streams.main, subtract=True)
            functions = self.functions(index, call)
            for place in reversed(range(len(functions))):
                streams.leap_back(functions[place](streams.floating(streams.other)), None, place)
            if self.wiring == 2:
                self._add(index, streams, streams.main, streams.other, subtract=True)


def fraction_for(largest: float) -> int:
    """Bits behind the point for hidden states up to `largest` in magnitude, with room to grow."""
    fraction = MOST_FRACTION
    while fraction > 0 and largest * HEADROOM >= kernels.LIMIT >> fraction:
        fraction -= 1
    return fraction


BEFORE = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
AFTER = {"self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"}
DROPOUTS = {"resid_attn_dropout", "resid_mlp_dropout"}


def halves(layer: Any) -> tuple[Callable[..., Tensor], Function]:
    """A decoder layer of transformers as its two residual halves, whose composition it is.

    Raises:
        JobError: it is built some other way.
    """
    parts = {name for name, _ in layer.named_children()} - DROPOUTS
    if parts not in (BEFORE, AFTER):
        raise JobError(
            f"a {type(layer).__name__} does not come apart into attention and MLP",
            at="adapter.wiring",
            why=f"it is made of {', '.join(sorted(parts))}",
            try_="--set adapter.wiring=1, which takes layers whole",
        )
    scale = getattr(layer, "residual_multiplier", None)
    norms = ("input_layernorm", "post_attention_layernorm") if parts == BEFORE else (None, None)
    norms_after = (None, None) if parts == BEFORE else ("post_attention_layernorm", "post_feedforward_layernorm")

    def through(name: str | None, x: Tensor) -> Tensor:
        module = getattr(layer, name, None) if name is not None else None
        return x if module is None else module(x)

    def added(x: Tensor, y: Tensor) -> Tensor:
        return x + y if scale is None else x + y * scale

    def attention(x: Tensor, **kwargs: Any) -> Tensor:
        y = layer.self_attn(hidden_states=through(norms[0], x), **kwargs)[0]
        return added(x, through("resid_attn_dropout", through(norms_after[0], y)))

    def mlp(x: Tensor) -> Tensor:
        y = layer.mlp(through(norms[1], x))
        return added(x, through("resid_mlp_dropout", through(norms_after[1], y)))

    return attention, mlp
