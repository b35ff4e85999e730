"""What a plan said beside what the run did, and what of it was off by more than a tenth.

Measured is what steady steps show: the first ones of each attempt page in, compile and warm up, so times are medians
over the later ones. A peak is the highest of all steps. Evaluations and checkpoints inside a step are not planned and
are taken off its time. The trainer times forward and backward as wholes, so planned parts are summed to those: forward
holds the loss head, which runs both ways there, and waiting for what leaves; backward what is computed again, and
waiting for what comes back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from farspan.jobs.plan import size
from farspan.jobs.plan_file import SavedPlan
from farspan.jobs.progress import number

WARM_STEPS = 2
"""First steps of an attempt that say nothing about the later ones."""
MISS = 0.10
"""A prediction that is off by more than this share is a finding."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One quantity; None: not planned, or not measured."""

    what: str
    planned: float | None
    measured: float | None
    unit: Literal["s", "bytes"]

    @property
    def off(self) -> float | None:
        """How far measured lies above planned, as a share of planned."""
        if not self.planned or self.measured is None:
            return None
        return self.measured / self.planned - 1

    @property
    def told(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.planned or self.measured)

    @property
    def planned_text(self) -> str:
        return self._text(self.planned)

    @property
    def measured_text(self) -> str:
        return self._text(self.measured)

    @property
    def off_text(self) -> str:
        return "" if self.off is None else f"{self.off:+.0%}"

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return size(value) if self.unit == "bytes" else f"{value:.3g}"


@dataclass(frozen=True)
class Comparison:
    """The plan's table with a measured column."""

    kind: str
    tiers: list[Row]
    parts: list[Row]
    """They sum to the last one, the step."""
    waiting: list[Row]
    """Of the parts, by the lane waited for."""
    moved: list[Row]
    """Bytes of a step through each lane."""
    steps: int
    """How many steps the medians are over."""

    @property
    def tables(self) -> list[tuple[str, str, list[Row]]]:
        """(title, unit, rows) of those that hold anything."""
        found = [
            ("memory of a rank, peak", "", self.tiers),
            ("part of a step", "seconds", self.parts),
            ("of that, waiting for", "seconds", self.waiting),
            ("moved in a step", "", self.moved),
        ]
        return [table for table in found if table[-1]]


@dataclass(frozen=True)
class Finding:
    """A prediction that missed."""

    quantity: Literal["step_s", "device_peak_bytes"]
    planned: float
    measured: float
    text: str


def of_plan(records: Records) -> Records:
    """Records of the plan in force at the end: a resumed run may have changed it."""
    plan = records[-1].get("plan_step_s") if records else None
    return [record for record in records if record.get("plan_step_s") == plan and _known(record.get("step_s")) > 0]


def steady(records: Records) -> Records:
    """Of those, the ones after the first steps of each attempt."""
    seen: dict[Any, int] = {}
    kept = []
    for record in of_plan(records):
        attempt = record.get("attempt")
        seen[attempt] = seen.get(attempt, 0) + 1
        if seen[attempt] > WARM_STEPS:
            kept.append(record)
    return kept


def planned_part_of_step_s(record: Mapping[str, Any]) -> float:
    """Seconds of a step without what no plan speaks of."""
    parts = record.get("parts_s") or {}
    return _known(record.get("step_s")) - sum(_known(parts.get(name)) for name in ("evaluate", "checkpoint"))


def findings(records: Records) -> list[Finding]:
    """What the plan got wrong by more than `MISS`, from the records of rank 0."""
    found: list[Finding] = []
    kept, whole = steady(records), of_plan(records)
    plan_s = _known(whole[-1].get("plan_step_s")) if whole else 0.0
    took_s = _median(kept, planned_part_of_step_s)
    if plan_s and took_s is not None and abs(took_s / plan_s - 1) > MISS:
        text = f"a step took {took_s:.3g} s (median of {len(kept)}), planned were {plan_s:.3g} s"
        found.append(Finding("step_s", plan_s, took_s, f"{text}: {took_s / plan_s - 1:+.0%}"))
    plan_bytes = _known(whole[-1].get("plan_device_peak_bytes")) if whole else 0.0
    peak_bytes = _peak(whole, "device_peak_bytes")
    if plan_bytes and peak_bytes and abs(peak_bytes / plan_bytes - 1) > MISS:
        text = f"the device held {size(peak_bytes)} at its peak, planned were {size(plan_bytes)}"
        found.append(
            Finding("device_peak_bytes", plan_bytes, peak_bytes, f"{text}: {peak_bytes / plan_bytes - 1:+.0%}")
        )
    return found


def compare(plan: SavedPlan, records: Records) -> Comparison:
    """The plan's table beside the run's; measured stays empty until there are steady steps."""
    kept = steady(records)
    prediction, parts = plan.prediction, plan.prediction.parts
    stall_s = parts.stall_s

    def part(*names: str) -> float | None:
        return _median(kept, lambda record: sum(_known((record.get("parts_s") or {}).get(name)) for name in names))

    def waited(*lanes: str) -> float:
        return sum(stall_s.get(lane, 0.0) for lane in lanes)  # type: ignore[call-overload]

    forward_s = parts.forward_s + parts.attention_forward_s + parts.head_s + waited("copy_out", "disk_write")
    forward_s += parts.forward_copies_s + parts.forward_codes_s
    backward_s = parts.backward_s + parts.attention_backward_s + parts.recompute_s + waited("copy_in", "disk_read")
    backward_s += parts.backward_copies_s + parts.backward_codes_s
    waiting = [Row(_words(lane), waited(lane), _nested(kept, "stall_s", lane), "s") for lane in prediction.moved_bytes]
    step_s = _median(kept, planned_part_of_step_s)
    return Comparison(
        kind=plan.kind,
        tiers=_tiers(plan, of_plan(records)),
        parts=[
            Row("data", None, part("data"), "s"),
            Row("forward and loss", forward_s, part("forward"), "s"),
            Row("backward", backward_s, part("backward"), "s"),
            Row("reduce and optimizer", parts.optimizer_s, part("reduce", "optimizer"), "s"),
            Row("step", prediction.step_s, step_s, "s"),
        ],
        waiting=[row for row in waiting if row.told],
        moved=[row for row in _moved(plan, kept) if row.told],
        steps=len(kept),
    )


def _tiers(plan: SavedPlan, records: Records) -> list[Row]:
    """Host and disk as the store counts them, with the model states that the plan has on the host."""
    prediction = plan.prediction
    states = sum(state.bytes for state in plan.problem.states if state.tier == "host")
    device = _peak(records, "device_peak_bytes") or None
    rows = [Row("device", prediction.device_peak_bytes, device, "bytes")]
    for tier, planned, more in (("host", prediction.host_bytes, states), ("disk", prediction.disk_bytes, 0)):
        peaks = [_known((record.get("tier_peak_bytes") or {}).get(tier)) for record in records]
        measured = max(peaks) + more if any(peaks) else None
        if planned or measured:
            rows.append(Row(tier, planned, measured, "bytes"))
    return rows


def _moved(plan: SavedPlan, kept: Records) -> list[Row]:
    """Rows read from disk come in by the same job, so that only those of the host count as copied in."""
    planned, times = dict(plan.prediction.moved_bytes), plan.problem.micro_batches
    planned["copy_in"] -= planned["disk_read"]
    names = {"copy_in": "copy in, from host"}
    return [
        Row(names.get(lane, _words(lane)), size_bytes * times, _nested(kept, "moved_bytes", lane), "bytes")
        for lane, size_bytes in planned.items()
    ]


def _median(records: Records, of: Callable[[Mapping[str, Any]], float]) -> float | None:
    return statistics.median(map(of, records)) if records else None


def _nested(records: Records, key: str, name: str) -> float | None:
    return _median(records, lambda record: _known((record.get(key) or {}).get(name)))


def _peak(records: Records, key: str) -> float:
    return max((_known(record.get(key)) for record in records), default=0.0)


def _known(value: Any) -> float:
    """A finite number, or nothing."""
    found = number(value)
    return found if abs(found) < float("inf") else 0.0


def _words(lane: str) -> str:
    return lane.replace("_", " ")
