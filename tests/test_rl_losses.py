"""Losses against TRL on the same tensors, advantages against torchrl and plain sums in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farspan.trainer.rl import gae, group_advantages, mastered_token_mask, policy_loss
from farspan.trainer.rl.losses import Aggregation, sample_weights, token_losses, truncated_weights, value_loss

N, T, CAP = 6, 9, 12


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities that differ enough for every branch of the clipping, and lengths from 1 to T."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    log_probs = -normal(N, T).abs()
    lengths = torch.tensor([1, T, 3, 5, T, 2])
    return {
        "log_probs": log_probs.requires_grad_(),
        "old": log_probs.detach() + 0.4 * normal(N, T),
        "ref": log_probs.detach() + 0.3 * normal(N, T),
        "behaviour": log_probs.detach() + 0.5 * normal(N, T),
        "advantages": normal(N),
        "mask": (torch.arange(T) < lengths[:, None]).long(),
        "entropies": normal(N, T).abs(),
    }


def trl_loss(kind: str, at: dict[str, Tensor], **settings: Any) -> Tensor:
    """TRL's own `GRPOTrainer._compute_loss` of version 1.16, on log-probabilities that are given."""
    from trl import GRPOTrainer

    options = {"low": 0.2, "high": 0.2, "delta": None, "beta": 0.0, **settings}
    weights = options.pop("weights", None)
    trainer = SimpleNamespace(
        loss_type=kind,
        beta=options["beta"],
        epsilon_low=options["low"],
        epsilon_high=options["high"],
        args=SimpleNamespace(delta=options["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=CAP,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda found: found, reduce=lambda found, reduction: found),
        model=SimpleNamespace(training=True),
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (at["log_probs"], at["entropies"], None)
    inputs = {
        "prompt_ids": torch.zeros(N, 1, dtype=torch.long),
        "prompt_mask": torch.ones(N, 1, dtype=torch.long),
        "completion_ids": torch.zeros(N, T, dtype=torch.long),
        "completion_mask": at["mask"],
        "advantages": at["advantages"],
        "old_per_token_logps": at["old"],
        "ref_per_token_logps": at["ref"],
        "num_items_in_batch": at["mask"].sum(),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "settings_of_both",
    [
        {},
        {"high": 0.28},
        {"delta": 1.5},
        {"beta": 0.04},
        {"high": 0.28, "beta": 0.1, "delta": 3.0},
    ],
    ids=str,
)
def test_losses_and_gradients_are_trl_s(kind: Aggregation, settings_of_both: dict[str, float]) -> None:
    at = tensors()
    theirs = trl_loss(kind, at, **settings_of_both)
    (their_gradient,) = torch.autograd.grad(theirs, at["log_probs"])
    ours = policy_loss(
        at["log_probs"], at["old"], at["advantages"], at["mask"],
        aggregation=kind, cap=CAP, clip_high=settings_of_both.get("high", 0.2),
        ratio_cap=settings_of_both.get("delta"),
        ref_log_probs_NT=at["ref"], kl_weight=settings_of_both.get("beta", 0.0),
    )  # fmt: skip
    (our_gradient,) = torch.autograd.grad(ours, at["log_probs"])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-14)
    assert our_gradient.abs().sum() > 0 and (our_gradient[at["mask"] == 0] == 0).all()


def test_truncated_weights_are_trl_s() -> None:
    at = tensors(1)
    weights = truncated_weights(at["old"], at["behaviour"], cap=1.3)
    assert weights.max() == 1.3 and not weights.requires_grad
    ours = policy_loss(at["log_probs"], at["old"], at["advantages"], at["mask"], weights_NT=weights)
    theirs = trl_loss("dapo", at, weights=(at["old"] - at["behaviour"]).exp().clamp(max=1.3))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_a_step_in_pieces_is_the_step(kind: Aggregation) -> None:
    """Packed, split at any token and added up."""
    at = tensors(2)
    whole = policy_loss(at["log_probs"], at["old"], at["advantages"], at["mask"], aggregation=kind, cap=CAP)
    weights = sample_weights(at["mask"].sum(1).tolist(), kind, cap=CAP)
    inside = at["mask"].bool()
    rows = torch.arange(N)[:, None].expand(N, T)[inside]
    flat = token_losses(at["log_probs"][inside], at["old"][inside], at["advantages"][rows])
    flat = flat * torch.tensor(weights, dtype=torch.float64)[rows]
    torch.testing.assert_close(flat[:7].sum() + flat[7:20].sum() + flat[20:].sum(), whole, rtol=1e-12, atol=1e-14)


def test_truncated_samples_leave_both_sides_and_mastered_tokens_one() -> None:
    at = tensors(3)
    kept = [0, 2, 3, 5]
    filtered = at["mask"].clone()
    filtered[[1, 4]] = 0
    for kind in ("grpo", "dapo", "dr_grpo"):
        loss = policy_loss(at["log_probs"], at["old"], at["advantages"], filtered, aggregation=kind, cap=CAP)
        alone = policy_loss(
            *(at[name][kept] for name in ("log_probs", "old", "advantages", "mask")), aggregation=kind, cap=CAP
        )
        torch.testing.assert_close(loss, alone)
    left_out = torch.zeros(N, T, dtype=torch.bool)
    left_out[1, :4] = True
    losses = token_losses(at["log_probs"], at["old"], at["advantages"][:, None])
    by_hand = (losses * at["mask"] * ~left_out).sum() / at["mask"].sum()
    loss = policy_loss(at["log_probs"], at["old"], at["advantages"], at["mask"], left_out_NT=left_out)
    torch.testing.assert_close(loss, by_hand)
    nothing = policy_loss(at["log_probs"], at["old"], at["advantages"], torch.zeros_like(filtered), aggregation="grpo")
    assert float(nothing.detach()) == 0.0


def test_padding_may_hold_anything() -> None:
    at = tensors(4)
    clean = policy_loss(at["log_probs"], at["old"], at["advantages"], at["mask"])
    (gradient,) = torch.autograd.grad(clean, at["log_probs"])
    dirty = at["old"].masked_fill(at["mask"] == 0, -math.inf)
    loss = policy_loss(at["log_probs"], dirty, at["advantages"], at["mask"])
    assert torch.equal(loss, clean)
    inside = at["mask"].bool()
    assert torch.equal(torch.autograd.grad(loss, at["log_probs"])[0][inside], gradient[inside])


def test_with_the_current_policy_as_the_old_one_nothing_is_clipped() -> None:
    """POIS: the gradient is that of -A log pi."""
    at = tensors(5)
    loss = policy_loss(at["log_probs"], at["log_probs"].detach(), at["advantages"], at["mask"], clip_low=0, clip_high=0)
    (gradient,) = torch.autograd.grad(loss, at["log_probs"])
    plain = -(at["advantages"][:, None] * at["log_probs"] * at["mask"]).sum() / at["mask"].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, at["log_probs"])[0])


def test_what_is_missing_is_said() -> None:
    at = tensors()
    with pytest.raises(ValueError, match="give cap"):
        policy_loss(at["log_probs"], at["old"], at["advantages"], at["mask"], aggregation="dr_grpo")
    with pytest.raises(ValueError, match="ref_log_probs"):
        policy_loss(at["log_probs"], at["old"], at["advantages"], at["mask"], kl_weight=0.1)


class TestGroupAdvantages:
    def test_are_trl_s(self) -> None:
        rewards = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
        found = torch.tensor(group_advantages(rewards.tolist()), dtype=torch.float64)
        torch.testing.assert_close(found, (rewards - mean) / (std + 1e-4))
        plain = torch.tensor(group_advantages(rewards.tolist(), scale="none"), dtype=torch.float64)
        torch.testing.assert_close(plain, rewards - mean)
        batch = torch.tensor(group_advantages(rewards.tolist(), scale="batch"), dtype=torch.float64)
        torch.testing.assert_close(batch, (rewards - mean) / (rewards.std() + 1e-4))

    def test_groups_that_say_nothing(self) -> None:
        assert group_advantages([[1.0], [0.1] * 3, []]) == [[0.0], [0.0] * 3, []]
        assert group_advantages([]) == []

    def test_without_a_verdict_a_sample_is_in_no_mean(self) -> None:
        found = group_advantages([[1.0, 0.0, 7.0]], judged=[[True, True, False]])
        assert found[0] == [pytest.approx(0.70700679), pytest.approx(-0.70700679), 0.0]

    def test_what_is_no_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match="group 1"):
            group_advantages([[0.0], [math.nan, 1.0]])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=8), min_size=1, max_size=4))
    def test_keep_the_order_and_sum_to_nothing(self, rewards: list[list[float]]) -> None:
        for row, found in zip(rewards, group_advantages(rewards)):
            assert abs(sum(found)) < 1e-6 * (1 + max(map(abs, found)))
            ranked = sorted(zip(row, found))
            assert all(before[1] <= after[1] + 1e-9 for before, after in pairwise(ranked))


class TestGAE:
    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.9375), (0.984375, 0.875), (0.5, 0.0)])
    def test_is_torchrl_s(self, gamma: float, lam: float) -> None:
        """At factors that are exact in single precision, to which torchrl rounds them."""
        from torchrl.objectives.value.functional import generalized_advantage_estimate

        count, length = 3, 300
        draw = torch.Generator().manual_seed(1)
        rewards = torch.randn(count, length, 1, generator=draw, dtype=torch.float64)
        values = torch.randn(count, length + 1, 1, generator=draw, dtype=torch.float64)
        done = torch.zeros(count, length, 1, dtype=torch.bool)
        done[[0, 2], -1] = True
        theirs, their_returns = generalized_advantage_estimate(
            gamma, lam, values[:, :-1], values[:, 1:], rewards, done, done
        )
        ours, returns = gae(
            rewards[..., 0], values[:, :-1, 0], gamma=gamma, lam=lam,
            finished=torch.tensor([True, False, True]), bootstrap="value", next_values_N=values[:, -1, 0],
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs[..., 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns, their_returns[..., 0], rtol=1e-12, atol=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 300), st.booleans(), st.floats(0, 1), st.integers(0, 100))
    def test_is_the_plain_double_sum(self, length: int, finished: bool, lam: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        rewards = torch.randn(length, generator=draw, dtype=torch.float64)
        values = torch.randn(length, generator=draw, dtype=torch.float64)
        behind = [*values.tolist(), 0.0 if finished else float(values[-1])]
        delta = [float(rewards[t]) + behind[t + 1] - behind[t] for t in range(length)]
        if not finished:
            assert delta[-1] == pytest.approx(float(rewards[-1]), abs=1e-12)
        by_hand = [math.fsum(lam**k * delta[t + k] for k in range(length - t)) for t in range(length)]
        advantages, returns = gae(rewards, values, lam=lam, finished=finished)
        torch.testing.assert_close(advantages, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(returns, advantages + values)

    def test_padding_is_left_alone(self) -> None:
        rewards, values = torch.randn(2, 200), torch.randn(2, 200)
        padded, _ = gae(rewards, values, lengths_N=torch.tensor([50, 200]))
        cut, _ = gae(rewards[0, :50], values[0, :50])
        assert torch.equal(padded[0, :50], cut) and not padded[0, 50:].any()

    def test_an_untrained_critic_says_nothing_about_unfinished_samples(self) -> None:
        advantages, _ = gae(torch.zeros(64), torch.full((64,), 0.3), finished=False)
        assert not advantages.any()

    def test_what_would_be_biased_is_refused(self) -> None:
        with pytest.raises(ValueError, match="gamma = 1"):
            gae(torch.zeros(4), torch.zeros(4), gamma=0.9, finished=False)
        with pytest.raises(ValueError, match="next_values_N"):
            gae(torch.zeros(4), torch.zeros(4), finished=False, bootstrap="value")


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_mastered_tokens_one_by_one(scope: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    count, length = 20, 15
    log_probs = -torch.rand(count, length, generator=draw) * 0.03
    entropies = torch.rand(count, length, generator=draw) * torch.rand(count, 1, generator=draw)
    rewarded = torch.rand(count, generator=draw) < 0.5
    mask = torch.arange(length) < torch.randint(0, length + 1, (count, 1), generator=draw)
    target = 0.25
    found = mastered_token_mask(log_probs, entropies, rewarded, mask, entropy_target=target, scope=scope)
    everything = [float(entropies[n, t]) for n in range(count) for t in range(length) if mask[n, t]]
    seen = set()
    for n in range(count):
        own = [float(entropies[n, t]) for t in range(length) if mask[n, t]] if scope == "sample" else everything
        for t in range(length):
            low = bool(own) and sum(own) / len(own) < target
            expected = bool(mask[n, t]) and bool(rewarded[n]) and math.exp(float(log_probs[n, t])) >= 0.99 and low
            assert bool(found[n, t]) == expected
            seen.add(expected)
    assert seen == ({True, False} if scope == "sample" or sum(everything) / len(everything) < target else {False})


def test_value_loss_is_clipped_as_in_ppo() -> None:
    values, returns, old = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.0])
    assert value_loss(values, returns).tolist() == [0.5, 0.0]
    # the value moved by 0.5 where 0.2 was allowed: 0.7 is held against the return, and the larger error counts
    assert value_loss(values, returns, old, clip=0.2).tolist() == [0.5, 0.0]
    assert value_loss(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.5]), clip=0.2).tolist() == [
        pytest.approx(0.5 * 0.3**2)
    ]
