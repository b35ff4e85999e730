"""How exactly the streams of a coupled model come back, measured: what decides where its anchors go.

A forward without autograd is followed layer by layer. From one anchor to the next its layers are undone at once, and
what comes out is compared with what was there: twice the time of a forward, and two more copies of the streams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farspan.memory.coupling import Coupling, Streams
from farspan.memory.float_streams import FloatStreams, squared_error


def anchor_errors(coupling: Coupling, run: Callable[[], object], every: int) -> Tensor:
    """What the streams before every so many layers are off by, after the layers up to the next were undone.

    Args:
        coupling: of the float form.
        run: calls the model once, without autograd.
        every: layers from one anchor to the next.

    Returns:
        of each stretch, and of both streams, the sum over this rank's rows of |error|^2 / |stream|^2, and the rows:
        fp64 [stretches, 2, 2].
    """
    assert coupling.form == "float"
    found: list[Tensor] = []
    calls: list[partial[Any]] = []
    before: list[Tensor] = []

    def look(index: int, call: partial[Any], streams: Streams | FloatStreams, ran: bool) -> None:
        assert isinstance(streams, FloatStreams)
        if not ran:
            if index % every == 0:
                calls.clear()
                before[:] = streams.main.clone(), streams.other.clone()
            return
        calls.append(call)
        if (index + 1) % every and index + 1 < len(coupling.layers):
            return
        main, other = streams.main, streams.other
        streams.main, streams.other = main.clone(), other.clone()
        for back, again in enumerate(reversed(calls)):
            coupling.undo(index - back, again, streams)
        pairs = zip((streams.main, streams.other), before)
        sums = torch.stack([squared_error(back, true) for back, true in pairs]).double()
        found.append(torch.stack([sums, torch.full_like(sums, before[0][..., 0].numel())], -1))
        streams.main, streams.other = main, other

    coupling.probe = look
    try:
        run()
    finally:
        coupling.probe = None
    return torch.stack(found)
