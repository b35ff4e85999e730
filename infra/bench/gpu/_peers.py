"""Other tools' ways to train the same model, each put on its decoder layers as that tool's trainer would."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from _device import DEVICE
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


class Unavailable(Exception):
    """Why a peer cannot run here."""


def checkpointed(layers: list[nn.Module], run: Callable[[Any, Tensor], Any]) -> None:
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = lambda call, x: run(call, x)  # type: ignore[assignment]


class Around(NamedTuple):
    """Contexts that a peer's own trainer would enter."""

    forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around forward and backward."""


def wants_grad(x: Tensor) -> Tensor:
    """Reentrant checkpointing needs an input with a gradient, as `enable_input_require_grads` sees to."""
    return x if x.requires_grad else x.detach().requires_grad_()


def hf_checkpoint(layers: list[nn.Module], _: nn.Module) -> Around:
    """Hugging Face's checkpointing, its default."""
    checkpointed(layers, lambda call, x: checkpoint(call, x, use_reentrant=False))
    return Around()


def hf_offload(layers: list[nn.Module], _: nn.Module) -> Around:
    """Hugging Face's checkpointing, reentrant, with what it saves moved out by torch's `save_on_cpu`."""
    checkpointed(layers, lambda call, x: checkpoint(call, wants_grad(x), use_reentrant=True))
    return Around(forward=lambda: save_on_cpu(pin_memory=DEVICE.type == "cuda"))


def trl_offload(layers: list[nn.Module], module: nn.Module) -> Around:
    """TRL's OffloadActivations over reentrant checkpointing."""
    try:
        from trl.models.activation_offloading import OffloadActivations
    except ImportError as error:
        raise Unavailable(f"{error}") from None
    checkpointed(layers, lambda call, x: checkpoint(call, wants_grad(x), use_reentrant=True))
    offload = OffloadActivations(use_pin_memory=True, use_streams=True)
    if hasattr(offload, "update_model_params"):
        offload.update_model_params(module)
    return Around(step=lambda: offload)


def deepspeed_offload(layers: list[nn.Module], _: nn.Module) -> Around:
    """DeepSpeed's activation checkpointing in host memory."""
    try:
        import deepspeed
    except ImportError as error:
        raise Unavailable(f"{error}") from None
    if not dist.is_initialized():  # it wants a group, of one
        meet = Path(tempfile.mkdtemp()) / "meet"
        dist.init_process_group("nccl", init_method=f"file://{meet}", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="nccl")
    deepspeed.checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=True)
    checkpointed(layers, lambda call, x: deepspeed.checkpointing.checkpoint(call, wants_grad(x)))
    return Around()


def liger(layers: list[nn.Module], module: nn.Module) -> Around:
    """Liger's kernels under Hugging Face's checkpointing."""
    try:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise Unavailable(f"{error}") from None
    _apply_liger_kernel_to_instance(model=module._causal[0])  # type: ignore[index, union-attr]
    return hf_checkpoint(layers, module)


PEERS: dict[str, Callable[[list[nn.Module], nn.Module], Around]] = {
    "hf-checkpoint": hf_checkpoint,
    "hf-offload": hf_offload,
    "trl-offload": trl_offload,
    "deepspeed-offload": deepspeed_offload,
    "liger": liger,
}


NEED_A_GPU = {
    "trl-offload": "OffloadActivations needs an accelerator",
    "deepspeed-offload": "what it moves to host memory must come from a GPU",
    "liger": "its kernels need a GPU",
}
