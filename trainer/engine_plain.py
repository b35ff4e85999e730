"""ZeRO stage 0: every rank keeps the whole optimizer, and one all-reduce a step makes the gradients equal.

Right when masters, moments and gradients fit on every rank (adapters, small models): nothing is gathered, and the step
is torch's own fused AdamW. On one rank with fp32 parameters this engine adds nothing to a bare torch loop: gradients
are those autograd allocates, the master is the parameter. Otherwise gradients live in one flat fp32 buffer, filled by
hooks while backward runs: with several ranks so that the all-reduce needs no copy, with bf16 parameters so that
micro-batches add up in fp32 and the bf16 gradients of the whole model never exist at once. It costs 4 bytes a parameter
for that buffer, 8 for the moments and, in bf16, 4 for the masters.

Summing fp32 on ranks in a fixed order keeps results reproducible; for checkpoints each rank answers for one slice of
every parameter, so that writing is shared although all ranks hold everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from farspan.trainer.engine import Engine, Fragment
from farspan.trainer.optimizer import adamw_options, global_norm, split_by_decay

if TYPE_CHECKING:
    from torch import Tensor, nn

    from farspan.trainer.config import Optim

_REDUCE_ELEMENTS = 1 << 25
"""Elements of one all-reduce: 128 MiB, past which a larger message is no faster and only adds staging memory."""
_ALIGN_ELEMENTS = 16
"""Every gradient starts on a 64-byte line of the flat buffer, as a tensor of its own would."""


class PlainEngine(Engine):
    """Replicated fp32 AdamW over the ranks of `group`.

    Args:
        module: what the loop calls; returned unchanged.
        trainable: parameters to train by name, bf16 or fp32, equal on all ranks.
        optim: AdamW and weight decay settings; `lr` comes with every step.
        device: where the parameters live.
        group: ranks whose gradients are summed; default the world.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optim: Optim,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.module = module
        self.trainable = dict(trainable)
        self._group = group
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            parameter.data = parameter.data.contiguous()
            is_fp32 = parameter.dtype == torch.float32
            self._masters[name] = parameter if is_fp32 else parameter.detach().float().requires_grad_()
        self._flat, self._slots = self._flat_gradients(torch.device(device))
        self._filled: set[str] = set()
        self._reduced = False
        self._hooks = [
            self.trainable[name].register_post_accumulate_grad_hook(self._collector(name)) for name in self._slots
        ]
        self._adamw = self._optimizer(optim)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        del last
        loss.backward()

    def step(self, *, lr: float, clip_norm: float | None) -> float:
        gradients = self._summed_gradients()
        norm = global_norm(list(gradients.values())).item()
        if math.isfinite(norm):
            if clip_norm is not None and norm + 1e-6 > clip_norm:
                torch._foreach_mul_(list(gradients.values()), clip_norm / (norm + 1e-6))
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            self._refresh_weights()
        for name, parameter in self.trainable.items():
            parameter.grad = None
            self._masters[name].grad = None
        self._filled.clear()
        self._reduced = False
        return norm

    def fragments(self) -> list[Fragment]:
        found = []
        for name, parameter in self.trainable.items():
            start, end = self._owned(parameter.numel(), self._rank)
            if start == end:
                continue
            for kind, whole in self._state(name).items():
                found.append(Fragment(name, kind, tuple(parameter.shape), start, whole.view(-1)[start:end]))
        return found

    @torch.no_grad()
    def restored(self, *, step: int) -> None:
        for name, parameter in self.trainable.items():
            self._adamw.state[self._masters[name]]["step"].fill_(step)
            for owner in range(self._world_size if self._world_size > 1 else 0):
                start, end = self._owned(parameter.numel(), owner)
                for whole in self._state(name).values() if start < end else ():
                    dist.broadcast(whole.view(-1)[start:end], group=self._group, group_src=owner)
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

    def _optimizer(self, optim: Optim) -> torch.optim.AdamW:
        """AdamW on the masters with its state in place, so that fragments exist before the first step."""
        groups = [
            {"params": [self._masters[name] for name in names], "weight_decay": decay}
            for names, decay in split_by_decay(self.trainable, optim.weight_decay)
        ]
        adamw = torch.optim.AdamW(groups, fused=True, **adamw_options(optim))
        for master in self._masters.values():
            adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return adamw

    @torch.no_grad()
    def _summed_gradients(self) -> dict[str, Tensor]:
        """fp32 gradients summed over ranks, in place, attached to the masters. Collective; reduces once a step."""
        gradients = {}
        for name, parameter in self.trainable.items():
            gradient = self._slots.get(name, parameter.grad)
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            elif name in self._slots and name not in self._filled:
                gradient.zero_()
                self._filled.add(name)
            self._masters[name].grad = gradients[name] = gradient
        if self._world_size > 1 and not self._reduced:
            for piece in self._flat.split(_REDUCE_ELEMENTS):
                dist.all_reduce(piece, group=self._group)
            self._reduced = True
        return gradients

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        rounded = [name for name, parameter in self.trainable.items() if parameter is not self._masters[name]]
        if rounded:
            torch._foreach_copy_([self.trainable[n] for n in rounded], [self._masters[n] for n in rounded])

    def _owned(self, numel: int, rank: int) -> tuple[int, int]:
        """First and last (exclusive) element of a flattened parameter that `rank` answers for."""
        return numel * rank // self._world_size, numel * (rank + 1) // self._world_size

    def _state(self, name: str) -> dict[str, Tensor]:
        master = self._masters[name]
        state = self._adamw.state[master]
        return {"master": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
