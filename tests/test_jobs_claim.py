"""Run-folder discipline: nothing is overwritten, deleted or shared by accident."""

import pytest

from farspan.errors import JobError
from farspan.jobs.claim import Claim
from farspan.trainer.run_folder import RunFolder, write_json


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "outputs" / "run")


def old_run(folder, *, step=None):
    write_json(folder.job, {"name": "run"})
    folder.metrics.write_text("{}\n")
    if step is not None:
        write_json(folder.checkpoint(step) / "manifest.json", {})


def everything(folder):
    return {p: p.read_bytes() for p in folder.root.parents[1].rglob("*") if p.is_file() and p.name != "driver.lock"}


def test_a_fresh_name_is_made_only_when_taken(folder):
    with Claim(folder, resume=False, clean=False) as claim:
        assert not folder.root.parent.exists()
        claim.take()
        assert folder.root.is_dir()


def test_an_empty_folder_may_be_used(folder):
    folder.root.mkdir(parents=True)
    with Claim(folder, resume=False, clean=False) as claim:
        claim.take()


@pytest.mark.parametrize("step", [None, 5])
def test_a_name_in_use_is_refused(folder, step):
    old_run(folder, step=step)
    before = everything(folder)
    with pytest.raises(JobError) as caught:
        Claim(folder, resume=False, clean=False)
    assert "in use" in caught.value.what and "--resume" in caught.value.try_ and "--clean" in caught.value.try_
    assert ("step_5" in caught.value.why) == (step == 5)
    assert everything(folder) == before


def test_resume_keeps_and_clean_deletes_only_when_taken(folder):
    old_run(folder, step=5)
    before = everything(folder)
    with Claim(folder, resume=True, clean=False) as claim:
        claim.take()
        assert everything(folder) == before
    with Claim(folder, resume=False, clean=True) as claim:
        assert everything(folder) == before
        claim.take()
        assert everything(folder) == {}


@pytest.mark.parametrize("flags", [{"clean": True}, {"resume": True}, {}])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_a_run_is_never_touched(folder, flags, kind, tmp_path):
    folder.root.parent.mkdir()
    if kind == "file":
        folder.root.write_text("precious")
    else:
        home = tmp_path / "elsewhere" if kind == "link" else folder.root
        home.mkdir()
        (home / "thesis.tex").write_text("precious")
        if kind == "link":
            write_json(home / "job.json", {})
            folder.root.symlink_to(home)
    before = everything(folder)
    with pytest.raises(JobError, match="not a run folder"):
        Claim(folder, **{"resume": False, "clean": False, **flags})
    assert everything(folder) == before


def test_nothing_to_resume_and_flags_that_contradict(folder):
    with pytest.raises(JobError, match="no run run to resume"):
        Claim(folder, resume=True, clean=False)
    with pytest.raises(JobError, match="--resume and --clean"):
        Claim(folder, resume=True, clean=True)
    assert not folder.root.parent.exists()


@pytest.mark.parametrize("flags", [{"resume": True, "clean": False}, {"resume": False, "clean": True}])
def test_a_running_driver_is_not_disturbed(folder, flags):
    with Claim(folder, resume=False, clean=False) as running:
        running.take()
        write_json(folder.job, {})
        with pytest.raises(JobError, match="is running"):
            Claim(folder, **flags)
        assert folder.job.exists()
    with Claim(folder, **flags) as later:
        later.take()


def test_two_drivers_of_one_fresh_name(folder):
    first, second = (Claim(folder, resume=False, clean=False) for _ in range(2))
    with first, second:
        first.take()
        with pytest.raises(JobError, match="in use"):
            second.take()
    assert first._lock is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be made") as caught:
        Claim(RunFolder(tmp_path / "file" / "run"), resume=False, clean=False)
    assert "is a file" in caught.value.why and "output_dir" in caught.value.try_
