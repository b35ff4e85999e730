"""What a policy learns before RL: an SFT run on demonstrations of its task, done once and kept.

The run and its data lie in the cache by what they are made of, so jobs that differ in their rewards alone begin with
the same policy and wait for it once.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import farspan
from farspan.errors import JobError
from farspan.jobs.config import RLJob, SFTJob, WarmStart
from farspan.trainer.config import ChatData, Checkpoint, Evaluate, Model, RandomModel
from farspan.trainer.rl.tasks.base import Task
from farspan.trainer.rl.tasks.dropping import drop
from farspan.trainer.run_folder import RunFolder, default_cache_root, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES, RUN = "demonstrations.jsonl", "run"


def policy_of(job: RLJob, *, address: str | None, console: Console, say: Callable[[str, str], None]) -> Model:
    """The model that RL begins with; trains it where that was not done before.

    Raises:
        JobError: a model made on the spot, and no warm start.
        FarspanError: from the run.
    """
    from farspan.jobs.run import run

    if job.warm_start is None:
        if isinstance(job.model, RandomModel):
            raise JobError(
                "random weights have nothing to say",
                at="warm_start",
                why="a model made on the spot never answers right, so no response earns a reward to learn from",
                try_="set warm_start=WarmStart(), or give a trained model",
            )
        return job.model
    folder = default_cache_root() / "warm_start" / _digest(job)
    found = _exported(RunFolder(folder / RUN))
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        say("warm-up", f"SFT on {job.warm_start.examples} demonstrations, {job.warm_start.optim.steps} steps")
        _write_examples(job.task, job.warm_start, folder / EXAMPLES)
        run(_sft_job(job, folder), address=address, clean=(folder / RUN).exists(), console=console)
        found = _exported(RunFolder(folder / RUN))
        assert found is not None, f"{folder} has no export"
    say("policy", f"begins at {found}")
    return Model(str(found))


def _sft_job(job: RLJob, folder: Path) -> SFTJob:
    warm = job.warm_start
    assert warm is not None
    return SFTJob(
        name=RUN,
        model=job.model,
        data=ChatData(str(folder / EXAMPLES), context=warm.context),
        precision=job.precision,
        parallel=warm.parallel,
        memory=job.memory,
        optim=warm.optim,
        checkpoint=Checkpoint(keep=1),
        evaluate=Evaluate(share=0.01),
        cluster=job.cluster,
        output_dir=str(folder),
    )


def _digest(job: RLJob) -> str:
    """Of everything that decides the weights."""
    import torch
    import transformers

    warm = job.warm_start
    assert warm is not None
    made_of: list[Any] = [
        job.model.model_dump(mode="json"),
        job.task.model_dump(mode="json"),
        warm.model_dump(mode="json"),
        job.precision,
        farspan.__version__,
        torch.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _write_examples(task: Task, warm: WarmStart, path: Path) -> None:
    lines, draw = [], random.Random(f"drop {task.seed}")
    for number in range(warm.examples):
        problem, shown = task.demonstration(number)
        shown = drop(shown, warm.drop, draw)
        messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": shown.text}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    write_atomically(path, "".join(lines))


def _exported(folder: RunFolder) -> Path | None:
    """The export of a run that was done to its end."""
    complete = folder.complete_checkpoints()
    if not complete or not folder.status.exists():
        return None
    done = json.loads(folder.status.read_text(encoding="utf-8")).get("status") == "done"
    return complete[-1] / "export" if done and (complete[-1] / "export").is_dir() else None
