"""The SP degree by prediction: against planning every candidate, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from farspan import LoRA, MemoryBudget, Optim, Parallel, RandomModel, SFTJob, TextData
from farspan.errors import DoesNotFit
from farspan.jobs import mesh
from farspan.jobs.facts import Machine, ModelFacts, hardware_of, model_facts
from farspan.jobs.mesh import SAME, by_prediction
from farspan.jobs.origins import origins_in_python
from farspan.jobs.plan import plan
from farspan.jobs.resolve import Resolved, mesh_reason, resolve
from farspan.memory.capacity import short_bytes, smallest_device
from farspan.memory.evaluate import evaluate

MODEL = RandomModel(family="llama", hidden=4096, layers=8, heads=32, kv_heads=8, ffn=14336, vocab="125k")


def make(context: str, *, parallel: Mapping[str, Any] | None = None, tokens: str = "auto", **memory: Any) -> SFTJob:
    return SFTJob(
        name="m",
        model=MODEL,
        data=TextData("stdlib", context=context),
        adapter=LoRA(rank=16),
        parallel=Parallel(**parallel or {}),
        optim=Optim(tokens_per_step=tokens),
        memory=MemoryBudget(**{"hardware": "h200", **memory}),
    )


def gpus(count: int) -> Machine:
    node = {"CPU": float(count), "GPU": float(count)}
    return Machine((node,), cpu_memory_bytes=count * 115 * 10**9, gpu_memory_bytes=135 * 10**9)


def resolved(job: SFTJob, machine: Machine, facts: ModelFacts | None = None) -> Resolved:
    facts = facts or model_facts(job.model)
    return resolve(job, facts, machine, origins_in_python(job), by_prediction(job, facts, machine))


def seconds_per_token(job: SFTJob, machine: Machine, sp: int) -> float:
    """By planning the job with that degree written into it."""
    fixed = job.model_copy(update={"parallel": job.parallel.model_copy(update={"sp": sp})})
    one = resolve(fixed, model_facts(job.model), machine, origins_in_python(fixed))
    hardware = hardware_of(fixed, machine, ranks=one.gang.world_size, use_gpu=True)
    try:
        prediction = plan(fixed, one.train, model_facts(job.model), hardware).prediction
    except DoesNotFit:
        return float("inf")
    assert isinstance(one.train.optim.tokens_per_step, int)
    return prediction.step_s / one.train.optim.tokens_per_step if prediction.fits else float("inf")


@pytest.mark.parametrize(
    ("job", "count"),
    [
        (make("64k"), 4),
        (make("512k"), 4),
        (make("128k", device="30GB", host="8GiB"), 4),
        (make("256k", parallel={"dp": 2}), 8),
        (make("128k", plan="recompute"), 4),
        (make("128k", plan="offload-inputs", tokens="256k"), 8),  # two packs: dp is 1 or 2
    ],
    ids=["short", "long", "tight", "dp given", "fixed policy", "two packs"],
)
def test_the_fastest_of_all_degrees_is_taken(job: SFTJob, count: int) -> None:
    machine, found = gpus(count), resolved(job, gpus(count))
    ranks = count // job.parallel.dp if isinstance(job.parallel.dp, int) else count
    every = {sp: seconds_per_token(job, machine, sp) for sp in (1, 2, 4, 8) if sp <= ranks}
    assert every[found.train.mesh.sp] <= min(every.values()) * (1 + SAME)
    (why,) = mesh_reason(found)
    for sp, seconds in every.items():
        if f"sp={sp} does not fit by" in why:
            assert seconds == float("inf"), why
        elif seconds == float("inf"):  # its bound alone showed that it cannot be the fastest
            assert re.search(rf"at least [\d.]+ at sp={sp}", why), why
    assert f"sp={found.train.mesh.sp}: {every[found.train.mesh.sp] * 2**20:.4g} s per 1M tokens" in why
    assert found.gang.world_size == found.train.mesh.dp * found.train.mesh.sp
    assert json.loads(json.dumps(found.to_json()))["parallel.sp"]["why"] in why


def test_where_one_rank_has_too_little_memory_more_share_the_sequence() -> None:
    """512k rows need a working set no GPU has; a shorter context keeps all on one rank and exchanges nothing."""
    short, long = resolved(make("16k"), gpus(4)).train.mesh, resolved(make("512k"), gpus(4)).train.mesh
    assert (short.dp, short.sp) == (4, 1)
    assert long.sp > 1


def test_of_equals_the_rule_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank a sequence is 3 % faster here. If that counts as equal, the highest degree is taken, and said to be."""
    job, machine = make("64k"), gpus(4)
    assert resolved(job, machine).train.mesh.sp == 1
    monkeypatch.setattr(mesh, "SAME", 0.05)
    found = resolved(job, machine)
    assert found.train.mesh.sp == resolve(job, model_facts(job.model), machine, origins_in_python(job)).train.mesh.sp
    assert found.train.mesh.sp == 4 and "within 5.0% count as equal" in mesh_reason(found)[0]


@pytest.mark.parametrize("policy", ["solve", "offload-inputs"])
def test_when_nothing_fits_the_nearest_is_kept_for_the_error(policy: str) -> None:
    job = make("4M", plan=policy)
    found = resolved(job, gpus(4))
    assert found.train.mesh.sp == 4
    why = found.values["parallel.sp"].origin.why or ""
    assert "none fits; sp=4 does not fit by" in why and why.index("sp=4") < why.index("sp=2") < why.index("sp=1")


def test_layers_that_cannot_be_predicted_go_by_the_rule() -> None:
    facts = ModelFacts(4096, 2, 32, 8, 128, 4096, 3000, False, experts=8)
    job = make("64k")
    found = resolved(job, gpus(4), facts)
    assert found.train.mesh.sp == 4
    assert (
        "4 ranks for a sequence" in mesh_reason(found)[0]
        and "not predicted: a layer with 8 experts" in mesh_reason(found)[0]
    )


def test_a_degree_that_is_given_is_not_judged() -> None:
    found = resolved(make("64k", parallel={"sp": 2}), gpus(4))
    assert found.train.mesh.sp == 2 and mesh_reason(found) == []


def test_few_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = mesh.solved
    monkeypatch.setattr(mesh, "solved", lambda problem: asked.append(problem.rows) or whole(problem))
    resolved(make("128k"), gpus(32))
    assert 1 <= len(asked) <= mesh.MOST_SOLVED


def test_what_is_missing_is_known_about() -> None:
    """Within a percent of the exact search, which is slower."""
    job = make("4M")
    facts, machine = model_facts(job.model), gpus(1)
    one = resolve(job, facts, machine, origins_in_python(job))
    problem = mesh.problem_of(job, one.train, facts, hardware_of(job, machine, ranks=1, use_gpu=True))
    exact = evaluate(problem, smallest_device(problem)).device_peak_bytes
    assert short_bytes(problem) == pytest.approx(exact - problem.budgets.device_bytes, rel=0.02)
