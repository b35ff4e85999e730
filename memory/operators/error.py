"""How far codes, of saved activations or of what crosses ranks, turn a layer's gradients away from those without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from farspan.memory.operators.settings import Settings
from farspan.memory.problem import GradientError
from farspan.memory.single_layers import nothing_zero

SETTINGS = "activations_kept_as"


def settings_of(layer: nn.Module) -> Settings | None:
    """What `keep_less` gave a decoder layer."""
    return getattr(layer, SETTINGS, None)


def gradient_error(
    layer: nn.Module,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    seed: int = 0,
    without: Callable[[], AbstractContextManager[None]] | None = None,
) -> GradientError | None:
    """Compare one backward through codes with one without; both draw the same dropout.

    The gradient of the output is random, so that what is summed over rows does not add up: a loss's own gradient does,
    and is off by less. Parameters that are all zeros, as an adapter's second factor at its start, are given small
    random values meanwhile.
    Costs two forwards and backwards of the layer and its gradients three times.

    Args:
        layer: in training mode, before an engine listens to its gradients.
        call: the layer as the model calls it, hidden states apart.
        x: [1, s, d], hidden states the layer is given.
        seed: of the gradient of the output, normal, and of all that the layer draws.
        without: inside, the codes in question are left out. Default: those of saved activations.

    Returns:
        ||with codes - without|| / ||without||, all trained parameters together; None where the layer has no codes.
    """
    settings = settings_of(layer)
    if without is None:
        if settings is None or settings.kind == "fused":
            return None
        without = settings.measured_against
    return error_between(call, without, x, layer.parameters(), seed=seed)


def error_between(
    call: Callable[[Tensor], Tensor],
    without: Callable[[], AbstractContextManager[object]],
    x: Tensor,
    parameters: Iterable[nn.Parameter],
    *,
    seed: int,
) -> GradientError:
    """As `gradient_error`, of anything that some parameters are used in; inside `without` there are no codes."""
    trained = [p for p in parameters if p.requires_grad]
    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(cuda, device_type="cuda"), nothing_zero(trained), _gradients_apart(trained):
        with without():
            *wanted, wanted_input = _gradients(call, x, trained, seed)
        *found, found_input = _gradients(call, x, trained, seed)
    return GradientError(weights=_off(found, wanted), input=_off([found_input], [wanted_input]) or 0.0)


def _gradients(call: Callable[[Tensor], Tensor], x: Tensor, trained: list[nn.Parameter], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    dy = torch.randn_like(x)
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        call(leaf).backward(dy)
    assert leaf.grad is not None
    found = []
    for p in trained:
        found.append(p.grad if p.grad is not None else torch.zeros_like(p))
        p.grad = None
    return [*found, leaf.grad]


@contextmanager
def _gradients_apart(trained: list[nn.Parameter]) -> Iterator[None]:
    """Gradients that are there already are there again afterwards."""
    before = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(trained, before):
            p.grad = grad


def _off(found: list[Tensor], wanted: list[Tensor]) -> float | None:
    off = sum(float((f.float() - w.float()).square().sum()) for f, w in zip(found, wanted))
    whole = sum(float(w.float().square().sum()) for w in wanted)
    return (off / whole) ** 0.5 if whole else None
