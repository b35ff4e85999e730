"""kill -9 of a rank in a step, of a rank during a checkpoint, and of the driver: nothing of the numbers may change.

Real runs by the command line on a local Ray, sp=2. What counts is `metrics.jsonl` at the end: every loss and gradient
norm must be bit-equal to the run nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from farspan.trainer.run_folder import RunFolder, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
STEPS = 14


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its data."""
    place = tmp_path_factory.mktemp("drills")
    with open(place / "data.jsonl", "w") as file:
        for index in range(200):
            file.write(json.dumps({"text": f"number {index} of the documents " * (5 + index % 7)}) + "\n")
    (place / "job.yaml").write_text(
        f"""
        name: calm
        model: {{family: llama, hidden: 64, layers: 2, heads: 4, kv_heads: 2, ffn: 128, vocab: 400}}
        data: {{source: {place}/data.jsonl, context: 512}}
        precision: fp32
        parallel: {{sp: 2, dp: 1, zero: 0}}
        optim: {{lr: 1e-3, steps: {STEPS}}}
        checkpoint: {{every: 4, keep: 1}}
        evaluate: {{every: 7, max_tokens: 1k}}
        cluster: {{max_failures: 3}}
        """
    )
    return place


class Driver:
    """One `farspan run` as a process of its own."""

    def __init__(self, place: Path, name: str, *flags: str) -> None:
        self.folder = RunFolder(place / "outputs" / name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FARSPAN_CACHE": str(place / "cache")}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "infra/py")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "farspan.jobs", "run", "job.yaml", "--set", f"name={name}", *flags],
            cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        """The trainer actors of this driver's Ray, oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "TrainerActor" in " ".join(child.cmdline()):
                    found.append(child)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def wait_for(self, what: Callable[[], Any], why: str, timeout_s: float = 120.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := what()):
            assert self.process.poll() is None, f"ended while waiting for {why}:\n{self.process.communicate()[0]}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {why}"
            time.sleep(0.002)
        return value

    def done_steps(self) -> int:
        return len(read_metrics(self.folder.metrics))

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output
        return output


COMPARED = ("step", "loss", "grad_norm", "lr", "tokens_total", "eval_loss")


def numbers(folder: RunFolder) -> list[tuple[Any, ...]]:
    return [tuple(record.get(key) for key in COMPARED) for record in read_metrics(folder.metrics)]


@pytest.fixture(scope="module")
def calm(place: Path) -> list[tuple[Any, ...]]:
    driver = Driver(place, "calm", "--set", "checkpoint.export=false")
    driver.finish()
    records = numbers(driver.folder)
    assert [record[0] for record in records] == list(range(1, STEPS + 1))
    return records


def test_a_rank_killed_during_a_checkpoint_and_another_in_a_step(place: Path, calm: list[tuple[Any, ...]]) -> None:
    driver = Driver(place, "ranks")
    # the export inside a checkpoint takes seconds, so the kill lands while step 4 is half written
    driver.wait_for(lambda: list(driver.folder.checkpoints.glob(".step_4.tmp-*")), "the checkpoint of step 4")
    driver.ranks()[0].send_signal(signal.SIGKILL)
    driver.wait_for(lambda: driver.folder.log(2, "trainer", 0).exists(), "the second attempt")
    assert not (driver.folder.checkpoint(4) / "manifest.json").exists(), "the first attempt must not have finished it"
    driver.wait_for(lambda: driver.folder.checkpoint(4).exists(), "step 4 of the second attempt")
    driver.wait_for(lambda: driver.done_steps() >= 5, "step 5")
    driver.ranks()[1].send_signal(signal.SIGKILL)
    output = driver.finish()
    assert output.count("attempt ") >= 2, output
    assert "resuming from step 4" in output, output
    assert numbers(driver.folder) == calm
    assert not list(driver.folder.checkpoints.glob(".step_*"))


def test_the_driver_killed_and_resumed(place: Path, calm: list[tuple[Any, ...]]) -> None:
    driver = Driver(place, "driver")  # its exports keep it from ending before the kill arrives
    driver.wait_for(lambda: driver.folder.checkpoint(4).exists() and driver.done_steps() >= 5, "step 5")
    ranks = driver.ranks()
    assert len(ranks) == 2
    driver.process.kill()
    driver.process.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive, "ranks outlived their driver"
    resumed = Driver(place, "driver", "--resume")
    output = resumed.finish()
    assert "from step 4" in output or "from step 8" in output, output
    assert numbers(resumed.folder) == calm
