"""One step of LoRA on an 8B model from 32k to 512k rows: Farspan's policies beside what else there is.

    python infra/bench/gpu/race.py [--lengths 32k 128k] [--systems solve hf-offload] [--toy] [--minutes 8.5]

One GPU, no Ray. Layers are measured first (a minute); plans follow from that. Every system trains the same random
weights on the same tokens: the policies of the planner; Hugging Face's checkpointing, alone and with what it saves in
host memory; TRL's OffloadActivations; DeepSpeed's activation checkpointing in host memory; Liger's kernels. At 512k a
step takes minutes: give that length a start of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from typing import Any

from _common import Bench, gib, main, markdown, rows_of, seconds
from _plans import (
    allocated_bytes,
    budgets_of,
    calibration_of,
    config_of,
    heads_of,
    problem_of,
    tiers_of,
)

from farspan.errors import DoesNotFit
from farspan.memory.evaluate import evaluate
from farspan.memory.policies import fixed_policy
from farspan.memory.solve import solve
from farspan.schema import parse_count

K = 1 << 10
LENGTHS = (32 * K, 128 * K, 256 * K, 512 * K)
STEPS = {32 * K: 3, 128 * K: 2}
PLANNED = "solve, planned addresses"
POLICIES = ("solve", "solve, MLP tiles", PLANNED, "keep", "recompute", "offload-inputs")
LIMIT_S = 1200.0
"""Of a cell; a start may have less, see `--minutes`: a step at 512k takes eight of them."""
PEERS = ("hf-checkpoint", "hf-offload", "trl-offload", "deepspeed-offload", "liger")
TILE = 2048
TARGETS = {128 * K: 36.0, 512 * K: 490.0}
"""Seconds on an H200; the floors without any recomputation are 33 and 468."""


def cell(bench: Bench, config: dict[str, Any], length: int, system: str, options: Any, folder: str) -> None:
    """One system at one length, planned if it is one of ours."""
    task: dict[str, Any] = {
        "what": "train",
        "config": config,
        "length": length,
        "system": system,
        "folder": folder,
        "steps": 1 if bench.toy else STEPS.get(length, 1),
        # whatever pins or maps memory when it is first needed does so in a whole step, if there is time for two
        "warm_rows": 64 if bench.toy else length if length <= 128 * K else 2048,
    }
    key = f"{config['name']}/{length}/{system}"
    if key in bench.done["cells"]:
        return
    if system not in POLICIES:
        bench.cell(key, task, limit_s=LIMIT_S)
        return
    if system == PLANNED:
        task["addresses"] = "planned"
    if system == "solve, MLP tiles":
        config = {**config, "mlp_tile": 64 if bench.toy else TILE}
    measured = calibration_of(bench, config, folder)
    if isinstance(measured, str):
        bench.failed(key, f"layers were not measured: {measured}")
        return
    problem = problem_of(bench, config, measured, length, budgets_of(bench, options))
    try:
        placement = solve(problem).placement if system.startswith("solve") else fixed_policy(problem, system)  # type: ignore[arg-type]
    except DoesNotFit as error:
        bench.failed(key, f"does not fit: {error.why}")
        return
    prediction = evaluate(problem, placement)
    planned = {
        "planned_s": prediction.step_s,
        "planned_bytes": allocated_bytes(problem, prediction),
        "planned_host_bytes": prediction.host_bytes,
        "planned_disk_bytes": prediction.disk_bytes,
    }
    if not prediction.fits:
        bench.failed(key, f"does not fit: over by {prediction.over_bytes}", **planned)
        return
    tiers = tiers_of(problem, placement, prediction)
    found = bench.cell(
        key, {**task, "config": config, "placement": placement.model_dump(mode="json"), "tiers": tiers}, limit_s=LIMIT_S
    )
    found |= planned


def equality(bench: Bench, config: dict[str, Any], length: int, options: Any, folder: str) -> None:
    """Gradients of every policy against those of keeping everything, at a length that keeping takes."""
    measured = calibration_of(bench, config, folder)
    if isinstance(measured, str):
        return
    problem = problem_of(bench, config, measured, length, budgets_of(bench, options))
    for policy in ("memo", "ssdtrain") if bench.toy else ("recompute", "offload-inputs", "memo", "ssdtrain"):
        placement = fixed_policy(problem, policy)
        tiers = tiers_of(problem, placement, evaluate(problem, placement))
        for mode in ("deterministic",) if bench.toy else ("deterministic", "as it is"):
            task = {
                "what": "gradients", "config": config, "length": length, "system": policy, "folder": folder,
                "placement": placement.model_dump(mode="json"), "tiers": tiers,
                "deterministic": mode == "deterministic",
            }  # fmt: skip
            bench.cell(f"gradients/{config['name']}/{length}/{policy}/{mode}", task)


def run(bench: Bench, options: argparse.Namespace) -> None:
    config = config_of("toy" if bench.toy else "8B", lora=8 if bench.toy else 16)
    fewer = {**config, "name": f"{config['name']}, 4 layers", "model": {**config["model"], "layers": 4}}
    fewer = config if bench.toy else fewer
    bench.choose_kernels(heads_of(config), 256 if bench.toy else 16 * K)
    with tempfile.TemporaryDirectory() as folder:
        if not options.lengths:
            equality(bench, fewer, 700 if bench.toy else 8 * K, options, folder)
        for length in options.lengths or ([1100] if bench.toy else LENGTHS):
            for system in options.systems or (*POLICIES, *PEERS):
                cell(bench, config, length, system, options, folder)


def row(key: str, cell: dict[str, Any]) -> list[str]:
    config, length, system = key.split("/")
    head = [config, rows_of(int(length)), system]
    planned = [seconds(cell.get("planned_s")), gib(cell.get("planned_bytes"))]
    if "failed" in cell:
        return [*head, cell["failed"], planned[0], "", "", planned[1], "", "", "", "", ""]
    step_s, peak = statistics.median(cell["step_s"]), cell["peak_bytes"]
    miss_s = f"{cell['planned_s'] / step_s - 1:+.1%}" if "planned_s" in cell else ""
    miss = f"{cell['planned_bytes'] / peak - 1:+.1%}" if "planned_bytes" in cell else ""
    stalls = sum(cell.get("stall_s", {}).values())
    return [
        *head, seconds(step_s), planned[0], miss_s, gib(peak), planned[1], miss,
        *(gib(cell.get(f"{what}_bytes")) for what in ("reserved", "host", "disk")), seconds(stalls) if stalls else "",
    ]  # fmt: skip


HEADER = (
    "model", "rows", "system", "step", "planned", "miss", "device GiB", "planned", "miss", "reserved", "host GiB",
    "disk GiB", "stalls",
)  # fmt: skip


def training(bench: Bench) -> dict[str, dict[str, Any]]:
    """Cells that trained, or were to."""
    others = ("calibration/", "gradients/", "fastest kernels")
    return {key: cell for key, cell in bench.done["cells"].items() if not key.startswith(others)}


def verdicts(bench: Bench) -> list[str]:
    """What the cells that there are say to what was promised."""
    ran = {key: cell for key, cell in training(bench).items() if "failed" not in cell}
    found = []
    took = {tuple(key.split("/")): statistics.median(cell["step_s"]) for key, cell in ran.items()}
    for config, length in dict.fromkeys((config, int(length)) for config, length, _ in took):
        of_length = {name: s for (c, rows, name), s in took.items() if (c, int(rows)) == (config, length)}
        ours = [s for name, s in of_length.items() if name.startswith("solve")]
        theirs = {name: s for name, s in of_length.items() if not name.startswith("solve")}
        if ours and theirs:
            best = min(theirs, key=lambda name: theirs[name])
            ratio = min(ours) / theirs[best]
            found.append(f"{config}, {rows_of(length)}: solve takes {ratio:.3f} of the quickest other, {best}.")
        if ours and length in TARGETS and config == "8B LoRA":
            met = "met" if min(ours) <= TARGETS[length] else "missed"
            found.append(
                f"{rows_of(length)}: {min(ours):.1f} s, at most {TARGETS[length]:g} s asked on an H200: {met}."
            )
    misses = [cell["planned_bytes"] / cell["peak_bytes"] - 1 for cell in ran.values() if "planned_bytes" in cell]
    late = [cell["planned_s"] / statistics.median(cell["step_s"]) - 1 for cell in ran.values() if "planned_s" in cell]
    if misses:
        found.append(
            f"Largest miss of a peak {max(misses, key=abs):+.2%} (3 % asked), "
            f"of a time {max(late, key=abs):+.1%} (5 % asked)."
        )
        longest = max(int(key.split("/")[1]) for key in ran)
        found.append(f"Longest context that ran: {rows_of(longest)}.")
    for key, cell in bench.done["cells"].items():
        if key.startswith("gradients/"):
            _, _, length, policy, mode = key.split("/")
            told = cell.get("failed") or (
                f"{len(cell['differing'])} of {cell['of']} differ, at most {cell['largest']:.1e} "
                f"(keep against keep {cell['largest of keep']:.1e})"
            )
            found.append(f"Gradients of {policy} against keep, {rows_of(int(length))}, {mode}: {told}.")
    return found


def table(bench: Bench) -> str:
    rows = [row(key, cell) for key, cell in training(bench).items()]
    return markdown(HEADER, rows) + "\n" + "".join(f"- {line}\n" for line in verdicts(bench))


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=parse_count, nargs="*", default=[])
    parser.add_argument("--systems", nargs="*", default=[], choices=[*POLICIES, *PEERS])
    parser.add_argument("--host-gib", type=float, default=0.0, help="of host memory; default 80 % of what there is")
    parser.add_argument("--disk-gib", type=float, default=48.0)


if __name__ == "__main__":
    sys.exit(main(__doc__.split("\n", maxsplit=1)[0], sys.argv[1:], "race", run, table, more_options))
