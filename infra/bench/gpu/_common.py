"""What the GPU benchmarks share: cells in processes of their own, results kept, a limit on time, one table.

Every cell is a process of its own, so that peaks are its own and what runs out of memory takes nothing along. A cell's
result is written as soon as it is there; a script that is stopped, or that has used up its minutes, goes on with what
is left when it is started again. A cell that cannot run says why, in the table too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _cell_process import CellFailed, start

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ON_GPU = torch.cuda.is_available()
GRACE_S = 30.0
"""A cell may end so much after the time is up."""
MINUTES = 8.5
"""Of one start, by default."""


class OutOfTime(Exception):
    """The rest is for the next start."""


class Bench:
    """Cells of one script, done and to be done.

    Args:
        out: JSON with the results.
        toy: small sizes, on whatever device there is.
        minutes: no cell is started after so many.
        redo: run again what failed.
    """

    def __init__(self, out: Path, *, toy: bool, minutes: float, redo: bool) -> None:
        self.out, self.toy, self.ends_s = out, toy, time.monotonic() + 60 * minutes
        self.done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cells": {}}
        if redo:
            self.done["cells"] = {key: cell for key, cell in self.done["cells"].items() if "failed" not in cell}
        here = _run({"what": "machine", "toy": toy}, 300)
        before = self.done.setdefault("machine", here)
        for name in ("gpu", "cpu"):
            if before[name] != here[name]:
                sys.exit(f"{out} holds results of {before[name]}, this is {here[name]}: choose another --out")

    @property
    def on_gpu(self) -> bool:
        return bool(self.done["machine"]["gpu"])

    def cell(self, key: str, task: dict[str, Any], *, limit_s: float = 300.0) -> dict[str, Any]:
        """A cell's result, from the file or from a run; `failed` says why there is none.

        Raises:
            OutOfTime: there is no result yet and no time for one.
        """
        cells = self.done["cells"]
        if key not in cells:
            left_s = self.ends_s - time.monotonic()
            if left_s <= 0:
                raise OutOfTime
            started = time.monotonic()
            allowed_s = min(limit_s, left_s + GRACE_S)
            found = _run({**task, "toy": self.toy, "kernels": self.done.get("kernels", [])}, allowed_s)
            if found.get("failed") == _too_long(allowed_s) and allowed_s < limit_s:
                raise OutOfTime  # it might have ended, had there been as much time as it may have
            cells[key] = found
            self.save()
            said = cells[key].get("failed") or "done"
            print(f"{key:<56} {time.monotonic() - started:6.1f} s  {said}", flush=True)
        return cells[key]

    def choose_kernels(self, shape: dict[str, int], rows: int) -> None:
        """All cells from here on use the attention kernel that a run would: the fastest for these heads."""
        found = self.cell("fastest kernels", {"what": "fastest", "rows": rows, **shape})
        self.done["kernels"] = found.get("names", [])

    def failed(self, key: str, why: str, **more: Any) -> None:
        """A cell that needs no run to fail."""
        self.done["cells"][key] = {"failed": why, **more}
        print(f"{key:<56} {'':8}  {why}", flush=True)
        self.save()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.done, indent=1) + "\n")


def _run(task: dict[str, Any], limit_s: float) -> dict[str, Any]:
    environment = {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if task.get("addresses") != "planned":
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        return start(HERE / "_cells.py", task, environment, forked=task["toy"] and not ON_GPU).result(limit_s)
    except TimeoutError:
        return {"failed": _too_long(limit_s)}
    except CellFailed as error:
        return {"failed": str(error).splitlines()[-1].strip()[:300]}


def _too_long(limit_s: float) -> str:
    return f"took more than {limit_s:.0f} s"


def main(
    what: str, arguments: Sequence[str], name: str, run: Callable[[Bench, argparse.Namespace], None],
    table: Callable[[Bench], str], options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:  # fmt: skip
    """A script: its cells, then its table, of what there is so far."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--toy", action="store_true", help="small sizes, on CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no cell starts after so many")
    parser.add_argument("--redo", action="store_true", help="run again what failed")
    if options is not None:
        options(parser)
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.out, toy=chosen.toy, minutes=chosen.minutes, redo=chosen.redo)
    if not bench.on_gpu and not chosen.toy:
        print("there is no GPU here; --toy runs small sizes on the CPU", file=sys.stderr)
        return 4
    ended = True
    try:
        run(bench, chosen)
    except OutOfTime:
        ended = False
    bench.save()
    text = f"{heading(bench)}\n\n{table(bench)}"
    chosen.out.with_suffix(".md").write_text(text)
    print(text)
    if not ended:
        print("Time is up: start again for the rest.")
    return 0


def heading(bench: Bench) -> str:
    machine = bench.done["machine"]
    device = machine["gpu"] or f"{machine['cpu']} (no GPU: sizes are toys, the numbers say nothing)"
    software = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{device}; {software}" + (f"; driver {machine['driver']}" if machine.get("driver") else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s" if value >= 10 else f"{value:.3g} s"


def gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.1f}" if value >= 2**30 else f"{value / 2**30:.3f}"


def rows_of(count: int) -> str:
    return f"{count >> 20}M" if count % (1 << 20) == 0 else f"{count >> 10}k" if count % 1024 == 0 else str(count)
