"""The plan of a problem: the fastest placement found, how far from the best possible it can be, and what is in the way.

Shapes (segment lengths, kept layers, prefetch) are enumerated and climbed, each judged by a linear program over rows
(`memory.row_program`); the best become placements of whole blocks, are walked by `memory.evaluate`, and where that
disagrees with the program its budgets are moved by the difference and it is solved again. Nothing is returned that the
walk says is over a budget. The order is fixed and no clock is read but for the time limit: a problem has one plan.
80 layers take about a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from farspan.memory.capacity import ROUNDS, does_not_fit, least_device, smallest_device
from farspan.memory.climb import climb, lengths, topped
from farspan.memory.evaluate import Evaluator, Walk, evaluate
from farspan.memory.milp import INFINITY, Bound, bound
from farspan.memory.plan import Placement
from farspan.memory.policies import fixed_policies, fixed_policy
from farspan.memory.polish import Key, best_near, decode
from farspan.memory.prediction import Prediction
from farspan.memory.problem import PlanProblem
from farspan.memory.row_program import RowProgram, Shape, even_shape
from farspan.schema import Schema

SLOTS = (2, 3, 4)
"""Layers in flight that are tried."""
FEW_LAYERS, FEW_SHAPES = 4, 12
"""So few layers make programs coarse and walks cheap: that many shapes become placements."""
CLIMBS = (60, 40, 40, 20)
"""Shapes tried in climbing from the best one, and from the best of other lengths and prefetches."""


class Alternative(Schema):
    """Another plan and what it would cost."""

    kind: str
    step_s: float
    placement: Placement


class Solution(Schema):
    """A plan and how sure one can be of it."""

    kind: str
    """In words: what sort of plan it is."""
    placement: Placement
    prediction: Prediction
    bound_s: float
    """No placement takes less than this."""
    gap: float
    """`step_s` over `bound_s`, less one."""
    segment: int
    """Layers of the longest segment; 0 when every layer is kept."""
    next_best: Alternative | None
    """The best feasible plan of a different kind that was seen."""
    bottleneck: str
    solve_s: float


@dataclass(frozen=True)
class Candidate:
    """A feasible placement."""

    kind: str
    family: tuple[object, ...]
    """Where saved tensors wait; a fixed policy's name, or the layers of the longest segment."""
    placement: Placement
    step_s: float
    lanes_s: float

    def named(self) -> Alternative:
        return Alternative(kind=self.kind, step_s=self.step_s, placement=self.placement)

    @property
    def order(self) -> tuple[float, float]:
        return same_s(self.step_s, digits=6), self.lanes_s


def solve(problem: PlanProblem, *, gap: float = 1e-4, time_limit_s: float = 10.0) -> Solution:
    """The fastest feasible placement found.

    Stops when within `gap` of the lower bound or, between two programs, after `time_limit_s` of this thread's own work
    (a busy machine does not change the plan). Raises DoesNotFit, naming the smallest device budget that would do.
    """
    started_s, until_s = time.monotonic(), time.thread_time() + time_limit_s
    search = Search(problem, gap, until_s)
    search.run()
    found, bound_s = search.found, search.bound_s
    if problem.saved == "device" and problem.can_save_on_host:
        on_host = Search(problem.saving("host"), gap, until_s)
        fastest_s = min((candidate.step_s for candidate in found), default=INFINITY)
        if on_host.can_beat(fastest_s):
            on_host.run()
            found, bound_s = found + on_host.found, min(bound_s, on_host.bound_s)
    if not found:
        raise does_not_fit(problem, evaluate(problem, smallest_device(problem)))
    best = min(found, key=lambda candidate: candidate.order)
    others = [candidate for candidate in found if candidate.family != best.family]
    second = min(others, key=lambda candidate: candidate.order, default=None)
    prediction = evaluate(problem, best.placement)
    assert bound_s <= best.step_s * (1 + 1e-6), "a bound that a placement beats"
    bound_s = min(bound_s, best.step_s)
    return Solution(
        kind=best.kind,
        placement=best.placement,
        prediction=prediction,
        bound_s=bound_s,
        gap=best.step_s / bound_s - 1 if bound_s else 0.0,
        segment=longest_segment(best.placement),
        next_best=second.named() if second is not None else None,
        bottleneck=bottleneck(search.evaluator, prediction),
        solve_s=time.monotonic() - started_s,
    )


class Search:
    """What `solve` has found so far of placements that save in one place."""

    def __init__(self, problem: PlanProblem, gap: float, until_s: float) -> None:
        self.evaluator = Evaluator(problem)
        self.problem, self.gap, self.until_s = problem, gap, until_s
        self.found: list[Candidate] = []
        self.almost: list[Placement] = []
        """What programs promised and rounding broke, the fastest first."""
        self.bounds: dict[int, Bound] | None = None
        """By longest segment, of what rebuilds a layer; None: not worked out."""
        self.values: dict[Shape, float] = {}
        self.layers = len(problem.layers) - problem.frozen_below

    def can_beat(self, step_s: float) -> bool:
        """Whether some placement may take less. Looks at copies alone first, which nearly always settles it."""
        if least_copying_s(self.evaluator) >= step_s:
            return False
        self.bounds = bounds(self.evaluator)
        least = [least.step_s for least in self.bounds.values()]
        if not self.problem.reversible:
            least.append(self.evaluator.walk(fixed_policy(self.problem, "keep")).step_s)
        return min(least, default=INFINITY) < step_s

    def run(self) -> None:
        for policy in fixed_policies(self.problem):
            self.add(fixed_policy(self.problem, policy), policy)
            if policy == "keep" and self.found and self.problem.saved == "device":
                return
        if self.bounds is None:
            self.bounds = bounds(self.evaluator)
        shapes = [shape for shape in sorted(self.seeds(), key=self.value) if self.value(shape) < INFINITY]
        kinds: dict[tuple[int, int], Shape] = {}
        for shape in shapes:
            kinds.setdefault((shape.longest, shape.prefetch), shape)
        placed: set[Shape] = set()
        for start, tries in zip(kinds.values(), CLIMBS):
            if placed and self.done():
                self.place(start)  # there is nothing faster; but something to compare with
                break
            climbed = climb(self.evaluator, start, self.value, tries)
            if climbed not in placed:
                self.place(climbed)
            placed.add(climbed)
        for shape in shapes[:FEW_SHAPES] if self.layers <= FEW_LAYERS else []:
            if shape not in placed and not self.done():
                self.place(shape)
        if not self.found:
            self.add(least_device(self.problem))
        if self.found and not self.done():
            placements = [candidate.placement for candidate in self.found]
            self.add(best_near(self.evaluator, placements, self.fastest, self.almost))

    @property
    def bound_s(self) -> float:
        rebuilding = [least.step_s for least in (self.bounds or {}).values()]
        keeping = [found.step_s for found in self.found if not longest_segment(found.placement)]
        return min([*rebuilding, *keeping], default=INFINITY)

    def done(self) -> bool:
        best = min((candidate.step_s for candidate in self.found), default=INFINITY)
        return best <= self.bound_s * (1 + self.gap) or time.thread_time() > self.until_s

    def fastest(self, walk: Walk) -> Key:
        over = self.evaluator.over(walk)
        return (sum(over.values()), same_s(walk.step_s, digits=11), walk.lanes_s)

    def add(self, placement: Placement, policy: str = "") -> bool:
        """Takes note of a placement, if it fits."""
        walk = self.evaluator.walk(placement)
        if fits := not self.evaluator.over(walk):
            family: tuple[object, ...] = (placement.saved, policy or longest_segment(placement))
            self.found.append(Candidate(self.kind(placement, policy), family, placement, walk.step_s, walk.lanes_s))
        return fits

    def kind(self, placement: Placement, policy: str) -> str:
        return kind_of(placement, policy).replace("from its input", f"from its {self.problem.input_stored_as}")

    def value(self, shape: Shape) -> float:
        """Seconds a shape takes by its program."""
        if shape not in self.values:
            solved = RowProgram(self.evaluator, shape, self.evaluator.limits).solve()
            self.values[shape] = solved.value if solved else INFINITY
        return same_s(self.values[shape], digits=9)

    def seeds(self) -> Iterator[Shape]:
        """Even segments of every length, with the relaxation's kept layers and none; then short ones at the top.

        Nothing is fetched ahead where that is what makes a shape fit.
        """
        even: list[Shape] = []
        few = range(self.layers) if self.layers <= FEW_LAYERS and not self.problem.reversible else ()
        for longest, least in (self.bounds or {}).items():
            for kept in dict.fromkeys((least.kept, 0, *few)):
                for between in ("o", "xo") if longest > 2 else ("o",):
                    even.append(even_shape(self.evaluator, -(-(self.layers - kept) // longest), kept, between))
        even = list(dict.fromkeys(even))
        best = sorted(even, key=self.value)[:3]
        even += [replace(shape, prefetch=0) for shape in even if few or shape in best or self.value(shape) == INFINITY]
        yield from even
        for shape in sorted(even, key=self.value)[:5]:
            for top in ((1,), (2,), (1, 1), (1, 2)):
                if sum(top) < shape.kept_from - self.problem.frozen_below and max(top) < shape.longest:
                    yield topped(self.evaluator, shape, top)

    def place(self, shape: Shape) -> None:
        """Adds a shape's placements, the program's budgets moved until the walk agrees with them.

        More layers in flight even out what layers of different kinds and whole tiles make uneven, for some memory.
        """
        limits: dict[str, float] = dict(self.evaluator.limits)
        best_s = INFINITY
        for attempt in range(ROUNDS):
            solved = RowProgram(self.evaluator, shape, limits, blocks=48, pieces=32).solve()
            if solved is None:
                return
            before_s = best_s
            placement = decode(self.evaluator, shape, solved)
            walks: list[tuple[float, int, Walk]] = []
            for slots in SLOTS:
                slotted = placement.model_copy(update={"slots": slots})
                walk = self.evaluator.walk(slotted)
                walks.append((same_s(walk.step_s, digits=6), slots, walk))
                if self.add(slotted):
                    best_s = min(best_s, walk.step_s)
            walk = min(walks)[-1]
            over = self.evaluator.over(walk)
            if over and attempt == 0:
                self.almost.append(placement)
            if not over and best_s > before_s * (1 - 1e-5):
                return
            for name, limit in self.evaluator.limits.items():
                if name in over:
                    limits[name] -= over[name] + (1e-5 * 2**attempt * limit if attempt > 2 else 0)
                elif not over:
                    limits[name] += 0.9 * (limit - self.evaluator.used(walk)[name])


def bounds(evaluator: Evaluator) -> dict[int, Bound]:
    """By the longest segment's layers, the lower bounds of all placements that rebuild a layer."""
    found = {end: bound(evaluator, shorter + 1, end) for shorter, end in pairwise([0, *lengths(evaluator)])}
    return {end: least for end, least in found.items() if least is not None}


def least_s(problem: PlanProblem) -> float:
    """No plan takes less; infinity when by its totals none fits. Ten times quicker than `solve`, a few percent less."""
    evaluator = Evaluator(problem)
    kept = evaluator.walk(fixed_policy(problem, "recompute" if problem.reversible else "keep"))
    fits = not evaluator.over(kept) and not problem.reversible
    if fits and problem.saved == "device":
        return kept.step_s
    found_s = min((least.step_s for least in bounds(evaluator).values()), default=INFINITY)
    found_s = min(found_s, kept.step_s) if fits else found_s
    if problem.saved == "device" and problem.can_save_on_host:
        on_host = problem.saving("host")
        if least_copying_s(Evaluator(on_host)) < found_s:
            return min(found_s, least_s(on_host))
    return found_s


def least_copying_s(evaluator: Evaluator) -> float:
    """No placement takes less, whatever fits: the step without any recomputing, with the copies of saved tensors."""
    problem, seconds = evaluator.problem, evaluator.problem.head.forward_s
    for layer, kind in enumerate(evaluator.kinds):
        seconds += kind.forward_s + kind.attention_forward_s
        if layer >= problem.frozen_below:
            kept_s, rebuilt_s = evaluator.saved_copies_s(kind)
            seconds += kind.backward_s + kind.attention_backward_s
            rebuilt_s += kind.elementwise_s + kind.exchange_s
            seconds += rebuilt_s if problem.reversible else min(kept_s, rebuilt_s)
    return seconds * problem.micro_batches + problem.head.step_s


def same_s(seconds: float, *, digits: int) -> float:
    """Seconds rounded to significant digits: what sums in another order are equal to."""
    return float(f"{seconds:.{digits}g}")


def longest_segment(placement: Placement) -> int:
    return max((len(unit) for unit in placement.units() if not placement.layers[unit.start].keep), default=0)


def kind_of(placement: Placement, policy: str = "") -> str:
    """A plan in a few words."""
    kept = sum(layer.keep for layer in placement.layers)
    longest = longest_segment(placement)
    found = policy or "keep"
    if longest and not policy:
        found = "each layer from its input" if longest == 1 else f"segments of up to {longest} layers"
        found += f", {kept} of {len(placement.layers)} layers kept" if kept else ""
    return f"{found}, saved tensors on the host" if placement.saved == "host" else found


def bottleneck(evaluator: Evaluator, prediction: Prediction) -> str:
    """What costs most beyond the compute that no plan avoids, and which budgets are full."""
    parts = prediction.parts
    costs = {
        "recomputing attention": parts.rebuild_attention_s,
        "recomputing linear layers": parts.rebuild_linear_s + parts.inner_forward_s,
        "copying saved tensors to the host and back": parts.forward_copies_s + parts.backward_copies_s,
        "making and reading codes of rows on host and disk": parts.forward_codes_s + parts.backward_codes_s,
        **{f"waiting for {lane.replace('_', ' ')}": seconds for lane, seconds in parts.stall_s.items()},
    }
    name, seconds = max(costs.items(), key=lambda cost: cost[1])
    if seconds <= 0.005 * prediction.step_s:
        return "compute: nothing that a plan decides costs more than 0.5 % of the step"
    used = {
        "device": prediction.device_peak_bytes,
        "host": prediction.host_bytes,
        "disk": prediction.disk_bytes,
        "disk_write": prediction.written_bytes,
    }
    full = [
        n.replace("disk_write", "disk writes") for n, limit in evaluator.limits.items() if used[n] > 0.98 * limit > 0
    ]
    reason = f"; full: {', '.join(full)}" if full else ""
    return f"{name}: {seconds:.4g} s, {100 * seconds / prediction.step_s:.1f} % of the step{reason}"


def longest(problem_at: Callable[[int], PlanProblem], *, step_tokens: int, most_tokens: int) -> int:
    """The longest context, a multiple of `step_tokens` up to `most_tokens`, that fits; 0 when none does.

    The least device memory grows almost in proportion to the context, so a line through what is known of both sides
    finds the end in few tries (the side that stays counts half as much each time: Illinois' rule). A try costs a
    `smallest_device`.
    """
    fits, fails = 0, most_tokens // step_tokens + 1
    spare: dict[int, float] = {}
    guess = fails - 1
    while fails - fits > 1:
        problem = problem_at(guess * step_tokens)
        device_bytes = problem.budgets.device_bytes
        spare.setdefault(0, device_bytes - sum(state.bytes for state in problem.states if state.tier == "device"))
        least = evaluate(problem, smallest_device(problem, rough=True))
        spare[guess] = device_bytes - least.device_peak_bytes
        if not least.fits:
            stale, fails = fits, guess
        else:
            stale, fits = fails, guess
        guess = (fits + fails) // 2
        if fails in spare and spare[fits] > 0 > spare[fails]:
            guess = round(fits + (fails - fits) * spare[fits] / (spare[fits] - spare[fails]))
            spare[stale] /= 2
        guess = min(max(guess, fits + 1), fails - 1)
    return fits * step_tokens
