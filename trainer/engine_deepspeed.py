"""ZeRO stages 1 to 3 by DeepSpeed, over the joined dp x sp group, without DeepSpeed's launcher.

DeepSpeed is told of no sequence parallelism: it sees every rank as data parallel and averages gradients over the world
at every stage, so the loss is multiplied by the world size and what it reduces is the sum. (With its own `mpu` the
factor differs between stages.) Each rank holds masters and moments of 1/world of the trainable parameters in fp32;
gradients are accumulated and communicated in fp32 whatever the compute dtype. The learning rate comes from us, clipping
and the update are DeepSpeed's.

Fragments and restoring read DeepSpeed's own bookkeeping (`_hp_mapping` at stages 1 and 2, `grad_position` at stage 3),
which is not public API: `pyproject.toml` bounds the version, and the tests compare every stage with one process. Three
classes lie behind the stages: `DeepSpeedZeroOptimizer` (1 and 2), `BF16_Optimizer` (1 in bf16 without offload, where
gradients are whole on every rank until the step) and `DeepSpeedZeroOptimizer_Stage3`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed as dist

from farspan.trainer.engine import Engine, Fragment
from farspan.trainer.optimizer import adamw_options, full_shape, split_by_decay

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor, nn

    from farspan.trainer.config import Optim, Precision

_BUCKET_ELEMENTS = 500_000_000
"""Elements DeepSpeed reduces or gathers at once (its default). Allocated in full, so small models get less."""
_PERSISTENT_ELEMENTS = 100_000
"""Stage 3 keeps smaller parameters whole on every rank (DeepSpeed's default)."""


class DeepSpeedEngine(Engine):
    """Sharded AdamW over all ranks; the process group is initialised by the caller.

    Args:
        module: forward returns this rank's sum of token losses. Its parameters are moved to flat (stages 1, 2) or
            partitioned (stage 3) storage; one built under `zero.Init` is taken as it is.
        trainable: parameters to train by name; all others are frozen.
        optim: AdamW and weight decay settings; `lr` comes with every step.
        device: where the parameters live.
        stage: 1 shards the optimizer, 2 gradients too, 3 weights too.
        precision: `bf16` casts every floating parameter to bf16 and keeps fp32 masters; `fp32` expects fp32.
        cpu_offload: masters, moments and update in host memory (DeepSpeed CPU Adam, compiled on first use).
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optim: Optim,
        device: torch.device | str,
        *,
        stage: Literal[1, 2, 3],
        precision: Precision,
        cpu_offload: bool = False,
    ) -> None:
        device = torch.device(device)
        self.trainable = dict(trainable)
        self._stage = stage
        self._world_size = dist.get_world_size()
        deepspeed = import_deepspeed(device)
        adamw: type[torch.optim.Optimizer] = torch.optim.AdamW
        options: dict[str, Any] = {"fused": True}
        if cpu_offload:
            adamw, options = deepspeed.ops.adam.DeepSpeedCPUAdam, {"adamw_mode": True}
        groups = [
            {"params": [self.trainable[name] for name in names], "weight_decay": decay}
            for names, decay in split_by_decay(self.trainable, optim.weight_decay)
        ]
        numels = [torch.Size(full_shape(parameter)).numel() for parameter in self.trainable.values()]
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Deprecations inside DeepSpeed and the ops it compiles, and memory reports it prints unasked.
            warnings.simplefilter("ignore")
            self._ds, *_ = deepspeed.initialize(
                model=module,
                optimizer=adamw(groups, **options, **adamw_options(optim)),
                config=_config(stage, precision, sum(numels), offload=cpu_offload, pin_memory=device.type == "cuda"),
            )
        _rename_collectives()
        self._zero = self._ds.optimizer
        self._adamw = self._zero.optimizer
        self.module = self._ds
        self._create_state()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._ds.set_gradient_accumulation_boundary(last)
        self._ds.backward(loss * self._world_size)

    def step(self, *, lr: float, clip_norm: float | None) -> float:
        self._zero.clip_grad = clip_norm or 0.0
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._ds.step()
        norm = float(self._ds.get_global_grad_norm())
        if not math.isfinite(norm) and hasattr(self._zero, "averaged_gradients"):
            # With offload DeepSpeed would add the next step's gradients to those of the step it has just discarded.
            self._zero.averaged_gradients.clear()
        self._forget_gradients()
        return norm

    def fragments(self) -> list[Fragment]:
        found = []
        for name, parameter in self.trainable.items():
            piece = self._piece(parameter)
            if piece is None:
                continue
            flat, start, numel, offset = piece
            state = self._adamw.state[flat]
            for kind, whole in (("master", flat.detach()), *((key, state[key]) for key in ("exp_avg", "exp_avg_sq"))):
                found.append(Fragment(name, kind, full_shape(parameter), offset, whole.narrow(0, start, numel)))
        return found

    @torch.no_grad()
    def restored(self, *, step: int) -> None:
        for flat in self._flats():
            count = self._adamw.state[flat]["step"]
            self._adamw.state[flat]["step"] = torch.full_like(count, step) if torch.is_tensor(count) else step
        self._ds.global_steps = step
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for index in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def full_gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().float().clone() for name, p in self.trainable.items()}

    def close(self) -> None:
        self._ds.destroy()
        self._ds.module_forward_pre_hook.remove()
        self._ds.module_forward_post_hook.remove()

    def _flats(self) -> list[Tensor]:
        """This rank's flat fp32 masters, the tensors the inner optimizer updates."""
        for attribute in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if hasattr(self._zero, attribute):
                return list(getattr(self._zero, attribute))
        return list(self._zero.single_partition_of_fp32_groups)

    def _forget_gradients(self) -> None:
        """Zero the buffers DeepSpeed keeps: it would update a parameter that gets no gradient with its last one."""
        buffers = [flat.grad for flat in self._flats() if flat.grad is not None]
        if self._stage == 3:
            buffers.append(self._zero.grad_partitions_flat_buffer)
        for buffer in buffers:
            buffer.zero_()

    def _create_state(self) -> None:
        """Moments and counters as the first step would create them: fragments have to exist before it."""
        for flat in self._flats():
            on_device = isinstance(self._adamw, torch.optim.AdamW)
            self._adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device) if on_device else 0,
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def _piece(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """(flat master, start in it, elements, offset in the parameter) of this rank's share; None without one."""
        if self._stage == 3:
            group, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            padded = parameter.partition_numel()
            offset = padded * dist.get_rank()
            numel = min(padded, parameter.ds_numel - offset)
            return (self._flats()[group], start, numel, offset) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return self._flats()[mapping.param_group_index], here.start, here.numel, there.start


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed with what its launcher would have set, silent below errors."""
    # Read once, when DeepSpeed is imported: a CUDA machine may still train on CPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # To DeepSpeed the index of the device within this process: a Ray actor sees only its own GPU, as cuda:0.
    if device.type == "cuda" or "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    with warnings.catch_warnings():
        # Deprecations inside DeepSpeed at import.
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setLevel(logging.ERROR)
    # Shared-memory all-reduce for inference on CPU: never called in training, half a minute to compile.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
    """Parameters that `zero.Init` has partitioned, whole on every rank inside; what is written to them is lost."""
    import deepspeed

    _rename_collectives()
    whole: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters))
    return whole


def _rename_collectives() -> None:
    """Let DeepSpeed call collectives by the names torch 2.13 gave them: under the old ones each call warns."""
    backend = importlib.import_module("deepspeed.comm.comm").cdb
    backend.all_gather_function = getattr(dist, "all_gather_single", backend.all_gather_function)
    backend.reduce_scatter_function = getattr(dist, "reduce_scatter_single", backend.reduce_scatter_function)


def _config(stage: int, precision: Precision, numel: int, *, offload: bool, pin_memory: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. `numel`: trainable elements, whole."""
    # Even, since DeepSpeed aligns bf16 buffers to four bytes; at least the alignment padding of every group.
    bucket = min(_BUCKET_ELEMENTS, max(2 * numel, 1024) // 2 * 2)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket // 10,
        "stage3_param_persistence_threshold": min(_PERSISTENT_ELEMENTS, numel // 20),
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    return {
        # Sizes DeepSpeed wants to know and we do not use: the loop decides where a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 31,
        "zero_optimization": zero,
        # A non-finite norm must leave the weights alone in bf16 too.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
