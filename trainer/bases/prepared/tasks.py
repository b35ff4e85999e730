"""The work of preparing a base, in pieces that any process may do: they are told everything, and write what they find.

What a matrix loses in each format is kept in the user's cache, under the bits of the matrix and whatever else it
depends on: a run that is started again, or with a larger grid, computes only what is not there yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from farspan.errors import JobError
from farspan.kernels.quantized.formats import Format
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.prepared import fisher
from farspan.trainer.bases.prepared.decompose import Importance, LowRank, Order, decompose, low_rank_of
from farspan.trainer.bases.prepared.matrices import Matrix, Source, fingerprint, matrices_of
from farspan.trainer.bases.prepared.store import write_matrix
from farspan.trainer.config import Adapter, Precision, RandomModel
from farspan.trainer.run_folder import write_atomically

CODE_VERSION = 1
"""Raised whenever the same matrix would lose something else."""


@dataclass(frozen=True)
class How:
    """What all matrices of a run have in common."""

    source: Source
    order: Order
    scale: float
    """s: what the adapter is multiplied with."""
    precision: Precision
    iterations: int
    seed: int
    importance: str | None = None
    """File with squared gradients."""

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    def importance_of(self, matrix: Matrix) -> Importance | None:
        return fisher.read(Path(self.importance), matrix.name) if self.importance is not None else None


@dataclass(frozen=True)
class Outline:
    """Read a model's list of matrices; one made on the spot is written first."""

    source: Source
    adapter: Adapter
    write: RandomModel | None
    precision: Precision
    context: int
    eos_id: int | None
    pad_id: int | None


def outline(task: Outline) -> list[Matrix]:
    """In a worker: it needs torch and transformers."""
    from farspan.trainer.models import write_random_model

    if task.write is not None and not Path(task.source.id).exists():
        write_random_model(
            task.write,
            Path(task.source.id),
            precision=task.precision,
            context=task.context,
            eos_id=task.eos_id,
            pad_id=task.pad_id,
        )
    return matrices_of(task.source, task.adapter)


@dataclass(frozen=True)
class Gather:
    """Take squared gradients of a model."""

    source: Source
    precision: Precision
    names: tuple[str, ...]
    tokens_dir: str
    samples: int
    tokens: int
    seed: int
    factored: bool
    out: str


def gather(task: Gather) -> str:
    """Write them to `task.out`, on this process's device: its GPU, if it has one."""
    from farspan.trainer.models import DTYPES, load_model

    out = Path(task.out)
    if not out.exists():
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        causal = load_model(task.source.id, revision=task.source.revision, dtype=DTYPES[task.precision], device=device)
        packs = fisher.sequences(Path(task.tokens_dir), task.samples, task.tokens, task.seed)
        fisher.write(out, fisher.gather(causal, task.names, packs, factored=task.factored))
    return str(out)


@dataclass(frozen=True)
class Measure:
    """Find what a matrix loses in each of some formats."""

    how: How
    matrix: Matrix
    formats: tuple[Format, ...]
    cache: str
    """Folder of what was found before."""


def measure(task: Measure) -> list[float]:
    """Squared error in each format."""
    how, matrix = task.how, task.matrix
    weight = matrix.read(how.source)
    importance = how.importance_of(matrix)
    path = Path(task.cache) / f"{_key(task, weight, importance)}.json"
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [form for form in task.formats if form.name not in known]
    if missing:
        first = _first(how, matrix, weight, importance)
        for form in missing:
            made = decompose(
                weight,
                form,
                matrix.rank,
                order=how.order,
                scale=how.scale,
                dtype=how.dtype,
                iterations=how.iterations,
                importance=importance,
                seed=how.seed,
                first=first,
            )
            known[form.name] = made.error
        try:
            write_atomically(path, json.dumps(known, indent=0))
        except OSError as error:
            raise JobError(
                "what a matrix loses cannot be kept",
                at=str(path),
                why=f"the system says: {error.strerror}",
                try_="free space there, or set FARSPAN_CACHE to another folder",
            ) from error
    return [known[form.name] for form in task.formats]


def _first(how: How, matrix: Matrix, weight: torch.Tensor, importance: Importance | None) -> LowRank | None:
    if how.order != "lq" or matrix.rank == 0:
        return None
    return low_rank_of(
        weight.float(), matrix.rank, scale=how.scale, dtype=how.dtype, importance=importance, seed=how.seed
    )


def _key(task: Measure, weight: torch.Tensor, importance: Importance | None) -> str:
    how = task.how
    told: dict[str, Any] = {
        "code": CODE_VERSION,
        "torch": torch.__version__,
        "weight": fingerprint(weight),
        "rank": task.matrix.rank,
        **{n: v for n, v in asdict(how).items() if n not in ("source", "importance")},
    }
    if importance is not None:
        parts = (importance.row, importance.column) if importance.whole is None else (importance.whole,)
        told["importance"] = fingerprint(*parts)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Make:
    """Decompose a matrix and write it."""

    how: How
    matrix: Matrix
    stored: Base | Format
    folder: str


def make(task: Make) -> dict[str, Any]:
    """Its entry of the index; found in its file where an earlier attempt came as far."""
    path = Path(task.folder) / f"{task.matrix.name}.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["entry"])
            return found
    how, weight = task.how, task.matrix.read(task.how.source)
    importance = how.importance_of(task.matrix)
    made = decompose(
        weight,
        task.stored,
        task.matrix.rank,
        order=how.order,
        scale=how.scale,
        dtype=how.dtype,
        iterations=how.iterations,
        importance=importance,
        seed=how.seed,
    )
    return write_matrix(Path(task.folder), task.matrix.name, made)


def sizes(matrices: Sequence[Matrix], formats: Sequence[Format]) -> list[list[int]]:
    """Bytes of each matrix in each format."""
    return [[form.bytes(m.rows * m.columns) for form in formats] for m in matrices]
