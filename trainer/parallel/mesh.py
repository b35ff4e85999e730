"""The grid of ranks, `dp x sp`, and its process groups.

rank = dp_index * sp + sp_index: the ranks that share a sequence are consecutive, so that a gang whose ranks are sorted
by node keeps its all-to-alls inside a node. Weights, gradients and optimizer states belong to the joined group of all
ranks, which is the default group.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from farspan.trainer.config import Mesh
from farspan.trainer.world import World


@dataclass(frozen=True)
class RankGrid:
    """Where this rank stands. `sp_group` is None where a sequence is not spread."""

    mesh: Mesh
    rank: int
    device: torch.device
    sp_group: dist.ProcessGroup | None

    @property
    def sp_index(self) -> int:
        return self.rank % self.mesh.sp

    @property
    def dp_index(self) -> int:
        return self.rank // self.mesh.sp

    @property
    def world_size(self) -> int:
        return self.mesh.world_size


def join(world: World, mesh: Mesh, *, alone_too: bool = False, timeout_s: float = 600.0) -> RankGrid:
    """Meet the other ranks and form the groups. Every rank must call it; gloo on CPU, NCCL on GPU.

    `alone_too` makes a default group of one as well, which DeepSpeed wants even on a single rank.
    """
    assert world.world_size == mesh.world_size, (world, mesh)
    device = torch.device("cuda", world.local_rank) if world.use_gpu else torch.device("cpu")
    if world.use_gpu:
        torch.cuda.set_device(device)
    if world.world_size == 1 and not alone_too:
        return RankGrid(mesh, 0, device, None)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if world.use_gpu else "gloo",
            init_method=f"tcp://{world.master_addr}:{world.master_port}",
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return form_groups(mesh, device, timeout_s=timeout_s)


def form_groups(mesh: Mesh, device: torch.device, *, timeout_s: float = 600.0) -> RankGrid:
    """Make the groups of `mesh` on an initialised default group; collective, in the same order on every rank."""
    rank, sp_group = dist.get_rank(), None
    timeout = timedelta(seconds=timeout_s)
    if mesh.sp > 1:
        for dp_index in range(mesh.dp):
            ranks = list(range(dp_index * mesh.sp, (dp_index + 1) * mesh.sp))
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                sp_group = group
    return RankGrid(mesh, rank, device, sp_group)
