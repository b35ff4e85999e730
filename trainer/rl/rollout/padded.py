"""Rollouts by transformers' own `generate`, a padded batch at a time.

The simplest engine, and the quickest for short responses of like lengths: a batch runs until its longest response has
ended. Tokens are drawn by a logits processor of ours (`draw`), which leaves `generate` nothing to choose, so a sample's
tokens depend on its seed alone. Samples of one prompt share its prefill.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from farspan.errors import RunFailed
from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult
from farspan.trainer.rl.rollout.draw import draw_tokens


class PaddedEngine:
    """`RolloutEngine` over a transformers model of this process.

    Args:
        model: with its adapter, in whatever attention implementation caches (not Farspan's).
        trainable: parameters by name that `load` replaces.
        eos_ids: tokens that end a response.
        batch: most samples of one `generate`.
    """

    def __init__(
        self, model: nn.Module, trainable: Mapping[str, nn.Parameter], *, eos_ids: Sequence[int], batch: int = 256
    ) -> None:
        self.model: Any = model.eval()
        self.trainable, self.eos_ids, self.batch, self.version = dict(trainable), tuple(eos_ids), batch, 0
        self.device = next(model.parameters()).device

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        results = []
        for start in range(0, len(jobs), self.batch):
            results += self._batch(jobs[start : start + self.batch], sampling)
        return results

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        load_weights(self.trainable, weights)
        self.version = version

    def close(self) -> None:
        self.model = None

    @torch.inference_mode()
    def _batch(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        began_s = time.perf_counter()
        contexts = [(*job.prompt_ids, *job.prefix_ids) for job in jobs]
        drawn = _Draw(jobs, sampling, self.eos_ids)
        ids, mask = self._padded(contexts)
        cache = self._prefill(contexts, ids.shape[1])
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max(job.budget for job in jobs),
            do_sample=False,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.eos_ids[0],
            logits_processor=LogitsProcessorList([drawn]),
        )
        seconds = time.perf_counter() - began_s
        return [drawn.result(row, self.version, seconds) for row in range(len(jobs))]

    def _padded(self, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded int64 [B, S] and its mask."""
        longest = max(map(len, contexts))
        ids = np.full((len(contexts), longest), self.eos_ids[0], dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, longest - len(context) :] = context
            mask[row, longest - len(context) :] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _prefill(self, contexts: Sequence[Sequence[int]], longest: int) -> DynamicCache | None:
        """Keys and values of all but the last token of each context, computed once where contexts are equal."""
        different = list(dict.fromkeys(contexts))
        if len(different) == len(contexts) or longest == 1:
            return None
        ids, mask = self._padded(different)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        self.model.get_decoder()(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        at = {context: row for row, context in enumerate(different)}
        cache.batch_select_indices(torch.tensor([at[context] for context in contexts], device=self.device))
        return cache


def load_weights(trainable: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Overwrite parameters by name.

    Raises:
        RunFailed: a name is missing or unknown, or a shape differs; nothing was overwritten then.
    """
    wrong = sorted(trainable.keys() ^ weights.keys()) or [
        name for name, tensor in weights.items() if tensor.shape != trainable[name].shape
    ]
    if wrong:
        raise RunFailed(
            "weights that were published are not those of this model",
            at=f"rollout worker, {len(weights)} tensors for {len(trainable)} parameters",
            why=f"{len(wrong)} differ in name or shape, the first {wrong[0]}",
            try_="use one model and one adapter for trainer and rollout workers",
        )
    for name, tensor in weights.items():
        trainable[name].copy_(tensor)


class _Draw(LogitsProcessor):
    """Draws the next token of every sample and hands `generate` a distribution that has nothing else."""

    def __init__(self, jobs: Sequence[RolloutJob], sampling: Sampling, eos_ids: Sequence[int]) -> None:
        self.jobs, self.sampling, self.eos_ids = jobs, sampling, eos_ids
        self.ended = torch.zeros(len(jobs), dtype=torch.bool)
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        turn, running = len(self.tokens), (~self.ended).nonzero()[:, 0].tolist()
        at = torch.tensor(running, device=scores.device)
        tokens = torch.full((len(self.jobs),), self.eos_ids[0], device=scores.device)
        log_probs = torch.zeros(len(self.jobs), device=scores.device)
        jobs = [self.jobs[row] for row in running]
        drawn, logs = draw_tokens(
            scores[at], [job.seed for job in jobs], [len(job.prefix_ids) + turn for job in jobs], self.sampling
        )
        tokens[at], log_probs[at] = drawn, logs
        self.tokens.append(tokens.cpu())
        self.log_probs.append(log_probs.cpu())
        over = torch.tensor([job.budget <= turn + 1 for job in self.jobs])
        self.ended |= torch.isin(self.tokens[-1], torch.tensor(self.eos_ids)) | over
        # what has used up its budget ends here; the token it drew is ours already
        told = torch.where((self.ended & over).to(scores.device), self.eos_ids[0], tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, told[:, None], 0.0)

    def result(self, row: int, version: int, seconds: float) -> SegmentResult:
        job = self.jobs[row]
        ids = torch.stack([tokens[row] for tokens in self.tokens])[: job.budget]
        ends = torch.isin(ids, torch.tensor(self.eos_ids)).nonzero()[:, 0].tolist()
        count = ends[0] + 1 if ends else len(ids)
        return SegmentResult(
            sample_id=job.sample_id,
            segment=job.segment,
            new_ids=ids[:count].numpy().astype(np.int32),
            log_probs=torch.stack([logs[row] for logs in self.log_probs])[:count].numpy().astype(np.float32),
            finish="eos" if ends else "cap" if job.budget == job.remaining else "segment",
            version=version,
            seconds=seconds,
        )
