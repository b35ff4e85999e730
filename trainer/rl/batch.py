"""From samples that train to packs: whole sequences end to end, and beside each trained row what its loss needs.

Rows are laid out as in supervised training: the label of a row is the next token, so a response of n tokens trains the
n rows from its prompt's last one on. T rows of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from farspan.trainer.data.packing import IGNORED_LABEL, Pack, best_fit

FIELDS = ("advantages", "weights", "old_log_probs", "behaviour_log_probs", "ref_log_probs")


@dataclass(frozen=True)
class TrainedSample:
    """One response, or the tokens of it that train now."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    """All tokens of the response so far."""
    first: int
    """Trained are tokens [first, len(ids))."""
    advantages: np.ndarray
    """float32, one for each trained token."""
    weight: float
    """Of each trained token in the loss (`losses.sample_weights`)."""
    behaviour_log_probs: np.ndarray
    """float32 of the trained tokens, when they were sampled."""
    rewarded: bool = False
    """Whether it has the full reward, so that mastered tokens may be left out."""


@dataclass(frozen=True)
class PolicyPack:
    """A pack, and what the loss needs of each row: float32 [T], 0 where nothing is trained."""

    pack: Pack
    samples: np.ndarray
    """int32 [T], number in the step of the sample a trained row belongs to; -1 elsewhere."""
    rewarded: np.ndarray
    """bool [T]."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """By the names in `FIELDS`; what was not given is not there."""


def pack_samples(
    samples: Sequence[TrainedSample],
    *,
    context: int,
    log_probs: dict[str, Sequence[np.ndarray]] | None = None,
) -> list[PolicyPack]:
    """Best-fit packs of at most `context` rows.

    Args:
        log_probs: more values of each sample's trained tokens, as `old_log_probs` and `ref_log_probs`.
    """
    lengths = np.array([len(sample.prompt_ids) + len(sample.ids) for sample in samples], dtype=np.int64)
    more = log_probs or {}
    return [
        _pack(
            [samples[index] for index in inside],
            inside,
            {name: [values[index] for index in inside] for name, values in more.items()},
        )
        for inside in best_fit(lengths, context)
    ]


def _pack(inside: Sequence[TrainedSample], numbers: Sequence[int], more: dict[str, list[np.ndarray]]) -> PolicyPack:
    lengths = [len(sample.prompt_ids) + len(sample.ids) for sample in inside]
    edges = np.cumsum([0, *lengths]).astype(np.int32)
    rows = int(edges[-1])
    ids = np.concatenate([np.array([*sample.prompt_ids, *sample.ids], dtype=np.int64) for sample in inside])
    labels, of_sample = np.full(rows, IGNORED_LABEL, dtype=np.int64), np.full(rows, -1, dtype=np.int32)
    rewarded = np.zeros(rows, dtype=bool)
    values = {
        name: np.zeros(rows, dtype=np.float32) for name in ("advantages", "weights", "behaviour_log_probs", *more)
    }
    for index, (sample, number, start, end) in enumerate(zip(inside, numbers, edges[:-1], edges[1:])):
        at = slice(start + len(sample.prompt_ids) + sample.first - 1, end - 1)
        labels[at] = ids[at.start + 1 : end]
        of_sample[at], rewarded[at] = number, sample.rewarded
        values["advantages"][at] = sample.advantages
        values["weights"][at] = sample.weight
        values["behaviour_log_probs"][at] = sample.behaviour_log_probs
        for name, found in more.items():
            values[name][at] = found[index]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    trained = int((labels != IGNORED_LABEL).sum())
    return PolicyPack(Pack(ids, labels, positions, edges, rows, trained, len(inside)), of_sample, rewarded, values)


def unpack(packs: Sequence[PolicyPack], found: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Values of trained rows, pack by pack, as one array for each sample."""
    pieces: dict[int, np.ndarray] = {}
    for pack, values in zip(packs, found, strict=True):
        numbers = pack.samples[pack.samples >= 0]
        assert len(numbers) == len(values)
        starts = np.flatnonzero(np.diff(numbers, prepend=-1)) if len(numbers) else np.zeros(0, dtype=np.int64)
        for start, part in zip(starts.tolist(), np.split(values, starts[1:])):
            pieces[int(numbers[start])] = part
    return [pieces[number] for number in range(count)]
