"""Every command of the README runs, in the order it stands there, and the quickstart ends as promised.

`make test` is this very run and `make quickstart` is run as what it runs after set-up. The commands on
`jobs/stdlib_llama.py` follow the quickstart in the same folder, as for a reader; runs are made short with `--set`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder beside a checkout: `jobs/` as it is, outputs of its own."""
    place = tmp_path_factory.mktemp("readme")
    (place / "jobs").symlink_to(ROOT / "jobs")
    return place


def run(command: str, place: Path, timeout_s: float = 600) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FARSPAN_CACHE": str(place / "cache")}
    environment["PYTHONPATH"] = str(ROOT / "infra/py")
    done = subprocess.run(
        shlex.split(command), cwd=place, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_make_targets_exist() -> None:
    assert commands()[:2] == ["make quickstart", "make test"]
    for target in ("quickstart", "test"):
        shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    assert "farspan.jobs.quickstart" in subprocess.run(
        ["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True
    ).stdout  # fmt: skip


def test_quickstart_learns_exports_and_reports(place: Path) -> None:
    output = run(f"{sys.executable} -m farspan.jobs.quickstart", place)
    found = re.search(r"held-out loss ([\d.]+), unigram entropy of the data ([\d.]+)", output)
    assert found is not None, output
    assert float(found[1]) < float(found[2]) - 0.5
    assert "reloaded with transformers" in output
    assert "sample   def __init__(self," in output
    last = output.strip().splitlines()[-1]
    report = Path(last.removeprefix("report").strip())
    assert report.is_file(), last
    assert "</html>" in report.read_text()


FOLLOWING = [command for command in commands() if not command.startswith("make ")]


@pytest.mark.parametrize("command", FOLLOWING)
def test_command(command: str, place: Path) -> None:
    assert (place / "outputs/stdlib-llama").exists(), "the quickstart comes first"
    program, _, rest = command.partition(" ")
    if program == "farspan":
        program = f"{sys.executable} -m farspan.jobs"
    elif program == "torchrun":
        program = f"{sys.executable} -m torch.distributed.run"
    if rest == "run jobs/reason_rl.py":
        rest += " --set warm_start.optim.steps=5 --set warm_start.examples=500 --set optim.steps=2"
        rest += " --set evaluate.prompts=16 --set rollout.prompts_per_step=2 --set reward.monitor_prompts=2"
        rest += " --set optim.warmup_steps=1"
    elif rest.startswith("run") and "name=" in rest:
        rest += " --set optim.steps=3 --set data.context=512"
    elif rest.startswith("run") and "--resume" not in rest:
        # the quickstart has left this name in use: the README's reader runs it in a fresh folder
        rest += " --clean --set optim.steps=3 --set data.context=512"
    elif rest.startswith("run"):
        rest = rest.replace("optim.steps=60", "optim.steps=4 --set data.context=512")
    assert run(f"{program} {rest}", place) or rest.startswith("-")


def test_files_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `(\w+)/` ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
