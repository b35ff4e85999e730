"""What a person sees while a run goes on: one greppable line a step, and on a terminal a panel that stays below them.

Everything shown comes from the step records and from event texts, never from a clock of its own, so that the same
records always print the same lines. In a log file there is no panel, no colour and no line break inside a step. On a
narrow terminal the less important fields of the line are left out instead of wrapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
PART_STYLES = {
    "data": "yellow",
    "forward": "blue",
    "backward": "cyan",
    "reduce": "magenta",
    "optimizer": "green",
    "checkpoint": "red",
    "evaluate": "bright_black",
    "other": "white",
}
RATE_WINDOW_STEPS = 20
"""Steps the ETA looks back on: long enough to hold an evaluation, short enough to follow a change of speed."""


@dataclass(frozen=True)
class Field:
    """One part of the step line; on a narrow terminal the highest rank goes first, rank 0 never."""

    text: str
    rank: int
    style: str = ""


class StepPrinter:
    """Prints step records and events to a console.

    Args:
        console: where to; a file or a terminal.
        total_steps: optimizer steps of the whole job.
        live: draw the panel; None: exactly when the console is a terminal.
        title: what the panel is headed with, usually the run's name.
    """

    def __init__(self, console: Console, total_steps: int, *, live: bool | None = None, title: str = "farspan") -> None:
        self._console = console
        self._total_steps = total_steps
        self._title = title
        self._records: list[Mapping[str, Any]] = []
        self._started: tuple[int, float] | None = None
        self._last_event = ""
        self._live: Live | None = None
        if console.is_terminal if live is None else live:
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()

    def record(self, record: Mapping[str, Any]) -> None:
        """Print one step. A step at or before the last one means the gang was restored: later ones are forgotten."""
        if self._started is None:
            self._started = (int(record["step"]), float(record["time"]) - float(record["step_s"]))
        self._records = [earlier for earlier in self._records if earlier["step"] < record["step"]]
        self._records.append(record)
        fields = line_fields(record, self._total_steps, elapsed_s=self._elapsed_s(), eta_s=self._eta_s())
        self._print(_fitted(fields, self._console.width if self._console.is_terminal else None))

    def event(self, text: str) -> None:
        """Print something that is not a step: a restart, a checkpoint, the end. Untrusted text is shown as it is."""
        shown = Text(_visible(text), style="bold yellow")
        self._last_event = _visible(text).split("\n")[0]
        self._print(shown)

    def close(self) -> None:
        """Leave the panel as it is on the screen and give the terminal back; may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: Text) -> None:
        # soft_wrap: one step is one line in a log, however narrow rich believes the file to be.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)
        if self._live is not None and self._records:
            self._live.update(self._panel(), refresh=True)

    def _elapsed_s(self) -> float:
        return float(self._records[-1]["time"]) - self._started[1] if self._started else 0.0

    def _eta_s(self) -> float | None:
        """Remaining steps at the pace of the last ones, pauses for evaluation and checkpoints included."""
        last = self._records[-1]
        window = self._records[-RATE_WINDOW_STEPS - 1 :]
        steps = last["step"] - window[0]["step"]
        pace_s = (last["time"] - window[0]["time"]) / steps if steps else last["step_s"]
        return max(0.0, (self._total_steps - last["step"]) * pace_s)

    def _panel(self) -> RenderableType:
        last, width = self._records[-1], max(20, min(100, self._console.width) - 4)
        room = max(8, width - 46)
        eta_s = self._eta_s()
        rows = Table.grid(padding=(0, 1), expand=False)
        rows.add_column(style="dim", justify="right", min_width=5)
        rows.add_column(no_wrap=True, min_width=room)
        rows.add_column(no_wrap=True)
        losses = [number(record["loss"]) for record in self._records]
        rows.add_row("loss", Text(sparkline(losses, room), style="cyan"), self._loss_text(losses))
        rates = [number(record["tokens_per_s"]) for record in self._records]
        rows.add_row("tok/s", Text(sparkline(rates, room, from_zero=True), style="green"), f"{rates[-1]:,.0f}")
        rows.add_row("step", parts_bar(last, room), parts_text(last))
        progress = Text("━" * round(room * last["step"] / max(1, self._total_steps)), style="bold blue")
        progress.append("─" * (room - len(progress)), style="dim")
        rows.add_row("run", progress, f"elapsed {clock(self._elapsed_s())}  eta {clock(eta_s)}")
        body: list[RenderableType] = [rows]
        if self._last_event:
            body.append(Text(self._last_event, style="yellow", no_wrap=True, overflow="ellipsis"))
        head = Text(f"{self._title}  step {last['step']}/{self._total_steps}", style="bold")
        return Panel(Group(*body), title=head, title_align="left", border_style="dim", width=width + 4)

    def _loss_text(self, losses: Sequence[float]) -> str:
        evaluated = [record for record in self._records if record.get("eval_loss") is not None]
        text = f"{losses[0]:.3f} → {losses[-1]:.3f}"
        return text + (f"  eval {number(evaluated[-1]['eval_loss']):.3f}" if evaluated else "")


def line_fields(record: Mapping[str, Any], total_steps: int, *, elapsed_s: float, eta_s: float | None) -> list[Field]:
    """The step line of one record, in order."""
    step = int(record["step"])
    width = len(str(total_steps))
    grad_norm, loss = (number(record[key]) if record[key] is not None else math.nan for key in ("grad_norm", "loss"))
    fields = [
        Field(f"step {step:>{width}}/{total_steps}", 0, "bold"),
        Field(f"{100 * step // max(1, total_steps):>3}%", 5, "dim"),
    ]
    if "response_tokens_mean" in record:
        fields += _rollout_fields(record)
    else:
        fields.append(Field(f"loss {loss:.4f}", 0, "cyan" if math.isfinite(loss) else "bold red"))
    if record.get("eval_loss") is not None:
        fields.append(Field(f"eval {number(record['eval_loss']):.4f}", 0, "bold cyan"))
    fields += [
        Field(
            f"gnorm {grad_norm:.2f}" if grad_norm < 1000 else f"gnorm {grad_norm:.1e}",
            3,
            "" if math.isfinite(grad_norm) else "bold red",
        )
        if record["grad_norm"] is not None
        else Field("no update", 3, "yellow"),
        Field(f"lr {number(record['lr']):.1e}" if record["lr"] is not None else "lr -", 6),
        Field(duration(number(record["step_s"])), 4),
        Field(f"{number(record['tokens_per_s']):.0f} tok/s", 2, "green"),
        Field(_memory_text(record), 7),
        Field(f"elapsed {clock(elapsed_s)}", 8, "dim"),
        Field(f"eta {clock(eta_s)}", 1, "dim"),
    ]
    return fields


def _rollout_fields(record: Mapping[str, Any]) -> list[Field]:
    """Of a step of RL: what responses were worth, and how long they were."""

    def shown(key: str, digits: int) -> str:
        return "-" if record.get(key) is None else f"{number(record[key]):.{digits}f}"

    fields = [
        Field(f"reward {shown('reward_mean', 3)}", 0, "cyan"),
        Field(
            f"right {100 * number(record['accuracy']):.1f}%" if record["accuracy"] is not None else "right -", 0, "cyan"
        ),
        Field(f"tokens {shown('response_tokens_mean', 1)}", 0, "cyan"),
    ]
    if record.get("truncated_share"):
        fields.append(Field(f"cut {100 * number(record['truncated_share']):.0f}%", 1, "yellow"))
    if record.get("eval_accuracy") is not None:
        text = f"held-out {100 * number(record['eval_accuracy']):.1f}% in {shown('eval_response_tokens', 1)} tokens"
        fields.append(Field(text, 0, "bold cyan"))
    return fields


def _memory_text(record: Mapping[str, Any]) -> str:
    """The peak of the step (the device's; on CPU the process's), else what the process holds now."""
    if record.get("rss_peak_bytes"):
        return f"rss {size(record['rss_peak_bytes'])}"
    if record.get("device_peak_bytes"):
        return f"peak {size(record['device_peak_bytes'])}"
    return f"rss {size(record['host_bytes'])}" if record.get("host_bytes") else "rss ?"


def _fitted(fields: Sequence[Field], width: int | None) -> Text:
    kept = list(fields)
    while width is not None and sum(len(field.text) + 2 for field in kept) - 2 > width:
        least = max(kept, key=lambda field: field.rank)
        if least.rank == 0:
            break
        kept.remove(least)
    return Text("  ").join(Text(field.text, style=field.style) for field in kept)


def sparkline(values: Sequence[float], width: int, *, from_zero: bool = False) -> str:
    """At most `width` bars over all values, each bar the mean of its share; a bar with nothing finite is `·`."""
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    finite = [[value for value in share if math.isfinite(value)] for share in shares]
    means = [sum(share) / len(share) if share else math.nan for share in finite]
    known = [mean for mean in means if not math.isnan(mean)]
    low, high = (0.0 if from_zero else min(known, default=0.0)), max(known, default=0.0)
    span = high - low

    def bar(mean: float) -> str:
        if math.isnan(mean):
            return "·"
        return BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] if span > 0 else BARS[0]

    return "".join(bar(mean) for mean in means)


def timed_parts(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the step by part, and `other`: what no part accounts for."""
    parts = {name: number(seconds) for name, seconds in (record.get("parts_s") or {}).items() if number(seconds) > 0}
    rest = number(record["step_s"]) - sum(parts.values())
    return parts | ({"other": rest} if rest > 1e-3 * number(record["step_s"]) else {})


def parts_bar(record: Mapping[str, Any], width: int) -> Text:
    """The step as one bar, each part as wide as its share of the time."""
    parts = timed_parts(record)
    whole = sum(parts.values())
    text, done, drawn = Text(), 0.0, 0
    for name, seconds in parts.items():
        done += seconds
        until = round(width * done / whole)
        text.append("█" * (until - drawn), style=PART_STYLES.get(name, "white"))
        drawn = until
    return text


def parts_text(record: Mapping[str, Any]) -> Text:
    """The two longest parts, in the colours of the bar."""
    text = Text(duration(number(record["step_s"])))
    for name, seconds in sorted(timed_parts(record).items(), key=lambda item: -item[1])[:2]:
        text.append("  ").append(f"{name} {100 * seconds / number(record['step_s']):.0f}%", PART_STYLES.get(name, ""))
    return text


def number(value: Any) -> float:
    """A number of a record: null and what is no number become NaN; `"NaN"` and `"Infinity"` are read."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def size(count_bytes: float) -> str:
    """`1.2GiB`: three digits at most, 1024-based."""
    value, units = float(count_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f}{units[0]}" if value >= 100 or units[0] == "B" else f"{value:.1f}{units[0]}"


def duration(seconds: float) -> str:
    """`412 ms` below a second, `2.41 s` above."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def clock(seconds: float | None) -> str:
    """`0:32`, `1:05:09`, `3d 04:00`; `?` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _visible(text: str) -> str:
    """Log lines reach the terminal through events: control characters must not move its cursor."""
    return "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text.replace("\t", "    "))
