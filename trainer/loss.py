"""Cross-entropy of the next token from hidden states, without ever holding the logits.

For 32k rows and a vocabulary of 128k the logits take 16 GiB in fp32. Here `tile` rows of them exist at a time: forward
computes the loss of a tile, and at once the gradients by hidden states and head weight, since all it needs is at hand
(the idea of Liger's fused linear cross-entropy). So the head's matmul runs once, not twice. Rows that are not trained
on are left out before the matmul. Cost: one tile of logits in fp32, and an fp32 copy of the head's gradient when the
head trains.

N rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farspan.trainer.log_probs import tiled_log_probs

IGNORED = -100


class Objective(Protocol):
    """A loss of log-probabilities, in the place of cross-entropy."""

    temperature: float
    """Logits are divided by it."""

    def __call__(self, log_probs_N: Tensor, entropies_N: Tensor) -> Tensor:
        """0-dim loss over the trained rows of this rank, in their order; both arguments fp32 [N]."""


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, labels_N: Tensor, tile: int, scale: float
    ) -> Tensor:
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = (labels_N != IGNORED).nonzero().squeeze(1)
        whole = rows.numel() == labels_N.numel()
        grad_hidden = torch.zeros_like(hidden_NC) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VC, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if need_bias and bias_V is not None else None
        total = hidden_NC.new_zeros((), dtype=wide)
        for start in range(0, rows.numel(), tile):
            at = rows[start : start + tile]
            where: Any = slice(start, start + at.numel()) if whole else at
            hidden, labels = hidden_NC[where], labels_N[where, None]
            logits = torch.nn.functional.linear(hidden, weight_VC, bias_V).to(wide)
            if scale != 1.0:
                logits.mul_(scale)
            lse = logits.logsumexp(1, keepdim=True)
            total += (lse - logits.gather(1, labels)).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            grad = logits.sub_(lse).exp_()  # softmax, in place of the logits
            grad.scatter_add_(1, labels, grad.new_full((1, 1), -1.0).expand_as(labels))
            if scale != 1.0:
                grad.mul_(scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[where] = narrow @ weight_VC
            if grad_weight is not None:
                if wide == narrow.dtype:
                    grad_weight.addmm_(narrow.T, hidden)
                else:
                    grad_weight += narrow.T @ hidden
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight_VC.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        # the gradients are ours alone and used once: scale them in place, free them with the node
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        assert hidden is not None or weight is not None or bias is not None, "backward through this loss runs once"
        scaled = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in (hidden, weight, bias)]
        narrowed = [None if g is None else g.to(ctx.weight_dtype) for g in scaled[1:]]
        return scaled[0], *narrowed, None, None, None


def tiled_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    tile: int = 2048,
    scale: float = 1.0,
) -> Tensor:
    """Sum over rows of -log softmax(scale * (hidden W^T + bias))[label]; rows labelled -100 do not count.

    Args:
        hidden_NC: [N, C], any float dtype; products run in it, the loss in fp32 (float64 stays float64).
        weight_VC: [V, C]. bias_V: [V] or None.
        labels_N: int64 [N], already shifted.
        tile: rows of logits that exist at a time.

    Returns:
        0-dim sum. Its backward may run once.
    """
    if not torch.is_grad_enabled():
        # inside the Function this is no longer seen, and gradients would be computed for nothing
        hidden_NC, weight_VC = hidden_NC.detach(), weight_VC.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _TiledCrossEntropy.apply(hidden_NC, weight_VC, bias_V, labels_N, tile, scale)


class LossHead(nn.Module):
    """The model's output projection and the loss in one module, sharing the projection's parameters.

    A module of its own, so that ZeRO-3 gathers the weight around it as around any other layer.
    """

    def __init__(self, projection: nn.Linear, *, tile: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = projection.weight, projection.bias
        self.tile, self.scale = tile, scale

    def forward(self, hidden_NC: Tensor, labels_N: Tensor, objective: Objective | None = None) -> Tensor:
        """The sum of token losses, or what `objective` makes of log-probabilities and entropies of trained rows."""
        if objective is None:
            return tiled_cross_entropy(
                hidden_NC, self.weight, labels_N, bias_V=self.bias, tile=self.tile, scale=self.scale
            )
        trained = labels_N != IGNORED
        log_probs, entropies = tiled_log_probs(
            hidden_NC[trained],
            self.weight,
            labels_N[trained],
            bias_V=self.bias,
            tile=self.tile,
            scale=self.scale / objective.temperature,
        )
        return objective(log_probs, entropies)
