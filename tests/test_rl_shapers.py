"""Shapers of rewards: formulas of the papers on cases worked by hand, TRL where it has them, what all of them keep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from farspan.trainer.rl import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers import (
    Cosine,
    GRPOLambda,
    Kimi,
    L1Exact,
    L1Max,
    Laser,
    LaserD,
    LaserDE,
    Plain,
    Repetition,
    Shaper,
    SoftOverlong,
    StopProperly,
)
from farspan.trainer.rl.shapers.laser import band_of
from farspan.trainer.rl.shapers.repetition import is_repetitive

CAP = 100


def sample(tokens: int, correct: bool | None = True, **more: Any) -> ScoredSample:
    score = more.pop("score", float(bool(correct)))
    return ScoredSample(tokens=tokens, score=score, correct=correct, **more)


def group(*samples: ScoredSample, prompt_id: str | int = 0) -> PromptGroup:
    return PromptGroup(samples, prompt_id)


def alone(shaper: Shaper, one: ScoredSample) -> float:
    return shaper.rewards([group(one)])[0][0]


class TestFormulas:
    def test_laser(self) -> None:
        # correct within the target: 1 + 0.5; correct beyond it: 1; wrong: its score
        short, long, wrong = sample(40), sample(41), sample(10, correct=False, score=-0.5)
        assert Laser(target=40).rewards([group(short, long, wrong)]) == [[1.5, 1.0, -0.5]]
        assert Laser(target=40, kind="penalty").rewards([group(short, long, wrong)]) == [[1.0, 0.5, -0.5]]
        assert Laser(target=40, kind="both").rewards([group(short, long, wrong)]) == [[1.5, 0.5, -0.5]]

    def test_bands(self) -> None:
        # 2 of 3 is easy, 1 of 3 medium, 0 of 3 hard; of 8: 6 easy (0.75), 5 medium (0.625), 3 medium, 2 hard
        def of(correct: int, number: int) -> str:
            return band_of(group(*[sample(1, correct=index < correct) for index in range(number)]))

        assert [of(c, 3) for c in range(4)] == ["hard", "medium", "easy", "easy"]
        assert [of(c, 8) for c in range(9)] == ["hard"] * 3 + ["medium"] * 3 + ["easy"] * 3

    def test_laser_d_finds_targets(self) -> None:
        # K = 8 samples. Easy: 2K/3 = 5 correct at least, so a fifth of all responses must lie within the target;
        # medium: 2, a half; hard: 1, all of them.
        shaper = LaserD(cap=100, lower=10, step=10)
        easy = group(*[sample(length) for length in (21, 25, 33, 47, 55, 60, 70)], sample(99, correct=False))
        medium = group(
            *[sample(length, correct=index < 4) for index, length in enumerate((5, 15, 25, 35, 45, 55, 65, 75))]
        )
        hard = group(*[sample(10 * index, correct=False) for index in range(1, 9)])
        shaper.observe([easy, medium, hard])
        # easy: 8 responses / 5 -> the 2nd of 21, 25, ..: 25 -> 30. medium: 8 / 2 -> the 4th: 35 -> 40. hard: 80
        assert shaper.targets == {"easy": 30, "medium": 40, "hard": 80}
        assert shaper.rewards([group(sample(30), sample(31))]) == [[1.5, 1.0]]
        mixed = group(sample(40), sample(41), sample(20, correct=False), sample(90, correct=False))
        assert shaper.rewards([mixed]) == [[1.5, 1.0, 0.0, 0.0]]
        assert shaper.metrics() == {"target_easy": 30, "target_medium": 40, "target_hard": 80}

    def test_laser_d_with_thirds_rounded_up(self) -> None:
        # K = 8: ceil(16 / 3) = 6 correct of an easy prompt: a sixth of 8 responses are 2; medium 3: a third are 3
        shaper = LaserD(cap=100, lower=1, step=1, rounding="ceil")
        shaper.observe(
            [
                group(*[sample(length) for length in range(11, 19)]),
                group(*[sample(length, correct=length < 25) for length in range(21, 29)]),
            ]
        )
        assert (shaper.targets["easy"], shaper.targets["medium"]) == (12, 23)

    def test_laser_d_without_a_target_takes_the_longest_response(self) -> None:
        shaper = LaserD(cap=100, lower=10, step=10)
        assert shaper.rewards([group(sample(70), sample(95, correct=False)), group(sample(99))]) == [[1.5, 0.0], [1.5]]
        shaper.observe([group(sample(10), sample(20), sample(30))])  # only easy prompts
        assert shaper.targets["hard"] is None and shaper.targets["easy"] == 20

    def test_laser_de_pays_for_exploring(self) -> None:
        shaper = LaserDE(cap=400, lower=10, step=10)
        hard = [sample(50, correct=False) for _ in range(4)]
        shaper.observe([group(*hard)])
        assert shaper.targets["hard"] == 50
        ids = list(range(300))
        longer = sample(60, correct=False, score=-0.5, token_ids=ids[:60])
        within = sample(50, correct=False, score=-0.5, token_ids=ids[:50])
        repeats = sample(60, correct=False, score=-0.5, token_ids=[1, 2, 3, 4] * 15)
        broken = sample(60, correct=False, score=-1.0, well_formed=False, token_ids=ids[:60])
        assert shaper.rewards([group(longer, within, repeats, broken)]) == [[0.0, -0.5, -0.5, -1.0]]

    def test_repetitive(self) -> None:
        fresh = list(range(1000))
        assert not is_repetitive(fresh) and not is_repetitive([])
        assert is_repetitive([7, 8, 7, 8, 1, 2, 3, 4, 5, 6])  # a 2-gram twice, 2 apart of 10 tokens
        assert not is_repetitive([7, 8, 1, 2, 3, 4, 5, 6, 7, 8])  # 8 apart: not closer than a third
        twice = fresh[:100] + fresh[50:54] + fresh[100:296]
        assert not is_repetitive(twice)  # a 4-gram twice in 300 tokens; 3 times are needed
        assert is_repetitive([*fresh[:100], 5, 6, 7, 8, 5, 6, 7, 8, *fresh[100:300]])

    def test_grpo_lambda(self) -> None:
        # lengths 10, 20, 30 of correct samples: mean 20, deviation 10 -> z = -1, 0, 1 -> sigmoid 0.2689, 0.5, 0.7311
        best = group(sample(10), sample(20), sample(30), prompt_id="a")
        other = group(sample(10), sample(99, correct=False, score=-1.0), prompt_id="b")
        found = GRPOLambda(top_share=0.5, alpha=0.6).rewards([other, best])
        assert found[0] == [1.0, 0.0]
        assert found[1] == pytest.approx([1 - 0.6 * 0.268941421, 0.7, 1 - 0.6 * 0.731058579], abs=1e-6)

    def test_grpo_lambda_pays_nothing_for_wrong_answers_and_knows_single_ones(self) -> None:
        chosen = group(sample(10), sample(50, correct=False), prompt_id=1)
        assert GRPOLambda(top_share=1.0, alpha=0.4).rewards([chosen]) == [[pytest.approx(0.8), 0.0]]

    def test_grpo_lambda_chooses_the_share_and_breaks_ties_by_prompt(self) -> None:
        groups = [group(sample(5), prompt_id=number) for number in (9, 10, 3, 7, 4)]
        assert GRPOLambda(top_share=0.4, alpha=0.5).choose(groups) == {2, 4}
        assert GRPOLambda(top_share=0.1, alpha=0.5).choose(groups) == {2}, "a share above zero chooses one at least"
        assert GRPOLambda(top_share=0.0, alpha=0.5).choose(groups) == set()

    def test_cosine(self) -> None:
        # at 0: s; half way: (s + e) / 2; a third: e + (s - e) / 2 * 1.5
        shaper = Cosine(cap=300, correct=(2.0, 1.0), wrong=(-10.0, 0.0), exceed=-10.0)
        assert alone(shaper, sample(0)) == 2.0 and alone(shaper, sample(0, correct=False)) == -10.0
        assert alone(shaper, sample(150)) == pytest.approx(1.5) and alone(shaper, sample(100)) == pytest.approx(1.75)
        assert alone(shaper, sample(150, correct=False)) == pytest.approx(-5.0)
        assert alone(shaper, sample(284)) == -10.0, "within 16 tokens of the cap"
        assert alone(shaper, sample(283)) == pytest.approx(1 + 0.5 * (1 + math.cos(math.pi * 283 / 300)))
        assert alone(shaper, sample(40, finish="cap")) == -10.0

    def test_kimi(self) -> None:
        # lengths 10 to 50: lambda = 0.5, 0.25, 0, -0.5; wrong ones keep what is below 0
        found = Kimi(weight=0.4).rewards(
            [group(sample(10), sample(20), sample(30, correct=False), sample(50), sample(50, correct=False))]
        )
        assert found == [pytest.approx([1.2, 1.1, 0.0, 0.8, -0.2])]
        assert Kimi(weight=1.0).rewards([group(sample(10, correct=False), sample(20))]) == [[0.0, 0.5]]
        assert Kimi().rewards([group(sample(10)), group(sample(7), sample(7))]) == [[1.0], [1.0, 1.0]]

    def test_l1(self) -> None:
        exact, most = L1Exact(alpha=0.001), L1Max(alpha=0.001)
        assert alone(exact, sample(700, target_tokens=1000)) == pytest.approx(0.7)
        assert alone(exact, sample(1200, correct=False, target_tokens=1000)) == pytest.approx(-0.2)
        assert alone(most, sample(1000, target_tokens=1000)) == 0.5
        assert alone(most, sample(700, target_tokens=1000)) == pytest.approx(0.8)
        assert (
            alone(most, sample(200, target_tokens=1000)) == 1.0 and alone(most, sample(1600, target_tokens=1000)) == 0.0
        )
        assert alone(most, sample(700, correct=False, target_tokens=1000)) == 0.0
        assert alone(L1Max(alpha=0.001, slope_scale=0.5), sample(700, target_tokens=1000)) == pytest.approx(0.65)
        with pytest.raises(ValueError, match="target_tokens"):
            alone(exact, sample(5))

    def test_soft_overlong(self) -> None:
        shaper = SoftOverlong(cap=100, buffer=20, factor=0.5)
        assert [alone(shaper, sample(length)) for length in (80, 90, 100, 101, 150)] == [1.0, 0.75, 0.5, 0.5, 0.5]
        theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
        lengths = list(range(70, 130))
        ours = [SoftOverlong(cap=100, buffer=20).punishment(length) for length in lengths]
        assert ours == pytest.approx(theirs([[1] * length for length in lengths]))
        assert [SoftOverlong(cap=10, buffer=0).punishment(length) for length in (10, 11)] == [0.0, -1.0]

    def test_stop_properly(self) -> None:
        cut = sample(100, finish="cap")
        assert StopProperly().rewards([group(sample(99), cut)]) == [[1.0, 0.0]]
        assert StopProperly(keep=0.5, penalty=0.25).rewards([group(cut)]) == [[0.25]]
        assert alone(StopProperly(), sample(100, correct=False, finish="cap", score=-1.0)) == -1.0

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
    def test_sparse_repetition_is_trl_s(self, ids: list[int], ngram: int) -> None:
        theirs = get_repetition_penalty_reward(ngram_size=ngram, max_penalty=-0.7)([ids])[0]
        assert alone(Repetition(ngram=ngram, weight=-0.7), sample(len(ids), token_ids=ids)) == pytest.approx(1 + theirs)

    def test_dense_repetition(self) -> None:
        # 1 2 1 2 1: the pair 1 2 begins again at 2, the pair 2 1 at 3 -> tokens 2 to 4
        shaper = Repetition(ngram=2, weight=-0.5, kind="dense", gamma=0.5)
        assert shaper.token_penalties([1, 2, 1, 2, 1]) == [0.0, 0.0, -0.5, -0.5, -0.5]
        assert alone(shaper, sample(5, token_ids=[1, 2, 1, 2, 1])) == pytest.approx(1 - 0.5 * (0.25 + 0.125 + 0.0625))
        apart = Repetition(ngram=2, weight=-0.5, kind="dense", apart=True)
        assert apart.token_penalties([1, 2, 1, 2, 1]) == [0.0, 0.0, -0.5, -0.5, 0.0]
        assert shaper.token_penalties([1]) == [0.0] and shaper.token_penalties([]) == []


SHAPERS: dict[str, Callable[[], Shaper]] = {
    "plain": Plain,
    "laser": lambda: Laser(target=40),
    "laser_d": lambda: LaserD(cap=CAP, lower=8, step=8),
    "laser_de": lambda: LaserDE(cap=CAP, lower=8, step=8, alpha=0.3),
    "grpo_lambda": lambda: GRPOLambda(top_share=0.5),
    "cosine": lambda: Cosine(cap=CAP, margin=0),
    "repetition": lambda: Repetition(ngram=2),
    "repetition, dense": lambda: Repetition(ngram=2, weight=-0.01, kind="dense"),
    "kimi": Kimi,
    "l1_exact": lambda: L1Exact(alpha=0.001),
    "l1_max": lambda: L1Max(alpha=0.01),
    "soft_overlong": lambda: SoftOverlong(cap=CAP, buffer=20),
    "stop_properly": StopProperly,
}
RANKS_GROUPS = {"grpo_lambda", "laser_d", "laser_de"}
"""Look beyond one group: by rank, or by the longest response of the step while there is no target."""
LONGER_MAY_BE_BETTER = {"l1_exact", "repetition", "repetition, dense"}
"""By their purpose: a length that is asked for; what repeats itself."""
WRONG_MAY_WIN = {"l1_exact", "repetition", "repetition, dense", "l1_max", "stop_properly", "soft_overlong", "cosine"}
"""At some lengths a wrong sample has as much as a correct one or more; each class says where."""


@st.composite
def samples(draw: st.DrawFn) -> ScoredSample:
    tokens = draw(st.one_of(st.just(0), st.integers(0, CAP), st.just(CAP)))
    correct = draw(st.sampled_from([True, False, None]))
    return ScoredSample(
        tokens=tokens,
        score={True: 1.0, False: -0.5, None: 0.25}[correct],
        correct=correct,
        well_formed=correct is True or draw(st.booleans()),
        finish="cap" if tokens == CAP else "eos",
        token_ids=draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)),
        target_tokens=draw(st.integers(0, CAP)),
    )


def groups(least: int = 1) -> st.SearchStrategy[list[PromptGroup]]:
    one = st.lists(samples(), min_size=1, max_size=6)
    return st.lists(one, min_size=least, max_size=5).map(
        lambda found: [PromptGroup(inside, prompt_id) for prompt_id, inside in enumerate(found)]
    )


def observed(name: str, monitor: Sequence[PromptGroup]) -> Shaper:
    shaper = SHAPERS[name]()
    shaper.observe(monitor)
    return shaper


@pytest.mark.parametrize("name", SHAPERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_every_shaper_keeps(name: str, data: st.DataObject) -> None:
    step, monitor = data.draw(groups()), data.draw(groups(0))
    shaper = observed(name, monitor)
    found = shaper.rewards(step)
    assert [len(row) for row in found] == [len(group.samples) for group in step]
    assert all(math.isfinite(reward) for row in found for reward in row)
    assert shaper.rewards(step) == found, "asking twice changes nothing"
    # the order of samples in a group does not matter
    turned = [PromptGroup(list(group.samples)[::-1], group.prompt_id) for group in step]
    assert [pytest.approx(row[::-1]) for row in shaper.rewards(turned)] == found
    # groups do not influence each other
    if name not in RANKS_GROUPS:
        assert [shaper.rewards([group])[0] for group in step] == found
    # nor does their order, even where they are ranked
    assert shaper.rewards(step[::-1]) == found[::-1]
    # without a verdict a sample keeps its score, and its siblings have what they had
    for group, row in zip(step, found):
        assert all(reward == one.score for one, reward in zip(group.samples, row) if one.correct is None)
    # what is restored goes on alike
    again = SHAPERS[name]()
    again.load_state_dict(json.loads(json.dumps(shaper.state_dict())))
    assert again.rewards(step) == found


@pytest.mark.parametrize("name", sorted(set(SHAPERS) - LONGER_MAY_BE_BETTER))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_of_correct_samples_the_shortest_is_worth_most(name: str, data: st.DataObject) -> None:
    step = data.draw(groups())
    asked = data.draw(st.integers(0, CAP))
    step = [
        PromptGroup(
            [
                ScoredSample(s.tokens, s.score, s.correct, s.well_formed, s.finish, s.token_ids, asked)
                for s in g.samples
            ],
            g.prompt_id,
        )
        for g in step
    ]
    for group, row in zip(step, observed(name, data.draw(groups(0))).rewards(step)):
        right = sorted((one.tokens, -reward) for one, reward in zip(group.samples, row) if one.correct)
        assert all(-right[0][1] >= -reward - 1e-9 for _, reward in right)


@pytest.mark.parametrize("name", sorted(set(SHAPERS) - WRONG_MAY_WIN))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_wrong_sample_beats_a_correct_one_of_its_group(name: str, data: st.DataObject) -> None:
    step = data.draw(groups())
    for group, row in zip(step, observed(name, data.draw(groups(0))).rewards(step)):
        right = [reward for one, reward in zip(group.samples, row) if one.correct]
        wrong = [reward for one, reward in zip(group.samples, row) if one.correct is False]
        assert not right or not wrong or min(right) > max(wrong)


@pytest.mark.parametrize("name", SHAPERS)
def test_ends_of_the_range(name: str) -> None:
    shaper = SHAPERS[name]()
    empty = sample(0, correct=False, well_formed=False, token_ids=[], target_tokens=10)
    cut = sample(CAP, correct=False, finish="cap", token_ids=[1] * CAP, target_tokens=10)
    unjudged = sample(5, correct=None, token_ids=[1] * 5, target_tokens=10)
    for step in ([], [group(empty)], [group(cut, cut)], [group(unjudged)], [group(empty, cut, unjudged)]):
        found = shaper.rewards(step)
        assert all(math.isfinite(reward) for row in found for reward in row)


def test_values_that_make_no_sense_are_refused() -> None:
    for wrong in (
        lambda: GRPOLambda(alpha=1.0),
        lambda: GRPOLambda(top_share=1.1),
        lambda: SoftOverlong(cap=10, buffer=11),
        lambda: LaserD(lower=0),
        lambda: LaserD(lower=20, cap=10),
        lambda: Repetition(weight=0.1),
        lambda: Cosine(cap=0),
        lambda: StopProperly(keep=2.0),
    ):
        with pytest.raises(ValueError):
            wrong()
