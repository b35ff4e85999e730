"""Which parameters decay, and the learning rate of every step.

Both are pure functions of what the job says, so a resumed run needs no scheduler state: the rate of step n is computed
from n. Weight decay is decoupled (Loshchilov and Hutter, 2019) and falls on matrices only: pulling the gain of a norm
or a bias towards zero changes what the layer computes without bounding anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from farspan.trainer.config import Optim
    from farspan.trainer.optimizers.config import Adam

_NORM_PIECE = 1 << 16
"""Elements whose squares are summed in one go."""


def lr_at(step: int, optim: Adam, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `optim.steps`.

    Warm-up is linear and reaches `optim.lr` at step `warmup_steps`. Then `cosine` falls to `min_lr_ratio * lr` at the
    last step (Loshchilov and Hutter, SGDR, 2017); `wsd` stays at `lr` and falls linearly over the last `decay_share`
    of all steps (Hu et al., MiniCPM, 2024); `constant` stays. Past the last step the rate no longer changes.
    """
    assert step >= 1, step
    if step < warmup_steps:
        return optim.lr * step / warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    after_warmup = max(optim.steps - warmup_steps, 0)
    if optim.schedule == "cosine":
        decay_steps = after_warmup
    else:
        decay_steps = min(round(optim.decay_share * optim.steps), after_warmup)
    decayed = step - (optim.steps - decay_steps)
    if decayed <= 0:
        return optim.lr
    progress = min(decayed / decay_steps, 1.0) if decay_steps > 0 else 1.0
    kept = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * kept)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also while ZeRO stage 3 holds it partitioned (its own shape is then `[0]`)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def split_by_decay(trainable: Mapping[str, nn.Parameter], weight_decay: float) -> list[tuple[list[str], float]]:
    """Names of the parameters with their weight decay: matrices decay, vectors and scalars do not, nor do scales of
    matrices that stay (`scales_weights`), whose decay would shrink the pretrained model.

    Groups without a parameter are left out. The order is that of `trainable`, so that flat buffers built from it are
    the same on every rank.
    """
    matrices = [
        name
        for name, parameter in trainable.items()
        if len(full_shape(parameter)) >= 2 and not getattr(parameter, "scales_weights", False)
    ]
    rest = [name for name in trainable if name not in set(matrices)]
    return [(names, decay) for names, decay in ((matrices, weight_decay), (rest, 0.0)) if names]


def adamw_options(optim: Optim) -> dict[str, Any]:
    """Arguments that every AdamW takes under the same names (torch's and DeepSpeed's)."""
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, fp32 scalar, the same bits for the same input.

    On CPU torch sums the squares of one tensor in a few running fp32 lanes: 5 million elements lose four digits, 100
    million nearly two. Norms of short pieces, combined, keep seven at the same speed. GPUs reduce in a tree already.
    """
    import torch

    if not tensors:
        return torch.zeros(())
    if tensors[0].device.type == "cpu":
        tensors = [piece for tensor in tensors for piece in tensor.reshape(-1).split(_NORM_PIECE)]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
