"""Log-probabilities of given tokens and entropies from hidden states, without ever holding the logits.

As in the loss of supervised training, `tile` rows of logits exist at a time. There the gradient is known as soon as the
logits are; here it depends on a loss that is taken of the log-probabilities, so backward makes each tile's logits once
more: one matmul of the head more, in exchange for N x V numbers that are never stored.

N rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, tokens_N: Tensor, tile: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        log_probs = hidden_NC.new_empty(tokens_N.shape, dtype=wide)
        entropies = torch.empty_like(log_probs)
        for start in range(0, tokens_N.numel(), tile):
            here = slice(start, start + tile)
            logs = _log_softmax(hidden_NC[here], weight_VC, bias_V, scale, wide)
            log_probs[here] = logs.gather(1, tokens_N[here, None])[:, 0]
            # an impossible token has log-probability -inf and adds nothing
            entropies[here] = -(logs.exp() * logs.clamp(min=torch.finfo(wide).min)).sum(1)
        ctx.save_for_backward(hidden_NC, weight_VC, bias_V, tokens_N, entropies)
        ctx.tile, ctx.scale = tile, scale
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, by_log_prob_N: Tensor, by_entropy_N: Tensor) -> tuple[Any, ...]:
        hidden_NC, weight_VC, bias_V, tokens_N, entropies_N = ctx.saved_tensors
        wide = entropies_N.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_NC) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VC, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if need_bias and bias_V is not None else None
        for start in range(0, tokens_N.numel(), ctx.tile):
            here = slice(start, start + ctx.tile)
            hidden, up = hidden_NC[here], by_log_prob_N[here, None]
            logs = _log_softmax(hidden, weight_VC, bias_V, ctx.scale, wide)
            probs = logs.exp()
            # d log p(token) = onehot - p;  d H = -p (log p + H)
            grad = probs * -up
            grad.scatter_add_(1, tokens_N[here, None], up)
            if by_entropy_N.any():
                logs.clamp_(min=torch.finfo(wide).min).add_(entropies_N[here, None])
                grad.sub_(probs.mul_(logs).mul_(by_entropy_N[here, None]))
            if ctx.scale != 1.0:
                grad.mul_(ctx.scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[here] = narrow @ weight_VC
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden
        narrowed = [None if g is None else g.to(weight_VC.dtype) for g in (grad_weight, grad_bias)]
        return grad_hidden, *narrowed, None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).to(wide)
    return torch.log_softmax(logits if scale == 1.0 else logits.mul_(scale), 1)


def tiled_log_probs(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    tokens_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    tile: int = 2048,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies of their distributions, softmax(scale * (hidden W^T + bias)).

    Args:
        hidden_NC: [N, C], any float dtype; products run in it, the rest in fp32 (float64 stays float64).
        weight_VC: [V, C]. bias_V: [V] or None.
        tokens_N: int64 [N], the token that follows each row.
        tile: rows of logits that exist at a time.
        scale: of the logits: the model's own, over the temperature.

    Returns:
        log-probabilities [N] and entropies in nats [N], both differentiable.
    """
    found: tuple[Tensor, Tensor] = _TiledLogProbs.apply(hidden_NC, weight_VC, bias_V, tokens_N, tile, scale)
    return found
