"""Our LoRA layer against peft's: the same function and gradients, and what it stores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from farspan.memory.frame import Frame, route_linear
from farspan.trainer.adapters.lora.apply import _mask, install

WIDTH, RANK = 64, 4


class Block(nn.Module):
    """Two linear layers that share their input, as q and k do, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48, bias=False)
        self.out = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.left(x) * self.right(x))


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same adapted block twice: as peft runs it, and ours."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": RANK, "lora_alpha": 12, "target_modules": ["left", "right", "out"], **options})
    theirs: nn.Module = get_peft_model(Block().to(dtype), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    ours = copy.deepcopy(theirs)
    assert install(ours) == len(config.target_modules)  # type: ignore[arg-type]
    return theirs, ours


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 9, WIDTH), (2, 3, 5, WIDTH)])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "orthogonal"}])
def test_equals_peft(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    x = torch.randn(shape, dtype=torch.float64)
    want, got = run(theirs, x), run(ours, x)
    assert got.keys() == want.keys() and len(want) == 2 + 6
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-13, msg=name)


def test_gradients_against_finite_differences() -> None:
    _, ours = pair()
    layer = ours.base_model.model.left
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def function(x: Tensor, a_: Tensor, b_: Tensor) -> Tensor:
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = map(nn.Parameter, (a_, b_))
        del layer.lora_A["default"]._parameters["weight"], layer.lora_B["default"]._parameters["weight"]
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a_, b_
        return layer(x)

    x = torch.randn(5, WIDTH, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, [t.detach().clone().requires_grad_() for t in (x, a, b)])


def test_bf16_is_as_near_to_fp64_as_peft() -> None:
    exact, _ = pair()
    theirs, ours = (copy.deepcopy(model).to(torch.bfloat16) for model in pair())
    x = torch.randn(64, WIDTH, dtype=torch.float64)
    want = run(exact, x)
    error = {
        name: max(float((found[key].double() - want[key]).norm() / want[key].norm()) for key in want)
        for name, found in (("peft", run(theirs, x.bfloat16())), ("ours", run(ours, x.bfloat16())))
    }
    assert error["ours"] <= 1.05 * error["peft"] < 0.05, error


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_stored(dropout: float) -> None:
    """The input once for all that share it, and r numbers a row for each layer."""
    theirs, ours = pair(torch.bfloat16, lora_dropout=dropout)
    x = torch.randn(100, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    stored = {}
    for name, model in (("peft", theirs.train()), ("ours", ours.train())):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, weights: set[int] = weights, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        stored[name] = sum(seen.values())
        del y
    product = 2 * 100 * 48 * 2  # both factors, for the multiplication
    assert stored["ours"] == 2 * 100 * (WIDTH + 48 + 3 * RANK) + product
    assert stored["ours"] < stored["peft"] if dropout else stored["ours"] == stored["peft"]


def test_dropout_is_dropout() -> None:
    """The share that is dropped, the scale of the rest, and backward through the very mask of forward."""
    mask = _mask(torch.empty(0), (1000, 200), key=5, share=0.25)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert torch.equal(mask, _mask(torch.empty(0), (1000, 200), key=5, share=0.25))
    _, ours = pair(lora_dropout=0.3)
    layer = ours.train().base_model.model.left
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)

    def output(x_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x_)

    assert torch.autograd.gradcheck(output, (x,))
    assert not torch.equal(output(x), layer.eval()(x))
    with torch.no_grad():
        drawn = torch.stack([layer.train()(x) for _ in range(2000)])
        off = (drawn.mean(0) - layer.eval()(x)).abs() / (drawn.std(0) / 2000**0.5)
    assert float(off.max()) < 5, "unbiased, within five standard errors"


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["left", "out"]},
        {"bias": "all", "target_modules": ["left", "out"]},
    ],
)
def test_what_is_more_than_the_formula_runs_as_peft_has_it(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    want, got = run(theirs, x), run(ours, x)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_merged_disabled_and_several_adapters() -> None:
    _, ours = pair()
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    apart = ours(x)
    with ours.disable_adapter():
        assert not torch.allclose(ours(x), apart)
    ours.add_adapter("second", LoraConfig(r=2, target_modules=["left"]))
    ours.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(ours(x), apart, rtol=1e-12, atol=1e-13)  # the second one starts at zero
    ours.set_adapter("default")
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), apart, rtol=1e-11, atol=1e-12)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), apart, rtol=1e-11, atol=1e-12)


def test_an_output_that_somebody_holds_is_not_written_to() -> None:
    """The executor stores outputs of base layers, and gives them again."""
    _, ours = pair()
    layer = ours.base_model.model.left
    base, x = layer.get_base_layer(), torch.randn(7, WIDTH, dtype=torch.float64)
    want, of_base = layer(x).detach(), base(x).detach()
    route_linear(base, "left")
    stored: list[Tensor] = []
    with Frame(produced={"left": stored.append}).active():
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-13)
    assert torch.equal(stored[0], of_base)
    with Frame(given={"left": lambda: stored[0]}, again=True).active():
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-13)
    assert torch.equal(stored[0], of_base)
    with Frame(given={"left": lambda: stored[0]}).active():
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-13)
