"""What is told when a run ends for want of memory: every change told is planned again here, by the way users take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from farspan import LoRA, MemoryBudget, Parallel, RandomModel, SFTJob, TextData
from farspan.cluster import supervisor
from farspan.cluster.failure import Kind, RankFailure
from farspan.cluster.package import package_root
from farspan.errors import OutOfMemory
from farspan.jobs import cli
from farspan.jobs.facts import hardware_of, machine_beside, model_facts
from farspan.jobs.origins import origins_in_python
from farspan.jobs.out_of_memory import Cure, Shortage, Situation, changes, cures, explain, shortage
from farspan.jobs.plan import plan
from farspan.jobs.resolve import resolve
from farspan.trainer.run_folder import RunFolder

GIB = 2**30
LAYERS_OF_8B = RandomModel(family="llama", hidden=4096, layers=8, heads=32, kv_heads=8, ffn=14336, vocab="125k")
ON_CUDA = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate {wanted:.2f} GiB. GPU 0 has a total capacity of 139.81 "
    "GiB of which {free:.2f} GiB is free."
)


def situation(context: str = "64k", *, free_disk_gib: int = 0, parallel: Any = None, **memory: Any) -> Situation:
    job = SFTJob(
        name="p",
        model=LAYERS_OF_8B,
        data=TextData("stdlib", context=context),
        adapter=LoRA(rank=16),
        parallel=parallel or Parallel(sp=1, dp=1),
        memory=MemoryBudget(**{"hardware": "h200", **memory}),
    )
    facts, machine, origins = model_facts(job.model), machine_beside(job), origins_in_python(job)
    resolved = resolve(job, facts, machine, origins)
    hardware = hardware_of(job, machine, ranks=resolved.gang.world_size, use_gpu=resolved.gang.use_gpu)
    planned = plan(job, resolved.train, facts, hardware)
    return Situation(job, facts, machine, origins, resolved, planned, free_disk_gib * GIB)


def died(detail: str, kind: Kind = Kind.RAISED) -> RankFailure:
    return RankFailure(rank=3, kind=kind, phase="backward", step=2, detail=detail, log=Path("logs/trainer-3.log"))


def on_cuda(wanted: float, free: float) -> RankFailure:
    return died(ON_CUDA.format(wanted=wanted, free=free))


def planned_by_hand(found: Situation, cure: Cure) -> Any:
    """The same change through `--set` of a job file, as a user would make it."""
    changed = found.job.model_dump()
    for flag in cure.flags:
        path, _, value = flag.partition("=")
        section, name = path.split(".")
        changed[section][name] = int(value) if value.isdigit() else value
    job = SFTJob.model_validate(changed)
    resolved = resolve(job, found.facts, machine_beside(job), found.origins)
    hardware = hardware_of(job, machine_beside(job), ranks=resolved.gang.world_size, use_gpu=resolved.gang.use_gpu)
    return plan(job, resolved.train, found.facts, hardware), resolved


@pytest.fixture(scope="module")
def tight() -> Situation:
    """A solved plan that fills device and host."""
    return situation(device="30GiB", host="4GiB")


@pytest.fixture(scope="module")
def told(tight: Situation) -> list[Cure]:
    return cures(tight, shortage(on_cuda(3.0, 1.0), tight))


def test_every_cure_is_a_plan_that_needs_as_much_less(tight: Situation, told: list[Cure]) -> None:
    short = shortage(on_cuda(3.0, 1.0), tight)
    assert (short.tier, short.missing_bytes) == ("device", 2 * GIB)
    assert len(told) >= 4
    here = [cure.s_per_token for cure in told if not cure.more_ranks]
    assert here == sorted(here) and len(here) == len(told) - 1
    assert told[-1].flags[0] == "parallel.sp=2", "there is no second rank on this machine"
    assert told[0].flags[-1].startswith("memory.device=")
    for cure in told:
        again, resolved = planned_by_hand(tight, cure)
        peak = again.prediction.device_peak_bytes
        assert again.prediction.fits and peak <= tight.planned.prediction.device_peak_bytes - 2 * GIB, cure
        assert again.prediction.step_s == pytest.approx(cure.step_s, rel=0.02), cure
        assert resolved.train.optim.tokens_per_step == cure.tokens and resolved.gang.world_size == cure.ranks
    names = {cure.flags[0].partition("=")[0] for cure in told}
    assert {"memory.device", "memory.mlp_tile", "parallel.sp", "data.context"} <= names


def test_the_error_has_plan_against_actual_and_three_cures(
    tight: Situation, told: list[Cure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farspan.jobs.out_of_memory.cures", lambda found, short: told)
    error = explain(tight, on_cuda(3.0, 1.0))
    assert type(error) is OutOfMemory and error.exit_code == 3
    what, at, why, try_ = str(error).splitlines()
    assert what == "error: out of memory: rank 3 failed in backward after step 2"
    assert "logs/trainer-3.log" in at
    assert f"planned were 30.0 GiB at {tight.planned.prediction.device_peak_at}, of 30.0 GiB on the device" in why
    assert "Tried to allocate 3.00 GiB" in why
    assert "2.0 GiB less" in try_ and try_.count("s a step") == 3 and try_.count(" | ") == 2
    listed = [float(ms) for ms in re.findall(r"([\d.e+-]+) ms a token", try_)]
    assert listed == sorted(listed) == pytest.approx([1e3 * cure.s_per_token for cure in told[:3]], rel=0.01)


def test_of_an_unknown_shortage_15_percent_are_taken() -> None:
    found = situation("8k", plan="recompute")
    error = explain(found, died("OutOfMemoryError: CUDA out of memory."))
    assert "(15%; how much was missing is not known)" in error.try_
    short = Shortage("device", 1000, 2000, None)
    assert short.lower_bytes == 150
    assert Shortage("device", 1000, 2000, 10).lower_bytes == 50, "what failed first is not all that was missing"
    assert Shortage("device", 1000, 2000, 400).lower_bytes == 400


def test_a_fixed_policy_may_be_left_and_its_changes_need_no_budget() -> None:
    found = situation("16k", plan="keep")
    told = cures(found, shortage(on_cuda(12.0, 2.0), found))
    solved = next(cure for cure in told if cure.flags[0] == "memory.plan=solve")
    assert solved.flags[1].startswith("memory.device=")
    assert all(len(cure.flags) == 1 for cure in told if cure is not solved)
    assert {"parallel.sp=2"} in [set(cure.flags) for cure in told]


def test_what_can_be_changed_depends_on_job_and_machine() -> None:
    def names(**fields: Any) -> set[str]:
        return {flag for flags in changes(situation("8k", **fields), "device") for flag in flags}

    assert "memory.disk=80GiB" in names(free_disk_gib=100)
    assert not any(name.startswith("memory.disk") for name in names(free_disk_gib=100, disk="1GiB"))
    assert not any(name.startswith("memory.disk") for name in names(free_disk_gib=1))
    assert "memory.host=auto" in names(host="1GiB") and "memory.host=auto" not in names()
    assert "memory.mlp_tile=2048" in names() and "memory.mlp_tile=2048" not in names(mlp_tile=1024)
    assert "memory.loss_tile=512" in names() and "memory.loss_tile=256" not in names(loss_tile=256)
    assert "parallel.sp=16" in names(parallel=Parallel(sp=8, dp=1))
    assert not any(name.startswith("parallel.sp") for name in names(parallel=Parallel(sp=32, dp=1)))


def test_ranks_that_are_not_there_are_said() -> None:
    cure = Cure(("parallel.sp=2",), 2.0, 1000, ranks=2, more_ranks=1)
    assert str(cure) == "--set parallel.sp=2 (2 s a step, 2 ms a token, needs 2 ranks, 1 more than there are)"
    found = situation("16k", plan="keep")
    twice = next(c for c in cures(found, shortage(on_cuda(3.0, 1.0), found)) if c.flags == ("parallel.sp=2",))
    assert (twice.ranks, twice.more_ranks) == (2, 1)
    roomy = replace(found.machine, nodes=({"CPU": 8.0, "GPU": 8.0},))
    found = replace(found, machine=roomy)
    twice = next(c for c in cures(found, shortage(on_cuda(3.0, 1.0), found)) if c.flags == ("parallel.sp=2",))
    assert twice.more_ranks == 0


def test_a_node_that_runs_low_is_about_the_host(tight: Situation) -> None:
    killed = died("process 7 was ended by Ray since its node ran low on memory", Kind.GONE)
    short = shortage(killed, tight)
    assert (short.tier, short.budget_bytes, short.missing_bytes) == ("host", 4 * GIB, None)
    told = cures(tight, short)
    assert told[0].flags[-1].startswith("memory.host=")
    for cure in told[:1]:
        assert planned_by_hand(tight, cure)[0].prediction.host_bytes <= 0.85 * tight.planned.prediction.host_bytes


def test_more_than_any_change_gives_is_said_so() -> None:
    found = situation("8k")
    error = explain(found, on_cuda(4000.0, 0.0))
    assert error.try_.startswith("nothing we know makes the plan need 3.9 TiB less")


def test_sp_stays_as_it_was_where_it_was_automatic() -> None:
    found = situation("16k", plan="keep")
    auto = found.job.model_copy(update={"parallel": Parallel(dp=1)})
    four = replace(found.machine, nodes=({"CPU": 4.0, "GPU": 4.0},))
    told = cures(replace(found, job=auto, machine=four), shortage(on_cuda(3.0, 1.0), found))
    assert {cure.ranks for cure in told} == {1, 2}
    assert [cure.flags for cure in told if cure.ranks == 2] == [("parallel.sp=2",)]


@pytest.mark.ray
def test_a_run_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: a rank of a real gang has no memory, nothing is restarted, the command line says what to do."""
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text to learn\n" for i in range(4000)))
    (tmp_path / "job.yaml").write_text(
        "name: tiny\n"
        "model: {hidden: 64, layers: 2, heads: 4, kv_heads: 2, ffn: 128, vocab: 512}\n"
        "data: {source: a.txt, context: 256, on_too_long: split}\n"
        "parallel: {sp: 1, dp: 1}\n"
        "precision: fp32\n"
        "memory: {plan: keep}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{package_root()}:{Path(__file__).parent}")
    entry = partial(supervisor.supervise, entry="gang_entries:no_memory_in_python")
    monkeypatch.setattr(supervisor, "supervise", entry)
    assert cli.main(["run", "job.yaml"]) == 3
    told = capsys.readouterr().err
    assert told.splitlines()[0] == "error: out of memory: rank 0 failed in data before step 1 was finished"
    assert "MemoryError" in told and "--set memory.plan=solve" in told
    folder = RunFolder(tmp_path / "outputs" / "tiny")
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [event["event"] for event in events] == ["placing", "starting", "running", "failure", "failed"]
    assert json.loads(folder.status.read_text())["error"] == told.strip()
