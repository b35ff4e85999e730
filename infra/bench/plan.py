"""What the planner predicts for one H200, beside the policies others ship and beside a closed-form estimate.

LoRA of rank 16 on the 8B Llama shape, one GPU with 141 GB, 128 GiB of host memory and 64 GiB of disk. Nothing is run:
rates are those of `infra/hardware/h200.json`, each with its source, so this compares plans, not machines. For each
length and policy: seconds of a step, bytes on each tier, by how much it does not fit; then the longest context of
each policy with the device alone, with host memory, and with disk. Three kinds of layers: unmodified ones (`today`),
the same with the row tiles a job can ask for (`today, tiles`), and fused kernels that do not exist yet (`tiled`).

A plan is only as good as the search behind it, so it must not lose to any fixed policy that fits, must move nothing
where everything can be kept, and must reach as far as any. It is also set beside an estimate that a person makes on
paper (`closed_form`), term by term: where both differ, one of them is wrong, and the table says which. Last, the time
of `farspan plan` itself, process start to exit, on 80 layers of a 70B model.

    farspan bench plan           results/plan.json, results/plan.md; about two minutes
    farspan bench plan --toy     one kind of layers, two lengths, three tiers: seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

from _closed_form import W_KIB, closed_form, longest_apart, longest_pooled

from farspan.errors import DoesNotFit
from farspan.memory.build import problem_for
from farspan.memory.capacity import smallest_device
from farspan.memory.evaluate import evaluate
from farspan.memory.hardware import Hardware, load_hardware
from farspan.memory.plan import POLICIES, TIERS, Placement
from farspan.memory.policies import fixed_policy
from farspan.memory.problem import PlanProblem
from farspan.memory.shape import AdapterShape, ModelShape, Training
from farspan.memory.solve import longest, solve

RESULTS = Path(__file__).parent / "results"
H200 = load_hardware("h200")
NO_TRAFFIC = H200.model_copy(update={"memory_bytes_per_s": 1e30})
"""The same machine if elementwise work took no time, as the closed form has it."""
LLAMA_8B = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
LENGTHS = {"32K": 2**15, "128K": 2**17, "512K": 2**19, "1M": 2**20, "2M": 2**21}
LAYERS: dict[str, dict[str, Any]] = {
    "today": {"working_set": "today", "mlp_tile": None},
    "today, tiles": {"working_set": "today", "mlp_tile": 2048},
    "tiled": {"working_set": "tiled", "mlp_tile": None},
}
REACH: dict[str, dict[str, int]] = {
    "device": {"host_bytes": 0, "disk_bytes": 0},
    "device + host": {"disk_bytes": 0},
    "three tiers": {},
}
STEP_TOKENS, MOST_TOKENS = 1024, 1 << 23
SAME = 1e-4
PLAN_JOB = """name: plan
model: {type: random, family: llama, hidden: 8192, layers: 80, heads: 64, kv_heads: 8, ffn: 28672, vocab: 125k}
data: {type: text, source: stdlib, context: 256k}
adapter: {type: lora, rank: 16}
parallel: {sp: 8, dp: 1}
memory: {hardware: h200, disk: 60GB}
"""


def problem_at(
    shape: ModelShape, layers: str, tokens: int, *, tiers: str = "three tiers", hardware: Hardware = H200
) -> PlanProblem:
    how = LAYERS[layers]
    training = Training(adapter=AdapterShape(rank=16), mlp_tile=how["mlp_tile"])
    budgets = hardware.budgets().model_copy(update=REACH[tiers])
    return problem_for(shape, training, hardware, tokens, working_set=how["working_set"], budgets=budgets)


def cell(problem: PlanProblem, policy: str) -> tuple[dict[str, Any], Placement]:
    """A policy at one length: what it costs, and by how much it does not fit."""
    found: dict[str, Any] = {}
    if policy == "solve":
        try:
            solution = solve(problem)
            placement, prediction = solution.placement, solution.prediction
            found = {"kind": solution.kind, "gap": round(solution.gap, 6), "bottleneck": solution.bottleneck}
        except DoesNotFit:
            placement = smallest_device(problem)
            prediction = evaluate(problem, placement)
            found = {"kind": "the least device memory there is"}
    else:
        placement = fixed_policy(problem, policy)
        prediction = evaluate(problem, placement)
    found |= {
        "fits": prediction.fits,
        "over_bytes": prediction.over_bytes,
        "step_s": round(prediction.step_s, 4),
        "device_bytes": prediction.device_peak_bytes,
        "host_bytes": prediction.host_bytes,
        "disk_bytes": prediction.disk_bytes,
        "moved_bytes": sum(prediction.moved_bytes.values()),
        "parts": {n: round(s, 4) for n, s in prediction.parts.model_dump(exclude={"stall_s"}).items()},
        "stalled_s": round(prediction.parts.stalled_s, 4),
    }
    return found, placement


def longest_of(shape: ModelShape, layers: str, tiers: str, policy: str) -> int:
    def at(tokens: int) -> PlanProblem:
        return problem_at(shape, layers, tokens, tiers=tiers)

    if policy == "solve":
        return longest(at, step_tokens=STEP_TOKENS, most_tokens=MOST_TOKENS)

    def fails(steps: int) -> bool:
        problem = at(steps * STEP_TOKENS)
        return not evaluate(problem, fixed_policy(problem, policy)).fits

    return STEP_TOKENS * bisect_left(range(1, MOST_TOKENS // STEP_TOKENS + 1), True, key=fails)


def beside_closed_form(shape: ModelShape, tokens: int, placement: Placement) -> dict[str, Any]:
    """Both estimates by term; the plan's are of the same placement if elementwise work took no time."""
    whole = evaluate(problem_at(shape, "tiled", tokens), placement)
    bare = evaluate(problem_at(shape, "tiled", tokens, hardware=NO_TRAFFIC), placement)
    parts = bare.parts
    terms = {
        "linear layers and loss": parts.forward_s + parts.backward_s + parts.head_s + parts.optimizer_s,
        "attention forward": parts.attention_forward_s,
        "attention backward": parts.attention_backward_s,
        "linear layers again": parts.rebuild_linear_s + parts.inner_forward_s,
        "attention again": parts.rebuild_attention_s,
        "elementwise work, waiting": whole.step_s - bare.step_s + parts.stalled_s,
    }
    return {"closed_form": closed_form(shape, H200, tokens), "plan": {"step_s": whole.step_s, "terms": terms}}


def compare(lengths: dict[str, int], kinds: list[str], reaches: list[str]) -> dict[str, Any]:
    shape = LLAMA_8B
    cells: dict[str, dict[str, Any]] = {}
    terms: dict[str, Any] = {}
    for layers in kinds:
        for name, tokens in lengths.items():
            problem = problem_at(shape, layers, tokens)
            for policy in POLICIES:
                found, placement = cell(problem, policy)
                cells.setdefault(layers, {}).setdefault(name, {})[policy] = found
                if policy == "solve" and layers == "tiled" and found["fits"]:
                    terms[name] = beside_closed_form(shape, tokens, placement)
            print(f"{layers}, {name}: {cells[layers][name]['solve']['step_s']:.2f} s", flush=True)
    reach = {
        layers: {tiers: {policy: longest_of(shape, layers, tiers, policy) for policy in POLICIES} for tiers in reaches}
        for layers in kinds
    }
    at_one = problem_at(shape, "tiled", 2**20)
    kind, states = at_one.kinds[0], sum(s.bytes for s in at_one.states if s.tier == "device")
    working_kib = (kind.rebuild_peak_bytes + kind.x_bytes + kind.o_bytes) / 2**30
    limits = {
        "closed form": longest_pooled(shape, H200),
        "device apart": longest_apart(shape, H200, W_KIB, 2 * shape.parameters + H200.context_bytes),
        "working set as counted": longest_apart(shape, H200, working_kib, states),
        "working_kib": working_kib,
    }
    return {"lengths": lengths, "cells": cells, "longest": reach, "terms": terms, "limits": limits}


def command_seconds(repeats: int) -> dict[str, dict[str, list[float]]]:
    """`farspan plan` and `--longest`: seconds from process start to exit, and those a core was at work."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.yaml"
        job.write_text(PLAN_JOB)
        seconds: dict[str, dict[str, list[float]]] = {}
        for name, more in (("plan", []), ("plan --longest", ["--longest"])):
            found = seconds[name] = {"wall_s": [], "cpu_s": []}
            for _ in range(repeats):
                started_s, worked_s = time.perf_counter(), children_cpu_s()
                command = [sys.executable, "-m", "farspan.jobs", "plan", str(job), "--json", *more]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                found["wall_s"].append(round(time.perf_counter() - started_s, 3))
                found["cpu_s"].append(round(children_cpu_s() - worked_s, 3))
    return seconds


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def verdict(done: dict[str, Any]) -> tuple[list[str], bool]:
    """What can be said in a line each, and whether every promise is kept."""
    lines, kept = [], True
    for layers, by_length in done["cells"].items():
        shortest, first = next(iter(by_length.items()))
        best, keep = first["solve"], first["keep"]
        moved = best["moved_bytes"]
        why = "" if keep["fits"] else f"; keep does not fit by {gb(keep['over_bytes']['device'])}"
        lines.append(f"{shortest}, {layers}: {gb(moved / 2)} leave the device{why}")
        kept &= moved == 0 or not keep["fits"]
        for name, cells in by_length.items():
            fixed = [c["step_s"] for policy, c in cells.items() if policy != "solve" and c["fits"]]
            if fixed and (not cells["solve"]["fits"] or cells["solve"]["step_s"] > min(fixed) * (1 + SAME)):
                lines.append(f"{name}, {layers}: a fixed policy is faster than solve")
                kept = False
        most = done["longest"][layers]["three tiers"]
        peer = most["offload-inputs"]
        lines.append(
            f"longest, {layers}: {most['solve']:,} tokens, offload-inputs {peer:,}: {most['solve'] / peer:.2f}x"
        )
        kept &= all(most_by["solve"] >= max(most_by.values()) for most_by in done["longest"][layers].values())
    for name, seconds in done["command"].items():
        wall_s, cpu_s = (statistics.median(seconds[what]) for what in ("wall_s", "cpu_s"))
        lines.append(f"farspan {name}, 80 layers: {wall_s:.2f} s, of which {cpu_s:.2f} s on a core")
    return lines, kept


def gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def words(found: dict[str, Any]) -> str:
    if found["fits"]:
        sizes = "/".join(f"{found[f'{tier}_bytes'] / 1e9:.0f}" for tier in TIERS)
        return f"{found['step_s']:.4g} s ({sizes})"
    return "no: " + ", ".join(f"{tier} +{size / 1e9:.0f} GB" for tier, size in found["over_bytes"].items())


def tables(done: dict[str, Any]) -> str:
    lines = ["# Predicted plans for one H200", "", *paragraph(
        "`farspan bench plan`. LoRA of rank 16 on the 8B Llama shape; 141 GB of device memory (135 usable), 128 GiB of "
        "host memory (115 GB usable), 64 GiB of disk (60 GB usable); rates assumed (`infra/hardware/h200.json`), "
        "nothing was run. K and M are 2^10 and 2^20. Seconds of a step, in brackets GB on device/host/disk, model "
        "states included; or by how much a policy does not fit (of solve: its plan with the least device memory)."
    )]  # fmt: skip
    for layers, by_length in done["cells"].items():
        lines += ["", f"## Layers: {layers}", "", f"| tokens | {' | '.join(POLICIES)} |", "|---" * 7 + "|"]
        lines += [f"| {n} | {' | '.join(words(cells[p]) for p in POLICIES)} |" for n, cells in by_length.items()]
        lines += ["", f"| longest context with | {' | '.join(POLICIES)} |", "|---" * 7 + "|"]
        for tiers, most in done["longest"][layers].items():
            lines.append(f"| {tiers} | {' | '.join(f'{most[p]:,}' for p in POLICIES)} |")
    lines += ["", *closed_form_text(done), "", "## Verdict", ""]
    lines += [f"- {line}" for line in verdict(done)[0]]
    if done["command"]:
        lines += ["", f"Times of the command on: {', '.join(f'{k} {v}' for k, v in done['machine'].items())}."]
    return "\n".join(lines) + "\n"


def paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 140, break_long_words=False, break_on_hyphens=False)


def closed_form_text(done: dict[str, Any]) -> list[str]:
    limits, terms = done["limits"], done["terms"]
    lines = [
        "## Beside a closed-form estimate (layers: tiled)",
        "",
        "    x L/k + O (L beta + k (1 - beta)) + W = (device - weights - context + host + disk) / tokens",
        "    seconds = linear and attention, forward and backward",
        "              + passes * linear forward of the body + (1 - beta)^2 * attention forward",
        "",
        *paragraph(
            "x of every k-th layer and O of the last share beta of all rows are stored, W = 40 KiB per token, all "
            "bytes are one pool; 1 pass for k = 1, else (k + 1) / 2 and one more while beta < 1; the least over k. "
            "Seconds, closed form / plan:"
        ),
        "",
        f"| term | {' | '.join(terms)} |",
        "|---" * (1 + len(terms)) + "|",
    ]
    for term in [*next(iter(terms.values()))["plan"]["terms"], "step"]:
        row = [
            f"{seconds_of(pair['closed_form'], term):.2f} / {seconds_of(pair['plan'], term):.2f}"
            for pair in terms.values()
        ]
        lines.append(f"| {term} | {' | '.join(row)} |")
    chosen = [f"{n}: k {pair['closed_form']['k']}, beta {pair['closed_form']['beta']}" for n, pair in terms.items()]
    return [
        *lines,
        "",
        f"The closed form chooses {'; '.join(chosen)}.",
        "",
        "Which is right, and why:",
        "",
        *paragraph(
            "- Seconds: the plan. It runs linear layers again for less: outputs of linear layers are stored too where "
            "bytes are left, the inner forward of a segment ends before its last layer and serves it (the closed form "
            "starts again from the head), and segments are shorter at the top, where memory is full. It counts what "
            "the closed form leaves out, norms, SwiGLU, rotary embedding and the loss through memory bandwidth; where "
            "little can be saved that makes it the higher figure."
        ),
        *paragraph(
            f"- Longest context: the plan. The closed form says {limits['closed form']:,}, but its pool lets bytes "
            "that are needed on the device in one moment (W, O of the segment, x of its head) lie on host or disk. "
            f"With these kept on the device, and nothing else changed, it says {limits['device apart']:,}; with the "
            f"{limits['working_kib']:.1f} KiB that such kernels need when counted tensor by tensor, and the adapters "
            f"and their optimizer among the states, {limits['working set as counted']:,}. The planner, which also "
            f"holds what is on its way and a tile of logits, says {done['longest']['tiled']['three tiers']['solve']:,}."
        ),
    ]


def seconds_of(estimate: dict[str, Any], term: str) -> float:
    return float(estimate["step_s"] if term == "step" else estimate["terms"][term])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench plan", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="two lengths, one kind of layers, no timing")
    parser.add_argument("--repeats", type=int, default=5, help="times the command is run")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.json")
    options = parser.parse_args(arguments)
    lengths = {name: LENGTHS[name] for name in ("32K", "128K")} if options.toy else LENGTHS
    kinds, reaches = (["tiled"], ["three tiers"]) if options.toy else ([*LAYERS], [*REACH])
    done = {"machine": machine(), **compare(lengths, kinds, reaches)}
    done["command"] = command_seconds(options.repeats) if options.repeats and not options.toy else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(tables(done))
    lines, kept = verdict(done)
    print("\n".join(lines))
    return 0 if kept else 1


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
