"""An engine owns gradients and optimizer of the trainable parameters: any optimizer at ZeRO 0, or DeepSpeed's AdamW.

The contract every engine keeps, at every ZeRO stage:

- `backward(loss)`: `loss` is this rank's *sum* of token losses divided by the trained tokens of the whole step (all
  ranks, all micro-batches). After the last backward of a step the gradient is the *sum* over ranks and micro-batches,
  which is the gradient of the mean loss over all trained tokens.
- masters are fp32 whatever the compute dtype, moments as the optimizer has them; a parameter in bf16 is the rounded
  master after `step`.
- `fragments()` names every piece of optimizer state this rank owns by parameter name and offset, in place: a
  checkpoint reads and writes through them, whatever mesh or stage wrote it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from farspan.trainer.config import Optim

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from farspan.trainer.config import Optimizer, Precision
    from farspan.trainer.parallel.mesh import RankGrid

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What AdamW has of every parameter, in fp32 and its shape."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one flattened state tensor, living in this rank's memory."""

    name: str
    """Parameter name as in `model.named_parameters()` of the HF or peft model."""
    kind: str
    """`master` (fp32 weight), `exp_avg`, `exp_avg_sq`, or what else an optimizer keeps."""
    shape: tuple[int, ...]
    """Shape of the whole tensor: of masters, and of AdamW's moments, that of the parameter."""
    offset: int
    """First element of this piece in the flattened tensor."""
    tensor: Tensor
    """[numel of the piece], a view of live state: writing it restores the optimizer. Masters are fp32."""


class Engine(ABC):
    """See the module text for the contract."""

    module: nn.Module
    """What the loop calls to get the loss; hooks of the engine fire inside."""
    trainable: dict[str, nn.Parameter]
    """Trainable parameters by their HF or peft name."""

    def begin(self, *, lr: float) -> None:  # noqa: B027  only an optimizer in backward must know it so early
        """Before the first forward of a step: its learning rate."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate one micro-batch; `last` closes the accumulation of this optimizer step."""

    @abstractmethod
    def step(self, *, lr: float, clip_norm: float | None) -> float:
        """Reduce, clip, update, zero. Returns the global gradient norm before clipping."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """State this rank owns. Over all ranks every element of every trainable parameter appears exactly once."""

    @abstractmethod
    def restored(self, *, step: int) -> None:
        """Fragments were overwritten with the state after optimizer step `step`: refresh weights and counters."""

    @abstractmethod
    def full_gradients(self) -> dict[str, torch.Tensor]:
        """fp32 gradients of the step, whole, by name; call after the last backward and before `step`. Collective."""

    def close(self) -> None:  # noqa: B027  an engine without hooks has nothing to release
        """Release hooks, buffers and threads."""


def make_engine(
    module: nn.Module,
    trainable: dict[str, nn.Parameter],
    optim: Optimizer,
    grid: RankGrid,
    *,
    zero: Literal[0, 1, 2, 3],
    precision: Precision,
    cpu_offload: bool = False,
) -> Engine:
    """The plain engine where nothing is sharded, DeepSpeed ZeRO otherwise, which knows AdamW only."""
    if zero == 0 and optim.in_backward:
        from farspan.trainer.engine_in_backward import InBackwardEngine

        return InBackwardEngine(module, trainable, optim, grid.device)
    if zero == 0:
        from farspan.trainer.engine_codes import with_codes
        from farspan.trainer.engine_plain import PlainEngine

        return with_codes(PlainEngine(module, trainable, optim, grid.device), module, optim)
    assert isinstance(optim, Optim), f"{optim.type} at ZeRO {zero} is refused when a job is resolved"
    from farspan.trainer.engine_deepspeed import DeepSpeedEngine
    from farspan.trainer.tiling import gather_tiled_whole

    if zero == 3:
        gather_tiled_whole(module)
    return DeepSpeedEngine(
        module, trainable, optim, grid.device, stage=zero, precision=precision, cpu_offload=cpu_offload
    )
