"""Queries, keys, values and outputs of attention in codes between ranks, and the bits of each channel learned (AMAQ).

What a rank sends to another one is rounded to a channel's bits and packed (`kernels.channel_codes`); its own part stays
as it is. Everything behind the exchange computes with what arrived, forward and in a rebuild alike, so rounding is part
of the step's mathematics; backward passes it by (straight through). A channel's gate Q gets the gradient that a step
size has in LSQ: with e = what arrived - what was sent and g its gradient, dL/dbits = -sum(g * e) * ln 2 * 2^n /
(2^n - 1), of some rows of each message only, since e would be as large as the message.

The paper adds a penalty on bits to the loss. Here the average is what a job asks for, by a shift of all gates after
each update: that is the penalty whose weight makes the budget come out. Gates are divided by the root mean square of
their gradients over the model and not by each one's own, as Adam does, which would push a channel that hardly matters
as far as one that does.

Source: AMAQ, 2025, https://arxiv.org/abs/2510.05468; step sizes: Esser et al., LSQ, 2019.

L layers, I items of a layer (H query heads, K of keys, K of values, H of outputs), D channels of an item.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.kernels.channel_codes.codes import Planes, decode, encode, rounding_error
from farspan.trainer.parallel.config import AMAQ

Items: TypeAlias = tuple[range, ...]
"""Which of a layer's items travel together, in order."""
ATTRIBUTE = "exchange_bits"
PROBED_ROWS = 128
"""Of a message, for the gradient of its channels' bits; up to twice as many."""
MOMENTUM, MEAN_SQUARE = 0.9, 0.99
FARTHEST = 6.0
"""|alpha * Q| at most: beyond it the sigmoid has no slope to come back by."""


class Exchanger(Protocol):
    """What `Ulysses` is to this module."""

    ranks: int
    rank: int
    lone: bool

    def all_to_all(self, recv: Tensor, send: Tensor, recv_counts: list[int], send_counts: list[int]) -> None: ...


@dataclass
class Traffic:
    """Bytes that this rank sent to others."""

    sent_bytes: int = 0
    exact_bytes: int = 0
    """What the same would have been as it was."""


@dataclass(frozen=True)
class Probe:
    """What one message's rounding did to some of its rows."""

    first: int
    """Of its items within what was sent."""
    items: Items
    error_NrD: Tensor


class LearnedBits:
    """Gates and bits of a model.

    Args:
        attentions: of the layers, bottom first.
        heads: query heads.
        device: where the model runs.
        steps: of the job.
        seed: of the rounding of gradients.
    """

    def __init__(
        self,
        config: AMAQ,
        attentions: Sequence[nn.Module],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        steps: int,
        seed: int,
    ) -> None:
        self.config, self.heads, self.kv_heads, self.device = config, heads, kv_heads, device
        self.steps, self.seed = steps, seed
        shape = len(attentions), 2 * (heads + kv_heads), head_dim
        share = (config.start - config.least) / (config.most - config.least)
        self.state = torch.zeros(2 * math.prod(shape) + 1)
        """fp32: gates, their momentum, and the mean square of their gradients; the same on all ranks."""
        parts = self.state[:-1].view(2, *shape)
        self.gates_LID, self.momentum_LID, self.mean_square = parts[0], parts[1], self.state[-1:]
        self.gates_LID.fill_(math.log(share / (1 - share)) / config.alpha)
        self.gradient_LID = torch.zeros(shape, device=device)
        """Of the loss by each channel's bits, of this rank's messages since the step began."""
        self.bits_LID = torch.zeros(shape, dtype=torch.int64)
        self.on, self.step, self.traffic = True, 0, Traffic()
        self.layers = [LayerBits(self, index) for index in range(len(attentions))]
        for attention, layer in zip(attentions, self.layers):
            setattr(attention, ATTRIBUTE, layer)
        self.begin(1)

    @staticmethod
    def of(
        layers: Sequence[nn.Module], config: Any, exchange: AMAQ, *, device: torch.device, steps: int, seed: int
    ) -> LearnedBits:
        """For the decoder layers of a transformers model of this configuration. Collective."""
        config = config.get_text_config()
        heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
        return LearnedBits(
            exchange,
            attention_layers(layers),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim or config.hidden_size // heads,
            device=device,
            steps=steps,
            seed=seed,
        )

    def mean_at(self, step: int) -> float:
        """Bits on average in a step, from 1."""
        falling = self.config.settle * self.steps
        done = min(1.0, (step - 1) / falling) if falling else 1.0
        return self.config.start + (self.config.bits - self.config.start) * done

    def begin(self, step: int) -> None:
        """Before a step: its bits, the same on all ranks. Collective."""
        self.step, self.traffic = step, Traffic()
        self.gradient_LID.zero_()
        self._shift(self.mean_at(step))
        bits_LID = whole_bits(self._bits()).to(torch.uint8)
        if dist.is_initialized() and dist.get_world_size() > 1:
            sent = bits_LID.to(self.device)
            dist.broadcast(sent, src=0)
            bits_LID = sent.cpu()
        self._use(bits_LID.long())

    @torch.no_grad()
    def update(self) -> None:
        """After a step: move the gates by their gradients, summed over all ranks. Collective."""
        if self.config.lr == 0:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.gradient_LID)
        config, share_LID = self.config, torch.sigmoid(self.config.alpha * self.gates_LID)
        slope_LID = (config.most - config.least) * config.alpha * share_LID * (1 - share_LID)
        gradient_LID = self.gradient_LID.cpu() * slope_LID
        self.mean_square.lerp_(gradient_LID.square().mean(), 1 - MEAN_SQUARE)
        size = math.sqrt(float(self.mean_square) / (1 - MEAN_SQUARE**self.step))
        if size > 0 and math.isfinite(size):
            self.momentum_LID.lerp_(gradient_LID / size, 1 - MOMENTUM)
            self.gates_LID -= config.lr / (1 - MOMENTUM**self.step) * self.momentum_LID
            self.gates_LID.clamp_(-FARTHEST / config.alpha, FARTHEST / config.alpha)

    def uniform(self, bits: float) -> None:
        """Give all channels the same bits, or the two numbers next to it; until the next step."""
        self._use(whole_bits(torch.full(self.bits_LID.shape, bits, dtype=torch.float64)))

    @contextlib.contextmanager
    def measured_against(self) -> Iterator[None]:
        """Inside, everything crosses as it is."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def _use(self, bits_LID: Tensor) -> None:
        if not torch.equal(bits_LID, self.bits_LID):
            self.bits_LID = bits_LID
            for layer in self.layers:
                layer.planes.clear()

    def _bits(self) -> Tensor:
        config = self.config
        return config.least + (config.most - config.least) * torch.sigmoid(config.alpha * self.gates_LID.double())

    def _shift(self, mean: float) -> None:
        """Add to all gates what makes bits come out on average."""
        config, gates = self.config, self.gates_LID.double()
        share = (mean - config.least) / (config.most - config.least)
        low, high = -4 * FARTHEST / config.alpha, 4 * FARTHEST / config.alpha
        for _ in range(50):
            middle = (low + high) / 2
            below = float(torch.sigmoid(config.alpha * (gates + middle)).mean()) < share
            low, high = (middle, high) if below else (low, middle)
        self.gates_LID += (low + high) / 2


@dataclass
class LayerBits:
    """One layer's part of `LearnedBits`."""

    model: LearnedBits
    index: int
    planes: dict[Items, Planes] = field(default_factory=dict)
    """Of the bits as they are, for items that travel together."""

    def inputs(self, query: range, kv: range) -> Items:
        """Items of some query heads and KV heads: queries, keys, values."""
        keys, values = self.model.heads, self.model.heads + self.model.kv_heads
        return query, range(keys + kv.start, keys + kv.stop), range(values + kv.start, values + kv.stop)

    def outputs(self, query: range) -> Items:
        """Items of some heads' outputs."""
        first = self.model.heads + 2 * self.model.kv_heads
        return (range(first + query.start, first + query.stop),)

    def exchange(
        self, ulysses: Exchanger, send_NBsD: Tensor, sent: list[Items], received: list[Items], *, learns: bool
    ) -> tuple[Tensor, list[Probe]]:
        """All-to-all of items, rounded to the nearest.

        Args:
            send_NBsD: items for each rank, one rank's after another's.
            sent: which these are.
            received: what each rank sends to this one.
            learns: keep what `exchange_gradients` needs for the gates.
        """
        probes: list[Probe] | None = [] if learns and self.model.config.lr > 0 else None
        recv = self._exchange(ulysses, send_NBsD, sent, received, noise=None, probes=probes)
        return recv, probes or []

    def exchange_gradients(
        self, ulysses: Exchanger, send_NBsD: Tensor, sent: list[Items], received: list[Items], probes: list[Probe]
    ) -> Tensor:
        """The way back of `exchange`, rounded at random; adds to the gates' gradients."""
        if self.model.config.gradients == "exact":
            counts = [[_count(items) for items in way] for way in (received, sent)]
            recv = send_NBsD.new_empty((sum(counts[0]), *send_NBsD.shape[1:]))
            ulysses.all_to_all(recv, send_NBsD.contiguous(), counts[0], counts[1])
            self._note(recv, sent, ulysses.rank, None)
        else:
            kind = "outputs" if len(sent[0]) == 1 else "inputs"
            noise = torch.Generator(send_NBsD.device).manual_seed(self._key(kind))
            recv = self._exchange(ulysses, send_NBsD, sent, received, noise=noise, probes=None)
        for probe in probes:
            g_NRD = _rows(recv[probe.first : probe.first + _count(probe.items)])
            every = _probed(g_NRD)
            slope_ND = (g_NRD[:, every].float() * probe.error_NrD).sum(1) * (g_NRD.shape[1] / probe.error_NrD.shape[1])
            levels_ND = self._planes(probe.items).levels_ND
            slope_ND *= -math.log(2) * (levels_ND + 1) / levels_ND
            at = 0
            for items in probe.items:
                self.model.gradient_LID[self.index, items.start : items.stop] += slope_ND[at : at + len(items)]
                at += len(items)
        return recv

    def _exchange(
        self,
        ulysses: Exchanger,
        send_NBsD: Tensor,
        sent: list[Items],
        received: list[Items],
        *,
        noise: torch.Generator | None,
        probes: list[Probe] | None,
    ) -> Tensor:
        rows = send_NBsD.shape[1] * send_NBsD.shape[2]
        out_bytes = self._message_bytes(sent, rows, ulysses.rank)
        messages = torch.empty(sum(out_bytes), dtype=torch.uint8, device=send_NBsD.device)
        blocks = send_NBsD.split([_count(items) for items in sent])
        first = 0
        for block, items, message in zip(blocks, sent, messages.split(out_bytes)):
            if len(message):
                planes, x_NRD = self._planes(items), _rows(block)
                encode(x_NRD, planes, message, noise)
                if probes is not None:
                    x_NrD = x_NRD[:, _probed(x_NRD)]
                    error_NrD = rounding_error(x_NrD, message, planes, rows).to(send_NBsD.dtype)
                    probes.append(Probe(first, items, error_NrD))
            first += len(block)
        self._note(send_NBsD, sent, ulysses.rank, len(messages))
        if ulysses.lone:
            return self._alone(ulysses, send_NBsD, messages.split(out_bytes), sent, received)
        in_bytes = self._message_bytes(received, rows, ulysses.rank)
        arrived = torch.empty(sum(in_bytes), dtype=torch.uint8, device=send_NBsD.device)
        ulysses.all_to_all(arrived, messages, in_bytes, out_bytes)
        del messages
        recv = send_NBsD.new_empty((sum(map(_count, received)), *send_NBsD.shape[1:]))
        parts = recv.split([_count(items) for items in received])
        for part, items, message in zip(parts, received, arrived.split(in_bytes)):
            if len(message):
                decode(message, self._planes(items), _rows(part))
        parts[ulysses.rank].copy_(blocks[ulysses.rank])
        return recv

    def _alone(
        self,
        ulysses: Exchanger,
        send_NBsD: Tensor,
        messages: Sequence[Tensor],
        sent: list[Items],
        received: list[Items],
    ) -> Tensor:
        """Without other ranks, for measuring: what would be sent is received, having been in codes."""
        rounded = send_NBsD.contiguous().clone()
        for part, items, message in zip(rounded.split([_count(items) for items in sent]), sent, messages):
            if len(message):
                decode(message, self._planes(items), _rows(part))
        recv = send_NBsD.new_empty((sum(map(_count, received)), *send_NBsD.shape[1:]))
        ulysses.all_to_all(recv, rounded, [_count(items) for items in received], [_count(items) for items in sent])
        return recv

    def _planes(self, items: Items) -> Planes:
        if items not in self.planes:
            bits_ND = torch.cat([self.model.bits_LID[self.index, r.start : r.stop] for r in items])
            self.planes[items] = Planes.of(bits_ND, self.model.device)
        return self.planes[items]

    def _message_bytes(self, items: list[Items], rows: int, rank: int) -> list[int]:
        """Of the message of each rank; a rank sends itself none."""
        return [0 if at == rank else self._planes(part).bytes(rows) for at, part in enumerate(items)]

    def _note(self, send: Tensor, sent: list[Items], rank: int, size_bytes: int | None) -> None:
        exact = sum(_count(items) for at, items in enumerate(sent) if at != rank) * send[0].nbytes
        self.model.traffic.exact_bytes += exact
        self.model.traffic.sent_bytes += exact if size_bytes is None else size_bytes

    def _key(self, kind: str) -> int:
        """Of the noise in this step and layer, another one on each rank."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        name = f"{self.model.seed} {self.model.step} {self.index} {kind} {rank}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())


def bits_of(attention: nn.Module) -> LayerBits | None:
    """Of a layer whose exchange is in codes at the moment: in training, and not while something is measured against."""
    found: LayerBits | None = getattr(attention, ATTRIBUTE, None)
    return found if found is not None and attention.training and found.model.on else None


def attention_layers(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of decoder layers that call the attention function, at most one of each."""
    found = []
    for layer in layers:
        found += [part for part in layer.modules() if hasattr(part, "num_key_value_groups")][:1]
    return found


def whole_bits(bits: Tensor) -> Tensor:
    """Whole numbers next to these, whose sum is theirs, rounded: the largest remainders are rounded up. int64."""
    below = bits.floor()
    remainder = (bits - below).flatten()
    up = round(float(remainder.sum()))
    found = below.flatten().long()
    found[remainder.argsort(descending=True, stable=True)[:up]] += 1
    return found.view(bits.shape)


def _count(items: Items) -> int:
    return sum(map(len, items))


def _rows(x_NBsD: Tensor) -> Tensor:
    """[N, B * s, D], a view where it can be one."""
    return x_NBsD.flatten(1, 2)


def _probed(x_NRD: Tensor) -> slice:
    """Rows as far from one another as gives about `PROBED_ROWS` of them."""
    return slice(None, None, max(1, x_NRD.shape[1] // PROBED_ROWS))
