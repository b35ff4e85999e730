"""ZeRO stage 0: gradients become equal by one all-reduce a step, and each rank steps what it holds.

With AdamW that is everything: every rank keeps the whole optimizer, nothing is gathered, and the step is torch's own
fused AdamW. Right when masters, moments and gradients fit on every rank (adapters, small models). Other optimizers
(`trainer.optimizers`) look at whole parameters; there each parameter has an owner, which alone keeps its fp32 master
and state, steps it and sends the weights.

On one rank with fp32 parameters this engine adds nothing to a bare torch loop: gradients are those autograd allocates,
the master is the parameter. Otherwise gradients live in one flat fp32 buffer, filled by hooks while backward runs: with
several ranks so that the all-reduce needs no copy, with bf16 parameters so that micro-batches add up in fp32 and the
bf16 gradients of the whole model never exist at once. It costs 4 bytes a parameter for that buffer, 8 for AdamW's
moments and, in bf16, 4 for the masters.

Summing fp32 on ranks in a fixed order keeps results reproducible; for checkpoints each rank answers for what it owns,
or for one slice of every parameter, so that writing is shared although all ranks hold everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch import nn

from farspan.trainer.engine import Engine, Fragment
from farspan.trainer.loss import LossHead
from farspan.trainer.optimizer import global_norm, split_by_decay
from farspan.trainer.optimizers.owned import Owners
from farspan.trainer.optimizers.select import make_rule

if TYPE_CHECKING:
    from torch import Tensor

    from farspan.trainer.config import Optimizer

_REDUCE_ELEMENTS = 1 << 25
"""Elements of one all-reduce: 128 MiB, past which a larger message is no faster and only adds staging memory."""
_ALIGN_ELEMENTS = 16
"""Every gradient starts on a 64-byte line of the flat buffer, as a tensor of its own would."""


class PlainEngine(Engine):
    """One optimizer over the ranks of `group`, fp32 masters.

    Args:
        module: what the loop calls; returned unchanged.
        trainable: parameters to train by name, bf16 or fp32, equal on all ranks.
        optim: which optimizer, and its settings; `lr` comes with every step.
        device: where the parameters live.
        group: ranks whose gradients are summed; default the world.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optim: Optimizer,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.module = module
        self.trainable = dict(trainable)
        self._group = group
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        numels = {name: parameter.numel() for name, parameter in self.trainable.items()}
        self._owners = Owners(numels, group) if optim.type != "adamw" else None
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            parameter.data = parameter.data.contiguous()
            is_fp32 = parameter.dtype == torch.float32
            if self._owners is None or name in self._owners.own:
                self._masters[name] = parameter if is_fp32 else parameter.detach().float()
        self._flat, self._slots = self._flat_gradients(torch.device(device))
        self._filled: set[str] = set()
        self._reduced = False
        self._hooks = [
            self.trainable[name].register_post_accumulate_grad_hook(self._collector(name)) for name in self._hooked()
        ]
        self._rule = make_rule(
            optim,
            self._masters,
            {name: decay for names, decay in split_by_decay(self.trainable, optim.weight_decay) for name in names},
            outside=_token_matrices(module, self.trainable),
            narrow=any(parameter.dtype != torch.float32 for parameter in self.trainable.values()),
        )
        self._count = 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        del last
        loss.backward()

    def step(self, *, lr: float, clip_norm: float | None) -> float:
        gradients = self._summed_gradients()
        norm = global_norm(list(gradients.values())).item()
        if math.isfinite(norm):
            if clip_norm is not None and norm + 1e-6 > clip_norm:
                torch._foreach_mul_(list(gradients.values()), clip_norm / (norm + 1e-6))
            self._count += 1
            self._rule.step({name: gradients[name] for name in self._masters}, lr=lr, count=self._count)
            self._refresh_weights()
        for parameter in self.trainable.values():
            parameter.grad = None
        self._filled.clear()
        self._reduced = False
        return norm

    def fragments(self) -> list[Fragment]:
        found = []
        for name, master in self._masters.items():
            whole = {"master": master.detach(), **self._rule.state(name)}
            if self._owners is not None:
                found += [Fragment(name, kind, tuple(t.shape), 0, t.view(-1)) for kind, t in whole.items()]
                continue
            start, end = self._answered(master.numel(), self._rank)
            if start < end:
                found += [
                    Fragment(name, kind, tuple(t.shape), start, t.view(-1)[start:end]) for kind, t in whole.items()
                ]
        return found

    @torch.no_grad()
    def restored(self, *, step: int) -> None:
        self._count = step
        self._rule.restored(step)
        if self._owners is None and self._world_size > 1:
            for name, master in self._masters.items():
                for rank in range(self._world_size):
                    start, end = self._answered(master.numel(), rank)
                    for whole in (master, *self._rule.state(name).values()) if start < end else ():
                        dist.broadcast(whole.detach().view(-1)[start:end], group=self._group, group_src=rank)
        self._refresh_weights()

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: gradient.clone() for name, gradient in self._summed_gradients().items()}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self.trainable.values():
            parameter.grad = None

    def _flat_gradients(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The fp32 buffer and each parameter's view of it; without those whose gradient autograd may simply keep."""
        names = [n for n, p in self.trainable.items() if self._world_size > 1 or p.dtype != torch.float32]
        starts, end = {}, 0
        for name in names:
            starts[name] = end
            end += -(-self.trainable[name].numel() // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        flat = torch.zeros(end, dtype=torch.float32, device=device)
        return flat, {
            name: flat[starts[name] : starts[name] + self.trainable[name].numel()].view(self.trainable[name].shape)
            for name in names
        }

    def _hooked(self) -> list[str]:
        """Parameters whose gradients something is done with as they come."""
        return list(self._slots)

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        """Hook that moves a gradient into its slot as soon as autograd has finished it."""
        slot, is_fp32 = self._slots[name], self.trainable[name].dtype == torch.float32

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name not in self._filled:
                slot.copy_(parameter.grad)
                self._filled.add(name)
            elif not is_fp32:
                slot.add_(parameter.grad)
            # In fp32 the slot becomes the gradient, and autograd itself adds the next micro-batch to it.
            parameter.grad = slot if is_fp32 else None

        return collect

    @torch.no_grad()
    def _summed_gradients(self) -> dict[str, Tensor]:
        """fp32 gradients summed over ranks, in place. Collective; reduces once a step."""
        gradients = {}
        for name, parameter in self.trainable.items():
            gradient = self._slots.get(name, parameter.grad)
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            elif name in self._slots and name not in self._filled:
                gradient.zero_()
                self._filled.add(name)
            gradients[name] = gradient
        if self._world_size > 1 and not self._reduced:
            for piece in self._flat.split(_REDUCE_ELEMENTS):
                dist.all_reduce(piece, group=self._group)
            self._reduced = True
        return gradients

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Round masters to weights, and send those to the ranks that do not own them."""
        rounded = [name for name, master in self._masters.items() if self.trainable[name] is not master]
        if rounded:
            torch._foreach_copy_([self.trainable[n] for n in rounded], [self._masters[n] for n in rounded])
        if self._owners is not None:
            self._owners.send(self.trainable)

    def _answered(self, numel: int, rank: int) -> tuple[int, int]:
        """First and last (exclusive) element of a flattened parameter that `rank` answers for, where all hold it."""
        return numel * rank // self._world_size, numel * (rank + 1) // self._world_size


def _token_matrices(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of embedding and output projection."""
    found = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | LossHead)}
    return {name for name, parameter in trainable.items() if id(parameter) in found}
