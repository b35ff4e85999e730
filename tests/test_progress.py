"""The step line and the panel: what they say is computed from the records alone, so texts are compared whole."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import HOSTILE, step_record
from rich.console import Console

from farspan.jobs.progress import StepPrinter, clock, duration, parts_bar, size, sparkline, timed_parts


def printed(records: list[dict[str, object]], total: int = 40, **console: object) -> str:
    out = io.StringIO()
    printer = StepPrinter(Console(file=out, **console), total)  # type: ignore[arg-type]
    for record in records:
        printer.record(record)
    printer.close()
    return out.getvalue()


def plain_records(count: int, step_s: float = 2.0) -> list[dict[str, object]]:
    return [
        step_record(step, time_s=1000 + step * step_s) | {"step_s": step_s, "eval_loss": None}
        for step in range(1, count + 1)
    ]


def test_the_line_says_it_all() -> None:
    record = step_record(12, time_s=100.0) | {
        "loss": 5.12341,
        "grad_norm": 0.871,
        "lr": 1e-3,
        "step_s": 2.41,
        "tokens_per_s": 3399.2,
        "device_peak_bytes": None,
        "host_bytes": int(1.2 * 2**30),
    }
    assert printed([record]) == (
        "step 12/40   30%  loss 5.1234  gnorm 0.87  lr 1.0e-03  2.41 s  3399 tok/s  "
        "rss 1.2GiB  elapsed 0:02  eta 1:07\n"
    )
    assert "  eval 4.5000  " in printed([record | {"eval_loss": 4.5}])
    assert "  peak 70.3GiB  " in printed([record | {"device_peak_bytes": int(70.3 * 2**30)}])


def test_a_log_file_gets_one_plain_line_a_step_however_narrow() -> None:
    text = printed(plain_records(5), width=20)
    assert "\x1b" not in text
    assert [int(step) for step in re.findall(r"^step +(\d+)/40 .* eta \S+$", text, re.MULTILINE)] == [1, 2, 3, 4, 5]
    assert text.count("\n") == 5


@pytest.mark.parametrize("width", [30, 48, 60, 80, 100, 132])
def test_a_terminal_line_never_wraps_and_keeps_step_and_loss(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    printer = StepPrinter(console, 40, live=False)
    for record in plain_records(12):
        printer.record(record)
    lines = out.getvalue().splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) <= width
    assert all("step" in line and "loss" in line for line in lines)


def test_eta_is_remaining_steps_at_the_pace_of_the_clock() -> None:
    """20 steps of 2 s with 1 s between them (a checkpoint, say): 20 more take 60 s, not 40."""
    records = [record | {"time": 1000 + 3.0 * int(str(record["step"]))} for record in plain_records(20)]
    assert printed(records).splitlines()[-1].endswith("elapsed 0:59  eta 1:00")


def test_a_restart_forgets_the_steps_that_are_done_again() -> None:
    out = io.StringIO()
    printer = StepPrinter(Console(file=out), 40)
    for record in plain_records(8):
        printer.record(record)
    printer.event("rank 1 died; restart 1 of 3 from step_4")
    for step in (5, 6):
        printer.record(step_record(step, time_s=1100.0 + 2 * step))
    assert [record["step"] for record in printer._records] == [1, 2, 3, 4, 5, 6]
    assert "rank 1 died; restart 1 of 3 from step_4\n" in out.getvalue()


def test_hostile_event_text_cannot_drive_the_terminal() -> None:
    out = io.StringIO()
    printer = StepPrinter(Console(file=out, force_terminal=True, color_system=None, width=200), 40, live=False)
    printer.event("[bold]not markup[/bold] \x1b[2J\r" + HOSTILE)
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue() and "\u202e" not in out.getvalue()
    assert "[bold]not markup[/bold] \\x1b[2J\\x0d" in out.getvalue()


def test_non_finite_numbers_are_shown_not_raised() -> None:
    nan = plain_records(1)[0] | {"loss": "NaN", "grad_norm": "Infinity", "tokens_per_s": None}
    text = printed([nan, *plain_records(3)[1:]], force_terminal=True, width=100)
    assert "loss nan" in text and "gnorm inf" in text


def test_panel_on_a_terminal_only_and_it_fits() -> None:
    for width in (40, 60, 80, 160):
        text = printed(plain_records(30), force_terminal=True, width=width, height=30, color_system=None)
        drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").rstrip("\n")
        last = drawn[drawn.rindex("╭") :].split("\n")
        assert last[0].startswith("╭") and last[-1].startswith("╰")
        assert {len(line) for line in last} == {min(100, width)}
        assert "step 30/40" in last[0]
        assert width < 60 or re.search(r"loss +[▁-█]+", last[1])
    assert "╭" not in printed(plain_records(3))


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=200),
    width=st.integers(1, 60),
)
def test_sparkline_has_a_bar_for_every_share(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set("▁▂▃▄▅▆▇█·")
    if all(math.isnan(value) or math.isinf(value) for value in values):
        assert set(line) == {"·"}


def test_sparkline_follows_the_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7, 0, 0], 2) == "█▁"
    assert sparkline([5, math.nan, 5], 3) == "▁·▁"


@given(parts=st.dictionaries(st.sampled_from(["data", "forward", "backward", "reduce"]), st.floats(0, 10), min_size=1))
def test_parts_add_up_to_the_step_and_fill_the_bar(parts: dict[str, float]) -> None:
    step_s = sum(parts.values()) + 1.0
    timed = timed_parts({"step_s": step_s, "parts_s": parts})
    assert sum(timed.values()) == pytest.approx(step_s)
    assert len(parts_bar({"step_s": step_s, "parts_s": parts}, 40)) == 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size(0), "0B"),
        (size(999), "999B"),
        (size(2**20), "1.0MiB"),
        (size(1.2 * 2**30), "1.2GiB"),
        (size(400 * 2**30), "400GiB"),
        (size(3 * 2**40), "3.0TiB"),
        (clock(32), "0:32"),
        (clock(3909), "1:05:09"),
        (clock(3 * 86400 + 4 * 3600), "3d 04:00"),
        (clock(None), "?"),
        (clock(math.inf), "?"),
        (duration(0.4121), "412 ms"),
        (duration(2.41), "2.41 s"),
    ],
)
def test_quantities_read_as_the_field_writes_them(text: str, expected: str) -> None:
    assert text == expected
