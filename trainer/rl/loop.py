"""The RL loop: roll out, verify, shape, train, publish. Read `RLLoop.step`: it is the whole algorithm.

One loop for several papers. With a segment as long as the cap, a step generates whole responses (GRPO). With a shorter
one a step decodes at most so many tokens of each response, and what has not ended goes on in the next step with newer
weights (UloRL's segment rollout). The loop holds no model: trainer, rollout workers and verifier are told what to do,
and everything that must outlive a restart is in `state`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from farspan.trainer.rl.advantages import group_advantages
from farspan.trainer.rl.batch import TrainedSample
from farspan.trainer.rl.config import RLRunSpec
from farspan.trainer.rl.losses import sample_weights
from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult
from farspan.trainer.rl.pool import Group, Pool, Sample, sample_seed
from farspan.trainer.rl.records import mean, sample_records, step_record
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.tasks.base import Problem, Verdict

if TYPE_CHECKING:
    from torch import Tensor

EVALUATION_SEED = 0x5EED
"""Samples of the monitor and of evaluations have seeds of their own."""


class PolicyTrainer(Protocol):
    """The gang that trains, as the loop sees it."""

    def update(
        self, samples: Sequence[TrainedSample], log_probs: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> dict[str, Any]:
        """One optimizer step; its record."""

    def score(self, samples: Sequence[TrainedSample], *, reference: bool = False) -> dict[str, list[np.ndarray]]:
        """Log-probabilities and entropies of trained tokens, now or under the policy that RL began with."""

    def weights(self) -> Mapping[str, Tensor]:
        """What trains, by name."""

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint with the loop's state in it."""


class Workers(Protocol):
    """Those that generate."""

    failures_total: int

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]: ...

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None: ...


class Judges(Protocol):
    """Those that verify."""

    kills: int
    crashes: int

    def judge(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]: ...


class RLLoop:
    """One RL run.

    Args:
        encode: a prompt's token ids. decode: the text of a response, special tokens left out.
        record: takes each step's metrics. recorded: takes each finished sample, for the record of the run.
    """

    def __init__(
        self,
        spec: RLRunSpec,
        *,
        trainer: PolicyTrainer,
        workers: Workers,
        judges: Judges,
        encode: Callable[[Problem], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        record: Callable[[dict[str, Any]], None],
        recorded: Callable[[Sequence[dict[str, Any]]], None] = lambda samples: None,
    ) -> None:
        self.spec, self.trainer, self.workers, self.judges = spec, trainer, workers, judges
        self.encode, self.decode, self.record, self.recorded = encode, decode, record, recorded
        rollout = spec.rollout
        self.shaper = spec.reward.shaper.for_cap(rollout.cap)
        self.sampling = Sampling(rollout.temperature)
        self.pool = Pool(
            slots=rollout.group_size * rollout.prompts_per_step,
            group_size=rollout.group_size,
            cap=rollout.cap,
            segment=rollout.segment_tokens or rollout.cap,
            seed=spec.seed,
        )
        self.at, self.version, self.next_problem = 0, 0, 0
        self.totals = {"samples": 0, "response_tokens": 0}
        self.waited_s: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """From where it stands to the last step; the last step's record."""
        last: dict[str, Any] = {}
        self._publish()
        for step in range(self.at + 1, self.spec.steps + 1):
            began_s = time.perf_counter()
            last = self.step(step)
            final = step == self.spec.steps
            if final or _due(step, self.spec.evaluate.every):
                last |= self.evaluate()
            if final or _due(step, self.spec.checkpoint_every):
                self._timed("checkpoint", lambda step=step: self.trainer.save(step, self.state()))  # type: ignore[misc]
            last |= {"step_s": time.perf_counter() - began_s, "waited_s": self.waited_s}
            last["tokens_per_s"] = last["generated_tokens"] / last["step_s"]
            self.waited_s = {}
            self.record(last)
        return last

    def step(self, step: int) -> dict[str, Any]:
        """One round of all that, with one optimizer step where a sample has an advantage."""
        if self.shaper.wants_monitor and (step - 1) % self.spec.reward.monitor_every == 0:
            self.shaper.observe(self.monitor())
        for _ in range(self.pool.room()):
            self._begin_group(step)
        results = self._timed("rollout", lambda: self.workers.generate(self.pool.jobs(), self.sampling))
        finished = self._take(results)
        self._timed("verify", lambda: self._judge(finished))
        groups = list(self.pool.complete())
        scored = [self._scored(group) for group in groups]
        rewards = self.shaper.rewards(scored)
        samples, advantages = self._trained(groups, scored, rewards)
        found: dict[str, Any] = {"loss": None, "grad_norm": None, "trained_tokens": 0}
        if samples:
            found |= self._timed("train", lambda: self._update(samples))
            self.version += 1
            self._publish()
        for group in groups:
            self.pool.remove(group)
        self.at = step
        self.recorded(sample_records(step, groups, scored, rewards, advantages, self.decode))
        return self._record(step, groups, scored, rewards, results) | found

    def monitor(self) -> list[PromptGroup]:
        """Groups of the monitoring prompts, under the weights of now."""
        count, number = self.spec.reward.monitor_prompts, self.spec.rollout.group_size
        problems = [self.spec.task.problem(index, side="monitor") for index in range(count)]
        found = self._one_shot(problems, number, f"monitor {self.at}", self.sampling)
        return [PromptGroup(samples, index) for index, samples in enumerate(found)]

    def held_out(self) -> list[ScoredSample]:
        """A response to each held-out prompt, the same prompts and seeds at every evaluation."""
        evaluate = self.spec.evaluate
        problems = [self.spec.task.problem(index, side="held_out") for index in range(evaluate.prompts)]
        sampling = Sampling(self.spec.rollout.temperature if evaluate.sampled else 0.0)
        return [group[0] for group in self._one_shot(problems, 1, "evaluation", sampling)]

    def evaluate(self) -> dict[str, Any]:
        """Accuracy and length on held-out prompts."""
        samples = self.held_out()
        judged = [sample for sample in samples if sample.correct is not None]
        return {
            "eval_accuracy": mean([float(bool(sample.correct)) for sample in judged]),
            "eval_response_tokens": mean([float(sample.tokens) for sample in samples]),
            "eval_truncated_share": mean([float(sample.finish == "cap") for sample in samples]),
            "eval_prompts": len(samples),
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the trainer's own state."""
        return {
            "step": self.at,
            "version": self.version,
            "next_problem": self.next_problem,
            "totals": self.totals,
            "pool": self.pool.state_dict(),
            "shaper": self.shaper.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.at, self.version, self.next_problem = state["step"], state["version"], state["next_problem"]
        self.totals = dict(state["totals"])
        self.pool.load_state_dict(state["pool"], self.spec.task.problem, self.encode)
        self.shaper.load_state_dict(state["shaper"])

    def _publish(self) -> None:
        self._timed("publish", lambda: self.workers.publish(self.trainer.weights(), self.version))

    def _begin_group(self, step: int) -> None:
        problem = self.spec.task.problem(self.next_problem)
        self.pool.begin(self.next_problem, problem, self.encode(problem), step=step)
        self.next_problem += 1

    def _take(self, results: Sequence[SegmentResult]) -> list[tuple[Group, Sample]]:
        """Append segments; the samples that ended by them."""
        finished = []
        for result in results:
            group, sample = self.pool.find(result.sample_id)
            sample.append(result)
            if sample.finish is not None:
                finished.append((group, sample))
        return finished

    def _judge(self, finished: Sequence[tuple[Group, Sample]]) -> None:
        verdicts = self.judges.judge([(group.problem, self.decode(sample.ids)) for group, sample in finished])
        for (_, sample), verdict in zip(finished, verdicts, strict=True):
            sample.verdict = verdict

    def _scored(self, group: Group) -> PromptGroup:
        return PromptGroup([self._as_scored(one, group.problem) for one in group.samples], group.group_id)

    def _as_scored(self, sample: Sample, problem: Problem) -> ScoredSample:
        assert sample.verdict is not None and sample.finish is not None
        verdict, cut = sample.verdict, sample.finish == "cap" and self.spec.loss.truncated == "wrong"
        return ScoredSample(
            tokens=len(sample.ids),
            score=min(verdict.score, 0.0) if cut else verdict.score,
            correct=None if verdict.correct is None else verdict.correct and not cut,
            well_formed=verdict.well_formed,
            finish=sample.finish,
            token_ids=sample.ids,
            target_tokens=problem.target_tokens,
        )

    def _trained(
        self, groups: Sequence[Group], scored: Sequence[PromptGroup], rewards: Sequence[Sequence[float]]
    ) -> tuple[list[TrainedSample], list[list[float]]]:
        """Samples with an advantage, weighted over the whole step."""
        loss, rollout = self.spec.loss, self.spec.rollout
        scale = loss.scale if loss.scale != "auto" else "none" if loss.aggregation == "dr_grpo" else "group"
        judged = [[sample.correct is not None for sample in group.samples] for group in scored]
        advantages = group_advantages(rewards, scale=scale, judged=judged)
        taken = [
            (group, sample, one, advantage)
            for group, of_group, row in zip(groups, scored, advantages)
            for sample, one, advantage in zip(group.samples, of_group.samples, row)
            if advantage != 0.0 and not (one.finish == "cap" and loss.truncated == "filter")
        ]
        lengths = [len(sample.ids) for _, sample, _, _ in taken]
        weights = sample_weights(lengths, loss.aggregation, cap=rollout.cap)
        trained = [
            TrainedSample(
                prompt_ids=group.prompt_ids,
                ids=sample.ids,
                first=0,
                advantages=np.full(len(sample.ids), advantage, dtype=np.float32),
                weight=weight,
                behaviour_log_probs=np.array(sample.log_probs, dtype=np.float32),
                rewarded=bool(one.correct),
            )
            for (group, sample, one, advantage), weight in zip(taken, weights)
        ]
        return trained, advantages

    def _update(self, samples: Sequence[TrainedSample]) -> dict[str, Any]:
        loss, more = self.spec.loss, dict[str, list[np.ndarray]]()
        if loss.importance == "decoupled":
            more["old_log_probs"] = self.trainer.score(samples)["log_probs"]
        if loss.kl_weight:
            more["ref_log_probs"] = self.trainer.score(samples, reference=True)["log_probs"]
        return self.trainer.update(samples, more)

    def _one_shot(
        self, problems: Sequence[Problem], number: int, what: str, sampling: Sampling
    ) -> list[list[ScoredSample]]:
        """Whole responses outside of the pool: `number` for each problem, judged."""
        cap, first = self.spec.rollout.cap, -1
        jobs: list[RolloutJob] = []
        for index, problem in enumerate(problems):
            prompt = tuple(self.encode(problem))
            for member in range(number):
                seed = sample_seed(self.spec.seed ^ EVALUATION_SEED, _number(what, index * number + member))
                jobs.append(RolloutJob(first - len(jobs), 0, prompt, (), cap, cap, seed))
        results = self._timed(what.split()[0], lambda: self.workers.generate(jobs, sampling))
        samples = []
        for result in results:
            sample = Sample(result.sample_id, 0)
            sample.append(result)
            samples.append(sample)
        of_sample = [problem for problem in problems for _ in range(number)]
        verdicts = self.judges.judge([(p, self.decode(sample.ids)) for p, sample in zip(of_sample, samples)])
        for sample, verdict in zip(samples, verdicts):
            sample.verdict = verdict
        scored = [self._as_scored(sample, problem) for sample, problem in zip(samples, of_sample)]
        return [scored[start : start + number] for start in range(0, len(scored), number)]

    def _record(
        self,
        step: int,
        groups: Sequence[Group],
        scored: Sequence[PromptGroup],
        rewards: Sequence[Sequence[float]],
        results: Sequence[SegmentResult],
    ) -> dict[str, Any]:
        record = step_record(groups, scored, rewards, results, version=self.version)
        self.totals["samples"] += record["samples"]
        self.totals["response_tokens"] += record["generated_tokens"]
        return {
            "step": step,
            **record,
            "samples_total": self.totals["samples"],
            "generated_tokens_total": self.totals["response_tokens"],
            "carried_over": len(self.pool.live),
            "version": self.version,
            "worker_failures": self.workers.failures_total,
            "verifier_kills": self.judges.kills,
            "shaper": self.shaper.metrics(),
        }

    def _timed(self, role: str, work: Callable[[], Any]) -> Any:
        began_s = time.perf_counter()
        try:
            return work()
        finally:
            self.waited_s[role] = self.waited_s.get(role, 0.0) + time.perf_counter() - began_s


def _number(what: str, index: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{what} {index}".encode(), digest_size=7).digest(), "little")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
