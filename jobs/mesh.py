"""Which mesh: every (sp, dp) that `auto` may take is planned, and the fewest seconds per token win.

More ranks on a sequence leave each more memory and less to compute again, but exchange more; fewer ranks train on more
sequences at once. Which is better depends on the model, the context and the machine, so the planner is asked. Its
lower bound takes a tenth of a second and is mostly within a percent of the plan: candidates are planned in the order
of their bounds until no other can be faster, at most `MOST_SOLVED` of them, a second each; usually it is one, which
`farspan plan` needs anyway. A fixed policy takes milliseconds for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farspan.errors import DoesNotFit, NoProfile
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import Machine, ModelFacts, hardware_of
from farspan.jobs.plan import problem_of, size, solved
from farspan.jobs.resolve import Choose, Resolved
from farspan.memory.capacity import short_bytes
from farspan.memory.evaluate import evaluate
from farspan.memory.policies import fixed_policy
from farspan.memory.problem import PlanProblem
from farspan.memory.solve import least_s

MOST_SOLVED = 3
SAME = 0.005
"""Predictions this close do not tell candidates apart: of these the first by rule is taken."""
INFINITY = float("inf")


@dataclass
class Candidate:
    """One mesh and what a step on it takes."""

    sp: int
    tokens: int
    problem: PlanProblem
    step_s: float
    """Infinity: it does not fit."""
    planned: bool
    """False: `step_s` is a lower bound."""
    short_bytes: int = 0

    @property
    def s_per_token(self) -> float:
        return self.step_s / self.tokens

    @property
    def per_million(self) -> str:
        seconds = self.s_per_token * 2**20
        return f"{seconds:.4g}" if seconds < 1e4 else f"{seconds:,.0f}"

    def words(self) -> str:
        if self.step_s == INFINITY:
            return f"sp={self.sp} does not fit by {size(self.short_bytes)}"
        return f"{'' if self.planned else 'at least '}{self.per_million} at sp={self.sp}"


def by_prediction(job: SFTJob, facts: ModelFacts, machine: Machine) -> Choose:
    """What `resolve` asks when it may choose the SP degree."""

    def choose(resolved: Sequence[Resolved]) -> tuple[int | None, str]:
        try:
            candidates = [_candidate(job, facts, machine, one) for one in resolved]
        except NoProfile as problem:
            return None, f"not predicted: {problem.what}"
        if job.policy == "solve":
            _plan(candidates)
        fastest = min((candidate.s_per_token for candidate in candidates if candidate.planned), default=INFINITY)
        if fastest == INFINITY:
            for candidate in candidates:
                candidate.short_bytes = candidate.short_bytes or short_bytes(candidate.problem)
            best = min(candidates, key=lambda candidate: candidate.short_bytes)
            others = sorted((c for c in candidates if c is not best), key=lambda c: c.short_bytes)
            return candidates.index(best), "; ".join(["none fits", best.words(), *(c.words() for c in others)])
        best = next(c for c in candidates if c.planned and c.s_per_token <= fastest * (1 + SAME))
        return candidates.index(best), _why(best, candidates)

    return choose


def _candidate(job: SFTJob, facts: ModelFacts, machine: Machine, resolved: Resolved) -> Candidate:
    gang, train = resolved.gang, resolved.train
    hardware = hardware_of(job, machine, ranks=gang.world_size, use_gpu=gang.use_gpu)
    problem = problem_of(job, train, facts, hardware)
    tokens = train.data.context * train.mesh.dp * train.accumulation
    if job.policy == "solve":
        return Candidate(train.mesh.sp, tokens, problem, least_s(problem), planned=False)
    prediction = evaluate(problem, fixed_policy(problem, job.policy))
    over = sum(prediction.over_bytes.values())
    return Candidate(train.mesh.sp, tokens, problem, INFINITY if over else prediction.step_s, True, over)


def _plan(candidates: Sequence[Candidate]) -> None:
    """Plans those that may be the fastest, the lowest bound first."""
    fastest = INFINITY
    for count, candidate in enumerate(sorted(candidates, key=lambda candidate: candidate.s_per_token)):
        bound = candidate.s_per_token
        if bound == INFINITY or bound > fastest * (1 + SAME) or (count >= MOST_SOLVED and fastest < INFINITY):
            return
        try:
            candidate.step_s = solved(candidate.problem).prediction.step_s
        except DoesNotFit:
            candidate.step_s = INFINITY
        candidate.planned = True
        fastest = min(fastest, candidate.s_per_token)


def _why(best: Candidate, candidates: Sequence[Candidate]) -> str:
    for candidate in candidates:
        if candidate.step_s == INFINITY and not candidate.short_bytes:
            candidate.short_bytes = short_bytes(candidate.problem)
    others = sorted((c for c in candidates if c is not best), key=lambda c: (c.s_per_token, c.short_bytes))
    slower = [c.words() for c in others if c.step_s < INFINITY]
    why = f"sp={best.sp}: {best.per_million} s per 1M tokens"
    if slower:
        why += f" against {', '.join(slower)}"
    if any(c.s_per_token < best.s_per_token for c in others if c.planned):
        why += f", of which those within {SAME:.1%} count as equal"
    return "; ".join([why, *(c.words() for c in others if c.step_s == INFINITY)])
