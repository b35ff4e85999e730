"""Makes `report.html`: what the run did, on one page that asks nothing of the network.

The plots are SVG drawn in `charts.py`, so everything but hovering, zooming and hiding works without JavaScript. `page`
makes the file and keeps hostile texts harmless.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from farspan.jobs.measured import MISS
from farspan.jobs.progress import clock, number, size, timed_parts
from farspan.jobs.report import rl_charts
from farspan.jobs.report.charts import MAX_POINTS, Chart, Kind, Series, thinned, trailing_mean
from farspan.jobs.report.collect import RunFacts, collect, visible
from farspan.jobs.report.page import render_page, value_text
from farspan.trainer.metrics import PARTS
from farspan.trainer.run_folder import RunFolder, write_atomically

SMOOTH_FROM_STEPS = 200
"""Shorter runs are read point by point; longer ones get a trailing mean over a fiftieth of their steps."""
DOTS = 60
"""Evaluations up to which each is drawn as a dot; more of them are a line."""
STACK_POINTS = 250
"""Points of a stacked chart: more would be a comb of spikes, so longer runs show means of equal stretches."""

Records = Sequence[Mapping[str, Any]]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder.

    Args:
        run_dir: folder of a run, finished, failed or still going.

    Returns:
        Path of the page.

    Raises:
        JobError: no step has been recorded in the folder.
    """
    facts = collect(run_dir)
    path = RunFolder(run_dir).report
    write_atomically(path, render(facts))
    return path


def render(run: RunFacts) -> str:
    """The page as text."""
    charts = make_charts(run)
    return render_page(
        "template.html",
        styles=("report.css",),
        script="report.js",
        data={
            "charts": [chart.data() for chart in charts if chart.x_unit == "step"],
            "marks": [x for x, _ in run.restarts],
        },
        title=run.name,
        run=run,
        headline=headline(run),
        numbers=key_numbers(run),
        charts=charts,
        marks=[(x, text) for x, text in run.restarts],
        position=lambda chart, x: _percent(x, chart.x_domain),
        parts=part_totals(run.records),
        stalls=stall_totals(run.records),
        thinned=len(run.records) > MAX_POINTS,
        max_points=MAX_POINTS,
        miss=MISS,
    )


def make_charts(run: RunFacts) -> list[Chart]:
    """All charts that have data, in the order of the page."""
    records = run.records
    steps = (float(records[0]["step"]), float(records[-1]["step"]))
    if rl_charts.is_rl(records):
        split = rl_charts.waiting(records)
        roles = _stack("waiting", "Who is at work", records, split, rl_charts.ROLES, rl_charts.ROLES.index)
        along = [*rl_charts.over_steps(records), roles, _rate_chart(records), _memory_chart(records)]
        along += [
            Chart("grad_norm", "Gradient norm", "before clipping", _series(records, "grad_norm", "norm", 0), True)
        ]
        first, *rest = [dataclasses.replace(chart, steps=steps) for chart in along if chart.series]
        return [first, rl_charts.front(records), *rest]
    charts = [
        _loss_chart(run),
        _rate_chart(records),
        _parts_chart(records),
        _memory_chart(records),
        _stall_chart(records),
        Chart("grad_norm", "Gradient norm", "before clipping", _smoothed(records, "grad_norm", "norm", 0), True),
        Chart("lr", "Learning rate", "", _series(records, "lr", "lr", 0), from_zero=True),
    ]
    return [dataclasses.replace(chart, steps=steps) for chart in charts if chart.series]


def _loss_chart(run: RunFacts) -> Chart:
    series = _smoothed(run.records, "loss", "train", 0)
    evaluated = [record for record in run.records if record.get("eval_loss") is not None]
    series += _series(evaluated, "eval_loss", "held out", 1, kind="dots" if len(evaluated) <= DOTS else "line")
    if run.unigram is not None:
        series.append(Series("unigram", "unigram entropy", "reference", [0.0], [run.unigram], 7))
    return Chart("loss", "Loss", "nats per token", series, wide=True)


def _rate_chart(records: Records) -> Chart:
    return Chart("tokens_per_s", "Tokens per second", "", _smoothed(records, "tokens_per_s", "all ranks", 2), True)


def _smoothed(records: Records, key: str, label: str, colour: int) -> list[Series]:
    """The values of a short run; those of a long one, faint, under their trailing mean."""
    if len(records) < SMOOTH_FROM_STEPS:
        return _series(records, key, label, colour)
    window = len(records) // 50
    means = trailing_mean([_finite(record.get(key)) for record in records], window)
    smooth = [{"step": record["step"], key: mean} for record, mean in zip(records, means, strict=True)]
    return [
        *_series(records, key, label, colour, kind="faint"),
        *_series(smooth, key, f"mean of {window}", colour, name=f"{key}_mean"),
    ]


def _parts_chart(records: Records) -> Chart:
    split = _split_parts(records)
    chart = _stack("parts", "Where the step goes", records, split, _part_names(split), _part_colour)
    planned = _series(records, "plan_step_s", "planned", 7)
    return dataclasses.replace(chart, series=[*chart.series, *planned])


def _stall_chart(records: Records) -> Chart:
    split = _split_stalls(records)
    causes = sorted({cause for stalls in split for cause in stalls})
    colours = {cause: index % 8 for index, cause in enumerate(causes)}
    return _stack("stalls", "Waiting", records, split, causes, lambda cause: colours[cause])


def _stack(
    key: str,
    title: str,
    records: Records,
    split: Sequence[Mapping[str, float]],
    names: Sequence[str],
    colour: Callable[[str], int],
) -> Chart:
    """Seconds by name as stacked areas; names that never took time are left out."""
    length = -(-len(records) // STACK_POINTS)
    starts = range(0, len(records), length)
    steps = [float(records[start]["step"]) for start in starts]
    series = []
    for name in names:
        sums = [sum(parts.get(name, 0.0) for parts in split[start : start + length]) for start in starts]
        means = [total / len(split[start : start + length]) for total, start in zip(sums, starts, strict=True)]
        if any(means):
            series.append(Series(visible(name), visible(name), "area", steps, means, colour(name)))
    return Chart(key, title, "seconds a step" + (f", mean of {length}" if length > 1 else ""), series)


def _memory_chart(records: Records) -> Chart:
    keys = (
        ("host_bytes", "rank 0 after the step", 0),
        ("device_peak_bytes", "peak of the step", 1),
        ("plan_device_peak_bytes", "peak planned", 7),
        ("disk_bytes", "disk", 2),
    )
    highest = max((number(record.get(key)) for record in records for key, *_ in keys if record.get(key)), default=0.0)
    unit, scale = ("GiB", 2.0**30) if highest >= 2**30 else ("MiB", 2.0**20)
    series: list[Series] = []
    for key, label, colour in keys:
        if any(number(record.get(key)) > 0 for record in records):
            series += _series(records, key, label, colour, scale=1 / scale)
    return Chart("memory", "Memory", unit, series, from_zero=True)


def _series(
    records: Records, key: str, label: str, colour: int, *, kind: Kind = "line", scale: float = 1.0, name: str = ""
) -> list[Series]:
    """One thinned series, or none when no record has a number under `key`."""
    values = [_finite(record.get(key)) for record in records]
    if all(value is None for value in values):
        return []
    kept = thinned(values)
    x = [float(records[index]["step"]) for index in kept]
    y = [None if (value := values[index]) is None else value * scale for index in kept]
    return [Series(name or key, label, kind, x, y, colour)]


def headline(run: RunFacts) -> str:
    """What came of it, in one sentence."""
    if rl_charts.is_rl(run.records):
        return rl_charts.headline(run.records)
    last = run.records[-1]
    held_out = [value for record in run.records if (value := _finite(record.get("eval_loss"))) is not None]
    train = _finite(last.get("loss"))
    if not held_out:
        return f"Training loss {value_text(train)} after step {last['step']}; nothing was held out."
    text = f"Held-out loss {held_out[-1]:.3f} after step {last['step']}"
    if run.unigram is None:
        return text + (f", from {held_out[0]:.3f} at the first evaluation." if len(held_out) > 1 else ".")
    gain = run.unigram - held_out[-1]
    side = "under" if gain >= 0 else "above"
    return f"{text}, {abs(gain):.3f} nats {side} the unigram entropy of the data ({run.unigram:.3f})."


def key_numbers(run: RunFacts) -> list[tuple[str, str]]:
    """The header's numbers, all computed from the step records, then those of `summary.json`."""
    records, last = run.records, run.records[-1]
    rates = sorted(value for record in records if (value := _finite(record.get("tokens_per_s"))) is not None)
    numbers = [
        ("steps", f"{len(records)}"),
        ("tokens", f"{number(last.get('tokens_total')):,.0f}"),
        ("train loss", value_text(_finite(last.get("loss")))),
        ("median tokens/s", value_text(rates[len(rates) // 2] if rates else None)),
        ("time in steps", clock(_total(records, "step_s"))),
        ("peak memory, rank 0", _peak(records, "device_peak_bytes") or _peak(records, "host_bytes")),
        ("packing", _percent_mean(records, "packing_efficiency")),
        ("restarts", str(len(run.restarts))),
    ]
    known = [(label, text) for label, text in numbers if text not in ("", "nan", "–")]
    return known + [(label, text) for label, text in run.facts if label not in dict(known)]


def part_totals(records: Records) -> list[tuple[str, float, float, int]]:
    """(part, seconds over the run, share of it, colour), longest first."""
    split = _split_parts(records)
    return _shares(_totals(split, _part_names(split)), _part_colour)


def stall_totals(records: Records) -> list[tuple[str, float, float, int]]:
    """(cause, seconds over the run, share of all step time, colour), longest first."""
    split = _split_stalls(records)
    causes = {cause for stalls in split for cause in stalls}
    return _shares(_totals(split, causes), lambda _: 7, of=_total(records, "step_s"))


def _shares(
    totals: Mapping[str, float], colour: Callable[[str], int], of: float | None = None
) -> list[tuple[str, float, float, int]]:
    whole = of if of is not None else sum(totals.values())
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [
        (visible(name), total, total / whole if whole else 0.0, colour(name)) for name, total in ordered if total > 0
    ]


def _split_parts(records: Records) -> list[dict[str, float]]:
    return [timed_parts(record) if _finite(record.get("step_s")) is not None else {} for record in records]


def _split_stalls(records: Records) -> list[dict[str, float]]:
    return [{cause: _finite(s) or 0.0 for cause, s in (record.get("stall_s") or {}).items()} for record in records]


def _totals(split: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    return {name: sum(row.get(name, 0.0) for row in split) for name in names}


def _part_names(split: Sequence[Mapping[str, float]]) -> list[str]:
    """The trainer's parts in their order, then any others, then what no part accounts for."""
    others = {name for parts in split for name in parts} - set(PARTS) - {"other"}
    return [*PARTS, *sorted(others), "other"]


def _part_colour(name: str) -> int:
    return PARTS.index(name) if name in PARTS else 7


def _finite(value: Any) -> float | None:
    value = number(value)
    return value if math.isfinite(value) else None


def _total(records: Records, key: str) -> float:
    return sum(_finite(record.get(key)) or 0.0 for record in records)


def _peak(records: Records, key: str) -> str:
    values = [value for record in records if (value := _finite(record.get(key))) is not None]
    return size(max(values)) if values else ""


def _percent_mean(records: Records, key: str) -> str:
    values = [value for record in records if (value := _finite(record.get(key))) is not None]
    return f"{100 * sum(values) / len(values):.1f} %" if values else ""


def _percent(x: float, domain: tuple[float, float]) -> float:
    return round((x - domain[0]) / (domain[1] - domain[0]) * 100, 3)
