"""S2A's trained parts (Jin et al., 2025, https://arxiv.org/abs/2503.08154), put into a model from outside.

Biases: y = x W^T + b with db = sum_t dy_t and dx = dy W, so that a node keeps nothing, on quantized matrices too.

Prompt: keys and values of each layer before every document (`kernels.prefix_attention`). The paper has "prompts"; of
their forms prefix tuning is the one that fits packed documents: no row of the pack is taken up, however many documents
there are, and under sequence parallelism rows stay evenly spread.

Side modules: y' = y + R (S (P x)) beside the MLP, with P the mean over w groups of neighbouring channels, S [w, w]
trained and R giving each of w numbers to the channels of its group. P and R have no parameters, so that P x, w numbers
a row, is all that is kept. (The paper has ViT's; this form is our reading.)

w width of the side module, n prompt tokens, K KV heads, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farspan.errors import JobError
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.s2a.config import S2A
from farspan.trainer.adapters.targets import target_linears
from farspan.trainer.attention import PREFIX_KEYS, PREFIX_VALUES
from farspan.trainer.bases.linear import QuantizedLinear

BIAS, SIDE = "s2a_bias", "s2a_side"
"""Names of trained parameters: of a linear layer [N], of a decoder layer [w, w]."""
_PROMPT_STD = 0.02


def add_parts(causal: Any, adapter: S2A, *, seed: int) -> list[str]:
    """Freeze the model and add what is trained; returns the names of the linear layers with a bias.

    Args:
        causal: a causal language model of transformers.
        seed: of the prompt's first keys and values; every rank draws the same ones.

    Raises:
        JobError: no layer matches, the side modules' width does not divide, or the output projection was named.
    """
    targets = target_linears(causal, adapter.target_modules) if adapter.bias else {}
    head = causal.get_output_embeddings()
    for name, linear in targets.items():
        if linear is head:
            raise JobError(
                "the output projection gets no bias",
                at="adapter.target_modules",
                why=f"logits are never held whole: the loss reads the weight of {name} itself, tile by tile",
                try_="leave it out",
            )
    for parameter in causal.parameters():
        parameter.requires_grad_(False)
    for linear in targets.values():
        add_bias(linear)
    hidden = causal.config.get_text_config().hidden_size
    draw = torch.Generator().manual_seed(seed)
    for layer in decoder_layers(causal):
        if adapter.side:
            add_side(layer, adapter.side, hidden)
        if adapter.prompt:
            _add_prompt(layer, adapter.prompt, draw)
    if adapter.prompt:
        causal.get_decoder().register_forward_pre_hook(partial(_behind_prompt, adapter.prompt), with_kwargs=True)
    return list(targets)


def add_bias(layer: nn.Linear) -> None:
    some: Any = layer
    like = layer.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype
    device = next(t.device for t in (*layer.buffers(), *layer.parameters()))
    layer.register_parameter(BIAS, nn.Parameter(torch.zeros(layer.out_features, dtype=like, device=device)))
    some.forward = partial(_forward, layer, layer.forward)
    some.node_of = partial(_node, layer)


def _forward(layer: nn.Linear, plain: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = plain(x).add_(getattr(layer, BIAS))
    return _node(layer, x, y) if torch.is_grad_enabled() else y


def _node(layer: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """The layer's autograd node around an output that is at hand, bias included."""
    return _Biased.apply(x, getattr(layer, BIAS), y, layer)


class _Biased(torch.autograd.Function):
    """x [..., C], b [N], y [..., N] -> y. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, y: Tensor, layer: nn.Linear) -> Tensor:
        del x, bias
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dy_RN = dy.reshape(-1, dy.shape[-1])
        db = dy_RN.sum(0) if ctx.needs_input_grad[1] else None
        # the weight is asked for again: under ZeRO-3 the tensor of the forward is gone by then
        dx = (dy_RN @ ctx.layer.weight).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, db, None, None


def add_side(layer: Any, width: int, hidden: int) -> None:
    """A side module beside a decoder layer's MLP, as a hook on it.

    Raises:
        JobError: the hidden size does not split into so many groups, or the layer has no `mlp`.
    """
    if hidden % width or not hasattr(layer, "mlp"):
        raise JobError(
            f"{type(layer).__name__} cannot have a side module of width {width}",
            at="adapter.side",
            why=f"beside `mlp`, {hidden} channels are pooled in groups: {hidden} / {width} = {hidden / width:.4g}",
            try_="--set adapter.side=0, or a divisor of the hidden size",
        )
    some = next(iter(layer.parameters()))
    made = torch.zeros(width, width, dtype=_float_dtype(layer), device=some.device)
    layer.register_parameter(SIDE, nn.Parameter(made))
    layer.mlp.register_forward_hook(partial(_beside, layer))


def _float_dtype(layer: nn.Module) -> torch.dtype:
    return next(p.dtype for p in layer.parameters() if p.is_floating_point())


def _beside(layer: nn.Module, _mlp: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return _Side.apply(inputs[0], getattr(layer, SIDE), y)


class _Side(torch.autograd.Function):
    """x [..., C], S [w, w], y [..., C] -> y + R S P x. Keeps P x and S."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        groups, each = s.shape[0], x.shape[-1] // s.shape[0]
        low = x.unflatten(-1, (groups, each)).mean(-1)
        ctx.each = each
        ctx.save_for_backward(low, s)
        return (y.unflatten(-1, (groups, each)) + (low @ s.t())[..., None]).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        low, s = ctx.saved_tensors
        d_high = dy.unflatten(-1, (s.shape[0], ctx.each)).sum(-1)
        ds = d_high.flatten(0, -2).t() @ low.flatten(0, -2) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (d_high @ s).div_(ctx.each).repeat_interleave(ctx.each, -1)
        return dx, ds, dy


def _add_prompt(layer: Any, count: int, draw: torch.Generator) -> None:
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        raise JobError(
            f"{type(layer).__name__} has no attention for a prompt",
            at="adapter.prompt",
            why="keys and values are put before those of `self_attn`",
            try_="--set adapter.prompt=0",
        )
    config, size = attention.config, attention.head_dim
    shape = (config.num_key_value_heads, count, size)
    device = next(iter(attention.parameters())).device
    for name in (PREFIX_KEYS, PREFIX_VALUES):
        drawn = torch.empty(shape, device="cpu").normal_(0.0, _PROMPT_STD, generator=draw)
        attention.register_parameter(name, nn.Parameter(drawn.to(device, _float_dtype(layer))))


def _behind_prompt(count: int, _decoder: nn.Module, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
    """Tokens begin at position `count`, as they do where peft puts the prompt into the cache."""
    if keywords.get("position_ids") is not None:
        keywords = {**keywords, "position_ids": keywords["position_ids"] + count}
    return inputs, keywords
