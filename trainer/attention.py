"""How attention enters an unmodified transformers model: one registration, composed as Ulysses(frame(kernel)).

Every attention layer of transformers looks its function up by the model's `attn_implementation`. Ours is registered as
`farspan`; what it must know of the pack (document lengths, the sp group) travels in the model's keyword arguments as
one `PackedSequence`. A model that does not hand its keyword arguments down is refused at its first forward, since
documents would otherwise see each other without any error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from farspan.errors import JobError
from farspan.kernels.prefix_attention import Prefix
from farspan.memory.frame import attention, known_output
from farspan.trainer.parallel.learned_bits import bits_of
from farspan.trainer.parallel.ulysses import Ulysses, head_layout

NAME = "farspan"
KEYWORD = "packed_sequence"
PREFIX_KEYS, PREFIX_VALUES = "prefix_keys", "prefix_values"
"""Parameters [K, n, D] of an attention layer: what every row of every document sees besides its document."""


@dataclass(frozen=True)
class PackedSequence:
    """What attention knows of one pack, the same on every rank of its sp group."""

    lengths: tuple[int, ...]
    """Rows of each document of the whole pack, padding at the end counted as a document."""
    ulysses: Ulysses | None = None
    """Exchange between rows and heads; None when the pack is not spread."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_sequence: PackedSequence | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`.

    Args:
        query: [B, H, s, D], this rank's rows.
        key, value: [B, K, s, D], KV heads not repeated.

    Returns:
        [B, s, H, D], and None for the weights, which are never formed.

    Raises:
        JobError: the model asks for something this attention does not compute.
    """
    if packed_sequence is None:
        raise _unsupported(module, "does not hand its keyword arguments to its attention layers")
    if attention_mask is not None:
        raise _unsupported(module, "builds its own attention mask")
    if dropout or softcap is not None or s_aux is not None:
        asked = "attention dropout" if dropout else "a soft cap" if softcap is not None else "attention sinks"
        raise _unsupported(module, f"asks for {asked}")
    if torch.is_autocast_enabled(query.device.type):  # rotary embedding leaves q and k in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads, kv_heads = query.shape[1], key.shape[1]
    ulysses, lengths = packed_sequence.ulysses, packed_sequence.lengths
    rest: Any = {"lengths": lengths, "scale": scale, "window": sliding_window}
    prefix = _prefix(module, heads, kv_heads, ulysses)
    if ulysses is None:
        return attention(query, key, value, prefix=prefix, **rest).transpose(1, 2), None
    out, bits = known_output(), bits_of(module)
    if out is None:
        out = attention(*ulysses.to_heads(query, key, value, bits), prefix=prefix, **rest)
    out = ulysses.to_rows(out, heads, kv_heads, bits)
    return out.transpose(1, 2), None


def _prefix(module: nn.Module, heads: int, kv_heads: int, ulysses: Ulysses | None) -> Prefix | None:
    """The layer's prefix, of the KV heads that this rank attends with."""
    keys, values = getattr(module, PREFIX_KEYS, None), getattr(module, PREFIX_VALUES, None)
    if keys is None or values is None:
        return None
    if ulysses is None:
        return Prefix(keys, values)
    layout, group = head_layout(heads, kv_heads, ulysses.ranks), heads // kv_heads
    mine = layout.kv[ulysses.rank]
    index = layout.kv_index(ulysses.rank, group) or range(len(mine))
    at = torch.tensor([mine.start + i for i in index], device=keys.device)
    return Prefix(keys.index_select(0, at), values.index_select(0, at))


def _unsupported(module: nn.Module, what: str) -> JobError:
    return JobError(
        f"this model's attention cannot be run: {type(module).__name__} {what}",
        at="model",
        why="Farspan attention is causal, exact and per document; anything else would change the result silently",
        try_="use a model whose decoder is plain causal attention (Llama, Qwen, Mistral, OLMo, Phi-3, SmolLM3, ...)",
    )


AttentionInterface.register(NAME, attend)
