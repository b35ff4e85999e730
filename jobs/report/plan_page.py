"""Makes the page of `farspan plan --html`: what a plan needs, how long a step takes and why, before anything runs.

It says what the tables on the terminal say and shows what they cannot: when what runs, when what is moved, and how
full each tier is meanwhile. Made from the plan alone; walking one micro-batch for the picture takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.errors import JobError
from farspan.jobs.plan import Planned, size
from farspan.jobs.plan_view import PLACES, error_lines, layer_shares, part_rows, placed_shares, tier_rows
from farspan.jobs.report.page import render_page, value_text
from farspan.jobs.report.timeline import COLOURS, Picture, picture, span_text
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import Placement
from farspan.memory.problem import PlanProblem
from farspan.trainer.run_folder import write_atomically

PLACE_WORDS = {"keep": "kept by autograd", "recompute": "computed again"}
PLACE_COLOURS = {"keep": 6, "device": 0, "host": 2, "disk": 1, "recompute": 7}
PART_COLOURS = {
    "forward": COLOURS["forward"],
    "backward": COLOURS["backward"],
    "rebuild": COLOURS["computed again"],
    "inner forwards": COLOURS["computed again"],
    "copying": COLOURS["waiting"],
    "loss head": COLOURS["loss head"],
    "optimizer": COLOURS["optimizer"],
    "waiting": COLOURS["waiting"],
}

LEAST_SHARE = 5e-4
"""Of what a layer keeps: smaller tensors are not shown."""


@dataclass(frozen=True)
class Budget:
    """A line of the table of tiers."""

    tier: str
    need_bytes: int
    have_bytes: int

    @property
    def share(self) -> float:
        return self.need_bytes / self.have_bytes if self.have_bytes else float(self.need_bytes > 0)


@dataclass(frozen=True)
class Strip:
    """A tensor class over all layers: each layer a column, from the bottom what is kept to what is computed again."""

    name: str
    shares: Mapping[str, float]
    """Share of all layers' rows by place."""
    cells: list[tuple[float, float, float, float, int, str]]
    """x, y, width, height in a box of 1000 x 100; colour; title."""


def write_plan_page(planned: Planned, path: Path, *, name: str, longest_tokens: int | None = None) -> None:
    """Write the page of a plan to `path`.

    Args:
        name: of the job.
        longest_tokens: the longest context that fits, when it was asked for.

    Raises:
        JobError: nothing can be written there.
    """
    try:
        write_atomically(path, render_plan(planned, name=name, longest_tokens=longest_tokens))
    except OSError as problem:
        raise JobError(
            "the page cannot be written",
            at=f"--html {path}",
            why=problem.strerror or str(problem),
            try_="the path of a file in a folder you can write to, as --html plan.html",
        ) from None


def render_plan(planned: Planned, *, name: str, longest_tokens: int | None = None) -> str:
    """The page as text."""
    prediction = evaluate(planned.problem, planned.placement, timeline=True)
    drawn = picture(planned.problem, prediction)
    budgets = [Budget(*row) for row in tier_rows(planned)]
    return render_page(
        "plan.html",
        styles=("report.css", "plan.css"),
        script="plan.js",
        data=_data(drawn),
        title=name,
        name=name,
        planned=planned,
        prediction=prediction,
        headline=headline(planned),
        numbers=key_numbers(planned, longest_tokens),
        budgets=budgets,
        parts=[
            (what, seconds, seconds / prediction.step_s, _part_colour(what))
            for what, seconds in part_rows(planned)
            if seconds > 0
        ],
        drawn=drawn,
        strips=strips(planned.placement, placed_shares(planned)),
        places=[(PLACE_WORDS.get(place, place), PLACE_COLOURS[place]) for place in PLACES],
        place_names=PLACES,
        kept=kept_kinds(planned.problem),
        gradient_errors=error_lines(planned),
        keep_colour=PLACE_COLOURS["keep"],
        assumptions=assumptions(planned),
        gib=size,
        duration=span_text,
    )


def headline(planned: Planned) -> str:
    """The verdict in a sentence."""
    prediction = planned.prediction
    kind = planned.solution.kind if planned.solution is not None else f"the policy {planned.policy}"
    if prediction.fits:
        return f"Fits on {planned.hardware.title}, with {kind}."
    over = " and ".join(f"{size(excess)} of {tier.replace('_', ' ')}" for tier, excess in prediction.over_bytes.items())
    return f"Does not fit on {planned.hardware.title}: {kind} takes {over} more than there is."


def key_numbers(planned: Planned, longest_tokens: int | None) -> list[tuple[str, str]]:
    """The header's numbers."""
    prediction, solution = planned.prediction, planned.solution
    numbers = [("step", span_text(prediction.step_s))]
    if planned.tokens_per_step:
        numbers.append(("tokens/s", f"{planned.tokens_per_step / prediction.step_s:,.0f}"))
        numbers.append(("tokens per step", f"{planned.tokens_per_step:,}"))
    numbers.append(("device peak", size(prediction.device_peak_bytes)))
    if longest_tokens is not None:
        numbers.append(("longest context that fits", f"{longest_tokens:,} tokens"))
    if prediction.parts.recompute_s:
        numbers.append(("computed again", f"{prediction.parts.recompute_s / prediction.step_s:.1%} of the step"))
    if prediction.parts.stalled_s:
        numbers.append(("waiting", f"{prediction.parts.stalled_s / prediction.step_s:.1%} of the step"))
    if solution is not None:
        numbers.append(("above the lower bound", f"{solution.gap:.1%} at most"))
    if planned.next_best is not None:
        more = planned.next_best.step_s / prediction.step_s - 1
        numbers.append(("next best", f"{planned.next_best.kind}, {more:+.1%}"))
    return numbers


def strips(placement: Placement, shares: Mapping[str, Mapping[str, float]]) -> list[Strip]:
    """One strip a tensor class; frozen layers store nothing and stay empty."""
    return [Strip(name, share, _cells(placement, name)) for name, share in shares.items()]


def _cells(placement: Placement, name: str) -> list[tuple[float, float, float, float, int, str]]:
    width = 1000 / len(placement.layers)
    gap = min(2.0, width / 8)
    cells = []
    for index, layer in enumerate(placement.layers):
        if index < placement.frozen_below:
            continue
        top = 100.0
        for place, share in layer_shares(placement, layer, name).items():
            if share <= 0 or place == "recompute":
                continue
            top -= 100 * share
            title = f"{name} of layer {index}: {share:.0%} {PLACE_WORDS.get(place, 'on ' + place)}"
            cells.append(
                (
                    index * width + gap / 2,
                    round(top, 2),
                    width - gap,
                    round(100 * share, 2),
                    PLACE_COLOURS[place],
                    title,
                )
            )
    return cells


@dataclass(frozen=True)
class KeptKind:
    """What autograd keeps of a kind of layer."""

    name: str
    kib: float
    """Per token, of all tensors, those too small to show included."""
    tensors: list[tuple[str, str, float, float]]
    """Name, operators that need it, KiB a token, share."""


def kept_kinds(problem: PlanProblem) -> list[KeptKind]:
    """Kinds of layers whose saved tensors were counted or measured, largest tensors first."""
    found = []
    for kind in problem.kinds:
        whole = sum(tensor.bytes_per_row for tensor in kind.saved)
        rows = [
            (tensor.name, ", ".join(tensor.kept_by), tensor.bytes_per_row / 1024, tensor.bytes_per_row / whole)
            for tensor in kind.saved
            if tensor.bytes_per_row >= LEAST_SHARE * whole
        ]
        if rows:
            found.append(KeptKind(kind.name, whole / 1024, rows))
    return found


def assumptions(planned: Planned) -> list[tuple[str, str, str, str]]:
    """(field of the hardware file, value, `measured` or `assumed`, where from), what is measured first."""
    values = planned.hardware.model_dump()
    found = []
    for name, source in planned.sources.items():
        found.append((name, _quantity(name, values.get(name)), source.how, source.what))
    return sorted(found, key=lambda row: row[2] == "assumed")


def _quantity(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_quantity(name, one)}" for key, one in value.items())
    if isinstance(value, tuple | list):
        return " to ".join(dict.fromkeys(f"{one['forward_flop_per_s'] / 1e12:.3g} TFLOP/s" for one in value))
    if value is None:
        return ""
    if name.endswith("_flop_per_s"):
        return f"{value / 1e12:.3g} TFLOP/s"
    if name.endswith("_bytes_per_s"):
        return f"{value / 1e12:.3g} TB/s" if value >= 1e12 else f"{value / 1e9:.3g} GB/s"
    return size(value) if name.endswith("_bytes") else value_text(value)


def _part_colour(what: str) -> int:
    return next((colour for start, colour in PART_COLOURS.items() if what.startswith(start)), 7)


def _data(drawn: Picture) -> dict[str, Any]:
    """What the script reads values from: the levels; what a lane does is read from its bars."""
    memory = [
        {"tier": one.tier, "x": [time_s for time_s, _ in one.levels], "y": [level for _, level in one.levels]}
        for one in drawn.memory
    ]
    return {"end": drawn.end_s, "memory": memory}
