"""Row tiling of the MLP: only `rows` rows of its wide intermediates exist at a time, in forward and in backward.

An unmodified SwiGLU layer stores four tensors of the FFN width for every row. Tiled, it stores its input alone and runs
once more, tile by tile, in backward. Costs one more MLP forward per layer. Tiling is part of the mathematics: the sums
in weight gradients are grouped by tile, so every policy that is to be bit-equal must use the same tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from farspan.errors import JobError
from farspan.memory.density import FIRST_ROW
from farspan.memory.frame import HOLLOW, TILED_MLP, current, draws


class _TiledRows(torch.autograd.Function):
    """`call` on row tiles, without a graph; backward runs each tile again with one."""

    @staticmethod
    def forward(
        ctx: Any, x_BSC: Tensor, anchor: Tensor, call: Callable[[Tensor], Tensor], rows: int, mlp: nn.Module
    ) -> Tensor:
        del anchor  # gives the node a gradient to wait for when x itself needs none (frozen embeddings below)
        ctx.call, ctx.rows, ctx.mlp = call, rows, mlp
        ctx.random = _random_state(x_BSC.device) if draws(mlp) else None
        ctx.save_for_backward(x_BSC)
        frame = current()
        if frame is not None and HOLLOW in frame.hollow:
            return torch.empty_like(x_BSC)  # a rebuild: backward runs the tiles, nobody reads this
        return torch.cat([call(tile) for tile in x_BSC.split(rows, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, dy_BSC: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        trained = [p for p in ctx.mlp.parameters() if p.requires_grad]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        tiles = list(zip(x.split(ctx.rows, dim=1), dy_BSC.split(ctx.rows, dim=1)))
        with _restored(ctx.random, x.device):
            for index, (x_tile, dy_tile) in enumerate(tiles):
                for p in trained:
                    # DeepSpeed reduces a gradient the first time it arrives unless told that more is to come
                    p.ds_grad_is_ready = index + 1 == len(tiles)
                leaf = x_tile.detach().requires_grad_(dx is not None)
                setattr(ctx.mlp, FIRST_ROW, index * ctx.rows)
                with torch.enable_grad():
                    y = ctx.call(leaf)
                torch.autograd.backward(y, dy_tile)
                if dx is not None:
                    assert leaf.grad is not None
                    dx[:, index * ctx.rows : index * ctx.rows + x_tile.shape[1]] = leaf.grad
                del y, leaf  # not beside those of the next tile
        setattr(ctx.mlp, FIRST_ROW, 0)
        return dx, None, None, None, None


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _restored:
    """Run a block with an earlier random state, then put the present one back."""

    def __init__(self, state: Tensor | None, device: torch.device) -> None:
        self.state, self.device = state, device

    def __enter__(self) -> None:
        if self.state is not None:
            self.present = _random_state(self.device)
            self._set(self.state)

    def __exit__(self, *_: object) -> None:
        if self.state is not None:
            self._set(self.present)

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


def tile_mlp(model: nn.Module, rows: int) -> int:
    """Tile the MLP of every decoder layer, on the instance; returns how many were tiled.

    Raises:
        JobError: the model's decoder layers have no token-wise `mlp` (mixture of experts, say).
    """
    count = 0
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        mlp = getattr(layer, "mlp", None)
        if mlp is None or not hasattr(mlp, "down_proj") or hasattr(mlp, "experts"):
            raise JobError(
                f"the MLP of {type(layer).__name__} cannot be tiled",
                at="memory.mlp_tile",
                why="tiling needs a token-wise MLP called `mlp` with a `down_proj`",
                try_="--set memory.mlp_tile=off",
            )
        _tile(mlp, rows)
        count += 1
    return count


def gather_tiled_whole(model: nn.Module) -> None:
    """Tell DeepSpeed, before ZeRO-3 starts, to gather a tiled MLP once per pass instead of once per tile.

    Not only faster: ranks of different dp groups hold packs of different length, so they run different numbers of
    tiles, and gathers inside a tile would not meet their counterparts on the other ranks.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if getattr(module, "tiled_rows", None) is not None:
            set_z3_leaf_module(module, True)


def _tile(mlp: nn.Module, rows: int) -> None:
    mlp.tiled_rows = rows  # type: ignore[assignment]
    whole = mlp.forward
    anchor = torch.empty(0, requires_grad=True)

    def forward(self: nn.Module, x_BSC: Tensor) -> Tensor:
        frame = current()
        rows: int = self.tiled_rows  # type: ignore[assignment]  # looked up anew: a measurement tries other tiles
        if frame is not None and TILED_MLP in frame.given and not torch.is_grad_enabled():
            return frame.given[TILED_MLP]()
        if x_BSC.shape[1] <= rows:
            y = whole(x_BSC)
        elif not torch.is_grad_enabled():
            y = torch.cat([whole(tile) for tile in x_BSC.split(rows, dim=1)], dim=1)
        else:
            return _TiledRows.apply(x_BSC, anchor, whole, rows, self)
        if frame is not None and TILED_MLP in frame.produced:
            frame.produced[TILED_MLP](y)
        return y

    mlp.forward = MethodType(forward, mlp)
