"""`plan.json` of a run folder: what `farspan plan --json` prints, and the problem with its placement.

Problem and placement are enough to walk the plan again anywhere (`memory.evaluate`), so whoever reads the file gets its
prediction from them and not from printed numbers: a picture, a lane, a level that nobody thought of printing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from farspan.jobs.plan import Planned
from farspan.jobs.plan_view import to_json
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import Placement
from farspan.memory.prediction import Prediction
from farspan.memory.problem import PlanProblem
from farspan.trainer.run_folder import write_json
from farspan.trainer.trace import Span, add_process


@dataclass(frozen=True)
class SavedPlan:
    """A plan that was carried out."""

    kind: str
    """In words: what sort of plan it is."""
    problem: PlanProblem
    placement: Placement
    prediction: Prediction


def write_plan(path: Path, planned: Planned) -> None:
    """Write a plan so that it can be replayed."""
    replay = {
        "placement": planned.placement.model_dump(mode="json"),
        "problem": planned.problem.model_dump(mode="json"),
    }
    write_json(path, to_json(planned) | replay)


def write_plan_trace(path: Path, planned: Planned) -> None:
    """Put the predicted lanes of one micro-batch, and the levels of device and host, into the run's trace."""
    timeline = evaluate(planned.problem, planned.placement, timeline=True).timeline
    assert timeline is not None
    spans = [Span(i.lane.replace("_", " "), i.start_s, i.end_s, i.label, i.bytes) for i in timeline.intervals]
    levels = {f"{tier} memory": getattr(timeline, tier) for tier in ("device", "host")}
    add_process(path, "plan", spans, levels=levels)


def read_plan(path: Path) -> SavedPlan:
    """Read a plan and walk it again.

    Raises:
        OSError: the file cannot be read.
        ValueError: what it says is no plan, or one of another version.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not an object")
    try:
        problem = PlanProblem.model_validate(value.get("problem"))
        placement = Placement.model_validate(value.get("placement"))
    except ValidationError as error:
        raise ValueError(f"{error.error_count()} values are not as this version writes them") from None
    if (len(placement.layers), placement.rows) != (len(problem.layers), problem.rows):
        raise ValueError("problem and placement are of different models")
    return SavedPlan(str(value.get("kind", "")), problem, placement, evaluate(problem, placement))
