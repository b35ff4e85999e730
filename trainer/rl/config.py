"""What an RL job says about its loss, its rollouts and its rewards. Neither torch nor ray.

The first half is written by users inside a job; `RLSpec` is what a job resolves to.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from farspan.schema import Count, Ratio, Schema
from farspan.trainer.config import TrainSpec
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
    SoftOverlong,
    StopProperly,
)
from farspan.trainer.rl.tasks import TaskSource

ShaperSource = Annotated[
    Plain
    | Laser
    | LaserD
    | LaserDE
    | GRPOLambda
    | Cosine
    | Repetition
    | Kimi
    | L1Exact
    | L1Max
    | SoftOverlong
    | StopProperly,
    Field(discriminator="type"),
]


class Mastered(Schema):
    """Tokens of rewarded samples that are predicted almost surely are left out of the loss, while entropy is low.

    Source: UloRL, 2025, https://arxiv.org/abs/2507.19766
    """

    threshold: Ratio = 0.99
    """Probability from which on a token is mastered."""
    entropy_target: float = Field(default=0.2, gt=0)
    """Nats. Nothing is left out while the mean entropy is at or above it."""
    scope: Literal["sample", "batch"] = "sample"
    """Whose mean entropy."""


class PolicyLoss(Schema):
    """How samples train the policy."""

    aggregation: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """`grpo`: a mean over samples of means over tokens; `dapo`: over all tokens of the step; `dr_grpo`: over samples
    times the cap, with advantages that are not divided by a deviation."""
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    """Ratios count between 1 - clip_low and 1 + clip_high; DAPO's clip-higher is 0.28."""
    ratio_cap: float | None = Field(default=None, gt=1)
    """No ratio counts more, where the loss would take any."""
    importance: Literal["pois", "sais", "decoupled"] = "pois"
    """The policy that ratios are taken against: the one that trains, so that every ratio is 1 and nothing is clipped
    (UloRL's POIS; there is one update a step); that which generated each token (SAIS); or the one at the beginning of
    the step, with truncated weights for tokens that an older one generated."""
    weight_cap: float = Field(default=2.0, gt=0)
    """`decoupled`: most that such a weight may be."""
    scale: Literal["group", "batch", "none", "auto"] = "auto"
    """What advantages are divided by. `auto`: the group's deviation, with `dr_grpo` nothing."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Of a penalty on the distance from the policy that RL began with, of which every rank then holds a frozen copy;
    the memory plan does not count it."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Of a bonus for entropy."""
    mastered: Mastered | None = None
    truncated: Literal["wrong", "filter", "keep"] = "wrong"
    """A sample that was cut off at the cap counts as wrong whatever it says; takes part in its group's mean and is not
    trained on; or keeps its verdict."""


class Reward(Schema):
    """What a response is worth."""

    shaper: ShaperSource = Plain()
    """How lengths enter."""
    verify_s: float = Field(default=10.0, gt=0)
    """Longest that a verifier may take for one response; then it is killed and the response has no verdict."""
    monitor_every: int = Field(default=20, ge=1)
    """Steps between two looks at the monitoring prompts, for shapers that have targets to find."""
    monitor_prompts: int = Field(default=64, ge=1)
    """Prompts of such a look, `group_size` samples each; none of them is trained on."""


class Rollout(Schema):
    """How samples are generated."""

    engine: Literal["hf", "hf-cb"] = "hf"
    """`hf`: transformers' `generate`, a padded batch at a time; a token depends on its sample's seed and place alone.
    `hf-cb`: its continuous batching, for responses of unlike lengths; tokens depend on what else is in a batch."""
    cache_tokens: Count = Field(default=1 << 16, ge=64)
    """`hf-cb`: tokens whose keys and values a worker holds."""
    workers: int = Field(default=1, ge=1)
    """Rollout actors."""
    temperature: float = Field(default=1.0, gt=0)
    cap: Count = Field(default=1024, ge=1)
    """Most tokens of a response."""
    segment_tokens: Count | None = Field(default=None, ge=1)
    """Most new tokens of a sample in one step; what is not finished then goes on in the next (UloRL). null: the cap."""
    group_size: int = Field(default=8, ge=1)
    """Samples of a prompt."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Groups begun in a step, where there is room for them."""
    batch: int = Field(default=256, ge=1)
    """Samples that a worker generates at a time."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Longest that a worker may take for its samples of a step; then they are sent to another, or it is replaced."""
    max_failures: int = Field(default=10, ge=0)
    """Failures of workers in a row, without a finished step between, before the run stops."""


class RLEvaluate(Schema):
    """Held-out problems during training."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null: at the end only."""
    prompts: int = Field(default=256, ge=1)
    """Held-out prompts, the same at each evaluation, one response each."""
    sampled: bool = True
    """Responses are drawn at the temperature of training; false: the most likely tokens."""


class RLRunSpec(Schema):
    """All the loop needs."""

    task: TaskSource
    steps: int
    """Of the whole job."""
    seed: int
    loss: PolicyLoss
    rollout: Rollout
    reward: Reward
    evaluate: RLEvaluate
    checkpoint_every: int | None


class RLSpec(Schema):
    """All a rank needs to train a policy, identical on every rank."""

    train: TrainSpec
    """Model, adapter, mesh, optimizer, memory; its data are rollouts."""
    loss: PolicyLoss
    temperature: float
    vocab: int
