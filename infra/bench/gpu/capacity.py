"""How long a context fits: a few layers of an 8B model at 1M and 2M rows, with the buffers of all 32 reserved.

    python infra/bench/gpu/capacity.py [--lengths 1M 2M] [--toy] [--minutes 8.5]

A whole step at 1M rows takes half an hour and longer, so it is not run. The plan of the whole model is made; its top
units of backward, at least two layers, run one whole step, in tiers that are reserved as large as the whole plan's, and
beside a block of device memory as large as what the other layers would hold at that moment. If it runs, the context
fits; its seconds, over those planned for these layers, say how much to trust the planned seconds of the whole step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from typing import Any

from _common import Bench, gib, main, markdown, rows_of, seconds
from _plans import allocated_bytes, budgets_of, calibration_of, config_of, heads_of, problem_of, tiers_of
from race import TILE

from farspan.errors import DoesNotFit
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import Placement
from farspan.memory.policies import fixed_policy
from farspan.memory.solve import solve
from farspan.schema import parse_count

M = 1 << 20
LEAST_LAYERS = 2


def top_of(placement: Placement) -> Placement:
    """The last units of a placement, with at least `LEAST_LAYERS` layers."""
    units, layers = placement.units(), 0
    for unit in units:
        layers += len(unit)
        if layers >= LEAST_LAYERS:
            break
    return placement.model_copy(update={"layers": placement.layers[-layers:], "frozen_below": 0})


def cell(bench: Bench, length: int, options: Any, folder: str) -> None:
    key = f"capacity/{length}"
    if key in bench.done["cells"]:
        return
    config = config_of("toy" if bench.toy else "8B", lora=8 if bench.toy else 16, mlp_tile=64 if bench.toy else TILE)
    measured = calibration_of(bench, config, folder)
    if isinstance(measured, str):
        bench.failed(key, f"layers were not measured: {measured}")
        return
    budgets = budgets_of(bench, options)
    problem = problem_of(bench, config, measured, length, budgets)
    try:
        # at toy size everything would fit: a policy that uses the tiers in any case
        whole = fixed_policy(problem, "offload-inputs") if bench.toy else solve(problem).placement
    except DoesNotFit as error:
        bench.failed(key, f"does not fit: {error.why}")
        return
    top = top_of(whole)
    few = {**config, "model": {**config["model"], "layers": len(top.layers)}}
    part = problem_of(bench, few, measured, length, budgets)
    of_whole, of_top = evaluate(problem, whole), evaluate(part, top)
    planned, small = allocated_bytes(problem, of_whole), allocated_bytes(part, of_top)
    found = bench.cell(
        key,
        {
            "what": "train", "config": few, "length": length, "system": "solve", "folder": folder, "steps": 1,
            "warm_rows": 64 if bench.toy else 2048, "placement": top.model_dump(mode="json"),
            "tiers": tiers_of(problem, whole, of_whole), "ballast_bytes": max(0, planned - small),
        },
        limit_s=570,
    )  # fmt: skip
    found |= {
        "layers": len(top.layers),
        "of_layers": len(whole.layers),
        "planned_bytes": planned,
        "planned_s": of_top.step_s,
        "planned_whole_s": of_whole.step_s,
        "planned_host_bytes": of_whole.host_bytes,
        "planned_disk_bytes": of_whole.disk_bytes,
    }


def run(bench: Bench, options: argparse.Namespace) -> None:
    model = config_of("toy" if bench.toy else "8B", lora=16)
    bench.choose_kernels(heads_of(model), 256 if bench.toy else 16384)
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths or ([900] if bench.toy else (M, 2 * M)):
            cell(bench, length, options, folder)


def table(bench: Bench) -> str:
    rows = []
    for key, cell in bench.done["cells"].items():
        if not key.startswith("capacity/"):
            continue
        length = rows_of(int(key.split("/")[1]))
        if "failed" in cell:
            rows.append([length, cell["failed"], *[""] * 6])
            continue
        step_s = statistics.median(cell["step_s"])
        rows.append(
            [
                length,
                f"ran, {cell['layers']} of {cell['of_layers']} layers",
                f"{seconds(step_s)} (planned {seconds(cell['planned_s'])})",
                f"{seconds(cell['planned_whole_s'] * step_s / cell['planned_s'])}",
                gib(cell["peak_bytes"]),
                gib(cell["planned_bytes"]),
                gib(cell["planned_host_bytes"]),
                gib(cell["planned_disk_bytes"]),
            ]
        )
    header = [
        "rows", "", "these layers", "whole step, extrapolated", "device GiB", "planned", "host GiB, planned",
        "disk GiB, planned",
    ]  # fmt: skip
    return markdown(header, rows)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=parse_count, nargs="*", default=[])
    parser.add_argument("--host-gib", type=float, default=0.0, help="of host memory; default 80 % of what there is")
    parser.add_argument("--disk-gib", type=float, default=48.0)


if __name__ == "__main__":
    sys.exit(main(__doc__.split("\n", maxsplit=1)[0], sys.argv[1:], "capacity", run, table, more_options))
