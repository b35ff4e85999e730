"""What the report says, without a browser: against brute force, closed forms, and folders with pieces missing."""

from __future__ import annotations

import itertools
import json
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from report_sample import HOSTILE, UNIGRAM, iso, step_record, write_sample

from farspan.errors import JobError
from farspan.jobs.report.build import headline, part_totals, write_report
from farspan.jobs.report.charts import EXTENT, Chart, Series, thinned, ticks, trailing_mean
from farspan.jobs.report.collect import collect, visible
from farspan.jobs.report.page import embedded, value_text
from farspan.trainer.run_folder import RunFolder, read_metrics, write_json

FINITE = st.floats(-1e9, 1e9)


class Page(HTMLParser):
    """Tags that were opened, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


def bare_run(root: Path, steps: int = 3, **changes: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    records = [step_record(step, time_s=step * 2.0) | changes for step in range(1, steps + 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def test_only_metrics_is_needed_and_what_is_missing_is_said(tmp_path: Path) -> None:
    page = Page(write_report(bare_run(tmp_path / "bare")))
    for missing in (
        "no status.json",
        "no summary.json",
        "no resolved.json",
        "no events.jsonl",
        "no checkpoint;",
        "no unigram entropy of the data",
    ):
        assert missing in page.text
    assert "No checkpoint is in the folder." in page.text and "No events were recorded." in page.text


@pytest.mark.parametrize("content", [None, "", "not json\n", "[1, 2]\n", '{"loss": 1.0}\n'])
def test_nothing_to_report_is_a_job_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(JobError, match="nothing to report"):
        write_report(tmp_path)


def test_a_folder_in_ruins_still_gives_a_page(tmp_path: Path) -> None:
    root = bare_run(
        tmp_path / "ruins", loss="NaN", parts_s=None, stall_s=None, host_bytes=None, lr="Infinity", attempt=None
    )
    with open(root / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 3.')
    (root / "status.json").write_text("{")
    (root / "summary.json").write_text("[1]")
    (root / "resolved.json").write_text(json.dumps({"a.b": 3, "c": {"value": [1, {"d": None}]}}))
    (root / "events.jsonl").write_text('{"time": "yesterday"}\n17\n{"event": 5, "text": ["x"], "attempt": "?"}\n{"ev')
    (root / "checkpoints" / "step_7").mkdir(parents=True)
    (root / "checkpoints" / "step_7" / "manifest.json").write_text("")
    page = Page(write_report(root))
    assert "3 of 3 steps have no finite loss" in page.text
    assert "status.json cannot be read" in page.text and "summary.json is not an object" in page.text
    assert "a.b" in page.text and '[1, {"d": null}]' in page.text


def test_nothing_is_requested_and_hostile_text_makes_no_tag(tmp_path: Path) -> None:
    names = [tmp_path / "calm", tmp_path / "hostile"]
    calm, hostile = (
        write_report(write_sample(root, hostile=h).root) for root, h in zip(names, ("", HOSTILE), strict=True)
    )
    tags = [[tag for tag, _ in Page(path).tags] for path in (calm, hostile)]
    assert tags[0] == tags[1]
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(tags[1])
    for tag, attributes in Page(hostile).tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not {"src", "srcset", "action", "data"} & set(attributes)
        assert str(attributes.get("href", "#")).startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", hostile.read_text(encoding="utf-8"))


@given(
    st.recursive(
        st.none() | st.booleans() | FINITE | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_embedded_json_reads_back_and_cannot_leave_its_element(value: Any) -> None:
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


@given(st.text(alphabet=st.characters()))
def test_visible_text_has_nothing_invisible_and_is_utf8(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert all(c in "\n\t" or c.isprintable() for c in shown)
    assert visible(shown) == shown


@given(st.lists(st.none() | FINITE, min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_real_points_the_ends_and_the_extremes(values: list[float | None], at_most: int) -> None:
    kept = thinned(values, at_most)
    assert kept == sorted(set(kept)) and len(kept) <= max(at_most, 2)
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    known = [value for value in values if value is not None]
    if known:
        left = [value for index in kept if (value := values[index]) is not None]
        assert (min(left), max(left)) == (min(known), max(known))


@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(1, 20))
def test_trailing_mean_against_the_definition(values: list[float], window: int) -> None:
    for index, mean in enumerate(trailing_mean(values, window)):
        share = values[max(0, index - window + 1) : index + 1]
        assert mean == pytest.approx(sum(share) / len(share), rel=1e-9, abs=1e-6)


@example(1.0, 400401.0, 2)
@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.integers(2, 8))
def test_ticks_are_round_evenly_spaced_and_inside(low: float, span: float, about: int) -> None:
    high = low + span
    if not high - low > 1e-7 * max(abs(low), abs(high)):
        return  # no room for a label that could tell the two ends apart
    percents = [tick.percent for tick in ticks(low, high, about)]
    assert all(-0.01 <= percent <= 100.01 for percent in percents)
    assert 1 <= len(percents) <= 2 * about + 2
    steps = [after - before for before, after in itertools.pairwise(percents)]
    assert steps == pytest.approx([steps[0]] * len(steps), abs=0.02) if steps else True


@given(st.lists(st.none() | FINITE, min_size=1, max_size=40), st.booleans())
@example([5e-324], True)
def test_curves_stay_inside_the_plot_and_break_at_gaps(values: list[float | None], from_zero: bool) -> None:
    values = [None if value is None else abs(value) for value in values] if from_zero else values
    xs = [float(x) for x in range(len(values))]
    chart = Chart("k", "t", "", [Series("s", "s", "line", xs, values)], from_zero=from_zero)
    path = chart.curves[0].path
    points = [float(number) for number in re.findall(r"-?\d+\.\d", path)]
    assert all(-0.1 <= point <= EXTENT + 0.1 for point in points)
    assert len(points) == 2 * sum(value is not None for value in values)
    runs = sum(now is not None and (i == 0 or values[i - 1] is None) for i, now in enumerate(values))
    assert path.count("M") == runs


def test_areas_are_stacked(tmp_path: Path) -> None:
    """Two constant areas of 1 and 3 under a top of 4 x 1.06: their edges by hand."""
    areas = [Series(key, key, "area", [0.0, 1.0], [value, value]) for key, value in (("a", 1.0), ("b", 3.0))]
    lower, upper = (curve.path for curve in Chart("k", "t", "", areas).curves)
    first, second = (f"{EXTENT - value / 4.24 * EXTENT:.1f}" for value in (1, 4))
    assert lower == f"M0.0,{first}L1000.0,{first}L1000.0,1000.0L0.0,1000.0Z"
    assert upper == f"M0.0,{second}L1000.0,{second}L1000.0,{first}L0.0,{first}Z"


def test_part_totals_are_the_sums_over_the_steps(tmp_path: Path) -> None:
    records = read_metrics(write_sample(tmp_path / "run").metrics)
    totals = {name: seconds for name, seconds, *_ in part_totals(records)}
    for name in ("data", "forward", "backward", "reduce", "optimizer", "checkpoint", "evaluate"):
        assert totals.pop(name) == pytest.approx(math.fsum(record["parts_s"][name] for record in records))
    assert totals == {"other": pytest.approx(40 * 0.03)}
    assert math.fsum(share for *_, share, _ in part_totals(records)) == pytest.approx(1)


def test_headline_numbers_and_restart_come_from_the_files(tmp_path: Path) -> None:
    run = collect(write_sample(tmp_path / "run").root)
    loss = 4.72 + 3.6 * math.exp(-4)
    assert headline(run) == (
        f"Held-out loss {loss:.3f} after step 40, "
        f"{UNIGRAM - loss:.3f} nats under the unigram entropy of the data (6.412)."
    )
    ((position, text),) = run.restarts
    assert position == 20.5 and "SIGKILL" in text and "resuming from step 20" in text
    assert [(saved.step, saved.complete) for saved in run.checkpoints] == [(10, False), (20, True), (40, True)]
    assert run.checkpoints[1].written_with == "world_size 2, dp 1, sp 2, zero 1, torch 2.13.0"
    origins = {setting.path: (setting.value, setting.origin, setting.note) for setting in run.settings}
    assert origins["parallel.sp"] == ("2", "flag", "--set parallel.sp=2")
    assert origins["parallel.dp"] == ("1", "planner", "2 ranks / sp 2 = 1")


def test_unigram_entropy_is_found_in_the_token_store(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "run")
    (folder.root / "summary.json").unlink()
    assert collect(folder.root).unigram is None
    write_json(tmp_path / "tokens" / "meta.json", {"unigram_entropy_nats": 6.5})
    write_json(folder.checkpoint(40) / "manifest.json", {"job": {"tokens_dir": str(tmp_path / "tokens")}})
    assert collect(folder.root).unigram == 6.5


def test_restarts_that_finished_no_step_are_not_lost(tmp_path: Path) -> None:
    root = bare_run(tmp_path / "run", 6)
    records = [record | {"attempt": 1 if record["step"] < 4 else 3} for record in read_metrics(root / "metrics.jsonl")]
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [{"event": "restarting", "attempt": attempt, "text": f"to {attempt}"} for attempt in (2, 3, 4)]
    RunFolder(root).events.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert collect(root).restarts == [(3.5, "to 2; to 3"), (6.0, "to 4")]


def test_a_driver_killed_without_a_word_is_not_called_running(tmp_path: Path) -> None:
    root = bare_run(tmp_path / "run")
    for age_s, expected in ((1, "running"), (3600, "ended without a word, last seen ")):
        write_json(root / "status.json", {"status": "running", "updated": iso(datetime.now(UTC).timestamp() - age_s)})
        assert collect(root).status.startswith(expected)


def test_the_error_of_a_failed_run_is_on_the_page(tmp_path: Path) -> None:
    root = bare_run(tmp_path / "run")
    write_json(root / "status.json", {"status": "failed", "error": "error: <b>rank</b> 1 died\n   at: step 3"})
    page = Page(write_report(root))
    assert "error: <b>rank</b> 1 died\n   at: step 3" in page.text


def test_writing_again_replaces_the_page_whole(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "run")
    first = write_report(folder.root).read_text(encoding="utf-8")
    assert first.rstrip().endswith("</html>")
    again = write_report(folder.root).read_text(encoding="utf-8")
    stamp = re.compile(r"Written .* UTC")
    assert stamp.sub("", again) == stamp.sub("", first)
    assert not list(folder.root.glob(".report*"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (4.7321, "4.732"),
        (3399.4, "3399"),
        (0.0123, "0.0123"),
        (1e-4, "1.00e-4"),
        (2e7, "2.00e7"),
    ],
)
def test_values_read_with_three_or_four_digits(value: float | None, text: str) -> None:
    assert value_text(value) == text
