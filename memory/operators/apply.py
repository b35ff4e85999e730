"""Replacing the operators of a loaded model's decoder layers, on the instances."""

from __future__ import annotations

from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from farspan.errors import JobError
from farspan.kernels.activation_codecs import LEAST_GROUP
from farspan.memory.density import FIRST_ROW, Density, PenalisedActivation
from farspan.memory.frame import DRAWS
from farspan.memory.operators.error import SETTINGS
from farspan.memory.operators.gated import GatedUnit
from farspan.memory.operators.linear import keep_stored
from farspan.memory.operators.norm import RMSNorm
from farspan.memory.operators.settings import Activations, Settings

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""By what configurations call them."""
_KNOWN_NAMES = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn", "chunk"}
"""All that the forward of a gated MLP may ask for: one that asks for more computes more."""


def keep_less(layers: list[nn.Module], kind: Activations, *, hidden_act: str) -> Settings | None:
    """Run norms, gated units and trained linear layers of decoder layers as `memory.operators` says.

    To be applied once adapters are there, and before MLPs are tiled.

    Args:
        hidden_act: as the model's configuration has it.

    Raises:
        JobError: a layer has norms or an MLP of another make, or rows too narrow for groups of codes.
    """
    if kind == "autograd":
        return None
    settings = Settings(kind)
    for layer in layers:
        setattr(layer, SETTINGS, settings)
        norms = 0
        for name, module in layer.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                _replace_norm(module, settings, name)
                norms += 1
            elif hasattr(module, "down_proj"):
                _replace_mlp(module, settings, name, hidden_act)
            elif type(module) is nn.Linear and module.weight.requires_grad:
                keep_stored(module)
        if not norms:
            raise _unknown(type(layer).__name__, "it has no RMSNorm")
    return settings


def _replace_norm(module: nn.Module, settings: Settings, name: str) -> None:
    width = _width(module)
    _check_groups(width, settings, name)
    module.forward = RMSNorm(module, settings, offset=_offset(type(module)))
    setattr(module, DRAWS, settings.draws)


def _width(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(getattr(weight, "ds_numel", weight.numel()))


def _offset(kind: type[nn.Module]) -> float:
    """What this make of norm adds to its weight, found by trying: its code is nobody's interface."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            norm = kind(64).float()
            weight: Any = norm.weight
            weight.copy_(torch.rand(64) + 0.5)
            x = torch.randn(4, 64)
            found = norm(x)
        except (TypeError, RuntimeError) as error:
            raise _unknown(kind.__name__, f"it cannot be tried: {error}") from error
        n = torch.nn.functional.rms_norm(x, (64,), eps=1e-6)
        for offset in (0.0, 1.0):
            if torch.allclose(found, n * (weight + offset), atol=1e-4, rtol=1e-4):
                return offset
    raise _unknown(kind.__name__, "its output is neither w x / rms(x) nor (1 + w) x / rms(x)")


def _replace_mlp(module: nn.Module, settings: Settings, name: str, hidden_act: str) -> None:
    forward: Any = type(module).forward
    code: CodeType = forward.__code__
    more = set(code.co_names) - _KNOWN_NAMES
    if more or not (hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")):
        raise _unknown(type(module).__name__, f"its forward uses {', '.join(sorted(more)) or 'no gate'}")
    if hidden_act not in ACTIVATIONS:
        raise _unknown(type(module).__name__, f"its activation {hidden_act} is none of {', '.join(ACTIVATIONS)}")
    some: Any = module
    inputs = some.down_proj.in_features
    _check_groups(inputs, settings, f"{name}.down_proj")
    unit = GatedUnit(settings, ACTIVATIONS[hidden_act], _density(module))
    module.forward = partial(_mlp, module, unit)
    setattr(module, DRAWS, settings.draws)


def _density(mlp: nn.Module) -> Density | None:
    return next((part.density for part in mlp.children() if isinstance(part, PenalisedActivation)), None)


def _mlp(mlp: Any, unit: GatedUnit, x: Tensor) -> Tensor:
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = unit(gate, up, training=mlp.training, first=getattr(mlp, FIRST_ROW, 0))
    del gate, up  # where codes stand for them nobody needs them any more
    return mlp.down_proj(product)


def _check_groups(width: int, settings: Settings, name: str) -> None:
    if settings.kind != "fused" and width % LEAST_GROUP:
        raise JobError(
            f"rows of {width} elements do not split into groups that share a scale",
            at="memory.activations",
            why=f"{name}: {width} / {LEAST_GROUP} leaves {width % LEAST_GROUP}",
            try_="--set memory.activations=fused",
        )


def _unknown(what: str, why: str) -> JobError:
    return JobError(
        f"{what} cannot keep less for its backward",
        at="memory.activations",
        why=why,
        try_="--set memory.activations=autograd",
    )
