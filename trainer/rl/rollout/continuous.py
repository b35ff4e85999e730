"""Rollouts by transformers' continuous batching: a finished sample makes room for the next at once.

For long responses of unlike lengths. Its cache is sized here: left to itself it takes nine tenths of the free memory.
Segments are requests of their own, since a request that is cancelled loses its tokens and one that goes on over new
weights keeps keys and values of the old ones. Tokens are drawn by the library, from a seed of the whole call: unlike
those of the padded engine they depend on what else is in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from farspan.errors import RunFailed
from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult
from farspan.trainer.rl.rollout.padded import load_weights

PAGE_TOKENS = 32
RESULT_S = 5.0
"""Wait for one result before looking whether the library still runs."""


class ContinuousEngine:
    """`RolloutEngine` over a transformers model of this process.

    Args:
        model, trainable, eos_ids: as for `PaddedEngine`.
        batch: most samples at a time.
        cache_tokens: keys and values that are held, over all samples.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        *,
        eos_ids: Sequence[int],
        batch: int = 256,
        cache_tokens: int = 1 << 16,
    ) -> None:
        self.model: Any = model.eval()
        self.trainable, self.eos_ids, self.batch, self.version = dict(trainable), tuple(eos_ids), batch, 0
        self.cache_tokens = cache_tokens

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        if not jobs:
            return []
        self._check_room(jobs)
        began_s = time.perf_counter()
        outputs = self._outputs(jobs, sampling)
        seconds = time.perf_counter() - began_s
        return [self._result(job, outputs[str(job.sample_id)], seconds) for job in jobs]

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        load_weights(self.trainable, weights)
        self.version = version

    def close(self) -> None:
        self.model = None

    def _outputs(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> dict[str, Any]:
        """The library's results by request, every one of them there and without an error."""
        found: dict[str, Any] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=GenerationConfig(
                **({"do_sample": False} if sampling.temperature == 0 else _drawn(sampling)),
                eos_token_id=list(self.eos_ids),
                pad_token_id=self.eos_ids[0],
                max_new_tokens=max(job.budget for job in jobs),
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=self.cache_tokens // PAGE_TOKENS,
                max_batch_tokens=max(512, 2 * self.batch),
                max_requests_per_batch=self.batch,
                return_logprobs=True,
                seed=_seed(jobs),
            ),
            block=True,
            timeout=RESULT_S,
        ) as manager:
            for job in jobs:
                manager.add_request(
                    [*job.prompt_ids, *job.prefix_ids],
                    request_id=str(job.sample_id),
                    max_new_tokens=job.budget,
                    eos_token_id=list(self.eos_ids),
                )
            while len(found) < len(jobs):
                output = manager.get_result(timeout=RESULT_S)
                if output is not None and output.error is not None:
                    raise _failed(f"sample {output.request_id}: {output.error}")
                if output is not None and output.is_finished():
                    found[output.request_id] = output
                elif output is None and not manager.is_running():
                    raise _failed(f"it stopped with {len(jobs) - len(found)} of {len(jobs)} samples to come")
        return found

    def _result(self, job: RolloutJob, output: Any, seconds: float) -> SegmentResult:
        """The library does not tell why a request ended: by its last token, or by its budget."""
        ids = np.array(output.generated_tokens, dtype=np.int32)
        ended = bool(len(ids)) and int(ids[-1]) in self.eos_ids
        return SegmentResult(
            sample_id=job.sample_id,
            segment=job.segment,
            new_ids=ids,
            log_probs=np.minimum(np.array(output.logprobs, dtype=np.float32), 0.0),
            finish="eos" if ended else "cap" if job.budget == job.remaining else "segment",
            version=self.version,
            seconds=seconds,
        )

    def _check_room(self, jobs: Sequence[RolloutJob]) -> None:
        """A request beyond the cache would end the library's loop, and all others with it."""
        needed = max(len(job.prompt_ids) + len(job.prefix_ids) + job.budget for job in jobs)
        if needed > self.cache_tokens:
            raise RunFailed(
                "a sample does not fit into the cache of the rollout engine",
                at=f"rollout.cache_tokens = {self.cache_tokens}",
                why=f"prompt and response take up to {needed} tokens",
                try_=f"--set rollout.cache_tokens={needed}, or a smaller rollout.cap",
            )


def _drawn(sampling: Sampling) -> dict[str, Any]:
    rest = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return {**rest, "top_k": sampling.top_k}


def _seed(jobs: Sequence[RolloutJob]) -> int:
    """Of the call: the same jobs draw the same tokens."""
    return hash(tuple((job.seed, job.segment) for job in jobs)) % (1 << 31)


def _failed(why: str) -> RunFailed:
    return RunFailed(
        "continuous batching failed",
        at="rollout worker, engine hf-cb",
        why=why,
        try_="--set rollout.engine=hf, or another rollout.cache_tokens",
    )
