"""How many rows of what lie where, for given segments: a linear program.

`Shape` fixes what makes the step's story non-linear: where segments start, which layers at the top are kept, how far
fetching runs ahead. Given it, every byte and second is linear in the shares of rows on each tier, but for the
recompute of attention, which is convex and is bounded from below by tangents. Consecutive units are joined to blocks
that share their variables (identical layers aggregated): a dozen blocks solve in a few milliseconds, one block per
unit is as fine as a placement. Stalls are the excess of a block's transfers over the compute they run beside. Where
time decides what is in flight the program assumes the steady state; `memory.evaluate` has the last word, and
`memory.solve` moves the budgets and solves again where it disagrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from farspan.memory.evaluate import Evaluator
from farspan.memory.milp import Program, Terms, alike, tangents
from farspan.memory.plan import TIERS
from farspan.memory.prediction import LANES
from farspan.memory.problem import LayerKind

SMALLEST_COST = 1e4
"""Step time is so many units of the objective: the solver's tolerance on it is absolute, 1e-7."""
IDLE = 1e-4
"""Price of a lane's second that compute hides: of plans that take equally long, the one that moves least."""


@dataclass(frozen=True)
class Shape:
    """What is decided before the rows are."""

    starts: tuple[int, ...]
    """First layer of each segment, bottom first."""
    kept_from: int
    """Layers from here to the top are kept."""
    between: Literal["xo", "o"] = "o"
    prefetch: int = 1
    slots: int = 2

    @cached_property
    def units(self) -> list[range]:
        """Segments in the order of backward."""
        ends = [*self.starts[1:], self.kept_from]
        return [range(start, end) for start, end in zip(self.starts, ends)][::-1]

    @property
    def longest(self) -> int:
        return max((len(unit) for unit in self.units), default=0)


def even_shape(
    evaluator: Evaluator, segments: int, kept: int, between: Literal["xo", "o"] = "o", prefetch: int = 1
) -> Shape:
    """Segments whose lengths differ by one at most, the longer ones at the bottom, where more memory is free again."""
    first, kept_from = evaluator.problem.frozen_below, len(evaluator.kinds) - kept
    layers = kept_from - first
    starts = tuple(first + -(-index * layers // segments) for index in range(segments)) if layers else ()
    return Shape(starts=starts, kept_from=kept_from, between=between, prefetch=prefetch)


@dataclass
class Share:
    """Columns of the layers of one kind in a block: shares on device, host and disk."""

    kind: LayerKind
    layers: list[int]
    x: list[int] | None = None
    o: list[int] | None = None
    linear: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Block:
    """Consecutive units, top first, whose layers of a kind store the same shares."""

    units: list[range]
    shares: dict[str, Share] = field(default_factory=dict)
    tier: dict[str, int] = field(default_factory=dict)
    """Columns: bytes of the block on each tier."""
    seconds: list[tuple[int, float]] = field(default_factory=list)
    """Backward of the block, rebuild and inner forward included: terms ..."""
    fixed_s: float = 0.0
    """... and what does not depend on them."""

    @property
    def layers(self) -> int:
        return sum(len(unit) for unit in self.units)


@dataclass
class Solved:
    """Shares by layer, and what the program thinks they cost (seconds of a micro-batch, or device bytes)."""

    value: float
    x: dict[int, np.ndarray]
    o: dict[int, np.ndarray]
    linear: dict[int, dict[str, np.ndarray]]


class RowProgram:
    """Rows on each tier for one shape, as a linear program.

    `limits` are bytes for `device`, `host`, `disk` and `disk_write`; the objective is time or, with
    `least_device`, the smallest device budget that would do.
    """

    def __init__(
        self, evaluator: Evaluator, shape: Shape, limits: Mapping[str, float], *, blocks: int = 12, pieces: int = 16
    ) -> None:
        self.evaluator, self.shape, self.limits, self.pieces = evaluator, shape, limits, pieces
        problem = evaluator.problem
        self.problem, self.kinds = problem, evaluator.kinds
        self.unit_bytes = float(max(1, *evaluator.limits.values()))
        self.unit_s = sum(
            k.forward_s + k.attention_forward_s + k.backward_s + k.attention_backward_s for k in self.kinds
        )
        self.unit_s = self.unit_s / SMALLEST_COST or 1.0
        self.program = Program()
        count = min(blocks, len(shape.units))
        cuts = [index * len(shape.units) // count for index in range(count + 1)] if count else []
        self.blocks = [Block(units=shape.units[a:b]) for a, b in pairwise(cuts)]

    def solve(self, *, least_device: bool = False) -> Solved | None:
        self.timeless = least_device
        self.device = self.program.column(lower=0.0, cost=1.0 if least_device else 0.0)
        if not least_device:
            self.program.upper[self.device] = self.limits["device"] / self.unit_bytes
        self.constant_s = 0.0
        for block in self.blocks:
            self._columns(block)
        self._capacity()
        self._device_rows()
        if not least_device:
            self._stalls()
        found = self.program.solve()
        return self._shares(*found) if found else None

    def _second(self, cost: float) -> float:
        return 0.0 if self.timeless else cost / self.unit_s

    def _columns(self, block: Block) -> None:
        """Columns of a block, and what they cost in time and bytes."""
        in_bytes: dict[str, list[tuple[int, float]]] = {tier: [] for tier in TIERS}
        for unit in block.units:
            for layer in unit:
                kind = self.kinds[layer]
                block.shares.setdefault(kind.name, Share(kind, [])).layers.append(layer)
        last = {layer: unit[-1] for unit in block.units for layer in unit}
        heads = {unit.start for unit in block.units}
        for share in block.shares.values():
            kind, count = share.kind, len(share.layers)
            passes = sum(last[n] - n if self.shape.between == "o" else n < last[n] for n in share.layers)
            block.fixed_s += count * (kind.backward_s + kind.attention_backward_s)
            block.fixed_s += (passes + count) * (kind.elementwise_s + kind.exchange_s)
            block.fixed_s += count * self.evaluator.saved_copies_s(kind)[1]
            if in_heads := sum(n in heads for n in share.layers):
                sizes = [in_heads * kind.x_bytes_on(tier) for tier in TIERS]
                share.x = self._stored(in_bytes, sizes, whole=True)
            if kind.o_bytes:
                share.o = self._stored(in_bytes, [count * kind.o_bytes_on(tier) for tier in TIERS])
                self._attention(block, share)
            else:
                block.fixed_s += (passes + count) * kind.attention_forward_s
            for linears in alike(kind.linear):
                runs = passes + (0 if linears[0].inner_only else count)
                again_s = runs * sum(c.matmul_s for c in linears)
                block.fixed_s += again_s
                if again_s and not self.timeless:
                    sizes = [count * sum(c.bytes_on(tier) for c in linears) for tier in TIERS]
                    columns = self._stored(in_bytes, sizes, saved_s=again_s)
                    block.seconds += [(column, -again_s) for column in columns]
                    share.linear |= {linear.name: columns for linear in linears}
        self.constant_s += block.fixed_s
        block.tier = {tier: self.program.total(in_bytes[tier]) for tier in TIERS}
        for tier, lanes in (("host", LANES[:2]), ("disk", LANES)):
            lanes_s = sum(1 / getattr(self.problem.links, f"{lane}_bytes_per_s") for lane in lanes)
            self.program.cost[block.tier[tier]] = self._second(IDLE * lanes_s * self.unit_bytes)

    def _stored(
        self,
        in_bytes: dict[str, list[tuple[int, float]]],
        sizes: list[int],
        *,
        whole: bool = False,
        saved_s: float = 0.0,
    ) -> list[int]:
        """`sizes` of all rows on each tier; `saved_s` by having all of them."""
        columns = [self.program.column(1.0, -self._second(saved_s)) for _ in TIERS]
        self.program.row([(c, 1.0) for c in columns], lower=1.0 if whole else 0.0, upper=1.0)
        for tier, size, column in zip(TIERS, sizes, columns):
            in_bytes[tier].append((column, size / self.unit_bytes))
            if tier != "device":
                self.program.cost[column] += self._second(sum(self.problem.coding_s(sizes[0])))
        return columns

    def _attention(self, block: Block, share: Share) -> None:
        """Attention of rows not stored: `share ** growth` of the whole, from below by tangents."""
        assert share.o is not None
        all_s = len(share.layers) * share.kind.attention_forward_s
        if not all_s or self.timeless:
            block.fixed_s += all_s
            return
        again = self.program.column(1.0, self._second(all_s))
        for slope, intercept in tangents(share.kind.attention_growth, self.pieces):
            self.program.row([(again, 1.0), *((c, slope) for c in share.o)], lower=intercept + slope)
        block.seconds.append((again, all_s))

    def _capacity(self) -> None:
        """Host with staging, disk, and columns for what the blocks from here down hold."""
        program, fixed = self.program, self.evaluator.fixed
        room = {tier: (self.limits[tier] - fixed[tier]) / self.unit_bytes for tier in ("host", "disk")}
        if "disk_write" in self.limits:
            room["disk"] = min(room["disk"], self.limits["disk_write"] / self.unit_bytes)
        program.row([(block.tier["disk"], 1.0) for block in self.blocks], upper=room["disk"])
        kept = self.kinds[self.shape.kept_from :]
        in_rebuild = room["host"]
        room["host"] -= sum(kind.keep_host_bytes for kind in kept) / self.unit_bytes
        self.below: list[int] = [program.column(0.0)]
        host = program.column(0.0)
        for block in reversed(self.blocks):
            self.below.append(program.total([(self.below[-1], 1.0), (block.tier["device"], 1.0)]))
            saved = max(share.kind.rebuild_host_bytes for share in block.shares.values()) / self.unit_bytes
            if saved:  # the unit that is rebuilt has come back
                own = 1 - 1 / len(block.units)
                program.row([(host, 1.0), (block.tier["host"], own)], upper=in_rebuild - saved)
            host = program.total([(host, 1.0), (block.tier["host"], 1.0)])
            staged = max(
                min(2, block.layers) / block.layers, min(self.shape.prefetch + 1, len(block.units)) / len(block.units)
            )
            program.row([(host, 1.0), (block.tier["disk"], staged)], upper=room["host"])
        self.below.reverse()

    def _fetched(self, index: int, units: int) -> list[tuple[int, float]]:
        """Bytes on their way back while a block's first (`units`: last so many) units run."""
        ahead = self.shape.prefetch + 1
        terms: list[tuple[int, float]] = []
        for block in self.blocks[index:]:
            taken = min(units, ahead, len(block.units))
            terms += [(block.tier[tier], taken / len(block.units)) for tier in ("host", "disk") if taken]
            ahead -= taken
            units = ahead
        return terms

    def _fit(self, terms: Terms, held_bytes: float) -> None:
        self.program.row([*terms, (self.device, -1.0)], upper=-held_bytes / self.unit_bytes)

    def _device_rows(self) -> None:
        """Device bytes at the moments that can be the highest."""
        evaluator, head, shape, kinds = self.evaluator, self.problem.head, self.shape, self.kinds
        accumulates = self.problem.micro_batches > 1
        base = evaluator.fixed["device"] + head.held_bytes + (evaluator.gradient_bytes if accumulates else 0)
        self._fit([], evaluator.fixed["device"] + evaluator.gradient_bytes + head.step_peak_bytes)
        stack = [(self.below[0], 1.0)]
        kept = kinds[shape.kept_from :]
        kept_bytes = sum(kind.keep_bytes for kind in kept)
        top, last = (self.blocks[0] if self.blocks else None), kinds[-1]
        leaving: list[tuple[int, float]] = []
        if top is not None and not kept:
            leaving = [(top.tier[tier], 1 / top.layers) for tier in ("host", "disk")]
            own = [(top.tier[tier], -1 / top.layers) for tier in TIERS]
            self._fit([*stack, *own, *leaving], base + last.x_bytes + last.forward_peak_bytes)
        elif kept:
            self._fit(stack, base + kept_bytes + last.x_bytes + last.keep_forward_peak_bytes)
        base += 0 if accumulates else head.gradient_bytes
        early = shape.prefetch + 1 - len(kept)
        asked = self._first_asked(early)
        self._fit([*stack, *leaving, *asked], base + kept_bytes + head.peak_bytes)
        for count, kind in enumerate(reversed(kept)):
            base += 0 if accumulates else kind.gradient_bytes
            if count in (0, len(kept) - 1):
                asked = self._first_asked(shape.prefetch + 1 - (len(kept) - count))
                self._fit([*stack, *asked], base + kept_bytes + kind.keep_backward_peak_bytes)
            kept_bytes -= kind.keep_bytes
        for index, block in enumerate(self.blocks):
            gradients = [0 if accumulates else sum(kinds[n].gradient_bytes for n in unit) for unit in block.units]
            upper = [(self.below[index], 1.0), *self._fetched(index, len(block.units))]
            one = [(self.below[index + 1], 1.0), (block.tier["device"], 1 / len(block.units))]
            transients = self._transients(block)
            for released, transient in transients:
                self._fit([*upper, *released], base + transient + gradients[0])
            base += sum(gradients)
            for released, transient in transients if len(block.units) > 1 else ():
                self._fit([*one, *self._fetched(index, 1), *released], base + transient)

    def _first_asked(self, units: int) -> list[tuple[int, float]]:
        """Bytes of the first so many units, when these are on their way before the first of them starts."""
        terms: list[tuple[int, float]] = []
        for block in self.blocks:
            taken = min(max(units, 0), len(block.units))
            terms += [(block.tier[tier], taken / len(block.units)) for tier in ("host", "disk") if taken]
            units -= taken
        return terms

    def _transients(self, block: Block) -> list[tuple[list[tuple[int, float]], float]]:
        """What a unit needs beside stored rows: at the rebuild of its last layer, and in its inner forward before."""
        kinds, rebuild, forward = self.kinds, 0.0, 0.0
        for unit in block.units:
            inner, last = unit[:-1], kinds[unit[-1]]
            inputs = sum(kinds[n].x_bytes for n in (unit[1:] if self.shape.between == "xo" else unit[1:][-1:]))
            whole = sum(kinds[n].o_bytes for n in unit) + inputs
            rebuild = max(rebuild, whole + last.rebuild_peak_bytes)
            running = max((kinds[n].forward_peak_bytes for n in inner), default=0)
            forward = max(forward, whole + running + last.x_bytes if inner else 0)
        complete: list[tuple[int, float]] = []
        given: list[tuple[int, float]] = []
        tops = [unit[-1] for unit in block.units]
        share_of_units = 1 / len(block.units) / self.unit_bytes
        for share in block.shares.values():
            if share.o is not None:
                layers = share_of_units * len(share.layers)
                complete += [(c, -layers * share.kind.o_bytes_on(tier)) for tier, c in zip(TIERS, share.o)]
            if share.x is not None and share.kind.coded_x_bytes is not None:
                heads = share_of_units * sum(unit.start in share.layers for unit in block.units)
                grows = heads * (share.kind.stored_x_bytes - share.kind.coded_x_bytes)
                complete += [(column, grows) for column in share.x[1:]]
            rebuilt = sum(top in share.layers for top in tops)
            for linear in share.kind.linear:
                if rebuilt and not linear.inner_only:
                    columns = zip(TIERS, share.linear.get(linear.name, ()))
                    given += [(c, -share_of_units * rebuilt * linear.bytes_on(tier)) for tier, c in columns]
        found = [([*complete, *given], rebuild)]
        return [*found, (complete, forward)] if forward else found

    def _stalls(self) -> None:
        """Excess of a block's transfers over the compute beside them."""
        links, kinds, prefetch = self.problem.links, self.kinds, self.shape.prefetch
        rate = {lane: getattr(links, f"{lane}_bytes_per_s") * self.unit_s / self.unit_bytes for lane in LANES}
        kept = kinds[self.shape.kept_from :]
        after_s = self.problem.head.forward_s + sum(k.forward_s + k.attention_forward_s for k in kept)
        before_s = sum(k.backward_s + k.attention_backward_s for k in kept[:prefetch])
        before_s += self.problem.head.forward_s if len(kept) < max(prefetch, 1) else 0.0
        window: list[tuple[int, float]] = []
        for block in self.blocks:
            host, disk = block.tier["host"], block.tier["disk"]
            # a layer's rows leave while the layers above it run
            own_s = [kinds[n].forward_s + kinds[n].attention_forward_s for unit in block.units for n in unit]
            lowest = kinds[block.units[-1].start]
            forward_s = after_s + sum(own_s) - (lowest.forward_s + lowest.attention_forward_s)
            after_s = lowest.forward_s + lowest.attention_forward_s
            waited = self.program.column(cost=1.0)
            for terms in (
                [(host, 1 / rate["copy_out"]), (disk, 1 / rate["copy_out"])],
                [(disk, 1 / rate["disk_write"])],
            ):
                self.program.row([*terms, (waited, -1.0)], upper=forward_s / self.unit_s)
            arriving = [(host, 1 / rate["copy_in"]), (disk, 1 / rate["copy_in"])]
            waited = self.program.column(cost=1.0)
            if prefetch == 0:
                self.program.row([*arriving, (disk, 1 / rate["disk_read"]), (waited, -1.0)], upper=0.0)
                continue
            own = max(0, len(block.units) - prefetch) / len(block.units)
            beside_s = before_s + own * block.fixed_s
            window += [(column, own * seconds) for column, seconds in block.seconds]
            beside = [(column, -seconds / self.unit_s) for column, seconds in window]
            for terms in (arriving, [(disk, 1 / rate["disk_read"])]):
                self.program.row([*terms, *beside, (waited, -1.0)], upper=beside_s / self.unit_s)
            tail = min(prefetch, len(block.units)) / len(block.units)
            before_s = tail * block.fixed_s
            window = [(column, tail * seconds) for column, seconds in block.seconds]

    def _shares(self, value: float, columns: np.ndarray) -> Solved:
        solved = Solved(value * self.unit_bytes, {}, {}, {})
        if not self.timeless:
            kept = self.kinds[self.shape.kept_from :]
            solved.value = value * self.unit_s + self.constant_s + self.problem.head.forward_s
            solved.value += sum(kind.forward_s + kind.attention_forward_s for kind in self.kinds)
            solved.value += sum(kind.backward_s + kind.attention_backward_s for kind in kept)
            solved.value += sum(self.evaluator.saved_copies_s(kind)[0] for kind in kept)
        heads = set(self.shape.starts)
        for share in (share for block in self.blocks for share in block.shares.values()):
            for layer in share.layers:
                if layer in heads and share.x:
                    solved.x[layer] = columns[share.x]
                if share.o:
                    solved.o[layer] = columns[share.o]
                solved.linear[layer] = {name: columns[stored] for name, stored in share.linear.items()}
        return solved
