"""Rewards that know about length, side by side: held-out accuracy against tokens of a response.

The small reasoner of `jobs/reason_rl.py`: one warm start, then the same steps of RL under each reward, three seeds, and
4,096 held-out prompts before and after. In one process each, without Ray; every run is the loop of `farspan run`.

    farspan bench rl-rewards                  results/rl-rewards.json (resumable cell by cell), .md, .png
    farspan bench rl-rewards --workers 2      two runs at a time
    farspan bench rl-rewards --only laser     rewards whose name contains it
    farspan bench rl-rewards --toy            a minute, for the test
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _cells_file import Cells
from rich.console import Console

from farspan.jobs.config import RLJob
from farspan.jobs.facts import Machine, model_facts
from farspan.jobs.origins import origins_in_python
from farspan.jobs.policy_tokens import PolicyTokens
from farspan.jobs.reason_rl import job as reasoner
from farspan.jobs.resolve import resolve
from farspan.jobs.warm_start import policy_of
from farspan.trainer.config import Checkpoint, Model, Rollouts, Track
from farspan.trainer.rl.config import RLRunSpec, RLSpec
from farspan.trainer.rl.local import LocalTrainer, LocalWorkers
from farspan.trainer.rl.loop import RLLoop
from farspan.trainer.rl.policy import PolicyRank
from farspan.trainer.rl.samples import ScoredSample
from farspan.trainer.rl.shapers import (
    Cosine,
    GRPOLambda,
    Kimi,
    L1Max,
    Laser,
    LaserD,
    LaserDE,
    Plain,
    Shaper,
    SoftOverlong,
)
from farspan.trainer.rl.verify import VerifierPool
from farspan.trainer.world import World

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
TARGET = 20
"""Tokens: where targets begin, just above a response in short."""
SHAPERS: dict[str, Shaper] = {
    "plain": Plain(),
    "LASER": Laser(target=TARGET),
    "LASER-D": LaserD(lower=TARGET, step=4),
    "LASER-DE": LaserDE(lower=TARGET, step=4),
    "GRPO-lambda": GRPOLambda(),
    "its penalty in every group": GRPOLambda(top_share=1.0),
    "cosine": Cosine(margin=0),
    "Kimi": Kimi(),
    "L1-Max": L1Max(alpha=0.01, otherwise=TARGET),
    "DAPO overlong": SoftOverlong(buffer=48),
}


def small(job: RLJob) -> RLJob:
    """Of toy size."""
    assert job.warm_start is not None
    warm = job.warm_start.model_copy(
        update={"examples": 200, "optim": job.warm_start.optim.model_copy(update={"steps": 5})}
    )
    return job.model_copy(
        update={
            "warm_start": warm,
            "optim": job.optim.model_copy(update={"steps": 2, "warmup_steps": 1}),
            "rollout": job.rollout.model_copy(update={"prompts_per_step": 2, "group_size": 4, "cap": 64}),
            "evaluate": job.evaluate.model_copy(update={"prompts": 16}),
            "reward": job.reward.model_copy(update={"monitor_prompts": 2}),
        }
    )


def loop_of(job: RLJob, model: Model, folder: Path) -> tuple[RLLoop, PolicyRank, VerifierPool, list[dict[str, Any]]]:
    """A run of the job in this process."""
    trained = job.trainer(model)
    here = Machine(nodes=({"CPU": 1.0},), cpu_memory_bytes=1 << 34)
    train = resolve(trained, model_facts(model), here, origins_in_python(trained)).train.model_copy(
        update={
            "run_dir": str(folder),
            "data": Rollouts(context=job.context),
            "checkpoint": Checkpoint(export=False),
            "track": Track(tensorboard=False),
        }
    )
    tokens = PolicyTokens(model)
    temperature = job.rollout.temperature
    rank = PolicyRank(RLSpec(train=train, loss=job.loss, temperature=temperature, vocab=tokens.vocab), World())
    judges, records = VerifierPool(job.task, processes=1), []
    loop = RLLoop(
        RLRunSpec(
            task=job.task,
            steps=job.optim.steps,
            seed=job.optim.seed,
            loss=job.loss,
            rollout=job.rollout,
            reward=job.reward,
            evaluate=job.evaluate,
            checkpoint_every=None,
        ),
        trainer=LocalTrainer(rank),
        workers=LocalWorkers(model.id, eos_ids=tokens.eos_ids),
        judges=judges,
        encode=tokens.encode,
        decode=tokens.decode,
        record=records.append,
    )
    return loop, rank, judges, records


def by_length(samples: Sequence[ScoredSample]) -> dict[str, list[int]]:
    """Of each length, how many responses and how many right ones."""
    found: dict[str, list[int]] = {}
    for sample in samples:
        counts = found.setdefault(str(sample.tokens), [0, 0])
        counts[0] += 1
        counts[1] += bool(sample.correct)
    return found


def run_cell(name: str | None, seed: int, model: Model, toy: bool) -> dict[str, Any]:
    """A whole run; None: the policy before RL."""
    job = small(reasoner) if toy else reasoner
    with tempfile.TemporaryDirectory() as folder:
        job = job.model_copy(
            update={
                "optim": job.optim.model_copy(update={"seed": seed}),
                "reward": job.reward.model_copy(update={"shaper": SHAPERS[name or "plain"]}),
            }
        )
        loop, rank, judges, records = loop_of(job, model, Path(folder))
        began_s = time.perf_counter()
        try:
            if name is None:
                loop.workers.publish(loop.trainer.weights(), 0)
            else:
                loop.run()
            seconds = time.perf_counter() - began_s
            lengths = by_length(loop.held_out())
        finally:
            judges.close()
            rank.close()
    curve = [[r["step"], r["accuracy"], r["response_tokens_mean"]] for r in records]
    return {"by_length": lengths, "curve": curve, "seconds": seconds}


def totals(cell: dict[str, Any], cut: float = math.inf) -> tuple[float, float, int]:
    """Accuracy, tokens and number of responses, those longer than `cut` being cut there and so wrong."""
    counts = [(int(length), *found) for length, found in cell["by_length"].items()]
    number = sum(count for _, count, _ in counts)
    right = sum(good for length, _, good in counts if length <= cut)
    return right / number, sum(min(length, cut) * count for length, count, _ in counts) / number, number


def interval(accuracy: float, number: int) -> float:
    """Half of Wilson's 95 % interval."""
    z = 1.96
    return z / (1 + z**2 / number) * math.sqrt(accuracy * (1 - accuracy) / number + z**2 / (4 * number**2))


def report(cells: dict[str, Any], job: RLJob) -> str:
    start_accuracy, start_tokens, prompts = totals(cells["start"])
    found = {name: [cells[key] for seed in SEEDS if (key := f"{name}/{seed}") in cells] for name in SHAPERS}
    lines = [
        "# Rewards that know about length",
        "",
        f"`farspan bench rl-rewards`: the reasoner of `jobs/reason_rl.py`, {job.optim.steps} steps of "
        f"{job.rollout.prompts_per_step} prompts x {job.rollout.group_size} samples under each reward, {prompts} "
        f"held-out prompts. Before RL {start_accuracy:.1%} right in {start_tokens:.1f} tokens. Accuracy with half of "
        "the 95 % interval over all seeds' responses, and its range over seeds.",
        "",
        "| reward | right | range | tokens | of plain's | least on the way | seeds | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain_tokens = statistics.fmean(totals(cell)[1] for cell in found["plain"]) if found["plain"] else None
    for name, runs in found.items():
        if not runs:
            continue
        accuracies, tokens = ([totals(cell)[at] for cell in runs] for at in (0, 1))
        accuracy, mean_tokens = statistics.fmean(accuracies), statistics.fmean(tokens)
        share = f"{mean_tokens / plain_tokens:.2f}" if plain_tokens else "–"
        least = min(value for cell in runs for _, value, _ in cell["curve"] if value is not None)
        lines.append(
            f"| {name} | {accuracy:.1%} ± {interval(accuracy, prompts * len(runs)):.1%} "
            f"| {min(accuracies):.1%} to {max(accuracies):.1%} | {mean_tokens:.1f} | {share} | {least:.0%} "
            f"| {len(runs)} | {statistics.fmean(cell['seconds'] for cell in runs):.0f} |"
        )
    if found["LASER-D"]:
        mean_tokens = statistics.fmean(totals(cell)[1] for cell in found["LASER-D"])
        cut, _, _ = totals(cells["start"], cut=mean_tokens)
        lines += [
            "",
            f"Responses of the policy before RL that are cut at LASER-D's mean, {mean_tokens:.1f} tokens: {cut:.1%} "
            f"right, {start_accuracy - cut:.1%} fewer.",
        ]
    return "\n".join(lines) + "\n"


def draw(cells: dict[str, Any], path: Path) -> None:
    """The front: a point for each reward and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for index, name in enumerate(SHAPERS):
        runs = [totals(cells[key]) for seed in SEEDS if (key := f"{name}/{seed}") in cells]
        if runs:
            axes.scatter([t for _, t, _ in runs], [100 * a for a, _, _ in runs], label=name, s=46, alpha=0.85,
                         color=pyplot.cm.tab10(index))  # fmt: skip
    accuracy, tokens, _ = totals(cells["start"])
    axes.scatter([tokens], [100 * accuracy], label="before RL", marker="x", color="black", s=60)
    axes.set_xlabel("tokens of a response, mean")
    axes.set_ylabel("held-out prompts answered right, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(name: str | None, seed: int, model: str, path: Path, toy: bool) -> None:
    torch.set_num_threads(1)
    key = "start" if name is None else f"{name}/{seed}"
    Cells(path).add(key, lambda: run_cell(name, seed, Model(model), toy))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench rl-rewards", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="few steps of a policy that has learned nothing")
    parser.add_argument("--only", default="", help="rewards whose name contains this")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="at most so many")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="default: results/rl-rewards.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        folder = Path(tempfile.mkdtemp()) if options.toy else RESULTS
        options.out = folder / "rl-rewards.json"
    job = small(reasoner) if options.toy else reasoner
    console = Console()
    policy = policy_of(job, address=None, console=console, say=lambda label, text: console.print(f"{label:<8} {text}"))
    names = [name for name in SHAPERS if options.only in name]
    runs: list[tuple[str | None, int]] = [(None, 0)]
    runs += [(name, seed) for seed in SEEDS[: 1 if options.toy else options.seeds] for name in names]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(measure, *run, policy.id, options.out, options.toy) for run in runs]:
            done.result()
    cells = Cells(options.out).read()
    text = report(cells, job)
    options.out.with_suffix(".md").write_text(text)
    draw(cells, options.out.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
