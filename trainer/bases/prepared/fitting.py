"""The task that calibrates a whole model, on one rank's device: each matrix is written as soon as it is found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from farspan.kernels.quantized.formats import Format
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.prepared import fisher
from farspan.trainer.bases.prepared.calibrated import Fit, Products, calibrate
from farspan.trainer.bases.prepared.decompose import Importance, decompose
from farspan.trainer.bases.prepared.matrices import Matrix
from farspan.trainer.bases.prepared.store import PreparedBase, write_matrix
from farspan.trainer.bases.prepared.tasks import How
from farspan.trainer.bases.prepared.walk import walk


@dataclass(frozen=True)
class Fitting:
    """Calibrate all matrices of a model."""

    how: How
    matrices: tuple[Matrix, ...]
    stored: tuple[Base | Format, ...]
    folder: str
    tokens_dir: str
    sequences: int
    tokens: int
    rounds: int
    saliency: float


def fit(task: Fitting) -> list[dict[str, Any]]:
    """Entries of the index; those of an earlier attempt are read from their files."""
    from farspan.trainer.models import load_model

    how, folder = task.how, Path(task.folder)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    causal = load_model(how.source.id, revision=how.source.revision, dtype=how.dtype, device=device)
    causal.eval()
    packs = fisher.sequences(Path(task.tokens_dir), task.sequences, task.tokens, how.seed)
    names = [matrix.name for matrix in task.matrices]
    of_name = {matrix.name: (matrix, stored) for matrix, stored in zip(task.matrices, task.stored)}
    gathered = fisher.gather(causal, names, packs, factored=True) if task.saliency > 0 else {}
    entries: dict[str, dict[str, Any]] = {}

    def found(name: str, _: Tensor, products: Products) -> Tensor:
        matrix, stored = of_name[name]
        if (folder / f"{name}.safetensors").exists():
            return _written(folder, name, entries, how, device)
        wide = matrix.read(how.source).to(device)
        importance = None
        if gathered:
            parts = (gathered[name + part].to(device) for part in (fisher.ROW, fisher.COLUMN))
            importance = Importance.factored(*parts)
        order: Any = "lq" if isinstance(stored, Format) else "loftq"
        start = decompose(
            wide,
            stored,
            matrix.rank,
            order=order,
            scale=how.scale,
            dtype=how.dtype,
            iterations=how.iterations,
            seed=how.seed,
        )
        made = calibrate(
            Fit(wide, products, saliency=task.saliency, importance=importance),
            stored,
            matrix.rank,
            scale=how.scale,
            dtype=how.dtype,
            rounds=task.rounds,
            starts=(start,),
        )
        entries[name] = write_matrix(folder, name, made)
        low, whole = made.low_rank, made.layer.whole().float()
        return whole if low is None else torch.addmm(whole, low.b.float(), low.a.float(), alpha=how.scale)

    walk(causal, names, packs, found)
    return [entries[name] for name in names]


def _written(folder: Path, name: str, entries: dict[str, dict[str, Any]], how: How, device: torch.device) -> Tensor:
    """What an earlier attempt has found for a matrix."""
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        entries[name] = json.loads(file.metadata()["entry"])
    base = PreparedBase(folder, {"matrices": entries})
    whole = base.layer(name, None, how.dtype, device).whole().float()
    low = base.start(name)
    if low is None:
        return whole
    return torch.addmm(whole, low.b.to(device).float(), low.a.to(device).float(), alpha=how.scale)
