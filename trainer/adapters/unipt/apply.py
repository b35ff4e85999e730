"""UniPT for causal language models (Diao et al., 2023, https://arxiv.org/abs/2308.14316), from outside.

With h_l what layer l gives, detached, and D = d / r:

    z_l = LayerNorm(W_l h_l)                 the last one is the anchor a
    m_l = causal_merge(a, z_l)               l < L, see `kernels.causal_merge`
    w   = softmax over l of u . (mean a * mean z_l)
    out = final hidden states + U ReLU(a + V sum_l w_l m_l)

The paper's mean is over all tokens, which would show a token the later ones; here it is over those up to it, of its
document. U is zero at first, so that training starts at the pretrained model. (A bias of u would be the same for all
layers, and softmax does not see it.)

The frozen model and all W_l are one autograd node (`_Backbone`), whose forward runs the model without autograd. With
ranks that share a sequence, layers are spread over them for the merge, each with all rows, by one all-to-all there and
one back, as heads are for attention: nothing is larger on any rank than it is without.

d hidden, D width, L layers, S rows of the pack, s rows of this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.errors import JobError
from farspan.kernels.causal_merge import causal_merge, running_mean
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.unipt.config import UniPT
from farspan.trainer.attention import KEYWORD, PackedSequence

CHILD = "unipt"
"""Name of the network in the model."""


class SideNetwork(nn.Module):
    """What is trained.

    Args:
        store: see `UniPT`.
    """

    def __init__(self, layers: list[nn.Module], hidden: int, width: int, store: str, *, like: Tensor) -> None:
        super().__init__()
        self.store = store
        self._layers = (tuple(layers),)  # in a tuple: they are no children of this one

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))

        self.down = made(len(layers), width, hidden)
        self.norm_weight, self.norm_bias = made(len(layers), width), made(len(layers), width)
        self.gate = made(width)
        self.proj, self.up = made(width, width), made(hidden, width)

    def start(self, draw: torch.Generator) -> None:
        """First weights: the same for a seed on every rank."""
        for weight in (self.down, self.proj, self.gate):
            drawn = torch.empty(weight.shape, device="cpu").normal_(0.0, weight.shape[-1] ** -0.5, generator=draw)
            weight.data.copy_(drawn)
        self.norm_weight.data.fill_(1.0)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return self._layers[0]

    def added(self, low_LsD: Tensor, sequence: PackedSequence) -> Tensor:
        """What comes to the final hidden states of this rank's rows: [s, d].

        Args:
            low_LsD: W_l h_l.
        """
        norms = zip(low_LsD.unbind(0), self.norm_weight.unbind(0), self.norm_bias.unbind(0))
        *below, anchor_sD = (functional.layer_norm(low, low.shape[-1:], weight, bias) for low, weight, bias in norms)
        others = torch.stack(below)
        del below
        anchor, ulysses = anchor_sD, sequence.ulysses
        if ulysses is not None:
            others, anchor = ulysses.spread(others, anchor)
        merged = causal_merge(anchor, others, lengths=sequence.lengths)
        of_anchor = running_mean(anchor, lengths=sequence.lengths) * self.gate
        scores = (running_mean(others, lengths=sequence.lengths) * of_anchor).sum(-1)
        if ulysses is not None:
            both = ulysses.gather(torch.cat([merged, scores[..., None]], -1), len(self.layers) - 1)
            merged, scores = both[..., :-1], both[..., -1]
        share = torch.softmax(scores, dim=0, dtype=torch.promote_types(scores.dtype, torch.float32)).to(merged.dtype)
        mixed_sD = torch.einsum("ls,lsd->sd", share, merged)
        return functional.linear(torch.relu(anchor_sD + functional.linear(mixed_sD, self.proj)), self.up)


def add_side_network(causal: Any, adapter: UniPT, *, seed: int) -> SideNetwork:
    """Freeze the model and put the network beside it: from now on the decoder gives final hidden states with what the
    network adds, for whoever calls it.

    Raises:
        JobError: the width is no whole number, or the model has a single layer.
    """
    layers, hidden = decoder_layers(causal), causal.config.get_text_config().hidden_size
    if len(layers) < 2 or hidden % adapter.reduction:
        raise JobError(
            "the model has no room for a UniPT",
            at="adapter.reduction",
            why=f"{len(layers)} layers, of which the last is the anchor of the others; width {hidden} / "
            f"{adapter.reduction} = {hidden / adapter.reduction:.4g}",
            try_="a divisor of the hidden size, or another adapter",
        )
    for parameter in causal.parameters():
        parameter.requires_grad_(False)
    like = causal.get_input_embeddings().weight
    network = SideNetwork(layers, hidden, hidden // adapter.reduction, adapter.store, like=like)
    network.start(torch.Generator().manual_seed(seed))
    setattr(causal, CHILD, network)
    decoder = causal.get_decoder()
    decoder.forward = partial(_forward, network, decoder.forward)
    return network


def _forward(network: SideNetwork, plain: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The decoder's forward, with what the network adds."""
    if keywords.get("use_cache") or keywords.get("past_key_values") is not None:
        raise JobError(
            "a model with a UniPT was to run from a cache",
            at="use_cache",
            why="the network merges all rows of a document, and a cache keeps only keys and values",
            try_="call it with use_cache=False",
        )
    keywords["use_cache"] = False
    given: list[Any] = []

    def run() -> Tensor:
        given[:] = [plain(*args, **keywords)]
        hidden: Tensor = given[0].last_hidden_state
        return hidden

    hidden, low = _Backbone.apply(network.down, network, run, torch.is_grad_enabled())
    rows = hidden.shape[:-1]
    sequence = keywords.get(KEYWORD) or PackedSequence((rows[1],) * rows[0])
    mask = keywords.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise JobError(
            "a model with a UniPT was to run on padded sequences",
            at="attention_mask",
            why="the network would merge the padding too",
            try_="pack documents, or give sequences of one length",
        )
    added = network.added(low.flatten(1, -2), sequence)
    given[0].last_hidden_state = hidden + added.view_as(hidden)
    return given[0]


@contextlib.contextmanager
def _seen(layers: tuple[nn.Module, ...], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, what layers give is seen."""

    def hook(index: int, _layer: nn.Module, _inputs: Any, y: Any) -> None:
        see(index, y if isinstance(y, Tensor) else y[0])

    hooks = [layer.register_forward_hook(partial(hook, index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


class _Backbone(torch.autograd.Function):
    """W [L, D, d] -> final hidden states [B, s, d], which are data, and W_l h_l [L, B, s, D]."""

    @staticmethod
    def forward(
        ctx: Any, down: Tensor, network: SideNetwork, run: Callable[[], Tensor], recorded: bool
    ) -> tuple[Tensor, Tensor]:
        low: list[Tensor] = []
        kept: list[Tensor] = []

        def see(index: int, h: Tensor) -> None:
            low.append(h @ down[index].t())
            if network.store == "inputs" and recorded:
                kept.append(h)

        with torch.no_grad(), _seen(network.layers, see):
            hidden = run()
        ctx.network, ctx.run = network, run
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(hidden)
        return hidden, torch.stack(low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_low: Tensor) -> tuple[Any, ...]:
        network: SideNetwork = ctx.network
        d_down = torch.empty_like(network.down)

        def see(index: int, h: Tensor) -> None:
            d_down[index] = d_low[index].flatten(0, -2).t() @ h.flatten(0, -2)

        if network.store == "inputs":
            for index, h in enumerate(ctx.saved_tensors):
                see(index, h)
        else:
            with torch.no_grad(), _seen(network.layers, see):
                ctx.run()
        return d_down, None, None, None
