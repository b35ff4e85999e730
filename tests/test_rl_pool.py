"""The pool of samples: segments add up, groups leave when they are whole, a state is a state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.trainer.rl.messages import RolloutJob, SegmentResult
from farspan.trainer.rl.pool import Pool, sample_seed
from farspan.trainer.rl.state import from_bytes, to_bytes
from farspan.trainer.rl.tasks.arithmetic import Arithmetic
from farspan.trainer.rl.tasks.base import Verdict

TASK, EOS = Arithmetic(), 3


def prompt(problem: Any) -> list[int]:
    return list(problem.prompt.encode())


def pool(**more: Any) -> Pool:
    return Pool(**{"slots": 12, "group_size": 3, "cap": 20, "segment": 6, "seed": 5, **more})


def answer(job: RolloutJob, length: int, version: int) -> SegmentResult:
    """A worker's answer, of a sample that has `length` tokens in all."""
    count = min(job.budget, length - len(job.prefix_ids))
    ends = count + len(job.prefix_ids) == length and length < 20
    ids = np.arange(10, 10 + count, dtype=np.int32)
    if ends:
        ids[-1] = EOS
    finish = "eos" if ends else "cap" if count == job.remaining else "segment"
    return SegmentResult(job.sample_id, job.segment, ids, np.full(count, -0.5, np.float32), finish, version, 0.1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_sample_is_generated_once_and_groups_leave_whole(data: st.DataObject) -> None:
    made = pool(segment=data.draw(st.integers(1, 20)))
    length_of: dict[int, int] = {}
    number, left = 0, []
    for step in range(12):
        for _ in range(made.room()):
            group = made.begin(number, TASK.problem(number), prompt(TASK.problem(number)), step=step)
            number += 1
            length_of |= {sample.sample_id: data.draw(st.integers(1, 20)) for sample in group.samples}
        assert len(made.live) <= made.slots
        for job in made.jobs():
            assert job.budget <= made.segment and len(job.prefix_ids) + job.remaining == made.cap
            result = answer(job, length_of[job.sample_id], step)
            assert result.problem_with(job, eos_ids=[EOS], vocab=100) is None
            _, sample = made.find(job.sample_id)
            sample.append(result)
            if sample.finish is not None:
                sample.verdict = Verdict(1.0, True)
        if data.draw(st.booleans()):  # through a state and back
            state = from_bytes(to_bytes(made.state_dict()))
            again = pool(segment=made.segment)
            again.load_state_dict(state, TASK.problem, prompt)
            assert again.groups == made.groups and again.next_group == made.next_group
            made = again
        for group in made.complete():
            left.append(group.group_id)
            made.remove(group)
            for sample in group.samples:
                assert len(sample.ids) == len(sample.log_probs) == length_of[sample.sample_id]
                assert sample.finish == ("cap" if len(sample.ids) == 20 else "eos")
                assert [span.version for span in sample.spans] == sorted(span.version for span in sample.spans)
                assert sample.segments == -(-len(sample.ids) // made.segment)
    assert len(set(left)) == len(left)


def test_a_group_with_an_unfinished_member_stays() -> None:
    made = pool()
    group = made.begin(0, TASK.problem(0), [1], step=1)
    lengths = {0: 3, 1: 3, 2: 15}
    for job in made.jobs():
        made.find(job.sample_id)[1].append(answer(job, lengths[job.sample_id], 0))
    for sample in group.samples[:2]:
        sample.verdict = Verdict(0.0, False)
    assert not list(made.complete()) and len(made.live) == 1 and made.room() == 3
    (job,) = made.jobs()
    assert (job.segment, len(job.prefix_ids), job.remaining) == (1, 6, 14)


def test_tokens_and_spans_that_do_not_add_up_are_a_defect() -> None:
    made = pool()
    group = made.begin(0, TASK.problem(0), [1], step=1)
    group.samples[0].ids.append(7)
    with pytest.raises(AssertionError, match="spans"):
        group.samples[0].append(answer(made.job(group, group.samples[1]), 3, 0))


def test_seeds_are_the_sample_s_own() -> None:
    assert len({sample_seed(seed, sample) for seed in range(20) for sample in range(200)}) == 4000


def test_bytes_of_another_kind_are_refused() -> None:
    for data in (b"", b"not a state", to_bytes({"a": 1})[:40]):
        with pytest.raises(ValueError):
            from_bytes(data)
    state = {"a": [1, {"b": np.arange(3)}], "c": None, "d": {"e": np.zeros((2, 2))}}
    found = from_bytes(to_bytes(state))
    assert found["a"][0] == 1 and found["a"][1]["b"].tolist() == [0, 1, 2] and found["d"]["e"].shape == (2, 2)
