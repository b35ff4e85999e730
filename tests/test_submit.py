"""Submission: what is staged and refused, the KubeRay manifest, and one real cluster with token authentication."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from farspan.cluster.actor import find_free_port
from farspan.cluster.metrics import NAMES
from farspan.cluster.package import package_root
from farspan.errors import ClusterNotReady, JobError
from farspan.jobs.config import SFTJob
from farspan.jobs.load import load
from farspan.jobs.rayjob import kubernetes_name, rayjob_manifest
from farspan.jobs.submit import check_upload, follow, stage, submit
from farspan.trainer.config import Optim, Parallel, RandomModel, TextData

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def job(tmp_path: Path, **fields: Any) -> SFTJob:
    model = RandomModel(hidden=32, layers=1, heads=2, kv_heads=2, ffn=32, vocab=300)
    given = {
        "name": "tiny",
        "model": model,
        "data": TextData("texts/*.txt", context=64, on_too_long="split"),
        "parallel": Parallel(sp=1, dp=1),
        "optim": Optim(steps=2),
        "precision": "fp32",
        "output_dir": str(tmp_path / "outputs"),
        **fields,
    }
    return SFTJob(**given)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data in it, and things that must not be uploaded."""
    folder = tmp_path / "texts"
    (folder / "outputs").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text number {number} " * 200)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_is_staged(tmp_path: Path, texts: Path) -> None:
    into = tmp_path / "staged"
    into.mkdir()
    stage(job(tmp_path, output_dir="outputs"), into)
    top = {path.name for path in into.iterdir()}
    assert top == {"job.yaml", "farspan", "texts"}
    assert {path.name for path in (into / "texts").iterdir()} == {"0.txt", "1.txt", "2.txt", "3.txt"}
    package = {path.relative_to(into / "farspan") for path in (into / "farspan").rglob("*")}
    assert Path("trainer/world.py") in package
    assert not [path for path in (into / "farspan").rglob("*") if path.is_symlink() or path.name == "__pycache__"]
    loaded = load(str(into / "job.yaml")).job
    assert loaded == job(tmp_path, output_dir=str(tmp_path / "outputs")), "the job means the same on the other side"
    assert 10_000 < check_upload(into) < 5 * 2**20


def test_the_staged_package_imports_alone(tmp_path: Path, texts: Path) -> None:
    into = tmp_path / "staged"
    into.mkdir()
    stage(job(tmp_path), into)
    code = "import farspan.jobs.cli, farspan.cluster.supervisor as s; print(s.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=into, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().startswith(str(into / "farspan"))


def test_too_much_to_upload_is_refused_with_the_largest_files(tmp_path: Path) -> None:
    with open(tmp_path / "big.jsonl", "wb") as file:
        file.truncate(101 * 2**20)
    (tmp_path / "small").write_text("x")
    with pytest.raises(JobError) as caught:
        check_upload(tmp_path)
    assert "largest: big.jsonl 101.0 MiB, small 0.0 MiB" in str(caught.value)


def test_data_outside_the_folder_is_refused(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "staged"
    into.mkdir()
    monkeypatch.chdir(into)
    with pytest.raises(JobError, match="outside the folder"):
        stage(job(tmp_path, data=TextData("../texts/*.txt")), into)


def test_rayjob_manifest(tmp_path: Path) -> None:
    spec = job(tmp_path, name="Long_Code.v2", parallel=Parallel(sp=8, dp=2), cluster={"cpus_per_actor": 4})
    config_map, manifest = yaml.safe_load_all(rayjob_manifest(spec, gpus_per_node=8))
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == (
        "ray.io/v1",
        "RayJob",
        "long-code-v2",
    )
    # The field names are those of KubeRay's RayJobSpec; an unknown one would be dropped by the API server in silence.
    assert set(manifest["spec"]) == {
        "entrypoint",
        "submissionMode",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "backoffLimit",
        "runtimeEnvYAML",
        "rayClusterSpec",
    }
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"]) == {"env_vars": {"PYTHONUNBUFFERED": "1"}}
    cluster = manifest["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    (worker,) = workers["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == {"cpu": 33, "memory": "512Gi", "nvidia.com/gpu": 8}
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    volumes = {volume["name"]: volume for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert volumes["job"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert {mount["name"] for mount in head["volumeMounts"]} == set(volumes)
    sent = tmp_path / "job.yaml"
    sent.write_text(config_map["data"]["job.yaml"])
    assert load(str(sent)).job.run_dir == Path("/storage/outputs/Long_Code.v2")


def test_a_manifest_needs_the_size_of_the_gang(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="size of the gang"):
        rayjob_manifest(job(tmp_path, parallel=Parallel(sp=2)))


@pytest.mark.parametrize("name", ["Run_1", "1st", "a" * 80, "x..--y-"])
def test_kubernetes_name(name: str) -> None:
    import re

    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", kubernetes_name(name))
    assert len(kubernetes_name(name)) <= 47


def test_the_dashboard_draws_metrics_that_exist() -> None:
    import re

    text = (ROOT / "infra" / "grafana" / "farspan.json").read_text()
    drawn = {name.removesuffix("_total") for name in re.findall(r"ray_(farspan_\w+)", text)}
    assert drawn == set(NAMES)
    documented = (ROOT / "infra" / "grafana" / "README.md").read_text()
    assert {name.removesuffix("_total") for name in re.findall(r"`ray_(farspan_\w+)`", documented)} == set(NAMES)
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_what_is_no_dashboard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not the address of a Ray dashboard"):
        submit(job(tmp_path), "127.0.0.1:6379")
    with pytest.raises(ClusterNotReady, match="no Ray dashboard answers"):
        submit(job(tmp_path), f"http://127.0.0.1:{find_free_port()}")


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node of our own, with token authentication, on ports of its own; ended by process id."""
    port, dashboard = find_free_port(), find_free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Unix sockets lie below it
    without = ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-the-farspan-tests-0123456789",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"]
    command += [f"--ray-client-server-port={find_free_port()}", f"--dashboard-agent-listen-port={find_free_port()}"]
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for_dashboard(process, f"http://127.0.0.1:{dashboard}", folder / "head.log")
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for member in alive:
            member.kill()
        process.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_dashboard(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import requests

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            requests.get(f"{url}/api/version", timeout=2)
            return
        except requests.RequestException:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture
def token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.environment["RAY_AUTH_TOKEN"])


@pytest.mark.ray
def test_a_wrong_token_is_refused(head: Head, token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ClusterNotReady, match="refuses us") as caught:
        submit(job(tmp_path), head.dashboard)
    assert "the token found here is not the cluster's" in str(caught.value)


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # Ray's SDK, in aiohttp
@pytest.mark.ray
def test_a_submitted_job_trains_and_its_exit_code_arrives(head: Head, token: None, tmp_path: Path, texts: Path) -> None:
    lines: list[str] = []
    good = submit(job(tmp_path), head.dashboard, tell=lines.append)
    log: list[str] = []
    code = follow(head.dashboard, good, log.append)
    assert code == 0, "".join(log)
    assert "uploading" in lines[0] and "MiB" in lines[0]
    run = tmp_path / "outputs" / "tiny"
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    missing = submit(job(tmp_path, data=TextData("none/*.txt"), name="bad"), head.dashboard, tell=lines.append)
    log.clear()
    assert follow(head.dashboard, missing, log.append) == 2, "".join(log)
    assert "error: " in "".join(log)


DRIVER = """
import sys
from pathlib import Path
sys.path.append(sys.argv[3])
from cluster_jobs import gang_spec
from farspan.cluster.session import connect
from farspan.cluster.supervisor import supervise
with connect(sys.argv[1]) as session:
    supervise(gang_spec(Path(sys.argv[2]), 1), session=session, entry="gang_entries:endless")
"""


@pytest.mark.ray
def test_joining_ships_the_package_and_a_killed_driver_leaves_no_rank(head: Head, tmp_path: Path) -> None:
    environment = {**head.environment, "PYTHONPATH": str(package_root())}  # of the driver; the cluster has none
    command = [sys.executable, "-c", DRIVER, head.address, str(tmp_path), str(TESTS)]
    mark = tmp_path / "pid-0"
    with subprocess.Popen(command, env=environment, cwd=TESTS) as driver:  # Ray puts its folder on the workers' path
        deadline = time.monotonic() + 90
        while not (mark.exists() and mark.read_text()):
            assert driver.poll() is None, "the driver ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        rank = psutil.Process(int(mark.read_text()))
        driver.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([rank], timeout=60)
        assert not alive, "a rank trains on without its driver"
