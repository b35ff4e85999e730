"""The density loss: its gradient against autograd through the explicit formula, wherever the layer runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, engines_on_rank, segments, tokens
from sp_ranks import on_ranks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from farspan.errors import JobError
from farspan.memory.density import Density, add_density
from farspan.memory.executor import Executor
from farspan.memory.operators.gated import GatedUnit
from farspan.memory.operators.settings import Settings
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import DensityLoss, FullFineTune, LoRA, PaCA, Reversible
from farspan.trainer.tiling import tile_mlp

LENGTHS = [40, 56]
LOSS = DensityLoss(weight=0.7, eps=1e-3, threshold=0.01)
TRAINED = 60
ADAPTERS = {"full": FullFineTune(), "lora": LoRA(rank=4), "paca": PaCA(rank=4)}


def batch() -> tuple[Tensor, Tensor, Tensor, PackedSequence]:
    """Some rows are not trained on, the first among them."""
    torch.manual_seed(3)
    ids, positions = tokens(LENGTHS)
    labels = ids.roll(-1, 1)
    labels[:, torch.randperm(sum(LENGTHS))[TRAINED:]] = -100
    return ids, labels, positions, PackedSequence(tuple(LENGTHS))


def explicit(family: str, adapter: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients by autograd, the penalty before its weight, and the density; fp64, transformers' own operators."""
    model = Model(family, adapter=adapter)
    model.causal.double()
    ids, labels, positions, pack = batch()
    seen: list[Tensor] = []
    for layer in model.layers:
        act = layer.mlp.activation_fn if family == "phi3" else layer.mlp.act_fn
        act.register_forward_hook(lambda _module, _inputs, o: seen.append(o))
    loss = model.loss(ids, labels, positions, pack) / TRAINED
    counted = labels[0] != -100
    o = torch.stack(seen)[:, 0, counted]
    assert o.shape == (LAYERS, TRAINED, 160)
    penalty = (o**2 / (o**2 + LOSS.eps)).mean((1, 2)).sum()
    (loss + LOSS.weight * penalty).backward()
    gradients = {name: p.grad for name, p in model.trainable().items() if p.grad is not None}
    return gradients, penalty.detach(), (o.abs() > LOSS.threshold).double().mean()


def ours(family: str, adapter: Any, how: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    model = Model(family, adapter=adapter, density=LOSS, activations="fused" if "fused" in how else "autograd")
    model.causal.double()
    if "tiled" in how:
        tile_mlp(model.model, 17)
    if "rebuilt" in how:
        Executor(model.layers, segments(2, 0.5, sum(LENGTHS)), hollow=True)
    (model.loss(*batch()) / TRAINED).backward()
    assert model.loss.density is not None
    penalty, dense, rows = model.loss.density.take(torch.device("cpu"))
    assert rows == LAYERS * TRAINED
    return {n: p.grad for n, p in model.trainable().items() if p.grad is not None}, penalty / TRAINED, dense / rows


@pytest.mark.parametrize("adapter", [*ADAPTERS])
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", "kept"),
        ("phi3", "kept"),
        ("llama", "tiled"),
        ("qwen3", "rebuilt"),
        ("llama", "rebuilt, tiled"),
        ("llama", "fused"),
        ("phi3", "fused, tiled"),
    ],
)
def test_gradients_are_those_of_the_formula(family: str, adapter: str, how: str) -> None:
    want, penalty, dense = explicit(family, ADAPTERS[adapter])
    got, our_penalty, our_dense = ours(family, ADAPTERS[adapter], how)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        # the head of a norm in one node computes in fp32
        scale = float(gradient.abs().max())
        tolerance = 1e-10 if "fused" not in how else 1e-6
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(our_penalty, penalty, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_dense, dense, rtol=1e-6, atol=0)
    assert 0 < float(dense) < 1


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_of_codes_it_is_the_penalty_of_what_they_stand_for(kind: Any) -> None:
    """With and without: the difference is act'(gate) times the penalty's gradient, within what the codes lose."""
    draw = torch.Generator().manual_seed(0)
    gate, up, d = (torch.randn(24, 64, generator=draw) for _ in range(3))
    density = Density(LOSS.weight, 1.0, LOSS.threshold)  # so flat that a step of a code matters little
    density.begin(torch.tensor(2.0), torch.arange(24) < 20)
    found = []
    for penalty in (None, density):
        torch.manual_seed(1)
        unit = GatedUnit(Settings(kind), "silu", penalty)
        leaf = gate.clone().requires_grad_()
        found.append(torch.autograd.grad(unit(leaf, up, training=True), leaf, d)[0])
    off = found[1] - found[0]
    assert float(off[20:].abs().max()) < 1e-6
    o = nn.functional.silu(gate[:20]).requires_grad_()
    (of_o,) = torch.autograd.grad((LOSS.weight * 2 * (o**2 / (o**2 + 1.0)).mean(1)).sum(), o)
    exact = torch.ops.aten.silu_backward(of_o, gate[:20])
    assert float((off[:20] - exact).norm() / exact.norm()) < (0.2 if kind == "int4" else 0.04)


def test_nothing_more_is_stored() -> None:
    stored = []
    for density in (None, LOSS):
        model = Model(precision="bf16", adapter=LoRA(rank=4), density=density)
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(*batch())
        stored.append(sum(seen.values()))
        del loss
    assert stored[0] == stored[1]


def test_sums_are_of_one_step() -> None:
    model = Model(adapter=LoRA(rank=4), density=LOSS)
    density = model.loss.density
    assert density is not None
    for micro_batches in (1, 3):
        for _ in range(micro_batches):
            model.loss(*batch()).backward()
        assert int(density.take(torch.device("cpu"))[2]) == micro_batches * LAYERS * TRAINED
    with torch.no_grad():
        model.loss(*batch())
    assert not density.take(torch.device("cpu")).any()


def test_engines_agree() -> None:
    """DeepSpeed scales the loss and takes means over ranks; the penalty follows."""
    plain, zero = on_ranks(engines_on_rank, 2, (2, 1), [0, 2], adapter=LoRA(rank=4), density=LOSS)[0]
    without = on_ranks(engines_on_rank, 2, (2, 1), [0], adapter=LoRA(rank=4))[0][0]
    names = [name for name in without if ".lora_" in name and not name.endswith((" master", " exp_avg", " exp_avg_sq"))]
    assert len(names) == 14 * LAYERS
    for name in names:
        torch.testing.assert_close(zero[name], plain[name], rtol=0, atol=1e-5 * float(plain[name].abs().max()))
    assert sum(not torch.allclose(without[n], plain[n], rtol=1e-3) for n in names) > len(names) // 2


def test_reversible_layers_pass_it_once() -> None:
    model = Model(adapter=Reversible(bits=3, inside=LoRA(rank=4)), density=LOSS)
    Executor(model.layers, segments(1, 0.0, sum(LENGTHS)), coupling=model.coupling)
    (model.loss(*batch()) / TRAINED).backward()
    assert model.loss.density is not None
    assert int(model.loss.density.take(torch.device("cpu"))[2]) == LAYERS * TRAINED


def test_a_layer_without_one_mlp_is_refused() -> None:
    with pytest.raises(JobError, match="cannot be penalised"):
        add_density([nn.Linear(4, 4)], Density(1.0, 1e-7, 1e-3))
