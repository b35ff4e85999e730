"""ZeRO stage 0 with the optimizer inside backward: a weight is updated as soon as its gradient is there.

The gradient then goes, so that at no time more than about one layer's gradients exist: on full fine-tuning in bf16
that saves 4 bytes a weight of the flat buffer, in fp32 4 of the gradients themselves. (Lv et al., LOMO, 2023,
https://arxiv.org/abs/2306.09782, has it for SGD; with state of its own for each parameter any optimizer works so.)
What it costs: nothing can be clipped by the norm of all gradients, and micro-batches cannot add up, since neither is
known yet.

A weight's gradient comes from the last use of the weight in backward, so nobody reads the old one afterwards. Tiles of
the MLP bring it in several parts, the last of which is marked; they add up in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.optimizer import global_norm

if TYPE_CHECKING:
    from torch import Tensor


class InBackwardEngine(PlainEngine):
    """As `PlainEngine`, which see for the arguments, but every backward is a step's only one, and updates."""

    def begin(self, *, lr: float) -> None:
        self._lr = lr
        self._squares: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}
        self._done: set[str] = set()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert last, "an optimizer in backward has one micro-batch a step"
        loss.backward()

    @torch.no_grad()
    def step(self, *, lr: float, clip_norm: float | None) -> float:
        """Step what had no gradient, send weights. The norm is that of the step just taken, finite or not."""
        assert clip_norm is None, "by then the weights are updated"
        assert lr == self._lr, (lr, self._lr)
        for name, parameter in self.trainable.items():
            if name not in self._done:
                self._update(name, torch.zeros_like(parameter, dtype=torch.float32))
        self._count += 1
        if self._owners is not None:
            self._owners.send(self.trainable)
        return torch.stack(self._squares).sum().sqrt().item()

    def full_gradients(self) -> dict[str, Tensor]:
        raise AssertionError("gradients never exist together")

    def _flat_gradients(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """No buffer."""
        return torch.empty(0, device=device), {}

    def _hooked(self) -> list[str]:
        return list(self.trainable)

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        """Hook that updates a weight from its gradient."""

        @torch.no_grad()
        def update(parameter: Any) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            assert name not in self._done, f"{name} has its gradient in parts that are not marked"
            gradient = gradient.float()
            if name in self._parts:
                gradient = self._parts.pop(name).add_(gradient)
            if getattr(parameter, "ds_grad_is_ready", True):
                if self._world_size > 1:
                    dist.all_reduce(gradient, group=self._group)
                self._update(name, gradient)
            else:
                self._parts[name] = gradient

        return update

    def _update(self, name: str, gradient: Tensor) -> None:
        self._done.add(name)
        self._squares.append(global_norm([gradient]).square())
        if name not in self._masters:
            return
        self._rule.step({name: gradient}, lr=self._lr, count=self._count + 1)
        parameter, master = self.trainable[name], self._masters[name]
        if parameter is not master:
            parameter.copy_(master)
