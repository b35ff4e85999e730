"""Memory policies on one machine: predicted and measured peaks, step times, bytes moved, and torch's own tools beside.

Every cell is a process of its own with one thread (`_memory_cells`). First the layers of each configuration are
measured at 2,048 rows at most; everything predicted follows from that and from shapes. Then

- peaks: each policy's highest point of a step, from the allocator's events, against the plan made beforehand;
- times: policies, torch's non-reentrant checkpointing, its selective checkpointing that keeps attention, and
  `save_on_cpu`, interleaved, several repeats; for each of the three also `solve` with exactly the device memory that it
  was seen to take and the host memory that it used;
- the frontier: `solve` at a range of device budgets.

On a CPU "device" is what torch's allocator holds, a budget and not a limit; host memory is another part of the same
RAM, so copies cost compute: offloading looks worse here than over a link that copies by itself.

    farspan bench memory                     results/memory.json (resumable), memory.md, memory.png
    farspan bench memory --toy               a minute, for the test
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from _cell_process import CellFailed, start
from _memory_report import PEERS, TIMED, plot, report

from farspan.errors import DoesNotFit
from farspan.memory.calibration import Calibration, Measured, calibrated_problem
from farspan.memory.evaluate import evaluate
from farspan.memory.hardware import load_hardware
from farspan.memory.plan import Placement
from farspan.memory.policies import FIXED_POLICIES, FixedPolicy, fixed_policy
from farspan.memory.prediction import Prediction
from farspan.memory.problem import Budgets, PlanProblem
from farspan.memory.shape import AdapterShape, ModelShape, Training
from farspan.memory.solve import solve

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL = {"family": "llama", "hidden": 64, "layers": 4, "heads": 1, "kv_heads": 1, "ffn": 172, "vocab": 1024}
"""One head: attention at 32k rows takes a CPU core seven seconds for each head and layer."""
WIDER = {**MODEL, "hidden": 128, "heads": 2, "ffn": 344, "vocab": 2048}
BASE = {"model": MODEL, "precision": "fp32", "lora": 0, "loss_tile": 512, "mlp_tile": 0, "sp": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "full fp32": BASE,
    "full fp32, sp 2": {**BASE, "model": WIDER, "sp": 2},
    "LoRA bf16, Qwen3": {**BASE, "model": {**WIDER, "family": "qwen3"}, "precision": "bf16", "lora": 8},
    "full fp32, MLP tiles": {**BASE, "model": WIDER, "mlp_tile": 1024},
}
TILED = "full fp32, narrow, MLP tiles"
"""For budgets in which no whole MLP can be rebuilt."""
CONFIGS[TILED] = {**BASE, "mlp_tile": 1024}
SHORT = ("LoRA bf16, Qwen3", "full fp32, MLP tiles")
"""At the first length only: the other two show that length changes nothing."""
LENGTHS = (8192, 32768)
REPEATS, STEPS = {8192: 4, 32768: 3}, {8192: 2, 32768: 1}
SHARES: dict[int, tuple[float, ...]] = {8192: (0.75, 0.5)}
HOST_SHARES = (0.25, 0.15)
"""Device budgets of the frontier, as shares of what keeping everything takes: alone, and with as much host memory."""
TOY: dict[str, Any] = {
    "policies": ("keep",),
    "peers": ("checkpoint",),
    "lengths": [2560],
    "repeats": {2560: 1},
}
AMPLE = 1 << 40


class Bench:
    """Cells done so far, and how to do one more."""

    def __init__(self, out: Path, *, toy: bool) -> None:
        self.out, self.toy = out, toy
        self.policies: tuple[FixedPolicy, ...] = TOY["policies"] if toy else FIXED_POLICIES
        self.peers: tuple[str, ...] = TOY["peers"] if toy else PEERS
        self.done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"machine": machine(), "cells": {}}

    def cell(self, key: str, task: dict[str, Any], *, ranks: int = 1) -> dict[str, Any]:
        """A cell's result, from the file or from a run; of several ranks the first's, with all peaks.

        Run again when the plan under this name has become another one.
        """
        cells = self.done["cells"]
        digest = hashlib.sha256(json.dumps([task.get("placement"), task.get("tiers")]).encode()).hexdigest()[:12]
        if cells.get(key, {}).get("placement") != digest:
            found = _run(task, ranks, toy=self.toy)
            cells[key] = {**found[0], "placement": digest}
            if ranks > 1:
                cells[key]["ranks"] = [cell.get("peak_bytes") for cell in found]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.done, indent=1) + "\n")
            said = {k: v for k, v in cells[key].items() if k in ("peak_bytes", "step_s")}
            print(f"{key:<48} {said or 'done'}", flush=True)
        return cells[key]

    def calibration(self, name: str) -> Measured:
        """Layers of a configuration, measured."""
        config = CONFIGS[name]
        shape = shape_of(config)
        request = {
            "model": {"type": "random", **config["model"]},
            "adapter": {"type": "lora", "rank": config["lora"]} if config["lora"] else {"type": "full"},
            "precision": config["precision"],
            "memory": {"loss_tile": config["loss_tile"], "mlp_tile": config["mlp_tile"] or "off"},
            "context": max(LENGTHS),
            "sp": config["sp"],
            "kinds": [shape.form(layer).name for layer in range(shape.layers)],
            "gradients": "first" if config["precision"] == "fp32" and config["sp"] == 1 else "handed on",
            "disk_dir": str(Path.cwd()),
        }
        found = self.cell(f"profile/{name}", {"what": "calibrate", "request": request})
        return Measured.model_validate({field: found[field] for field in Measured.model_fields})

    def problem(self, name: str, length: int, budgets: Budgets | None = None) -> PlanProblem:
        config = CONFIGS[name]
        measured = self.calibration(name)
        calibration = Calibration(key={}, profile=measured.profile, links=measured.links)
        ample = Budgets(device_bytes=AMPLE, host_bytes=AMPLE, disk_bytes=AMPLE)
        return calibrated_problem(
            calibration, shape_of(config), training_of(config), load_hardware("cpu"), length, budgets=budgets or ample
        )

    def train(
        self,
        key: str,
        name: str,
        length: int,
        system: str,
        placement: Placement | None,
        prediction: Prediction | None,
        what: str,
        steps: int = 1,
    ) -> dict[str, Any]:
        tiers = None
        if prediction is not None and placement is not None and any(prediction.moved_bytes.values()):
            pages = 4096 * 64 * len(placement.layers)  # a tensor takes whole ones
            disk_bytes = prediction.disk_bytes + pages if prediction.disk_bytes else 0
            tiers = {"host_bytes": prediction.host_bytes + pages, "disk_bytes": disk_bytes, "slots": placement.slots}
        task = {
            "what": what,
            "config": CONFIGS[name],
            "length": length,
            "system": system,
            "placement": placement.model_dump(mode="json") if placement is not None else None,
            "tiers": tiers,
            "disk_dir": str(Path.cwd()),
            "steps": steps,
            "ranks": CONFIGS[name]["sp"],
        }
        return self.cell(key, task, ranks=CONFIGS[name]["sp"])


def _run(task: dict[str, Any], ranks: int, *, toy: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        task = {**task, "ranks": ranks, "meet": f"{folder}/meet"}
        environments = [{"OMP_NUM_THREADS": "1", "RANK": str(rank), "HF_HUB_OFFLINE": "1"} for rank in range(ranks)]
        processes = [start(HERE / "_memory_cells.py", task, each, forked=toy) for each in environments]
        try:
            return [process.result() for process in processes]
        except CellFailed as error:
            raise RuntimeError(f"{task['what']} {task.get('system')}:\n{str(error)[-4000:]}") from None


def shape_of(config: dict[str, Any]) -> ModelShape:
    model = config["model"]
    numbers = {key: model[key] for key in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab")}
    norm = "head" if model["family"] == "qwen3" else "none"
    return ModelShape.model_validate({**numbers, "head_dim": model["hidden"] // model["heads"], "qk_norm": norm})


def training_of(config: dict[str, Any]) -> Training:
    return Training(
        precision=config["precision"],
        adapter=AdapterShape(rank=config["lora"]) if config["lora"] else None,
        sp=config["sp"],
        loss_tile=config["loss_tile"],
        mlp_tile=config["mlp_tile"] or None,
    )


def scarce(bench: Bench, name: str, length: int) -> PlanProblem:
    """A problem in which `solve` has to use every means: what recomputing all takes, a little host and disk."""
    ample = bench.problem(name, length)
    checkpointed = evaluate(ample, fixed_policy(ample, "recompute")).device_peak_bytes
    layer = ample.kinds[0]
    fixed = sum(state.bytes for state in ample.states if state.tier == "host")
    return bench.problem(
        name,
        length,
        Budgets(device_bytes=checkpointed, host_bytes=fixed + 2 * layer.x_bytes, disk_bytes=4 * layer.x_bytes),
    )


def on_host(bench: Bench, name: str, length: int) -> PlanProblem:
    """A problem in which only what waits in host memory fits."""
    ample = bench.problem(name, length)
    least = evaluate(ample, fixed_policy(ample.saving("host"), "keep")).device_peak_bytes
    return bench.problem(name, length, Budgets(device_bytes=least, host_bytes=AMPLE))


def peaks(bench: Bench, lengths: list[int], names: list[str]) -> list[dict[str, Any]]:
    """Predicted and measured peak of every policy."""
    found = []
    for name in names:
        for length in lengths[: 1 if name in SHORT else None]:
            ample = bench.problem(name, length)
            solved = {"solve": scarce(bench, name, length), "solve, host": on_host(bench, name, length)}
            for policy in (*bench.policies, *solved):
                problem = solved.get(policy, ample)
                placement = solve(problem).placement if policy in solved else fixed_policy(problem, policy)
                prediction = evaluate(problem, placement)
                key = f"peak/{name}/{length}/{policy}"
                cell = bench.train(key, name, length, policy, placement, prediction, "peak")
                peak = max(cell.get("ranks") or [cell["peak_bytes"]])
                found.append(
                    {
                        "config": name,
                        "length": length,
                        "policy": policy,
                        "planned": prediction.device_peak_bytes,
                        "measured": peak,
                        "miss": prediction.device_peak_bytes / peak - 1,
                        "at": prediction.device_peak_at,
                        "resident": cell["resident_bytes"],
                        "host": cell.get("host_bytes", 0),
                        "disk": cell.get("disk_bytes", 0),
                    }
                )
    return found


System = tuple[str, Placement | None, Prediction | None]
"""Configuration, and what the executor is told; None: a peer's own way."""


def systems(bench: Bench, length: int) -> dict[str, System]:
    """Everything that is timed: policies, peers, `solve` in each peer's memory, `solve` at the frontier's budgets."""
    ample = bench.problem(TIMED, length)
    found: dict[str, System] = {}
    for policy in bench.policies:
        placement = fixed_policy(ample, policy)
        found[policy] = TIMED, placement, evaluate(ample, placement)
    for peer in bench.peers:
        found[peer] = TIMED, None, None
        cell = bench.train(f"peak/{TIMED}/{length}/{peer}", TIMED, length, peer, None, None, "peak")
        budgets = Budgets(device_bytes=cell["peak_bytes"], host_bytes=cell.get("host_bytes", 0))
        if (solved := _solved(bench, length, budgets)) is not None:
            found[f"solve at {peer}"] = solved
    whole = evaluate(ample, fixed_policy(ample, "keep")).device_peak_bytes
    for share in SHARES.get(length, ()):
        if (solved := _solved(bench, length, Budgets(device_bytes=int(share * whole)))) is not None:
            found[f"solve at {share:.0%}"] = solved
    for share in HOST_SHARES if len(bench.peers) > 1 else ():
        if (solved := _solved(bench, length, Budgets(device_bytes=int(share * whole), host_bytes=whole))) is not None:
            found[f"solve with host at {share:.0%}"] = solved
    return found


def _solved(bench: Bench, length: int, budgets: Budgets) -> System | None:
    """With the MLP whole if that fits, else in tiles."""
    for name in (TIMED, TILED):
        try:
            solution = solve(bench.problem(name, length, budgets))
        except DoesNotFit:
            continue
        return name, solution.placement, solution.prediction
    return None


def times(bench: Bench, lengths: list[int], repeats: dict[int, int]) -> None:
    for length in lengths:
        timed = systems(bench, length)
        for name, (config, placement, prediction) in timed.items():
            bench.train(f"peak/{TIMED}/{length}/{name}", config, length, name, placement, prediction, "peak")
        for repeat in range(repeats[length]):
            for name, (config, placement, prediction) in timed.items():
                key = f"time/{length}/{repeat}/{name}"
                steps = STEPS.get(length, 1)
                bench.train(key, config, length, name, placement, prediction, "time", steps)


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "torch": version("torch")}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench memory", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="one configuration, few systems, short, once")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--only", choices=["peaks", "times"])
    options = parser.parse_args(arguments)
    lengths, repeats, names = options.lengths, dict(REPEATS), [name for name in CONFIGS if name != TILED]
    if options.toy:
        lengths, repeats, names = TOY["lengths"], TOY["repeats"], [TIMED]
    bench = Bench(options.out, toy=options.toy)
    found = peaks(bench, lengths, names) if options.only != "times" else []
    if options.only != "peaks":
        times(bench, lengths, repeats)
        plot(bench.done, lengths, repeats, options.out.with_suffix(".png"))
    text, good = report(bench.done, found, MODEL, lengths if options.only != "peaks" else [], repeats)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if good or options.toy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
