"""Charts of an RL run: what responses were worth, how long they were, and who waited for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from farspan.jobs.progress import number
from farspan.jobs.report.charts import Chart, Series

Records = Sequence[Mapping[str, Any]]
ROLES = ("rollout", "verify", "train", "publish", "monitor", "evaluation", "checkpoint")


def is_rl(records: Records) -> bool:
    """Whether these are steps of an RL run."""
    return "response_tokens_mean" in records[-1]


def front(records: Records) -> Chart:
    """Accuracy against tokens of a response, from the first step to the last, and where held-out prompts stand."""
    steps = [record for record in records if _known(record, "accuracy", "response_tokens_mean")]
    held_out = [record for record in records if _known(record, "eval_accuracy", "eval_response_tokens")]
    series = [
        Series(
            "front",
            "step by step",
            "faint",
            [number(record["response_tokens_mean"]) for record in steps],
            [100 * number(record["accuracy"]) for record in steps],
            0,
        )
    ]
    if held_out:
        x = [number(record["eval_response_tokens"]) for record in held_out]
        series.append(Series("front_held_out", "held out", "dots", x, _percent(held_out, "eval_accuracy"), 1))
    return Chart("front", "Right answers against length", "%", series, x_unit="tokens")


def over_steps(records: Records) -> list[Chart]:
    """Charts along the steps."""
    return [
        Chart("accuracy", "Right answers", "%", _accuracy(records), wide=True),
        Chart("tokens", "Tokens of a response", "", _tokens(records), from_zero=True),
        Chart("reward", "Reward", "mean, after shaping", _line(records, "reward_mean", "reward", 0)),
        Chart("cut", "Cut off at the cap", "%", _line(records, "truncated_share", "samples", 3, scale=100.0), True),
        Chart("age", "Age of samples", "versions of the weights", _line(records, "staleness_mean", "mean", 2), True),
        Chart("entropy", "Entropy", "nats a token", _line(records, "entropy_mean", "policy", 4), from_zero=True),
    ]


def waiting(records: Records) -> list[dict[str, float]]:
    """Seconds of each step by what the driver waited for."""
    return [{role: number(seconds) for role, seconds in (record.get("waited_s") or {}).items()} for record in records]


def headline(records: Records) -> str:
    """What came of it, in one sentence."""
    held_out = [record for record in records if _known(record, "eval_accuracy", "eval_response_tokens")]
    if held_out:
        last, whose = held_out[-1], "of held-out prompts right"
        share, tokens = number(last["eval_accuracy"]), number(last["eval_response_tokens"])
    else:
        last, whose = records[-1], "right"
        share, tokens = number(last["accuracy"]), number(last["response_tokens_mean"])
    return f"{share:.1%} {whose} in {tokens:.1f} tokens, after step {last['step']}."


def _accuracy(records: Records) -> list[Series]:
    series = _line(records, "accuracy", "of the step", 0, scale=100.0)
    held_out = [record for record in records if _known(record, "eval_accuracy")]
    if held_out:
        x = [float(record["step"]) for record in held_out]
        series.append(Series("eval_accuracy", "held out", "dots", x, _percent(held_out, "eval_accuracy"), 1))
    return series


def _tokens(records: Records) -> list[Series]:
    """The mean, medians of right and wrong ones, and targets of a shaper that has them."""
    series = _line(records, "response_tokens_mean", "mean", 0)
    for colour, kind in ((2, "correct"), (3, "wrong")):
        values = [((record.get("response_tokens") or {}).get(kind) or {}).get("0.5") for record in records]
        series += _values(records, f"median_{kind}", f"median, {kind}", values, colour)
    for colour, band in ((5, "easy"), (6, "medium"), (7, "hard")):
        values = [(record.get("shaper") or {}).get(f"target_{band}") for record in records]
        series += _values(records, f"target_{band}", f"target, {band}", values, colour)
    return series


def _line(records: Records, key: str, label: str, colour: int, *, scale: float = 1.0) -> list[Series]:
    values = [None if record.get(key) is None else scale * number(record[key]) for record in records]
    return _values(records, key, label, values, colour)


def _values(records: Records, key: str, label: str, values: Sequence[Any], colour: int) -> list[Series]:
    if all(value is None for value in values):
        return []
    x = [float(record["step"]) for record in records]
    return [Series(key, label, "line", x, [None if v is None else number(v) for v in values], colour)]


def _percent(records: Records, key: str) -> list[float | None]:
    return [100 * number(record[key]) for record in records]


def _known(record: Mapping[str, Any], *keys: str) -> bool:
    return all(record.get(key) is not None for key in keys)
