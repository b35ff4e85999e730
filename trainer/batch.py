"""One rank's rows of a pack.

The pack's labels are shifted before the split, so the last row of a shard knows the first token of the next one. A pack
that does not divide by the SP degree is padded at its end; the padding is a document of its own, which no trained row
sees and on which nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.trainer.attention import PackedSequence
from farspan.trainer.data.packing import Pack
from farspan.trainer.loss import IGNORED
from farspan.trainer.parallel.ulysses import Ulysses


@dataclass(frozen=True)
class Rows:
    """What the model is called with; s rows of this rank."""

    input_ids: Tensor
    """int64 [1, s]"""
    labels: Tensor
    """int64 [1, s], shifted, -100 where nothing is trained."""
    position_ids: Tensor
    """int64 [1, s], starting over in each document."""
    sequence: PackedSequence
    """Boundaries of the whole pack."""


def rows_of(
    pack: Pack, *, sp: int, sp_index: int, ulysses: Ulysses | None, device: torch.device, pad_id: int = 0
) -> Rows:
    """Rows `sp_index` of `sp` of a pack, on the rank's device."""
    padding = -len(pack.input_ids) % sp
    lengths = [int(n) for n in np.diff(pack.cu_seqlens)] + ([padding] if padding else [])
    shard = (len(pack.input_ids) + padding) // sp
    mine = slice(sp_index * shard, (sp_index + 1) * shard)

    def rows(values: np.ndarray, fill: np.ndarray) -> Tensor:
        whole = np.concatenate([values, fill]) if padding else values
        return torch.from_numpy(np.ascontiguousarray(whole[mine], dtype=np.int64))[None].to(device, non_blocking=True)

    return Rows(
        rows(pack.input_ids, np.full(padding, pad_id)),
        rows(pack.labels, np.full(padding, IGNORED)),
        rows(pack.position_ids, np.arange(padding)),
        PackedSequence(tuple(lengths), ulysses),
    )
