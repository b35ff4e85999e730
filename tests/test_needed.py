"""What autograd keeps of a layer, against a count by hand, and which of it a gradient needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from executor_models import Model, tokens
from torch import Tensor

from farspan.memory.needed import SavedTensors, saved_tensors
from farspan.memory.single_layers import calls_of
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import LoRA, PaCA
from farspan.trainer.tiling import tile_mlp

LENGTHS = [100, 156]
ROWS = sum(LENGTHS)
C, FFN, HEADS, HEAD, KV, RANK = 64, 160, 4, 16, 32, 4
ADAPTERS = {
    "full": None,
    "lora": LoRA(rank=RANK),
    "fp32 lora": LoRA(rank=RANK),
    "attention only": LoRA(rank=RANK, target_modules=("q_proj", "v_proj")),
    "dropout": LoRA(rank=RANK, dropout=0.1),
    "paca": PaCA(rank=RANK),
}


def saved(model: Model, *, wants_dx: bool = True) -> SavedTensors:
    ids, positions = tokens(LENGTHS)
    keywords = {"use_cache": False, "packed_sequence": PackedSequence(tuple(LENGTHS))}
    decoder = model.causal.get_decoder()
    calls, x = calls_of(model.layers, lambda: decoder(input_ids=ids, position_ids=positions, **keywords))
    x = torch.randn_like(x)
    before = torch.get_rng_state()
    found = saved_tensors(model.layers[1], calls[1], x, wants_dx=wants_dx)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.model.parameters()) and x.grad is None
    return found


def by_hand(family: str, width: int, adapter: str) -> int:
    """Bytes per row, from reading the layer: what each operator's derivative formula asks for."""
    norms = 2 * 4 * C + 2 * 4  # both inputs in fp32, and the two roots
    attention = width * (C + 2 * KV + C) + 4 * HEADS  # q, k, v, O; log-sum-exp
    heads = {"llama": 0, "qwen3": 4 * (C + KV) + 4 * (HEADS + KV // HEAD)}[family]  # norms of q and k
    mlp = 3 * width * FFN  # gate, silu(gate), up
    inputs = 2 * width * C + width * FFN  # of q, k, v together, of gate and up, of down; o_proj's is O
    if adapter == "full":
        weights = width * (2 * C + (C + KV if family == "qwen3" else 0))  # normed, before the norms' weights
        return norms + attention + heads + mlp + inputs + weights
    if adapter == "lora":
        return norms + attention + heads + mlp + inputs + 7 * width * RANK
    if adapter == "paca":  # q, k and v share a slice, so do gate and up; o and down have their own
        return norms + attention + heads + mlp + 4 * width * RANK
    assert adapter == "attention only"
    return norms + attention + heads + mlp + width * C + 2 * width * RANK


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [*ADAPTERS])
def test_nothing_is_kept_for_the_gradient_of_a_frozen_weight(family: str, precision: str, adapter: str) -> None:
    model = Model(family, precision=precision, adapter=ADAPTERS[adapter])
    if adapter == "fp32 lora":  # peft's default on a bf16 base
        for name, p in model.model.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
    for name, p in model.model.named_parameters():
        if "norm" in name:  # ones would make two equal tensors of what is before and after them
            p.data.normal_(1.0, 0.2)
    found = saved(model)
    assert found.unneeded_bytes == 0, found
    assert found.rows == ROWS and found.kept_bytes == found.needed_bytes > 0
    cast = adapter == "fp32 lora" and precision == "bf16"  # q, k and v each keep their rows in fp32, so do gate and up
    assert found.repeated_bytes == (ROWS * 3 * 4 * C if cast else 0)
    if adapter not in ("fp32 lora", "dropout"):
        assert found.needed_bytes_per_row == by_hand(family, 4 if precision == "fp32" else 2, adapter)


def test_without_a_gradient_of_the_input_less_is_kept() -> None:
    """The lowest layer over a frozen embedding: its first norm keeps nothing."""
    model = Model(precision="bf16", adapter=ADAPTERS["lora"])
    found = saved(model, wants_dx=False)
    assert found.unneeded_bytes == 0
    assert found.needed_bytes_per_row == by_hand("llama", 2, "lora") - (4 * C + 4)


def test_a_tiled_mlp_keeps_its_input_alone() -> None:
    model = Model(precision="bf16", adapter=ADAPTERS["lora"])
    tile_mlp(model.model, 64)
    found = saved(model)
    assert found.unneeded_bytes == 0
    # of the MLP: its input, which stays; not gate, silu(gate), up and their product, nor what its adapters keep
    assert found.needed_bytes_per_row == by_hand("llama", 2, "lora") - 4 * 2 * FFN - 3 * 2 * RANK
    assert [s.operator for s in found.by_operator if "Tiled" in s.operator] == ["_TiledRowsBackward"]


class EagerNorm(torch.autograd.Function):
    """RMSNorm by hand, as kernels are often written: it keeps the normed rows whether the weight is trained or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = x * root
        ctx.save_for_backward(normed, root, weight, x)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        normed, root, weight, x = ctx.saved_tensors
        dn = dy * weight
        dx = root * dn - x * root.pow(3) * (dn * x).mean(-1, keepdim=True)
        return dx, (dy * normed).sum((0, 1)) if ctx.needs_input_grad[1] else None


class StandIn(torch.autograd.Function):
    """Keeps the same factor twice and uses whichever is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        factor = torch.ones_like(x) * weight
        ctx.save_for_backward(factor, factor.clone())
        return x * factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        one, other = ctx.saved_tensors
        return dy * torch.where(one.isnan(), other, one), None


def with_norm(model: Model, function: Callable[[Tensor, Tensor], Tensor]) -> Model:
    norm = model.layers[1].input_layernorm
    norm.forward = lambda x: function(x, norm.weight)
    return model


def test_what_only_a_frozen_weight_needs_is_found() -> None:
    lora = saved(with_norm(Model(adapter=ADAPTERS["lora"]), EagerNorm.apply))
    (norm,) = (s for s in lora.by_operator if s.operator == "EagerNormBackward")
    assert norm.unneeded_bytes == lora.unneeded_bytes == ROWS * C * 4
    assert lora.unneeded_bytes_per_row == C * 4
    assert norm.needed_bytes == ROWS * (C + 1) * 4, "x and the root"
    full = saved(with_norm(Model(), EagerNorm.apply))
    assert full.unneeded_bytes == 0


def test_of_two_tensors_that_stand_in_for_each_other_neither_is_called_unneeded() -> None:
    with pytest.raises(AssertionError, match="of two unneeded tensors one is needed"):
        saved(with_norm(Model(adapter=ADAPTERS["lora"]), StandIn.apply))
