"""One autograd node for a LoRA layer: y = x W^T + b + s (m * x) A^T B^T (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

peft builds the adapter and keeps its file format; what changes is how its layers run. As separate operators a layer
stores its input once more for each dropout, with a mask beside it, and makes four tensors as wide as its output on the
way. Here it stores the input, which q, k and v share (as gate and up do), and x A^T, r numbers a row; the adapter's
part is added where the base's output is. Dropout's mask m is not stored: a key is drawn where peft would draw the mask,
so that a layer which is rebuilt draws the same one, and the mask is made from it again in backward.

peft's own forward still runs where a layer is asked for something else: merged or disabled adapters, several at once,
DoRA, autocast, a weight that another library has quantized, and under ZeRO-3, which gathers weights by watching
submodules run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farspan.errors import JobError
from farspan.memory.frame import DRAWS, current
from farspan.memory.operators import Stored, stored
from farspan.trainer.adapters.lora.rows import RowSampler
from farspan.trainer.adapters.lora.start import PROBE, START_A, START_B
from farspan.trainer.adapters.targets import SHARED
from farspan.trainer.bases.linear import QuantizedLinear

ROWS = "row_sampler"


def install(model: nn.Module) -> int:
    """Have every LoRA layer of a peft model run this way, on the instance; returns how many there are."""
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def keep_rows(model: nn.Module, share: float) -> None:
    """Have every LoRA layer store that share of its input's rows; layers of one block that read the same share them."""
    from peft.tuners.lora import Linear

    samplers: dict[str, RowSampler] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            block, _, last = name.rpartition(".")
            sampler = samplers.setdefault(f"{block}.{SHARED.get(last, last)}", RowSampler(share))
            setattr(layer, ROWS, sampler)
            setattr(layer, DRAWS, True)


def _forward(layer: Any, of_peft: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = _plain_adapter(layer, x) if not args and not kwargs else None
    if adapter is None:
        if hasattr(layer, START_A) and not layer.disable_adapters:
            raise JobError(
                "an adapter with a frozen start was to run by peft's own forward",
                at="adapter.init",
                why="peft knows nothing of the second pair, and runs where weights are gathered (ZeRO-3) or merged",
                try_="--set parallel.zero=2, or --set adapter.init=default",
            )
        return of_peft(x, *args, **kwargs)
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dropout = layer.lora_dropout[adapter]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    kept = stored(x)
    recipe: Stored | None = kept.recipe()
    tensors = kept.tensors
    if hasattr(layer, ROWS) and layer.training:
        recipe, tensors = None, getattr(layer, ROWS).of(x, wanted=torch.is_grad_enabled()) or ()
    start = (getattr(layer, START_A), getattr(layer, START_B)) if hasattr(layer, START_A) else None
    return _LoRALinear.apply(x, a, b, layer.get_base_layer(), layer.scaling[adapter], share, start, recipe, *tensors)


def _plain_adapter(layer: Any, x: Tensor) -> str | None:
    """The one adapter of a layer that runs as the formula says; None: peft's own forward is wanted."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    quantized = isinstance(base, QuantizedLinear)
    if len(active) != 1 or layer.disable_adapters or layer.merged or (type(base) is not nn.Linear and not quantized):
        return None
    (name,) = active
    a, b = layer.lora_A[name], layer.lora_B[name]
    if name in layer.lora_variant or a.bias is not None or b.bias is not None:
        return None
    weights = (a.weight, b.weight) if quantized else (base.weight, a.weight, b.weight)
    if quantized and base.dtype != x.dtype:
        return None
    if any(hasattr(w, "ds_id") or w.dtype != x.dtype for w in weights) or torch.is_autocast_enabled(x.device.type):
        return None
    return None if any(p.requires_grad for p in base.parameters()) else name


class _LoRALinear(torch.autograd.Function):
    """x [..., C], A [r, C], B [N, r] -> [..., N].

    `start`: a frozen A and B whose product is taken off. `kept`: what A's gradient is made from, x as
    `recipe` makes it or, without one, `KeptRows` of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        base: nn.Linear,
        scale: float,
        share: float,
        start: tuple[Tensor, Tensor] | None,
        recipe: Stored | None,
        *kept: Tensor,
    ) -> Tensor:
        frame = current()
        if frame is not None:
            frame.output_is_held = False
        y = base(x)  # the module and not its weight: a frame may have its output already
        held = frame is not None and frame.output_is_held
        ctx.key = int(torch.randint(2**62, ()).item()) if share else None
        x_RC = x.reshape(-1, x.shape[-1])
        low_Rr = (x_RC if ctx.key is None else x_RC * _mask(x_RC, x_RC.shape, ctx.key, share)) @ a.t()
        y_RN = y.view(-1, y.shape[-1])
        y_RN = torch.addmm(y_RN, low_Rr, b.t(), alpha=scale) if held else y_RN.addmm_(low_Rr, b.t(), alpha=scale)
        if start is not None:
            y_RN.addmm_(x_RC @ start[0].t(), start[1].t(), alpha=-scale)
        ctx.base, ctx.scale, ctx.share, ctx.start = base, scale, share, start
        ctx.shape, ctx.recipe = x.shape, recipe
        ctx.save_for_backward(low_Rr, a, b, *kept)
        return y_RN.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        low_Rr, a, b, *kept = ctx.saved_tensors
        dy_RN = dy.reshape(-1, dy.shape[-1])
        probe = getattr(ctx.base, PROBE, None)
        if probe is not None:
            probe(_input(ctx, kept), dy_RN)
        dlow_Rr = (dy_RN @ b).mul_(ctx.scale)
        db = (dy_RN.t() @ low_Rr).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        mask = None
        if ctx.key is not None:
            mask = _mask(dy_RN, (dy_RN.shape[0], ctx.shape[-1]), ctx.key, ctx.share)
        da = _gradient_of_a(ctx, kept, dlow_Rr, mask) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy_RN @ ctx.base.weight
            if mask is None:
                dx.addmm_(dlow_Rr, a)
            else:
                dx.add_((dlow_Rr @ a).mul_(mask))
            if ctx.start is not None:
                dx.addmm_(dy_RN @ ctx.start[1], ctx.start[0], alpha=-ctx.scale)
            dx = dx.view(ctx.shape)
        return dx, da, db, *(None,) * (len(ctx.needs_input_grad) - 3)


def _input(ctx: Any, kept: list[Tensor]) -> Tensor:
    """x [R, C], or the rows of it that are there."""
    x: Tensor = kept[0] if ctx.recipe is None else ctx.recipe.back(tuple(kept))
    return x.reshape(-1, ctx.shape[-1])


def _gradient_of_a(ctx: Any, kept: list[Tensor], dlow_Rr: Tensor, mask: Tensor | None) -> Tensor:
    x_RC = _input(ctx, kept)
    if ctx.recipe is None:
        _, index, weight = kept
        dlow_Rr = dlow_Rr.index_select(0, index) * weight[:, None].to(dlow_Rr.dtype)
        mask = None if mask is None else mask.index_select(0, index)
    return dlow_Rr.t() @ (x_RC if mask is None else x_RC * mask)


def _mask(like: Tensor, shape: tuple[int, ...], key: int, share: float) -> Tensor:
    """What dropout multiplies with: 0 for `share` of the elements, 1 / (1 - share) for the rest; the same for a key."""
    generator = torch.Generator(like.device).manual_seed(key)
    return like.new_empty(shape).bernoulli_(1 - share, generator=generator).div_(1 - share)
