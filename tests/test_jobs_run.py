"""The order of `farspan run`: what can fail fails before anything is written, and the last line is the truth."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import farspan
from farspan import LoRA, Model, Optim, Parallel, RandomModel, SFTJob, TextData
from farspan.errors import DataError, JobError, RunFailed
from farspan.jobs import run as run_module
from farspan.jobs.claim import Claim
from farspan.jobs.facts import Machine
from farspan.jobs.plan_file import read_plan
from farspan.jobs.run import run
from farspan.trainer.checkpoint_format import Manifest, write_manifest
from farspan.trainer.run_folder import RunFolder, write_json

RECORD = {"step": 3, "loss": 2.5, "eval_loss": 2.25}
BATCH = "tokens per step 32768 = 4 packs of 8192 = dp 4 x accumulation 1; each pack on sp 1 rank of 8192 rows"
"""So small a model has its sequences on one rank each: nothing needs to be exchanged."""


class Session:
    local, address = False, "somewhere:6379"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A cluster, a tokeniser and a supervisor that note what they are asked; tests replace single answers."""
    asked = []

    def supervise(gang, *, session, on_record, on_event, on_out_of_memory):
        asked.append("supervise")
        on_event({"event": "running", "text": "training on 1 ranks"})
        on_event({"event": "failed", "text": "never shown twice"})
        seen.gang = gang
        return SimpleNamespace(status="done", steps=3, last_record=RECORD, checkpoint=str(tmp_path / "step_3"))

    def prepare(data, model, evaluate, *, map_tasks, progress):
        asked.append("prepare")
        progress("tokens found")
        return tmp_path / "tokens"

    def connect(address):
        asked.append(f"connect {address}")
        return Session()

    monkeypatch.setattr("farspan.cluster.supervisor.supervise", supervise)
    monkeypatch.setattr("farspan.trainer.data.prepare.prepare", prepare)
    monkeypatch.setattr("farspan.trainer.data.store.TokenStore", lambda path: path)
    monkeypatch.setattr("farspan.trainer.data.packing.check_lengths", lambda store, data: None)
    monkeypatch.setattr("farspan.cluster.session.connect", connect)
    monkeypatch.setattr(run_module, "machine", lambda wait_s: Machine(({"CPU": 4.0},), 2**33))
    seen = SimpleNamespace(asked=asked, gang=None, monkeypatch=monkeypatch)
    return seen


@pytest.fixture
def job(tmp_path):
    model = RandomModel(hidden=64, heads=4, kv_heads=2)
    return SFTJob(name="r", model=model, data=TextData("stdlib"), adapter=LoRA(), output_dir=str(tmp_path / "outputs"))


def quiet():
    return Console(quiet=True)


def test_a_run_from_python(world, job, tmp_path, capsys):
    result = job.run(address="somewhere:6379")
    assert world.asked == ["connect somewhere:6379", "prepare", "supervise"]
    assert (result.status, result.metrics, result.checkpoint) == ("done", RECORD, tmp_path / "step_3")
    folder = RunFolder(result.run_dir)
    assert SFTJob.model_validate_json(folder.job.read_text()) == job
    assert json.loads(folder.resolved.read_text())["parallel.sp"]["origin"] == "planner"
    saved, train = read_plan(folder.plan), world.gang.train
    assert (saved.prediction.step_s, saved.placement.keeps_everything) == (train.plan_step_s, train.placement is None)
    assert world.gang.train.tokens_dir == str(tmp_path / "tokens")
    assert json.loads((folder.root / "train_spec.json").read_text()) == world.gang.train.model_dump(mode="json")
    assert capsys.readouterr().out == ""


def test_the_folder_is_locked_while_the_gang_trains(world, job):
    folder = RunFolder(job.run_dir)
    write_json(folder.job, {})
    write_json(folder.checkpoint(1) / "manifest.json", {})

    def supervise(*args, **options):
        assert not folder.checkpoints.exists()  # --clean
        with pytest.raises(JobError, match="is running"):
            Claim(folder, resume=True, clean=False)
        raise RunFailed("seen", at="a", why="b", try_="c")

    world.monkeypatch.setattr("farspan.cluster.supervisor.supervise", supervise)
    with pytest.raises(RunFailed, match="seen"):
        run(job, clean=True)


def test_the_last_line_says_how_it_ended(world, job, tmp_path, capsys):
    run(job, console=Console(width=300))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"done:    3 steps, loss 2.5000, held-out 2.2500, checkpoint {tmp_path / 'step_3'}"
    assert f"batch    {BATCH}" in lines
    assert any(line.startswith("mesh     sp 1: at most 4: 4 ranks for a sequence; sp=1: ") for line in lines)
    assert not any("never shown twice" in line for line in lines)


def failing(error):
    def fail(*args, **options):
        raise error

    return fail


DATA_ERROR = DataError("no data", at="b", why="c", try_="d")


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(
    ("change", "fails", "asked"),
    [
        ({"parallel": Parallel(sp=5)}, JobError, []),
        ({"optim": Optim(tokens_per_step=8193)}, JobError, []),
        ({"model": Model("./nowhere")}, JobError, []),
        ({}, DataError, ["connect None", "prepare"]),
    ],
)
def test_a_job_that_cannot_run_changes_nothing(world, job, change, fails, asked, clean):
    folder = RunFolder(job.run_dir)
    if clean:
        write_json(folder.job, {"precious": True})
    if fails is DataError:

        def prepare(*args, **options):
            world.asked.append("prepare")
            raise DATA_ERROR

        world.monkeypatch.setattr("farspan.trainer.data.prepare.prepare", prepare)
    with pytest.raises(fails):
        run(job.model_copy(update=change), clean=clean)
    assert world.asked == asked
    left = [path.name for path in folder.root.parent.rglob("*") if path.name != "driver.lock"]
    assert left == (["r", "job.json"] if clean else [])


def test_a_run_that_failed_can_be_resumed_or_cleaned(world, job):
    world.monkeypatch.setattr(
        "farspan.cluster.supervisor.supervise", failing(RunFailed("died", at="rank 1", why="c", try_="d"))
    )
    with pytest.raises(RunFailed, match="died"):
        run(job, console=quiet())
    with pytest.raises(JobError, match="in use"):
        run(job)


def test_resuming_is_checked_against_the_newest_checkpoint(world, job, capsys):
    run(job, console=quiet())
    folder = RunFolder(job.run_dir)
    trained = world.gang.train.model_dump(mode="json")
    write_manifest(folder.checkpoint(3), Manifest(3, {}, {}, kinds=(), parameters=(), files=(), job=trained))
    with pytest.raises(JobError, match="cannot resume") as caught:
        run(job.model_copy(update={"optim": Optim(seed=7)}), resume=True)
    assert "optim.seed was 0, is 7" in caught.value.why
    assert SFTJob.model_validate_json(folder.job.read_text()) == job
    run(job.model_copy(update={"optim": Optim(lr=3e-3)}), resume=True, console=Console(width=300))
    out = capsys.readouterr().out
    assert "resume   from step 3" in out and "changed  optim.lr was 0.0001, is 0.003" in out
    assert json.loads(folder.job.read_text())["optim"]["lr"] == 3e-3


@pytest.mark.ray
def test_one_command_trains_and_the_name_is_taken(tmp_path):
    """The whole way through the process: train two steps on a local Ray, then meet the same name again."""
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text to learn\n" for i in range(4000)))
    (tmp_path / "job.yaml").write_text(
        "name: tiny\n"
        "model: {hidden: 64, layers: 1, heads: 4, kv_heads: 2, ffn: 128, vocab: 512}\n"
        "data: {source: a.txt, context: 256, on_too_long: split}\n"
        "optim: {steps: 2, lr: 1e-3}\n"
        "parallel: {sp: 1, dp: 1}\n"
        "precision: fp32\n"
        "evaluate: {share: 0}\n"
        "checkpoint: {export: false}\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(farspan.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "FARSPAN_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "farspan.jobs", "run", "job.yaml"]
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1].startswith("done:    2 steps, loss ")
    folder = RunFolder(tmp_path / "outputs" / "tiny")
    assert [path.name for path in folder.complete_checkpoints()] == ["step_2"]
    assert folder.report.exists()
    assert read_plan(folder.plan).prediction.device_peak_bytes > 0
    processes = {event["pid"] for event in json.loads(folder.trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert processes == {1, 2}, "planned lanes, and those of the second step"
    assert "part of a step, seconds" in first.stdout
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "output folder of run tiny is in use" in again.stderr
