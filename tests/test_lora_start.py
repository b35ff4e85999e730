"""LoRA that does not start at zero: the function does, and the start is where the papers put it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, differing, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from farspan.errors import CheckpointError, JobError
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.trainer.adapters.lora import start
from farspan.trainer.adapters.lora.start import Sketch
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.config import NF4
from farspan.trainer.config import FullFineTune, LoRA

S, RANK = 96, 4


def loss(model: Model, micro: int = 0) -> Tensor:
    return model.forward([S], micro)


def started(init: str, **more: Any) -> Model:
    """At its start; B of the tests' own is put back to what it is."""
    adapter = LoRA(rank=RANK, init=init, alpha=8.0)  # type: ignore[arg-type]
    model = Model(adapter=adapter, **more)
    for name, p in model.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    if init == "lora_ga":
        start.from_gradients(model.model, adapter, lambda: loss(model).backward(), seed=0)
    else:
        for layer in start.lora_layers(model.model).values():
            start.begin(layer, *start.from_weights(layer, adapter))
    return model


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("base", [None, NF4()], ids=["plain", "nf4"])
def test_the_start_is_the_pretrained_function(init: str, base: Any) -> None:
    more = {} if base is None else {"base": base}
    want = float(loss(Model(adapter=LoRA(rank=RANK, alpha=8.0), **more)).detach())
    plain = Model(adapter=FullFineTune(), **more)
    want = float(loss(plain).detach())
    model = started(init, **more)
    assert float(loss(model).detach()) == pytest.approx(want, rel=1e-5)
    pairs = start.pairs(model.model)
    assert all(bool(pair.any()) for pair in pairs.values()) and len(pairs) == 2 * 7 * LAYERS
    for p in model.trainable().values():
        p.data.mul_(1.5)
    assert float(loss(model).detach()) != pytest.approx(want, rel=1e-5)
    start.restore(model.model, pairs)
    assert float(loss(model).detach()) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_from_the_weights_as_peft_has_it(init: str) -> None:
    """The products of A and B, and with a step on both, what the layers compute."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(48, 40, bias=False))
    options = {"r": RANK, "lora_alpha": 8, "target_modules": ["0"]}
    theirs: Any = get_peft_model(copy.deepcopy(block), LoraConfig(init_lora_weights=init, **options))  # type: ignore[arg-type]
    ours: Any = get_peft_model(block, LoraConfig(**options))  # type: ignore[arg-type]
    start.reserve(ours)
    from farspan.trainer.adapters.lora.apply import install

    install(ours)
    (layer,) = start.lora_layers(ours).values()
    start.begin(layer, *start.from_weights(layer, LoRA(rank=RANK, init=init)))  # type: ignore[arg-type]
    (other,) = start.lora_layers(theirs).values()
    pairs = [(each.lora_A["default"].weight, each.lora_B["default"].weight) for each in (layer, other)]
    torch.testing.assert_close(pairs[0][1] @ pairs[0][0], pairs[1][1] @ pairs[1][0], rtol=1e-4, atol=1e-6)
    for (a, b), (a_theirs, b_theirs) in [(pairs[0], pairs[1])]:
        a_theirs.data, b_theirs.data = a.data * 1.1, b.data * 0.9
        a.data, b.data = a.data * 1.1, b.data * 0.9
    x = torch.randn(5, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_sketch_knows_the_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values to 1 %, the rank 2r truncation too, on a spectrum like a gradient's; less memory than it."""
    monkeypatch.setattr(start, "WHOLE_SUM", 0)
    torch.manual_seed(0)
    outputs, inputs, r = 300, 500, 8
    u, v = torch.linalg.qr(torch.randn(outputs, outputs))[0], torch.linalg.qr(torch.randn(inputs, inputs))[0]
    spectrum = torch.arange(1, outputs + 1).float() ** -1.5
    gradient = (u * spectrum) @ v[:, :outputs].t()
    sketch = Sketch("layer", outputs, inputs, r, 0, torch.device("cpu"))
    assert not sketch.whole and Sketch("layer", 64, 64, r, 0, torch.device("cpu")).whole
    for turn in range(start.PASSES):
        if turn:
            sketch.next_pass()
        for row in range(0, outputs, 100):  # rows whose sum of outer products is the gradient
            sketch.add(gradient[row : row + 100], torch.eye(outputs)[row : row + 100])
        assert sketch.sum.numel() + sketch.right.numel() < outputs * inputs / 3
    uf, sf, vf = sketch.svd()
    torch.testing.assert_close(sf[: 2 * r], spectrum[: 2 * r], rtol=1e-2, atol=0)
    ours = (uf[:, : 2 * r] * sf[: 2 * r]) @ vf[: 2 * r]
    best = (u[:, : 2 * r] * spectrum[: 2 * r]) @ v[:, : 2 * r].t()
    left_out = float((gradient - best).norm())
    assert float((gradient - ours).norm()) == pytest.approx(left_out, rel=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_first_step_of_lora_ga_goes_along_the_gradient(dropout: float) -> None:
    """s^2 (B B^T G + G A^T A) against the best rank 2r approximation of the whole gradient G: cosine 1.000."""
    whole = Model(adapter=FullFineTune())
    whole.causal.double()  # in fp32 the gradients of q and k at such a start are half noise
    gradients = whole.gradients([S], micro_batches=1)
    adapter = LoRA(rank=RANK, init="lora_ga", alpha=8.0, dropout=dropout)
    model = Model(adapter=adapter)
    model.model.double()
    for name, p in model.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    start.from_gradients(model.model, adapter, lambda: loss(model).backward(), seed=0)
    for name, layer in start.lora_layers(model.model).items():
        g = gradients[name.removeprefix("base_model.model.") + ".weight"]
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        step = b @ b.t() @ g + g @ a.t() @ a
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        best = (u[:, : 2 * RANK] * s[: 2 * RANK]) @ vh[: 2 * RANK]
        cosine = float((step * best).sum() / step.norm() / best.norm())
        assert cosine > 0.9999, (name, cosine)
        # A^T and B are orthonormal times out^(1/4) / sqrt(gamma)
        size = layer.get_base_layer().out_features ** 0.5 / adapter.gamma
        for square in (a @ a.t(), b.t() @ b):
            torch.testing.assert_close(square, size * torch.eye(RANK).double(), rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.model.parameters())


def test_gradients_with_a_frozen_pair() -> None:
    """Against autograd on y = W0 x + s (B A - B0 A0) x, fp64."""
    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(24, 20)).double(), LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    )  # type: ignore[arg-type]
    start.reserve(model)
    from farspan.trainer.adapters.lora.apply import install

    install(model)
    (layer,) = start.lora_layers(model).values()
    start.begin(layer, torch.randn(3, 24).double(), torch.randn(20, 3).double())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data.mul_(1.3)
    x = torch.randn(2, 7, 24).double().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    read, a_, b_ = (t.detach().clone().requires_grad_() for t in (x, a, b))
    base = layer.get_base_layer()
    want = nn.functional.linear(read, base.weight + 2 * (b_ @ a_ - layer.start_B @ layer.start_A), base.bias)
    want.backward(dy)
    for got, expected in ((y, want), (x.grad, read.grad), (a.grad, a_.grad), (b.grad, b_.grad)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_under_the_executor() -> None:
    """The probe sees each layer's backward once, rebuilt or kept; placements change no bit."""
    plain = started("lora_ga")
    rebuilt = Model(adapter=LoRA(rank=RANK, init="lora_ga", alpha=8.0))
    plan = LayerPlan(x=Rows(device=S), linear={"down_proj": Rows(device=S)})
    for name, p in rebuilt.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    Executor(rebuilt.layers, Placement(rows=S, attention_rows=S, layers=(plan,) * LAYERS), hollow=True)
    adapter = LoRA(rank=RANK, init="lora_ga", alpha=8.0)
    start.from_gradients(rebuilt.model, adapter, lambda: loss(rebuilt).backward(), seed=0)
    kept = start.pairs(plain.model)
    for name, pair in start.pairs(rebuilt.model).items():
        torch.testing.assert_close(pair, kept[name], rtol=1e-3, atol=1e-4)
    start.restore(rebuilt.model, kept)
    assert differing(rebuilt.gradients([S]), plain.gradients([S])) == []


def test_whether_a_start_must_be_made(tmp_path: Path) -> None:
    kept, model = tmp_path / "adapter_start.safetensors", started("pissa")
    assert start.must_be_made(kept, "this job", [])
    with pytest.raises(CheckpointError, match="not in the run folder"):
        start.must_be_made(kept, "this job", [tmp_path])
    save_file(start.pairs(model.model), kept, metadata={"made_for": "this job"})
    assert not start.must_be_made(kept, "this job", [])
    assert start.must_be_made(kept, "another job", []), "of a run that never came to a checkpoint"
    assert not start.must_be_made(kept, "another job", [tmp_path]), "its checkpoints belong to it"


def test_more_directions_than_there_are() -> None:
    with pytest.raises(JobError, match="32 directions, fewer than the 40"):
        Model(adapter=LoRA(rank=40, init="pissa"))


def test_peft_s_own_forward_would_forget_the_pair() -> None:
    model = started("pissa")
    (some, *_) = start.lora_layers(model.model).values()
    some.merge()
    ids, positions = tokens([S])
    with pytest.raises(JobError, match="frozen start"):
        model.loss(ids, ids, positions, PackedSequence((S,)))
