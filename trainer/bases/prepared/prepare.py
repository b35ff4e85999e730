"""Prepare a run's base: measure, choose, decompose and write its matrices, before anything trains.

Nothing here knows of Ray: whoever calls hands in how to run a function over items, one by one or on a cluster. The run
folder keeps the result, which its checkpoints belong to; a run that is started again finds it, or goes on where an
earlier attempt stopped. Memory is that of one matrix and its copies in fp32, but for squared gradients (`fisher`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from farspan.errors import CheckpointError, JobError
from farspan.memory.bit_budget import Choice, allocate
from farspan.trainer.adapters.config import inner
from farspan.trainer.bases.config import LQ
from farspan.trainer.bases.prepared import tasks
from farspan.trainer.bases.prepared.fitting import Fitting, fit
from farspan.trainer.bases.prepared.matrices import Matrix, Source
from farspan.trainer.bases.prepared.store import INDEX, PreparedBase, write_index
from farspan.trainer.config import LoRA, Model, RandomModel, TrainSpec
from farspan.trainer.data.store import TokenStore
from farspan.trainer.run_folder import RunFolder, default_cache_root, write_json

WORK = "made_for.json"


class MapTasks(Protocol):
    """Runs a picklable function over items and returns the results in order."""

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], *, on_device: bool = False) -> list[Any]:
        """`on_device`: a task needs what a rank has, its GPU if ranks have any."""


def map_here(function: Callable[[Any], Any], items: Sequence[Any], *, on_device: bool = False) -> list[Any]:
    """One by one in this process."""
    return [function(item) for item in items]


def prepare(
    spec: TrainSpec,
    *,
    map_tasks: MapTasks = map_here,
    cache_root: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Make the base that `spec` asks for, or find that it was made before.

    Args:
        spec: a job whose tokens are there (`wants_prepared_base(spec)`).
        cache_root: where errors are kept, on storage that the tasks share; None: the user's cache.
        progress: called with one line of text now and then.

    Returns:
        the folder, for `PreparedBase.open`.

    Raises:
        JobError: the model's matrices cannot be read, or do not fit into the bits.
        CheckpointError: checkpoints were trained on a base that is not there any more.
    """
    tell = progress or (lambda line: None)
    folder, made_for = RunFolder(Path(spec.run_dir)).prepared_base, _made_for(spec)
    checkpoints = RunFolder(Path(spec.run_dir)).complete_checkpoints()
    # a run's checkpoints belong to the base that is there: what may change in a job that resumes did not make it
    if (folder / INDEX).exists() and (checkpoints or PreparedBase.open(folder).told["made_for"] == made_for):
        tell(f"found in {folder}")
        return folder
    if checkpoints:
        raise CheckpointError(
            "the base that the checkpoints were trained on is not there",
            at=str(folder),
            why="they hold adapters on its rounded matrices, and another rounding would not be the same",
            try_="copy prepared_base from where the run was, or start a run under another name",
        )
    _begin(folder, made_for)
    how, matrices = _outline(spec, map_tasks)
    base = spec.base
    if isinstance(base, LQ):
        if base.fisher != "none":
            tell(f"taking gradients of {base.samples} sequences")
            how = replace(how, importance=_gather(spec, base, how, matrices, folder, map_tasks))
        stored, more = _chosen(base, how, matrices, cache_root or default_cache_root(), map_tasks, tell)
    else:
        stored, more = [base] * len(matrices), {}
    lora = inner(spec.adapter)
    assert isinstance(lora, LoRA)
    if lora.init == "apiq":
        tell(f"calibrating {len(matrices)} matrices on {lora.init_packs} sequences")
        made = _calibrated(spec, lora, how, matrices, stored, folder, map_tasks)
    else:
        tell(f"decomposing {len(matrices)} matrices ({how.order})")
        work = [tasks.Make(how, matrix, each, str(folder)) for matrix, each in zip(matrices, stored)]
        made = map_tasks(tasks.make, work)
    if how.importance is not None:
        Path(how.importance).unlink()
    entries = {matrix.name: entry for matrix, entry in zip(matrices, made)}
    dtype = str(how.dtype).removeprefix("torch.")
    source = {"source": how.source.id, "revision": how.source.revision}
    write_index(folder, made_for, entries, dtype=dtype, scale=how.scale, **source, **more)
    (folder / WORK).unlink()
    found = PreparedBase.open(folder)
    tell(f"{found.bits_per_weight:.3f} bits a weight in {folder}")
    return folder


def _made_for(spec: TrainSpec) -> dict[str, Any]:
    lora = inner(spec.adapter)
    assert isinstance(lora, LoRA), "jobs.resolve lets no other adapter through"
    told: dict[str, Any] = {
        "model": spec.model.model_dump(mode="json"),
        "base": spec.base.model_dump(mode="json"),
        "adapter": {
            name: getattr(lora, name) for name in ("rank", "alpha", "rslora", "target_modules", "init", "init_rounds")
        },
        "precision": spec.precision,
        "seed": spec.optim.seed,
    }
    if lora.init == "apiq":
        told["calibration"] = [lora.init_packs, lora.init_tokens, lora.saliency]
    if lora.init == "apiq" or (isinstance(spec.base, LQ) and spec.base.fisher != "none"):
        told["tokens"] = Path(spec.tokens_dir).name  # the key of their store
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def _begin(folder: Path, made_for: dict[str, Any]) -> None:
    """Keep what an earlier attempt at the same has made."""
    try:
        same = json.loads((folder / WORK).read_text(encoding="utf-8")) == made_for
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / WORK, made_for)


def scale_of(lora: LoRA) -> float:
    """What the adapter's product is multiplied with."""
    assert lora.alpha is not None, "decided by jobs.resolve"
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def _outline(spec: TrainSpec, map_tasks: MapTasks) -> tuple[tasks.How, list[Matrix]]:
    lora, model = inner(spec.adapter), spec.model
    assert isinstance(lora, LoRA)
    if isinstance(model, Model):
        source = Source(model.id, model.revision)
    else:
        source = Source(str(RunFolder(Path(spec.run_dir)).base_model))
    meta = TokenStore(Path(spec.tokens_dir)).meta if isinstance(model, RandomModel) else {}
    task = tasks.Outline(
        source,
        spec.adapter,
        model if isinstance(model, RandomModel) else None,
        spec.precision,
        spec.data.context,
        meta.get("eos_id"),
        meta.get("pad_id"),
    )
    (matrices,) = map_tasks(tasks.outline, [task])
    iterations = spec.base.iterations if isinstance(spec.base, LQ) else lora.init_rounds
    order: Any = "lq" if isinstance(spec.base, LQ) else "loftq" if lora.init == "apiq" else lora.init
    return tasks.How(source, order, scale_of(lora), spec.precision, iterations, spec.optim.seed), matrices


def _gather(
    spec: TrainSpec, base: LQ, how: tasks.How, matrices: Sequence[Matrix], folder: Path, map_tasks: MapTasks
) -> str:
    task = tasks.Gather(
        how.source,
        spec.precision,
        tuple(matrix.name for matrix in matrices),
        spec.tokens_dir,
        base.samples,
        base.sample_tokens,
        spec.optim.seed,
        base.fisher == "factored",
        str(folder / ".squared_gradients"),
    )
    (path,) = map_tasks(tasks.gather, [task], on_device=True)
    return str(path)


def _calibrated(
    spec: TrainSpec,
    lora: LoRA,
    how: tasks.How,
    matrices: Sequence[Matrix],
    stored: Sequence[Any],
    folder: Path,
    map_tasks: MapTasks,
) -> list[dict[str, Any]]:
    """All matrices in one task: each needs what those before it give."""
    task = Fitting(
        how,
        tuple(matrices),
        tuple(stored),
        str(folder),
        spec.tokens_dir,
        lora.init_packs,
        lora.init_tokens,
        lora.init_rounds,
        lora.saliency,
    )
    (made,) = map_tasks(fit, [task], on_device=True)
    entries: list[dict[str, Any]] = made
    return entries


def _chosen(
    base: LQ,
    how: tasks.How,
    matrices: Sequence[Matrix],
    cache_root: Path,
    map_tasks: MapTasks,
    tell: Callable[[str], None],
) -> tuple[list[Any], dict[str, Any]]:
    """A format for each matrix, and what the index tells of how they were chosen."""
    formats, cache = base.formats, str(cache_root / "bases")
    tell(f"what {len(matrices)} matrices lose in {len(formats)} formats")
    errors = map_tasks(tasks.measure, [tasks.Measure(how, matrix, formats, cache) for matrix in matrices])
    count = sum(matrix.rows * matrix.columns for matrix in matrices)
    budget = int(base.bits * count / 8)
    table = [
        [Choice(error, size) for error, size in zip(row, sizes)]
        for row, sizes in zip(errors, tasks.sizes(matrices, formats))
    ]
    try:
        found = allocate(table, budget)
    except JobError as error:
        least = sum(min(choice.bytes for choice in row) for row in table)
        raise JobError(
            f"the matrices do not fit into {base.bits:g} bits a weight",
            at="base.bits",
            why=f"in the narrowest formats of base.grid they take {8 * least / count:.4f}",
            try_=f"--set base.bits={math.ceil(8e3 * least / count) / 1e3}, or narrower formats in base.grid",
        ) from error
    gap = found.error / found.bound - 1 if found.bound > 0 else 0.0
    tell(f"{8 * found.bytes / count:.3f} of {base.bits:g} bits a weight, {gap:.1e} above the proven least error")
    told = {"budget_bytes": budget, "squared_error": found.error, "squared_error_bound": found.bound}
    return [formats[index] for index in found.chosen], told
