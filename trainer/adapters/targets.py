"""Which linear layers of a model an adapter goes to, named as peft names them."""

from __future__ import annotations

from torch import nn

from farspan.errors import JobError
from farspan.trainer.adapters.layers import decoder_layers

SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linear layers of a block that read the same input."""


def target_linears(model: nn.Module, targets: tuple[str, ...] | str) -> dict[str, nn.Linear]:
    """Linear layers by their name in `model`.

    Args:
        targets: `all-linear` for all of the decoder layers; otherwise names, or last parts of names.

    Raises:
        JobError: none has such a name.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (targets != "all-linear" or id(module) in inside)
    }
    if targets != "all-linear":
        wanted = (targets,) if isinstance(targets, str) else targets
        found = {
            name: module
            for name, module in linears.items()
            if any(name == target or name.endswith(f".{target}") for target in wanted)
        }
        unknown = [target for target in wanted if not any(n == target or n.endswith(f".{target}") for n in linears)]
        if unknown:
            raise no_such_target(model, f"no linear layer is called {', '.join(unknown)}")
        return found
    return linears


def no_such_target(model: nn.Module, why: str) -> JobError:
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return JobError(
        "the adapter does not match the model",
        at="adapter.target_modules",
        why=why,
        try_=f"name linear layers of this model, for example {', '.join(sorted(names - {'lm_head'}))}",
    )
