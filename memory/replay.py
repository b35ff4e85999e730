"""Replays a placement, event by event: what lies where at every moment of a step, and what waits for what.

The planner predicts time and peaks in closed form; a slip there is a run that does not fit. This module answers the
same questions a second way, from `memory.plan` and `memory.problem` alone: a step is written down as operations on five
lanes, a clock runs them, and a ledger records each block of memory as it comes and goes. 80 layers take up to 0.2 s:
too slow for a search, quick enough to check its result and to draw it.

Lanes run one operation at a time in the order of the program, as streams do, so more bandwidth is never slower. Where
another order is as good, or the contract says less, this is what is simulated:

- Time. `forward_s` contains its exchanges; `exchange_s` is what each inner and rebuilding forward adds. `inner_only`
  classes run in inner forwards, not in rebuilds. Stored rows shorten both, down to `elementwise_s`. A layer without O
  to give (`o_bytes` 0) runs its attention each time.
- Forward. Stored rows, x included, come to exist when their layer ends; until then they count as working memory. A
  layer is copied out tensor by tensor (x, o, linear classes in the order of the kind), host rows before disk rows. All
  layers, kept and frozen ones too, wait for `slots`; the head does not.
- Transfers. The source is freed when a transfer ends, the target exists from when it starts; on the device rows to
  come exist from when their unit is asked for. A unit's rows on host come in before those on disk.
- Asking. A unit starts, for `prefetch`, when its turn comes, before it waits: else `prefetch` 0 would wait for itself.
- Backward. The gradient handed down is a block of its own between operations and in inner forwards; in others it is in
  their peak. Parameter gradients exist from the start of the backward that first makes them to the optimizer's end. A
  first inner forward makes a complete O beside the stored rows; when it is repeated (`between="o"`) that O is held
  already, so its peak counts without it. Rebuild and backward of a layer share one block of working memory.
- Ends. The embedding's gradient takes no time; the gradient it is made from and `held_bytes` are there until then.
  With frozen layers it is not made; what the placement says of frozen layers is not looked at.
- Codes. Made within a layer's forward, read within its rebuild, as far as time goes. Those of x become rows when the
  first operation of their unit starts; those of O are freed when its complete O is there; those of linear classes
  count, like rows, as part of what the rebuild makes.
- Saved tensors on the host. All of a layer's are there from the start of its forward or rebuild. Copies are part of the
  operation that makes them: one time for a rebuild with its copies out, one for a backward with its copies back.
- Stalls. Waiting is divided along the way of rows (copy out, disk write, disk read, copy in): a lane gets what passes
  after the lanes before it are done until the last transfer waited for on it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from farspan.memory.plan import TIERS, Placement, Rows
from farspan.memory.problem import PlanProblem
from farspan.memory.replay_clock import TRANSFERS, Block, Blocks, Lane, Operation, Ran, run


class Replay(Ran):
    """One optimizer step: all micro-batches, then the optimizer. `lane_bytes` has what compute copied that way too."""

    def over_budget(self, problem: PlanProblem) -> list[str]:
        """One sentence for each budget of `problem` that is exceeded; empty: the placement fits."""
        amounts: list[tuple[str, int, int | None]] = [
            (f"{tier} at {peak.time_s:.6g} s, {peak.operation}", peak.bytes, getattr(problem.budgets, f"{tier}_bytes"))
            for tier, peak in self.peaks.items()
        ]
        written = self.lane_bytes["disk_write"] // problem.micro_batches
        amounts.append(("disk writes of a micro-batch", written, problem.budgets.disk_write_bytes))
        return [
            f"{what}: {amount} bytes, {amount - limit} more than the budget of {limit}"
            for what, amount, limit in amounts
            if limit is not None and amount > limit
        ]


def replay(problem: PlanProblem, placement: Placement) -> Replay:
    """Runs one optimizer step of `placement`, which must be one for `problem`, as `memory.plan` tells it."""
    program = _Program(problem.saving(placement.saved), placement)
    for _ in range(problem.micro_batches):
        program.micro_batch()
    step_s, step_peak_bytes, gradients = problem.head.step_s, problem.head.step_peak_bytes, program.gradients.values()
    program.compute("step", "optimizer step", step_s, step_peak_bytes, releases=list(gradients))
    ran = run(program.operations, [Block(state.tier, f"state {state.name}", state.bytes) for state in problem.states])
    moved = {lane: size + program.copied[lane] for lane, size in ran.lane_bytes.items()}
    return Replay(**{**vars(ran), "lane_bytes": moved})


class _Program:
    """The operations of a step in the order in which each lane is handed them."""

    def __init__(self, problem: PlanProblem, placement: Placement) -> None:
        self.problem, self.placement, self.bottom = problem, placement, problem.frozen_below
        self.kinds = [problem.kind(layer) for layer in range(len(problem.layers))]
        assert len(placement.layers) == len(self.kinds), (len(placement.layers), len(self.kinds))
        self.rows, self.attention_rows = problem.rows, problem.attention_rows
        assert (placement.rows, placement.attention_rows) == (self.rows, self.attention_rows)
        trained = range(self.bottom, len(self.kinds))
        heads = [layer for layer in trained if placement.layers[layer].head]
        assert not trained or heads[:1] == [self.bottom], "nothing below to recompute the first trained layer from"
        assert placement.tier_codec == problem.tier_codec, (placement.tier_codec, problem.tier_codec)
        self.units = [range(start, end) for start, end in zip(heads, [*heads[1:], trained.stop])][::-1]
        for unit in self.units:
            assert len(unit) == 1 or not placement.layers[unit.start].keep, (unit, "a kept layer heads no segment")
        self.rows_of: dict[Block, int] = {}
        """Bytes of the rows that a block of codes stands for."""
        self.stored = [self._stored_rows(layer) for layer in range(len(self.kinds))]
        self.operations: list[Operation] = []
        self.awaited: list[Operation] = []
        """Transfers for which the next computing operation waits."""
        self.reads: list[Block] = []
        """Codes of x that become rows when the next computing operation starts."""
        self.outward: dict[Block, list[Operation]] = {}
        self.gradients: dict[str, Block] = {}
        self.copied: dict[Lane, int] = dict.fromkeys(TRANSFERS, 0)
        """By compute, not by lanes."""

    def micro_batch(self) -> None:
        head, top, ahead = self.problem.head, len(self.kinds), self.placement.prefetch
        self.forward()
        arriving = [self.ask_for(unit) for unit in self.units[: ahead + 1]]
        made = self.gradient("head gradients", head.gradient_bytes)
        drops, leaves = [self.of(top, "input")], [self.of(top, "input gradient")]
        self.compute("head", "head", head.forward_s, head.peak_bytes, drops=drops, makes=made, leaves=leaves)
        for index, unit in enumerate(self.units):
            if index:
                arriving += [self.ask_for(later) for later in self.units[index + ahead : index + ahead + 1]]
            self.awaited, layer = arriving[index], unit.start
            if self.placement.layers[layer].keep:
                drops, peak_bytes = [self.of(layer + 1, "input gradient")], self.kinds[layer].keep_backward_peak_bytes
                kind = self.kinds[layer]
                releases = [self.of(layer, "kept"), _saved(layer, kind.keep_host_bytes)]
                self.backward(layer, kind.keep_fetched_bytes, peak_bytes, drops, releases)
            else:
                self.segment(unit)
        made = [] if self.bottom else self.gradient("embedding gradient", head.embedding_gradient_bytes)
        releases = [self.of(self.bottom, "input gradient"), _device("held", head.held_bytes)]
        self.compute("backward", "embedding backward", 0.0, makes=made, releases=releases)

    def forward(self) -> None:
        held = _device("held", self.problem.head.held_bytes)
        self.compute("forward", "embedding", 0.0, leaves=[held, self.of(0, "input")])
        under_way: deque[list[Operation]] = deque()
        for layer, (kind, plan) in enumerate(zip(self.kinds, self.placement.layers)):
            while len(under_way) > self.placement.slots:
                self.awaited += under_way.popleft()
            label, seconds = f"layer {layer} forward", kind.forward_s + kind.attention_forward_s
            kept = [self.of(layer, "kept")] if plan.keep and layer >= self.bottom else []
            if kept:
                kept.append(_saved(layer, kind.keep_host_bytes))
                seconds += self.copying_s("copy_out", kind.keep_host_bytes)
            if layer >= self.bottom:
                seconds += self.coding_s(layer)[0]
            peak_bytes = kind.keep_forward_peak_bytes if kept else kind.forward_peak_bytes
            releases, output = [self.of(layer, "input")], self.of(layer + 1, "input")
            leaves = [output, *(block._replace(tier="device") for block in self.stored[layer])]
            ran = self.compute("forward", label, seconds, peak_bytes, makes=kept, releases=releases, leaves=leaves)
            if away := [block for block in self.stored[layer] if block.tier != "device"]:
                under_way.append([operation for block in away for operation in self.send(block, ran)])

    def send(self, block: Block, ran: Operation) -> list[Operation]:
        """Copies rows to host, and on to disk if they lie there."""
        on_device, on_host = block._replace(tier="device"), block._replace(tier="host")
        way = self.outward[block] = [self.transfer("copy_out", block, [ran], [on_host], [on_device])]
        if block.tier == "disk":
            way.append(self.transfer("disk_write", block, [way[0]], [block], [on_host]))
        return way

    def ask_for(self, unit: range) -> list[Operation]:
        """Asks for the rows of a unit; returns all transfers on their way out and back."""
        away = [block for layer in unit for block in self.stored[layer] if block.tier != "device"]
        # it stands on the compute lane, which has come so far when it is asked, but does not wait for what is awaited
        ask = Operation("compute", "backward", f"ask for layer {unit.start}", 0.0, makes=[_fetched(b) for b in away])
        self.operations.append(ask)
        transfers: list[Operation] = []
        for block in sorted(away, key=lambda block: TIERS.index(block.tier)):
            way, on_host = self.outward.pop(block), block._replace(tier="host")
            if block.tier == "disk":
                way = [*way, self.transfer("disk_read", block, [ask, way[-1]], [on_host], [block])]
            transfers += [*way, self.transfer("copy_in", block, [ask, way[-1]], [], [on_host])]
        return transfers

    def segment(self, unit: range) -> None:
        self.reads = [block for block in self.stored[unit.start] if block.tensor == "x" and block in self.rows_of]
        for layer in reversed(unit):
            last = layer == unit[-1]
            if last or self.placement.between == "o":
                for inner in range(unit.start, layer):
                    self.inner_forward(inner, head=unit.start, first=last)
            self.rebuild(layer, head=unit.start, last=last)

    def inner_forward(self, layer: int, head: int, first: bool) -> None:
        """Runs a layer from its input to the next layer's: for the `first` time, or again with its O complete."""
        kind, leaves = self.kinds[layer], [self.of(layer + 1, "input")]
        releases = [self.of(layer, "input")] if self.placement.between == "o" and layer != head else []
        if first:
            leaves.append(self.of(layer, "complete o"))
            releases += [_fetched(block) for block in self.stored[layer] if block.tensor == "o"]
        work_bytes = kind.forward_peak_bytes - (0 if first else kind.o_bytes)
        assert work_bytes >= 0, (kind.name, "forward_peak_bytes has O included")
        label, seconds = f"layer {layer} inner forward", self.recompute_s(layer, inner=True, attention=first)
        self.compute("inner_forward", label, seconds, work_bytes, releases=releases, leaves=leaves)

    def rebuild(self, layer: int, head: int, last: bool) -> None:
        """Runs a layer with autograd and then its backward, after which nothing of it is left but gradients."""
        held = [self.at_hand(block) for block in self.stored[layer] if last or block.tensor != "o"]
        held += [] if layer == head else [self.of(layer, "input")]
        held += [] if last else [self.of(layer, "complete o")]
        kind = self.kinds[layer]
        stored_o_bytes = sum(block.bytes for block in self.stored[layer] if block.tensor == "o")
        completed_bytes = kind.o_bytes - stored_o_bytes if last else 0
        needed = {linear.name for linear in kind.linear if not linear.inner_only}
        given_bytes = sum(block.bytes for block in self.stored[layer] if block.tensor in needed)
        made_bytes = max(kind.rebuild_peak_bytes - given_bytes, 0) + completed_bytes
        work = _device(f"layer {layer} rebuild and backward", made_bytes)
        seconds = self.recompute_s(layer, inner=False, attention=last)
        seconds += self.copying_s("copy_out", kind.rebuild_host_bytes) + self.coding_s(layer)[1]
        drops, makes = [self.of(layer + 1, "input gradient")], [work, _saved(layer, kind.rebuild_host_bytes)]
        self.compute("rebuild", f"layer {layer} rebuild", seconds, drops=drops, makes=makes)
        self.backward(layer, kind.rebuild_fetched_bytes, releases=[*makes, *held])

    def backward(
        self, layer: int, fetched: int, work_bytes: int = 0, drops: Blocks = (), releases: Blocks = ()
    ) -> None:
        kind, label, leaves = self.kinds[layer], f"layer {layer} backward", [self.of(layer, "input gradient")]
        made = self.gradient(f"layer {layer} gradients", kind.gradient_bytes)
        seconds = kind.backward_s + kind.attention_backward_s + self.copying_s("copy_in", fetched)
        effects = {"drops": drops, "makes": made, "releases": releases, "leaves": leaves}
        self.compute("backward", label, seconds, work_bytes, **effects)

    def copying_s(self, lane: Literal["copy_out", "copy_in"], size_bytes: int) -> float:
        """Seconds that compute copies saved tensors."""
        self.copied[lane] += size_bytes
        return size_bytes / getattr(self.problem.links, f"{lane}_bytes_per_s")

    def coding_s(self, layer: int) -> tuple[float, float]:
        """Seconds that compute makes and reads the codes of a layer's rows."""
        plan, kind = self.placement.layers[layer], self.kinds[layer]
        shares = [((plan.x or Rows()), kind.stored_x_bytes, self.rows), (plan.o, kind.o_bytes, self.attention_rows)]
        shares += [(plan.linear.get(each.name, Rows()), each.bytes, self.rows) for each in kind.linear]
        return self.problem.coding_s(sum(size * ((rows.host + rows.disk) / whole) for rows, size, whole in shares))

    def at_hand(self, block: Block) -> Block:
        """Where a layer's rebuild finds stored rows."""
        if block.tensor != "x" or block not in self.rows_of:
            return _fetched(block)
        return _device(f"{block.label}, read", self.rows_of[block])

    def recompute_s(self, layer: int, inner: bool, attention: bool) -> float:
        """Seconds of one forward that takes stored rows as given, with or without its attention."""
        kind, plan = self.kinds[layer], self.placement.layers[layer]
        seconds = kind.forward_s
        for linear in kind.linear:
            given = plan.linear.get(linear.name, Rows()).stored / self.rows
            seconds -= linear.matmul_s * (given if inner or not linear.inner_only else 1.0)
        seconds = max(seconds, kind.elementwise_s) + kind.exchange_s
        if attention or not kind.o_bytes:
            share = 1 - plan.o.stored / self.attention_rows
            seconds += kind.attention_forward_s * share**kind.attention_growth
        return seconds

    def compute(self, cause: str, label: str, seconds: float, work_bytes: int = 0, **effects: Blocks) -> Operation:
        """Appends an operation on the compute lane that waits for what is awaited, with working memory of its own."""
        work, after, self.awaited = _device(f"{label} work", work_bytes), self.awaited, []
        effects["drops"] = [*effects.get("drops", ()), *map(_fetched, self.reads)]
        effects["makes"] = [*effects.get("makes", ()), *map(self.at_hand, self.reads), work]
        self.reads = []
        effects["releases"] = [work, *effects.get("releases", ())]
        self.operations.append(Operation("compute", cause, label, seconds, 0, after, **effects))
        return self.operations[-1]

    def transfer(
        self, lane: Lane, block: Block, after: Sequence[Operation], makes: Blocks, releases: Blocks
    ) -> Operation:
        label, seconds = f"{block.label}, {lane}", block.bytes / getattr(self.problem.links, f"{lane}_bytes_per_s")
        self.operations.append(Operation(lane, lane, label, seconds, block.bytes, after, (), makes, releases))
        return self.operations[-1]

    def gradient(self, label: str, size_bytes: int) -> list[Block]:
        """The block of a parameter gradient if this is the first time in the step that it is made, else nothing."""
        known, block = label in self.gradients, _device(label, size_bytes)
        return [] if known else [self.gradients.setdefault(label, block)]

    def of(self, layer: int, what: Literal["input", "input gradient", "complete o", "kept"]) -> Block:
        """A block of a layer. The input is the output of the layer below; one past the last layer: the head's."""
        kind = self.kinds[min(layer, len(self.kinds) - 1)]
        sizes = {"complete o": kind.o_bytes, "kept": kind.keep_bytes}
        return _device(f"layer {layer} {what}", sizes.get(what, kind.x_bytes))

    def _stored_rows(self, layer: int) -> list[Block]:
        """One block for each tensor and each tier that holds rows of it."""
        plan, kind = self.placement.layers[layer], self.kinds[layer]
        if plan.keep or layer < self.bottom:
            return []
        assert plan.x is None or plan.x.stored == self.rows, (layer, "x is stored whole or not at all")
        assert kind.o_bytes or not plan.o.stored, (layer, "there is no O to store")
        assert plan.linear.keys() <= {linear.name for linear in kind.linear}, (layer, sorted(plan.linear))
        tensors = [
            ("x", plan.x or Rows(), kind.stored_x_bytes, kind.coded_x_bytes, self.rows),
            ("o", plan.o, kind.o_bytes, kind.coded_o_bytes, self.attention_rows),
        ]
        tensors += [
            (each.name, plan.linear.get(each.name, Rows()), each.bytes, each.coded_bytes, self.rows)
            for each in kind.linear
        ]
        found = []
        for name, stored, size, coded, whole in tensors:
            for tier, (start, end) in stored.spans(whole).items():
                # cut at row bounds, so that the parts of a tensor sum to its bytes
                rows_bytes, codes_bytes = (
                    each * end // whole - each * start // whole for each in (size, size if coded is None else coded)
                )
                if not rows_bytes:
                    continue
                block = Block(tier, f"layer {layer} {name} on {tier}", rows_bytes, name)
                if tier != "device" and coded is not None:
                    block = block._replace(bytes=codes_bytes)
                    self.rows_of[block] = rows_bytes
                found.append(block)
        return found


def _device(label: str, size_bytes: int) -> Block:
    return Block("device", label, size_bytes)


def _saved(layer: int, size_bytes: int) -> Block:
    return Block("host", f"layer {layer} saved tensors", size_bytes)


def _fetched(block: Block) -> Block:
    """Where backward finds stored rows."""
    return block if block.tier == "device" else _device(f"{block.label}, fetched", block.bytes)
