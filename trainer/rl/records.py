"""What a step of RL leaves behind: its metrics, and every sample that ended in it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from farspan.trainer.rl.messages import SegmentResult
from farspan.trainer.rl.pool import Group
from farspan.trainer.rl.samples import PromptGroup

LENGTH_QUANTILES = (0.1, 0.5, 0.9)


def step_record(
    groups: Sequence[Group],
    scored: Sequence[PromptGroup],
    rewards: Sequence[Sequence[float]],
    results: Sequence[SegmentResult],
    *,
    version: int,
) -> dict[str, Any]:
    """Metrics of the groups that were completed in a step; None where there is nothing to average.

    Args:
        results: all segments that were generated in the step.
        version: of the weights now.
    """
    samples = [sample for group in scored for sample in group.samples]
    judged = [sample for sample in samples if sample.correct is not None]
    ages = [version - sample.oldest_version for group in groups for sample in group.samples]
    lengths = {
        "correct": [one.tokens for one in judged if one.correct and one.finish == "eos"],
        "wrong": [one.tokens for one in judged if not one.correct and one.finish == "eos"],
        "truncated": [one.tokens for one in samples if one.finish == "cap"],
    }
    return {
        "reward_mean": mean([reward for row in rewards for reward in row]),
        "accuracy": mean([float(bool(sample.correct)) for sample in judged]),
        "response_tokens_mean": mean([float(sample.tokens) for sample in samples]),
        "response_tokens": {
            kind: dict(zip(map(str, LENGTH_QUANTILES), np.quantile(found, LENGTH_QUANTILES).tolist()))
            for kind, found in lengths.items()
            if found
        },
        "truncated_share": mean([float(sample.finish == "cap") for sample in samples]),
        "well_formed_share": mean([float(sample.well_formed) for sample in samples]),
        "unjudged": len(samples) - len(judged),
        "groups": len(groups),
        "groups_without_signal": sum(len(set(row)) <= 1 for row in rewards),
        "samples": len(samples),
        "segments_mean": mean([float(one.segments) for group in groups for one in group.samples]),
        "staleness_mean": mean([float(age) for age in ages]),
        "staleness_max": max(ages, default=0),
        "generated_tokens": sum(len(result.new_ids) for result in results),
    }


def sample_records(
    step: int,
    groups: Sequence[Group],
    scored: Sequence[PromptGroup],
    rewards: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
    decode: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """Every sample of these groups, for whoever wants to read or replay the run."""
    return [
        {
            "step": step,
            "sample": sample.sample_id,
            "group": group.group_id,
            "problem": group.number,
            "prompt": group.problem.prompt,
            "answer": group.problem.answer,
            "response": decode(sample.ids),
            "ids": sample.ids,
            "log_probs": [round(logs, 6) for logs in sample.log_probs],
            "spans": [[span.start, span.end, span.version] for span in sample.spans],
            "finish": sample.finish,
            "tokens": len(sample.ids),
            "score": one.score,
            "correct": one.correct,
            "reward": reward,
            "advantage": advantage,
        }
        for group, of_group, row, gains in zip(groups, scored, rewards, advantages, strict=True)
        for sample, one, reward, advantage in zip(group.samples, of_group.samples, row, gains, strict=True)
    ]


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.fmean(values) if values else None
