"""Optimizers with an owner for each parameter: one rank, two and three give the same training, and resume it.

The small model has what engines get wrong (`engine_gang`); it is wide enough here that one of its matrices gets 8-bit
moments, and narrow subspaces cut two of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import engine_gang as g
import pytest
import torch
from test_engine import Gangs

from farspan.jobs.optimizers import optimizer_shape
from farspan.memory.optimizers import owners, rank_bytes
from farspan.memory.shape import TrainedTensor
from farspan.trainer.config import COAT, LAMB, AdamW8bit, DCTAdamW, GaLore, Muon, Optim, Optimizer

HIDDEN = 72
SETTINGS: dict[str, Any] = {"lr": 3e-3, "steps": 10, "weight_decay": 0.1, "clip_norm": 0.5, "beta2": 0.95}
OWNED: dict[str, Optimizer] = {
    "adamw8bit": AdamW8bit(**SETTINGS),
    "coat": COAT(**SETTINGS),
    "dct_adamw": DCTAdamW(rank=2, every=2, **SETTINGS),
    "dct_adamw, 8 bits left out": DCTAdamW(rank=2, every=2, feedback="8bit", norm="l1", **SETTINGS),
    "dct_adamw, 4 bits left out": DCTAdamW(rank=2, every=1, feedback="4bit", **SETTINGS),
    "galore": GaLore(rank=2, every=2, **SETTINGS),
    "lamb": LAMB(**SETTINGS),
    "muon": Muon(**SETTINGS),
}
CODED = ("adamw8bit", "coat", "dct_adamw, 8 bits left out", "dct_adamw, 4 bits left out")
"""A last bit of a gradient may move a code there."""
EVERY = {"adamw": Optim(**SETTINGS), **OWNED}
Whole = dict[tuple[str, str], torch.Tensor]


@pytest.fixture(scope="module")
def gangs() -> Iterator[Gangs]:
    gangs = Gangs()
    yield gangs
    gangs.close()


def run(gangs: Gangs, world_size: int, name: str, load: Any = None, **case: Any) -> list[dict[str, Any]]:
    how = {"stage": 0, "precision": "fp32", "accumulation": 2, "steps": 4, "hidden": HIDDEN, **case}
    return gangs.train(world_size, load, optim=EVERY[name], **how)


def whole_state(results: list[dict[str, Any]]) -> Whole:
    """State of all ranks; every tensor whole on exactly one of them."""
    state: Whole = {}
    for result in results:
        for name, kind, shape, offset, tensor in result["pieces"]:
            assert (name, kind) not in state, "two ranks hold it"
            assert offset == 0 and tensor.numel() == math.prod(shape)
            state[name, kind] = tensor
    return state


@pytest.mark.parametrize("name", OWNED)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one(gangs: Gangs, name: str, world_size: int) -> None:
    (alone,), shared = run(gangs, 1, name), run(gangs, world_size, name)
    close = 2e-5 if name in CODED else 1e-6
    for result in shared:
        assert result["loss"] == shared[0]["loss"], "all ranks have the same weights"
        assert result["loss"] == pytest.approx(alone["loss"], rel=close)
        assert result["norms"] == pytest.approx(alone["norms"], rel=10 * close)
    assert abs(alone["loss"] / alone["start_loss"] - 1) > 1e-2, "something was trained"
    one, many = whole_state([alone]), whole_state(shared)
    assert one.keys() == many.keys()
    for key, tensor in many.items():
        assert tensor.dtype == one[key].dtype
        if key[1] == "master":
            assert (tensor - one[key]).norm() <= 100 * close * one[key].norm(), key


@pytest.mark.parametrize("name", OWNED)
def test_a_rank_holds_what_is_planned(gangs: Gangs, name: str) -> None:
    trained = g.trainable_of(g.Toy(hidden=HIDDEN), None)
    tensors = [TrainedTensor(shape=tuple(p.shape), inside=n != "embed.weight") for n, p in trained.items()]
    for world_size in (1, 2, 3):
        held = []
        for result in run(gangs, world_size, name):
            kinds = [(kind, tensor) for _, kind, _, _, tensor in result["pieces"]]
            numel = sum(tensor.numel() for kind, tensor in kinds if kind == "master")
            held.append((numel, sum(tensor.nbytes for kind, tensor in kinds if kind != "master")))
        fullest = max(held, key=lambda one: 4 * one[0] + one[1])
        assert fullest == rank_bytes(optimizer_shape(OWNED[name]), tensors, world_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OWNED)
def test_resume_is_bit_equal(gangs: Gangs, name: str, precision: str) -> None:
    straight = run(gangs, 2, name, precision=precision)
    half = run(gangs, 2, name, precision=precision, steps=2)
    resumed = run(gangs, 2, name, load=(2, whole_state(half)), precision=precision, steps=2)
    assert resumed[0]["start_loss"] == half[0]["loss"]
    for after, once in zip(resumed, straight):
        assert after["norms"] == once["norms"][2:]
        assert after["loss"] == once["loss"]
        for (*address, tensor), (*expected_address, expected) in zip(after["pieces"], once["pieces"], strict=True):
            assert address == expected_address
            assert torch.equal(tensor, expected), address


@pytest.mark.parametrize("name", OWNED)
@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 3)])
def test_resume_on_another_number_of_ranks(gangs: Gangs, name: str, source: int, target: int) -> None:
    half, straight = run(gangs, source, name, steps=2), run(gangs, target, name)
    resumed = run(gangs, target, name, load=(2, whole_state(half)), steps=2)
    close = 2e-5 if name in CODED else 1e-6
    assert resumed[0]["start_loss"] == pytest.approx(half[0]["loss"], rel=1e-6)
    assert resumed[0]["loss"] == pytest.approx(straight[0]["loss"], rel=close)
    assert resumed[0]["norms"] == pytest.approx(straight[0]["norms"][2:], rel=10 * close)


@pytest.mark.parametrize("name", OWNED)
def test_a_non_finite_gradient_leaves_the_weights(gangs: Gangs, name: str) -> None:
    for result in run(gangs, 2, name, poison_step=2, steps=3):
        first, poisoned, after = result["norms"]
        assert math.isfinite(first) and not math.isfinite(poisoned) and math.isfinite(after)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_in_backward_is_the_same_step(gangs: Gangs, name: str, precision: str, world_size: int) -> None:
    """Bit for bit, with a backward inside backward and a parameter that every other step does not touch."""
    case = {"stage": 0, "precision": precision, "accumulation": 1, "steps": 3, "hidden": HIDDEN}
    case |= {"clip_norm": None, "recompute": True}
    optim = EVERY[name].model_copy(update={"clip_norm": None})
    after = gangs.train(world_size, optim=optim, **case)
    inside = gangs.train(world_size, optim=optim.model_copy(update={"in_backward": True}), **case)
    for one, other in zip(after, inside):
        assert one["loss"] == other["loss"]
        assert one["norms"] == pytest.approx(other["norms"], rel=1e-6)
        for (*address, tensor), (*_, expected) in zip(other["pieces"], one["pieces"], strict=True):
            assert torch.equal(tensor, expected), address


def test_owners_are_balanced() -> None:
    numels = [7, 100, 3, 40, 41, 60, 1, 99]
    for ranks in range(1, 6):
        found = owners(numels, ranks)
        loads = [sum(n for n, rank in zip(numels, found) if rank == r) for r in range(ranks)]
        assert sum(loads) == sum(numels)
        assert max(loads) <= max(100, math.ceil(4 / 3 * sum(numels) / ranks))
