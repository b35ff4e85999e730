"""Which attention kernel a run uses: the one the job names, or the fastest of those that run its model here.

Decided once, by rank 0, and written into the run folder: kernels differ in the last bit, so ranks, policies and resumed
attempts of a run must use the same one. On CPU there is one kernel, and nothing is measured.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from farspan.errors import JobError
from farspan.kernels import attention as kernels
from farspan.kernels.attention_backends import BACKENDS, Pack
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.parallel.ulysses import head_layout
from farspan.trainer.run_folder import RunFolder, write_json

MEASURED_ROWS = 8192
"""Long enough for a GPU to be full and for the quadratic part to lead; costs milliseconds."""


def choose_attention(asked: str, config: Any, dtype: torch.dtype, grid: RankGrid, folder: RunFolder, rows: int) -> str:
    """Decide, on all ranks alike, and have this process use it; returns what was decided. Collective.

    Args:
        asked: `fastest`, or the name of a back end.
        config: the model's, with its numbers of heads.
        dtype: of queries and keys.
        rows: of the longest sequence, all ranks of an sp group together.

    Raises:
        JobError: the back end that was asked for does not run this model here.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    layout = head_layout(heads, kv_heads, grid.mesh.sp)
    shape = len(layout.query[0]), len(layout.kv[0]), size
    names: list[list[str] | None] = [None]
    if grid.rank == 0:
        names[0] = _decide(asked, shape, dtype, grid.device, folder, min(rows, MEASURED_ROWS))
    if grid.world_size > 1:
        dist.broadcast_object_list(names, src=0)
    assert names[0] is not None
    if asked != "fastest":
        _check(asked, shape, dtype, grid.device)
    kernels.use(*names[0])
    return names[0][0]


def _decide(
    asked: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, folder: RunFolder, rows: int
) -> list[str]:
    if asked != "fastest":
        return [asked]
    if folder.kernels.exists():
        return list(json.loads(folder.kernels.read_text(encoding="utf-8"))["attention"])
    q, k, v = _inputs(shape, dtype, device, rows)
    pack = Pack((rows,), shape[2] ** -0.5)
    fitting = [name for name, backend in BACKENDS.items() if backend.refusal(q, k, pack) is None]
    if len(fitting) > 1:
        fitting = kernels.fastest(q, k, v, pack)
        write_json(folder.kernels, {"attention": fitting})
    if not fitting:
        raise JobError(
            f"no attention kernel runs {dtype} with heads of {shape[2]} on {device.type}",
            at="model",
            why=str({name: backend.refusal(q, k, pack) for name, backend in BACKENDS.items()}),
            try_="--set precision=bf16",
        )
    return fitting


def _check(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    q, k, _ = _inputs(shape, dtype, device, 16)
    why = BACKENDS[name].refusal(q, k, Pack((16,), 1.0))
    if why is not None:
        raise JobError(
            f"the attention kernel {name} cannot be used",
            at="memory.attention",
            why=f"for {dtype} with heads of {shape[2]} on {device.type}: {why}",
            try_="--set memory.attention=fastest",
        )


def _inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, kv_heads, size = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, rows, n, size, dtype=dtype, device=device, generator=generator).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v
