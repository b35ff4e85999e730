"""Every method of fine-tuning in one table: what it trains, what it stores, how long a step takes, how well it learns.

A small language model, trained here on the standard library's source, is adapted to another domain, the English text
of Python's reference. Each method gets the same steps; its learning rate is the best of four on one seed, of which
three are tried (the outer one next to the better of the inner two), and two more seeds are run at that rate. Bytes are
counted: weights and optimizer by tensor, activations by the allocator's events in a forward and a step at 512 rows, in
bf16. Seconds are medians of interleaved steps of all methods in one process and thread.

    farspan bench adapters                   results/adapters.json (resumable cell by cell), adapters.md
    farspan bench adapters --only LoRA       methods whose name contains it
    farspan bench adapters --workers 2       two methods at a time
    farspan bench adapters --toy             seconds, for the test
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _cells_file import Cells
from _method_run import CPU, LAYERS, SEQUENCES, Run, source_model
from _methods import METHODS, Method
from _pretrained import ROWS
from transformers.utils import logging as transformers_logging

from farspan.jobs.matmul_speed import matmul_flop_per_s, slow_in_bf16
from farspan.memory.allocations import footprint

RESULTS = Path(__file__).parent / "results"
STEPS, TOY_STEPS = 80, 2
SEEDS = (0, 1, 2)


def machine() -> dict[str, Any]:
    """What this CPU multiplies in a second, and the dtype that weights and activations are trained in."""
    rates = matmul_flop_per_s(512)
    gflops = {f"{name}_gflop_per_s": rate / 1e9 for name, rate in rates.items()}
    return {"trained_in": "float32" if slow_in_bf16(rates) else "bfloat16", **gflops}


def trained_cell(method: Method, seed: int, lr: float, steps: int, toy: bool, dtype: torch.dtype) -> dict[str, Any]:
    run = Run(method, seed, lr, steps, toy, dtype)
    start = run.held_out(toy) if toy or (seed == 0 and lr == method.rates[1]) else None
    began_s = time.perf_counter()
    losses = [run.step(step) for step in range(1, steps + 1)]
    took_s = time.perf_counter() - began_s
    return {"start": start, "held_out": run.held_out(toy), "last": statistics.mean(losses[-10:]), "seconds": took_s}


def bytes_cell(method: Method, toy: bool) -> dict[str, Any]:
    """Always of a model in bf16."""
    run = Run(method, 0, 1e-3, 2, toy, torch.bfloat16)
    ids = run.batch()
    run.step(1, ids)
    footprint(lambda: None, CPU)
    kept = footprint(lambda: run.loss(ids), CPU)
    kept_bytes = kept.kept_bytes
    del kept
    return {
        "trained": run.trained,
        "weights": run.weight_bytes,
        "states": run.state_bytes(),
        "kept_per_row": kept_bytes / run.rows,
        "peak_per_row": footprint(lambda: run.step(1, ids), CPU).peak_bytes / run.rows,
    }


def times_cell(names: list[str], repeats: int, toy: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Interleaved, so that a busy moment of the machine meets all of them."""
    runs = {name: Run(METHODS[name], 0, 1e-4, 2, toy, dtype) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            ids = run.batch()
            began_s = time.perf_counter()
            run.step(1, ids)
            if repeat:
                taken[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(times) for name, times in taken.items()}


def best_rate(cells: dict[str, Any], name: str) -> float | None:
    """Of those that are there and finite; None: none is."""
    found = {lr: cells.get(f"{name}/{lr:g}/0", {}).get("held_out", math.inf) for lr in METHODS[name].rates}
    best = min(found, key=lambda lr: found[lr])
    return best if math.isfinite(found[best]) else None


def started(cells: dict[str, Any], name: str) -> float:
    """Held-out loss before training: measured once for a method."""
    found = [cell.get("start") for key, cell in cells.items() if key.rsplit("/", 2)[0] == name]
    return next(float(loss) for loss in found if loss is not None)


def report(cells: dict[str, Any], steps: int) -> str:
    names = [name for name in METHODS if best_rate(cells, name) is not None and f"bytes/{name}" in cells]
    start = started(cells, names[0])
    times = cells.get("times", {})
    base_s = times.get("LoRA")
    lines = [
        "# Methods of fine-tuning",
        "",
        f"`farspan bench adapters`: a Llama of {LAYERS} layers, 3 million parameters, trained on Python source, "
        f"adapted to English text in {steps} steps of {SEQUENCES} x {ROWS} bytes on one CPU thread, weights and "
        f"activations in {cells['machine']['trained_in']}. Loss in nats a byte on held-out text, {start:.3f} at the "
        "start; mean and range of three seeds at the best learning rate of four, three of them tried. Bytes are "
        "counted in bf16 with fp32 masters; those of activations are of a row.",
        "",
        "| method | trained | weights MiB | optimizer MiB | kept KiB | peak KiB | step | of LoRA's | lr | start "
        "| loss | range |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        size, lr = cells[f"bytes/{name}"], best_rate(cells, name)
        seeds = [cells[key] for seed in SEEDS if (key := f"{name}/{lr:g}/{seed}") in cells]
        losses = [cell["held_out"] for cell in seeds]
        edge = "*" if lr in (METHODS[name].rates[0], METHODS[name].rates[-1]) else ""
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "one seed"
        took = f"{times[name] * 1e3:.0f} ms | {times[name] / base_s:.2f}" if name in times and base_s else "– | –"
        lines.append(
            f"| {name} | {size['trained']:,} | {size['weights'] / 2**20:.2f} | {size['states'] / 2**20:.2f} "
            f"| {size['kept_per_row'] / 1024:.1f} | {size['peak_per_row'] / 1024:.1f} | {took} | {lr:g}{edge} "
            f"| {started(cells, name):.3f} | {statistics.mean(losses):.4f} | {spread} |"
        )
    lines += ["", "`*`: the best rate is the lowest or highest that was tried."]
    return "\n".join(lines) + "\n"


def measure_method(name: str, path: Path, toy: bool) -> None:
    """Its bytes, its rates on one seed, two more seeds at the best of them."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    cells, method, steps = Cells(path), METHODS[name], TOY_STEPS if toy else STEPS
    dtype = getattr(torch, cells.read()["machine"]["trained_in"])
    cells.add(f"bytes/{name}", lambda: bytes_cell(method, toy))
    rates = method.rates[:1] if toy else method.rates[1:3]
    for _ in range(1 if toy else 2):
        for lr in rates:
            cells.add(f"{name}/{lr:g}/0", lambda lr=lr: trained_cell(method, 0, lr, steps, toy, dtype))  # type: ignore[misc]
        # of the outer ones that beside the better of the two in the middle
        rates = (method.rates[0] if best_rate(cells.read(), name) == method.rates[1] else method.rates[3],)
    best = best_rate(cells.read(), name)
    for seed in () if toy or best is None else SEEDS[1:]:
        cells.add(f"{name}/{best:g}/{seed}", lambda seed=seed: trained_cell(method, seed, best, steps, toy, dtype))  # type: ignore[misc]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench adapters", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model, two steps, two rates")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--workers", type=int, default=1, help="methods measured at a time, one thread each")
    parser.add_argument("--out", type=Path, help="default: results/adapters.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) / "adapters.json" if options.toy else RESULTS / "adapters.json"
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    source_model(options.toy)
    names, cells = [name for name in METHODS if options.only in name], Cells(options.out)
    cells.add("machine", machine)
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(measure_method, name, options.out, options.toy) for name in names]:
            done.result()
    if names == list(METHODS):
        dtype = getattr(torch, cells.read()["machine"]["trained_in"])
        cells.add("times", lambda: times_cell(names, 1 if options.toy else 9, options.toy, dtype))
    text = report(cells.read(), TOY_STEPS if options.toy else STEPS)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
