"""Rollout engines: tokens by seed and position alone, log-probabilities of a fresh forward, segments as one shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.errors import RunFailed
from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult
from farspan.trainer.rl.rollout.continuous import ContinuousEngine
from farspan.trainer.rl.rollout.draw import draw_tokens, uniform
from farspan.trainer.rl.rollout.padded import PaddedEngine

VOCAB, EOS = 50, 3
GREEDY = Sampling(temperature=0)
KINDS = {"hf": PaddedEngine, "hf-cb": partial(ContinuousEngine, cache_tokens=2048)}


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=VOCAB, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(8)  # distributions that are neither flat nor certain
    return made


def engine(seed: int = 0, kind: str = "hf") -> Any:
    made = model(seed)
    return KINDS[kind](made, dict(made.named_parameters()), eos_ids=[EOS])


def job(sample_id: int, prompt: Sequence[int], *, cap: int = 40, budget: int | None = None) -> RolloutJob:
    return RolloutJob(sample_id, 0, tuple(prompt), (), budget or cap, cap, seed=1000 + sample_id)


def jobs(count: int = 12, **more: Any) -> list[RolloutJob]:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(4, VOCAB, size=draw.integers(1, 9)).tolist() for _ in range(4)]
    return [job(index, prompts[index % 4], **more) for index in range(count)]


def continued(one: RolloutJob, result: SegmentResult, budget: int) -> RolloutJob:
    prefix = (*one.prefix_ids, *result.new_ids.tolist())
    remaining = one.remaining - len(result.new_ids)
    return replace(one, segment=one.segment + 1, prefix_ids=prefix, budget=min(budget, remaining), remaining=remaining)


def in_segments(served: Any, one: list[RolloutJob], sampling: Sampling, budget: int) -> list[list[int]]:
    """Tokens of every job, generated so many at a time, all unfinished ones together."""
    live = {each.sample_id: replace(each, budget=min(budget, each.remaining)) for each in one}
    found: dict[int, list[int]] = {sample_id: [] for sample_id in live}
    while live:
        for result in served.generate(list(live.values()), sampling):
            current = live.pop(result.sample_id)
            assert result.problem_with(current, eos_ids=[EOS], vocab=VOCAB) is None
            found[result.sample_id] += result.new_ids.tolist()
            if result.finish == "segment":
                live[result.sample_id] = continued(current, result, budget)
    return [found[each.sample_id] for each in one]


@torch.no_grad()
def fresh_logits(causal: Any, one: RolloutJob, ids: Sequence[int]) -> torch.Tensor:
    """Of the generated tokens, in one forward without a cache: [n, V]."""
    whole = torch.tensor([[*one.prompt_ids, *one.prefix_ids, *ids]])
    return causal(input_ids=whole, use_cache=False).logits[0, -len(ids) - 1 : -1]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7), GREEDY, Sampling(1.3, top_k=10), Sampling(top_p=0.8)], ids=str
)
def test_log_probs_are_those_of_a_fresh_forward(sampling: Sampling) -> None:
    served, wanted = engine(), jobs()
    found = served.generate(wanted, sampling)
    assert {one.finish for one in found} == {"eos", "cap"} or sampling == GREEDY
    for one, result in zip(wanted, found):
        assert result.problem_with(one, eos_ids=[EOS], vocab=VOCAB) is None
        logits = fresh_logits(served.model, one, result.new_ids.tolist())
        tokens, log_probs = draw_tokens(logits, [one.seed] * len(logits), range(len(logits)), sampling)
        assert tokens.tolist() == result.new_ids.tolist()
        np.testing.assert_allclose(result.log_probs, log_probs.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sampling"), [("hf", GREEDY), ("hf", Sampling(0.9)), ("hf-cb", GREEDY)], ids=["hf", "hf, drawn", "hf-cb"]
)
@pytest.mark.parametrize("budget", [1, 5, 13, 40])
def test_segments_are_one_shot(budget: int, kind: str, sampling: Sampling) -> None:
    served, wanted = engine(kind=kind), jobs()
    whole = served.generate(wanted, sampling)
    parts = in_segments(served, wanted, sampling, budget)
    close = 0
    for one, result, ids in zip(wanted, whole, parts):
        expected = result.new_ids.tolist()
        at = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), None)
        if at is not None and sampling == GREEDY:  # where the best two are as good as equal
            best = fresh_logits(served.model, one, expected[: at + 1])[-1].topk(2).values
            assert float(best[0] - best[1]) < 1e-5
            close += 1
        else:
            assert ids == expected
    assert close <= 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), GREEDY, Sampling(1.3, top_k=10)], ids=str)
def test_continuous_batching_draws_from_the_model(sampling: Sampling) -> None:
    """Log-probabilities are a fresh forward's; a call draws the same tokens again, greedy ones as the padded engine."""
    served, wanted = engine(kind="hf-cb"), jobs()
    found, again = served.generate(wanted, sampling), served.generate(wanted, sampling)
    for one, result, repeated in zip(wanted, found, again):
        assert result.problem_with(one, eos_ids=[EOS], vocab=VOCAB) is None
        assert result.new_ids.tolist() == repeated.new_ids.tolist()
        logits = fresh_logits(served.model, one, result.new_ids.tolist()) / (sampling.temperature or 1.0)
        if sampling.top_k:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k, 1).values[:, -1:], -torch.inf)
        ids = torch.from_numpy(result.new_ids).long()[:, None]
        np.testing.assert_allclose(result.log_probs, torch.log_softmax(logits, 1).gather(1, ids)[:, 0], atol=1e-5)
    if sampling == GREEDY:
        assert [r.new_ids.tolist() for r in found] == [r.new_ids.tolist() for r in engine().generate(wanted, GREEDY)]
    assert served.model.config._attn_implementation == "sdpa", "as it was"


def test_a_sample_beyond_the_cache_is_refused_before_it_ends_the_others() -> None:
    with pytest.raises(RunFailed, match="does not fit into the cache"):
        engine(kind="hf-cb").generate([job(0, [5] * 2000, cap=100)], GREEDY)


def test_a_sample_does_not_depend_on_the_batch() -> None:
    served, wanted = engine(), jobs()
    together = served.generate(wanted, Sampling())
    alone = [served.generate([one], Sampling())[0] for one in wanted]
    served.batch = 5
    in_fives = served.generate(wanted[::-1], Sampling())[::-1]
    for a, b, c in zip(together, alone, in_fives):
        assert a.new_ids.tolist() == b.new_ids.tolist() == c.new_ids.tolist()
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
    assert len({tuple(one.new_ids.tolist()) for one in together[::4]}) == 3, "samples of one prompt differ"


def test_the_distribution_is_the_model_s() -> None:
    """Frequencies of first tokens over many seeds."""
    served, prompt, count = engine(), [7, 9, 11], 4000
    found = served.generate([replace(job(i, prompt, cap=1), seed=i) for i in range(count)], Sampling(0.8))
    probs = torch.softmax(fresh_logits(served.model, job(0, prompt), [0])[0] / 0.8, 0).double().numpy()
    seen = np.bincount([int(one.new_ids[0]) for one in found], minlength=VOCAB) / count
    assert np.abs(seen - probs).max() < 4 * np.sqrt(probs.max() / count)


def test_weights_are_taken_over_whole_or_not_at_all() -> None:
    served, other = engine(0), model(1)
    before = {name: p.detach().clone() for name, p in served.trainable.items()}
    new = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(RunFailed, match="not those of this model"):
        served.load({name: new[name] for name in list(new)[1:]}, 1)
    with pytest.raises(RunFailed, match="not those of this model"):
        served.load({**new, "lm_head.weight": new["lm_head.weight"][:-1]}, 1)
    assert served.version == 0 and all(torch.equal(before[name], p) for name, p in served.trainable.items())
    served.load(new, 7)
    (result,) = served.generate(jobs(1), GREEDY)
    assert result.version == 7
    assert (
        result.new_ids.tolist() == PaddedEngine(other, {}, eos_ids=[EOS]).generate(jobs(1), GREEDY)[0].new_ids.tolist()
    )


def test_garbage_is_recognised() -> None:
    one = job(4, [5, 6], cap=10, budget=4)
    ids, logs = np.array([7, 8, 9, 10], np.int32), np.full(4, -0.5, np.float32)
    good = SegmentResult(4, 0, ids, logs, "segment", 0, 0.1)

    def problem(**change: Any) -> str | None:
        return replace(good, **change).problem_with(one, eos_ids=[EOS], vocab=VOCAB)

    assert problem() is None
    assert problem(new_ids=np.array([7, EOS], np.int32), log_probs=logs[:2], finish="eos") is None
    for change in (
        {"sample_id": 5}, {"segment": 1}, {"log_probs": logs[:3]}, {"new_ids": ids[:3], "log_probs": logs[:3]},
        {"new_ids": np.arange(4, 9, dtype=np.int32), "log_probs": np.full(5, -1, np.float32)},
        {"new_ids": ids[:0], "log_probs": logs[:0]}, {"log_probs": logs + np.nan}, {"log_probs": -logs},
        {"new_ids": ids + VOCAB}, {"finish": "eos"}, {"new_ids": np.array([7, EOS, 8, 9], np.int32)},
        {"finish": "cap"}, {"new_ids": np.array([7, 8, 9, EOS], np.int32)},
    ):  # fmt: skip
        assert problem(**change), change


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_numbers_are_in_range(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


def test_uniform_numbers_are_uniform_and_apart() -> None:
    over_positions = np.array([uniform(5, position) for position in range(20000)])
    over_seeds = np.array([uniform(seed, 5) for seed in range(20000)])
    for numbers in (over_positions, over_seeds):
        assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.003
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(over_positions, over_seeds)[0, 1]) < 0.03


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=8), st.integers(0, 1000))
def test_what_is_impossible_is_never_drawn(logits: list[float], seed: int) -> None:
    row = torch.tensor([[*logits, -torch.inf]])
    for sampling in (Sampling(), Sampling(top_k=1), Sampling(top_p=0.01), GREEDY):
        token, log_prob = draw_tokens(row, [seed], [0], sampling)
        assert int(token) < len(logits) and torch.isfinite(log_prob).all()
        if sampling.top_k == 1 or sampling == GREEDY:
            assert logits[int(token)] == max(logits) or abs(logits[int(token)] - max(logits)) < 1e-5
