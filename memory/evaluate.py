"""What a placement costs: time, bytes on every tier and lane, before anything runs.

One micro-batch is walked through layer by layer, as `memory.plan` tells it: a compute lane, and four lanes that each
serve their jobs in the order these were asked for. Nothing is averaged, so a stall appears where it would happen; the
solver's search calls this, therefore plain numbers and no array library. It costs about a millisecond for 80 layers.
"""

from __future__ import annotations

from farspan.memory.plan import TIERS, LayerPlan, Placement, Rows
from farspan.memory.prediction import LANES, Interval, Lane, Parts, Prediction, Timeline, TransferLane
from farspan.memory.problem import LayerKind, PlanProblem


def share_bytes(total_bytes: int, part: int, whole: int) -> int:
    """Bytes of `part` of a tensor's `whole` rows, rounded up."""
    return -(-total_bytes * part // whole)


class LayerCost:
    """A layer's plan in bytes and seconds."""

    __slots__ = (
        "attention_s", "away", "device", "disk", "host", "inner_s", "keep", "o", "rebuild_bytes", "rebuild_s", "stored",
        "x_grows",
    )  # fmt: skip

    def __init__(self, kind: LayerKind, plan: LayerPlan, rows: int, attention_rows: int) -> None:
        self.keep = plan.keep
        self.device = self.host = self.disk = self.o = given = 0
        self.x_grows = 0
        """Bytes that x takes more when its codes have become rows."""
        self.away = 0.0
        """Bytes of the rows that leave the device, before they become codes."""
        self.inner_s = self.rebuild_s = kind.elementwise_s + kind.exchange_s
        if plan.x is not None:
            assert plan.x.stored == rows, f"{plan.x} of {rows} rows: a segment's head stores all rows of x"
            size = self._add(plan.x, kind.stored_x_bytes, kind.coded_x_bytes, rows)
            self.x_grows = kind.stored_x_bytes - size if kind.coded_x_bytes is not None else 0
        if plan.o.stored:
            assert kind.o_bytes and plan.o.stored <= attention_rows, (kind.name, plan.o)
            self.o = self._add(plan.o, kind.o_bytes, kind.coded_o_bytes, attention_rows)
        missing = 1.0 - plan.o.stored / attention_rows
        self.attention_s = kind.attention_forward_s * missing**kind.attention_growth
        assert plan.linear.keys() <= {linear.name for linear in kind.linear}, (kind.name, plan.linear)
        for linear in kind.linear:
            matmul_s = linear.matmul_s
            if (stored := plan.linear.get(linear.name)) is not None:
                assert stored.stored <= rows, (linear.name, stored)
                size = self._add(stored, linear.bytes, linear.coded_bytes, rows)
                given += 0 if linear.inner_only else size
                matmul_s *= 1.0 - stored.stored / rows
            self.inner_s += matmul_s
            self.rebuild_s += 0.0 if linear.inner_only else matmul_s
        self.stored = self.device + self.host + self.disk
        self.rebuild_bytes = max(0, kind.rebuild_peak_bytes - given)

    def _add(self, rows: Rows, total_bytes: int, coded_bytes: int | None, whole: int) -> int:
        away_bytes = total_bytes if coded_bytes is None else coded_bytes
        totals = (total_bytes, away_bytes, away_bytes)
        sizes = [share_bytes(total, rows.on(tier), whole) for tier, total in zip(TIERS, totals)]
        self.away += total_bytes * ((rows.host + rows.disk) / whole)
        self.device, self.host, self.disk = self.device + sizes[0], self.host + sizes[1], self.disk + sizes[2]
        return sum(sizes)


class Walk:
    """One micro-batch of a placement, walked from the first layer's forward to the last gradient."""

    def __init__(self, evaluator: Evaluator, placement: Placement, picture: bool = False) -> None:
        self.problem, self.kinds, self.placement = evaluator.problem, evaluator.kinds, placement
        self.costs = evaluator.costs(placement)
        self.seconds = dict.fromkeys(Parts.model_fields, 0.0)
        self.stall_s = dict.fromkeys(LANES, 0.0)
        self.moved = dict.fromkeys(LANES, 0)
        self.free_s = dict.fromkeys(LANES, 0.0)
        self.now_s = 0.0
        self.device = evaluator.fixed["device"] + self.problem.head.held_bytes
        self.peak, self.peak_at = 0, ("start", -1)
        self.leaving: list[tuple[float, int]] = []
        self.left = 0
        self.host_changes: list[tuple[float, int]] = []
        self.done: list[tuple[float, float]] = []
        self.copied_s: dict[int, float] = {}
        self.written_s: dict[int, float] = {}
        self.arrivals: dict[int, tuple[float, float]] = {}
        self.picture = picture
        self.intervals: list[tuple[Lane, float, float, str, int, int]] = []
        self.series: list[tuple[float, int]] = []
        self.running, self.ran_until_s = 0, 0.0
        accumulates = self.problem.micro_batches > 1
        self.gradients = 0 if accumulates else 1
        self.device += evaluator.gradient_bytes if accumulates else 0
        self.forward()
        self.loss_head()
        self.backward()
        self.end_of_micro_batch_s = self.now_s
        self.device = evaluator.fixed["device"] + evaluator.gradient_bytes
        self.moment("optimizer", -1, self.problem.head.step_peak_bytes, self.problem.head.step_s, "optimizer_s")
        self.host = evaluator.fixed["host"] + highest(self.host_changes)
        self.disk = evaluator.fixed["disk"] + self.moved["disk_write"]
        self.step_s = self.end_of_micro_batch_s * self.problem.micro_batches + self.problem.head.step_s

    @property
    def lanes_s(self) -> float:
        """Seconds that transfers keep their lanes busy, hidden or not: what to save where time is equal."""
        links = self.problem.links
        return sum(size / getattr(links, f"{lane}_bytes_per_s") for lane, size in self.moved.items())

    def saved_copies(self, out_bytes: int, back_bytes: int, part: str) -> float:
        """Compute copies saved tensors, whose room on the host is taken from now on: seconds."""
        if not out_bytes and not back_bytes:
            return 0.0
        links = self.problem.links
        self.host_changes.append((self.now_s, out_bytes))
        self.moved["copy_out"] += out_bytes
        self.moved["copy_in"] += back_bytes
        seconds = out_bytes / links.copy_out_bytes_per_s + back_bytes / links.copy_in_bytes_per_s
        self.seconds[part] += seconds
        return seconds

    def moment(self, what: str, layer: int, working: int, seconds: float, part: str, more_s: float = 0.0) -> None:
        """Runs one piece of compute; `working` bytes live as long as it does. The caller books what `more_s` is for."""
        while self.left < len(self.leaving) and self.leaving[self.left][0] <= self.now_s:
            self.device -= self.leaving[self.left][1]
            if self.picture:  # a copy may end while a piece of compute still has its working memory
                left_s, left_bytes = self.leaving[self.left]
                self.running -= left_bytes
                self.series.append((left_s, self.running if left_s < self.ran_until_s else self.device))
            self.left += 1
        if self.device + working > self.peak:
            self.peak, self.peak_at = self.device + working, (what, layer)
        self.seconds[part] += seconds
        end_s = self.now_s + seconds + more_s
        if self.picture:
            self.series += [(self.now_s, self.device + working), (end_s, self.device)]
            self.running, self.ran_until_s = self.device + working, end_s
            self.intervals.append(("compute", self.now_s, end_s, what, layer, 0))
        self.now_s = end_s

    def transfer(self, lane: TransferLane, ready_s: float, size: int, layer: int) -> tuple[float, float]:
        """Start and end of a job that may begin at `ready_s`."""
        start_s = max(ready_s, self.free_s[lane])
        end_s = self.free_s[lane] = start_s + size / getattr(self.problem.links, f"{lane}_bytes_per_s")
        self.moved[lane] += size
        if self.picture:
            self.intervals.append((lane, start_s, end_s, lane, layer, size))
        return start_s, end_s

    def wait(self, lane: TransferLane, until_s: float) -> None:
        if until_s > self.now_s:
            self.stall_s[lane] += until_s - self.now_s
            self.now_s = until_s

    def forward(self) -> None:
        frozen, slots = self.problem.frozen_below, self.placement.slots
        for layer, (kind, cost) in enumerate(zip(self.kinds, self.costs)):
            if len(self.done) > slots:
                copied_s, written_s = self.done[-slots - 1]
                self.wait("copy_out", copied_s)
                self.wait("disk_write", written_s)
            working, copies_s = kind.x_bytes + kind.forward_peak_bytes, 0.0
            if cost.keep and layer >= frozen:
                working = kind.x_bytes + kind.keep_bytes + kind.keep_forward_peak_bytes
                copies_s = self.saved_copies(kind.keep_host_bytes, 0, "forward_copies_s")
            coding_s = self.problem.coding_s(cost.away)[0] if layer >= frozen else 0.0
            self.seconds["forward_codes_s"] += coding_s
            more_s = kind.attention_forward_s + copies_s + coding_s
            self.moment("forward", layer, working, kind.forward_s, "forward_s", more_s)
            self.seconds["attention_forward_s"] += kind.attention_forward_s
            if layer >= frozen:
                self.device += kind.keep_bytes if cost.keep else cost.stored
                if cost.host + cost.disk:
                    self.copy_out(layer, cost)

    def copy_out(self, layer: int, cost: LayerCost) -> None:
        start_s, end_s = self.transfer("copy_out", self.now_s, cost.host + cost.disk, layer)
        self.leaving.append((end_s, cost.host + cost.disk))
        self.host_changes.append((start_s, cost.host + cost.disk))
        self.copied_s[layer] = self.written_s[layer] = end_s
        if cost.disk:
            _, self.written_s[layer] = self.transfer("disk_write", end_s, cost.disk, layer)
            self.host_changes.append((self.written_s[layer], -cost.disk))
        self.done.append((end_s, self.free_s["disk_write"]))

    def loss_head(self) -> None:
        head = self.problem.head
        self.units = self.placement.units()
        for unit in range(min(self.placement.prefetch + 1, len(self.units))):
            self.ask(unit)
        self.device += self.gradients * head.gradient_bytes
        self.moment("loss head", -1, head.peak_bytes, head.forward_s, "head_s")

    def ask(self, unit: int) -> None:
        """Starts a unit's way back to the device."""
        layers = self.units[unit]
        costs = [self.costs[layer] for layer in layers]
        host, disk = sum(c.host for c in costs), sum(c.disk for c in costs)
        if costs[0].keep or host + disk == 0:
            return
        self.device += host + disk
        read_from_s = arrived_s = 0.0
        if host:
            ready_s = max([self.now_s, *(self.copied_s[i] for i, c in zip(layers, costs) if c.host)])
            _, arrived_s = self.transfer("copy_in", ready_s, host, layers.start)
            self.host_changes.append((arrived_s, -host))
        if disk:
            ready_s = max([self.now_s, *(self.written_s[i] for i, c in zip(layers, costs) if c.disk)])
            start_s, read_s = self.transfer("disk_read", ready_s, disk, layers.start)
            read_from_s = read_s if read_s > self.free_s["copy_in"] else 0.0
            _, arrived_s = self.transfer("copy_in", read_s, disk, layers.start)
            self.host_changes += [(start_s, disk), (arrived_s, -disk)]
        self.arrivals[unit] = (read_from_s, arrived_s)

    def backward(self) -> None:
        prefetch, frozen = self.placement.prefetch, self.problem.frozen_below
        for unit, layers in enumerate(self.units):
            if 0 < unit < len(self.units) - prefetch:
                self.ask(unit + prefetch)
            # what is asked for lies beside rows still on their way out, and beside the gradient handed down
            self.moment("start", layers[-1], self.kinds[layers[-1]].x_bytes, 0.0, "backward_s")
            read_s, arrived_s = self.arrivals.get(unit, (0.0, 0.0))
            self.wait("disk_read", read_s)
            self.wait("copy_in", arrived_s)
            if self.costs[layers.start].keep:
                self.kept(layers.start)
            else:
                self.segment(layers)
        if self.units and frozen == 0:
            self.device += self.gradients * self.problem.head.embedding_gradient_bytes
            self.moment("embedding backward", -1, self.kinds[0].x_bytes, 0.0, "head_s")

    def kept(self, layer: int) -> None:
        kind = self.kinds[layer]
        self.device += self.gradients * kind.gradient_bytes
        more_s = kind.attention_backward_s + self.saved_copies(0, kind.keep_fetched_bytes, "backward_copies_s")
        self.moment("backward", layer, kind.keep_backward_peak_bytes, kind.backward_s, "backward_s", more_s)
        self.seconds["attention_backward_s"] += kind.attention_backward_s
        self.host_changes += [(self.now_s, -kind.keep_host_bytes)] * (kind.keep_host_bytes > 0)
        self.device -= kind.keep_bytes

    def segment(self, layers: range) -> None:
        """Inner forward, then rebuild and backward of each layer, last first."""
        inputs = self.placement.between == "xo"
        self.device += self.costs[layers.start].x_grows
        self.inner_forward(layers, first=True, keep_inputs=inputs)
        for layer in reversed(layers):
            if not inputs and layers.start < layer < layers[-1]:
                self.inner_forward(range(layers.start, layer + 1), first=False, keep_inputs=False)
            kind, cost = self.kinds[layer], self.costs[layer]
            own_input = 0 if layer == layers.start else kind.x_bytes
            self.device += self.gradients * kind.gradient_bytes
            attention_s = cost.attention_s if layer == layers[-1] or kind.o_bytes == 0 else 0.0
            self.seconds["rebuild_linear_s"] += cost.rebuild_s
            self.seconds["rebuild_attention_s"] += attention_s
            self.seconds["attention_backward_s"] += kind.attention_backward_s
            if layer == layers[-1]:
                self.device += kind.o_bytes - cost.o
            working = cost.rebuild_bytes + (0 if inputs else own_input)
            again_s = cost.rebuild_s + attention_s + kind.attention_backward_s
            coding_s = self.problem.coding_s(cost.away)[1]
            self.seconds["backward_codes_s"] += coding_s
            again_s += coding_s + self.saved_copies(
                kind.rebuild_host_bytes, kind.rebuild_fetched_bytes, "backward_copies_s"
            )
            self.moment("rebuild and backward", layer, working, kind.backward_s, "backward_s", again_s)
            self.host_changes += [(self.now_s, -kind.rebuild_host_bytes)] * (kind.rebuild_host_bytes > 0)
            self.device -= cost.stored + cost.x_grows + kind.o_bytes - cost.o + (own_input if inputs else 0)

    def inner_forward(self, layers: range, *, first: bool, keep_inputs: bool) -> None:
        """From the segment's head to the layer before `layers`' last, whose input it leaves."""
        gradient = self.kinds[layers[-1]].x_bytes
        for layer in layers[:-1]:
            kind, cost = self.kinds[layer], self.costs[layer]
            attention_s = cost.attention_s if first or kind.o_bytes == 0 else 0.0
            own_input = kind.x_bytes if layer > layers.start and not keep_inputs else 0
            # of a complete O that is there already, none is made
            working = gradient + own_input + kind.forward_peak_bytes - (0 if first else kind.o_bytes)
            self.moment("inner forward", layer, working, cost.inner_s, "inner_forward_s", attention_s)
            self.seconds["rebuild_attention_s"] += attention_s
            self.device += (kind.o_bytes - cost.o) if first else 0
            self.device += self.kinds[layer + 1].x_bytes if keep_inputs else 0


def highest(changes: list[tuple[float, int]]) -> int:
    """Highest sum over time; what ends at a moment makes room for what begins then."""
    level = top = 0
    for _, change in sorted(changes):
        level += change
        top = max(top, level)
    return top


class Evaluator:
    """`evaluate` for many placements of one problem."""

    def __init__(self, problem: PlanProblem) -> None:
        by_name = {kind.name: kind for kind in problem.kinds}
        self.problem = problem
        self.kinds = [by_name[name] for name in problem.layers]
        self.fixed = {tier: sum(s.bytes for s in problem.states if s.tier == tier) for tier in TIERS}
        head = problem.head
        trained = self.kinds[problem.frozen_below :]
        self.gradient_bytes = sum(kind.gradient_bytes for kind in trained) + head.gradient_bytes
        self.gradient_bytes += head.embedding_gradient_bytes if problem.frozen_below == 0 else 0
        budgets = problem.budgets
        self.limits = {"device": budgets.device_bytes, "host": budgets.host_bytes, "disk": budgets.disk_bytes}
        if budgets.disk_write_bytes is not None:
            self.limits["disk_write"] = budgets.disk_write_bytes
        self._costs: dict[tuple[int, str], tuple[LayerPlan, LayerCost]] = {}

    def costs(self, placement: Placement) -> list[LayerCost]:
        """Layers of a search differ in few places: what was worked out for a plan object is kept with it."""
        found = []
        for kind, plan in zip(self.kinds, placement.layers):
            key = (id(plan), kind.name)
            if key not in self._costs:
                self._costs[key] = plan, LayerCost(kind, plan, placement.rows, placement.attention_rows)
            found.append(self._costs[key][1])
        return found

    def saved_copies_s(self, kind: LayerKind) -> tuple[float, float]:
        """Seconds that compute copies saved tensors of a layer: kept, rebuilt."""
        out, back = self.problem.links.copy_out_bytes_per_s, self.problem.links.copy_in_bytes_per_s
        return (
            kind.keep_host_bytes / out + kind.keep_fetched_bytes / back,
            kind.rebuild_host_bytes / out + kind.rebuild_fetched_bytes / back,
        )

    def walk(self, placement: Placement, *, picture: bool = False) -> Walk:
        problem = self.problem
        assert (placement.rows, placement.attention_rows) == (problem.rows, problem.attention_rows), "other rows"
        assert len(placement.layers) == len(self.kinds), "other layers"
        assert placement.frozen_below == problem.frozen_below, "other layers frozen"
        assert placement.saved == problem.saved, "numbers for saved tensors elsewhere"
        assert placement.tier_codec == problem.tier_codec, "numbers for other codes"
        return Walk(self, placement, picture)

    def used(self, walk: Walk) -> dict[str, int]:
        return {"device": walk.peak, "host": walk.host, "disk": walk.disk, "disk_write": walk.moved["disk_write"]}

    def over(self, walk: Walk) -> dict[str, int]:
        used = self.used(walk)
        return {name: used[name] - limit for name, limit in self.limits.items() if used[name] > limit}

    def prediction(self, placement: Placement, *, timeline: bool = False) -> Prediction:
        walk = self.walk(placement, picture=timeline)
        times = self.problem.micro_batches
        seconds = {name: value * times for name, value in walk.seconds.items()}
        seconds["optimizer_s"] = self.problem.head.step_s
        stall_s = {lane: value * times for lane, value in walk.stall_s.items()}
        what, layer = walk.peak_at
        return Prediction(
            device_peak_bytes=walk.peak,
            device_peak_at=f"{what} of layer {layer}" if layer >= 0 else what,
            host_bytes=walk.host,
            disk_bytes=walk.disk,
            written_bytes=walk.moved["disk_write"],
            step_s=walk.step_s,
            parts=Parts.model_validate({**seconds, "stall_s": stall_s}),
            moved_bytes=walk.moved,
            over_bytes=self.over(walk),
            timeline=picture(walk, self.fixed["host"]) if timeline else None,
        )


def picture(walk: Walk, host_bytes: int) -> Timeline:
    """A walk's lanes and levels, in order of time."""
    host = [(0.0, host_bytes)]
    for time_s, change in sorted(walk.host_changes):
        host.append((time_s, host[-1][1] + change))
    return Timeline(
        intervals=tuple(
            Interval(
                lane=lane, start_s=start_s, end_s=end_s, label=f"{what} {layer}" if layer >= 0 else what, bytes=size
            )
            for lane, start_s, end_s, what, layer, size in walk.intervals
        ),
        device=tuple(sorted(walk.series, key=lambda point: point[0])),
        host=tuple(host),
    )


def evaluate(problem: PlanProblem, placement: Placement, *, timeline: bool = False) -> Prediction:
    """Predicts one optimizer step of `placement`, whether it fits or not.

    Bytes are absolute and per rank, model states included; seconds are of the whole step. With `timeline` the
    prediction carries every lane's intervals and the levels of device and host over time.
    """
    return Evaluator(problem.saving(placement.saved)).prediction(placement, timeline=timeline)
