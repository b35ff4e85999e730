"""The parts of an RL run in one process: a trainer of one rank and a worker, without Ray.

For benchmarks, for tests, and for looking at a run with a debugger; the loop cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from farspan.trainer import models
from farspan.trainer.config import Adapter, Base, FullFineTune, Precision, Unquantized
from farspan.trainer.rl.batch import TrainedSample
from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult
from farspan.trainer.rl.policy import PolicyRank
from farspan.trainer.rl.rollout.continuous import ContinuousEngine
from farspan.trainer.rl.rollout.engine import RolloutEngine
from farspan.trainer.rl.rollout.padded import PaddedEngine
from farspan.trainer.rl.state import to_bytes

if TYPE_CHECKING:
    from torch import Tensor


class LocalTrainer:
    """`trainer.rl.loop.PolicyTrainer` over the only rank there is."""

    def __init__(self, rank: PolicyRank) -> None:
        self.rank = rank

    def update(
        self, samples: Sequence[TrainedSample], log_probs: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> dict[str, Any]:
        return dict(self.rank.update(samples, dict(log_probs) if log_probs else None) or {})

    def score(self, samples: Sequence[TrainedSample], *, reference: bool = False) -> dict[str, list[np.ndarray]]:
        return dict(self.rank.score(samples, reference=reference) or {})

    def weights(self) -> Mapping[str, Tensor]:
        return dict(self.rank.weights() or {})

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        self.rank.save(step, to_bytes(dict(state)))


class LocalWorkers:
    """`trainer.rl.loop.Workers` over one engine.

    Args:
        model: folder or hub id.
        eos_ids: tokens that end a response.
    """

    failures_total = 0

    def __init__(
        self,
        model: str,
        *,
        eos_ids: Sequence[int],
        adapter: Adapter | None = None,
        base: Base | None = None,
        precision: Precision = "fp32",
        device: torch.device | None = None,
        batch: int = 256,
    ) -> None:
        self.engine = make_engine(
            model,
            revision=None,
            adapter=adapter or FullFineTune(),
            base=base or Unquantized(),
            precision=precision,
            seed=0,
            device=device or torch.device("cpu"),
            eos_ids=eos_ids,
            batch=batch,
        )

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        return self.engine.generate(jobs, sampling)

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.engine.load(weights, version)


def make_engine(
    model: str,
    *,
    revision: str | None,
    adapter: Adapter,
    base: Base,
    precision: Precision,
    seed: int,
    device: torch.device,
    eos_ids: Sequence[int],
    batch: int,
    engine: Literal["hf", "hf-cb"] = "hf",
    cache_tokens: int = 1 << 16,
) -> RolloutEngine:
    """A copy of the policy that generates: the same model and adapter as the trainer's, with caches for attention."""
    causal = models.load_model(model, revision=revision, dtype=models.DTYPES[precision], device=device, base=base)
    causal.set_attn_implementation("sdpa")
    adapted = models.add_adapter(causal, adapter, seed=seed)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    if engine == "hf-cb":
        return ContinuousEngine(adapted, trainable, eos_ids=eos_ids, batch=batch, cache_tokens=cache_tokens)
    return PaddedEngine(adapted, trainable, eos_ids=eos_ids, batch=batch)
