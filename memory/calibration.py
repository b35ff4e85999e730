"""Measured profiles and rates of this machine, kept between runs.

A profile belongs to a model's shape, a way of training it, library versions and a device: together they are its key,
and a file of the user's cache holds it. Numbers of another key are never used. What a calibration does not cover
(budgets, the optimizer's seconds, exchanges between ranks) still comes from a hardware file, and is said to be assumed.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from farspan.memory.analytic import exchange_amount
from farspan.memory.build import build_problem
from farspan.memory.hardware import Hardware
from farspan.memory.problem import Budgets, Links, PlanProblem
from farspan.memory.profile import Amount, HeadProfile, KindProfile, Profile, Source
from farspan.memory.reversible import reversible
from farspan.memory.shape import ModelShape, OptimizerShape, Training, Weights
from farspan.memory.states import gradient_width, model_states, optimizer_s, step_peak_bytes
from farspan.memory.tier_codes import coded
from farspan.schema import Schema

CODE_VERSION = 7
"""Of what a profile means; a higher one forgets all calibrations."""


class MeasuredLinks(Schema):
    """Sustained rates of this machine's lanes."""

    links: Links
    source: Source


class Measured(Schema):
    """What a measurement on a machine gives."""

    profile: Profile
    links: MeasuredLinks


class Calibration(Measured):
    """What was measured for one key."""

    key: dict[str, Any]


def calibration_key(shape: ModelShape, training: Training, device: str, model: str) -> dict[str, Any]:
    """All that a profile depends on. Ranks of other groups, and how states are shared out, are not among it, except
    that they decide what becomes of gradients.

    Args:
        model: which model it is, beyond its shape: families of the same shape have other biases, norms, experts.
    """
    neutral: dict[str, Any] = {"dp": 1, "zero": 0, "cpu_offload": False, "micro_batches": 1, "coupling": None}
    neutral["optimizer"] = OptimizerShape()
    return {
        "code": CODE_VERSION,
        "device": device,
        "model": model,
        "shape": shape.model_dump(mode="json", exclude={"layers", "tied", "forms"}),
        "kinds": sorted({shape.form(layer).name for layer in range(shape.layers)}),
        "tied": shape.tied,
        "training": training.model_copy(update=neutral).model_dump(mode="json"),
        "gradients": gradients_of(training, stay=gradient_width(training) > 0),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def gradients_of(training: Training, *, stay: bool) -> str:
    """As `samples.Gradients`."""
    if not stay:
        return "handed on"
    return "added" if training.micro_batches > 1 else "first"


def calibration_path(folder: Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return folder / "profiles" / f"{digest}.json"


def load_calibration(folder: Path, key: dict[str, Any]) -> Calibration | None:
    """The calibration of this key, if there is a sound one."""
    try:
        found = Calibration.model_validate_json(calibration_path(folder, key).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return found if found.key == key else None


def calibrated_problem(
    calibration: Calibration,
    shape: ModelShape,
    training: Training,
    hardware: Hardware,
    context: int,
    *,
    budgets: Budgets | None = None,
) -> PlanProblem:
    """The problem of a job from what was measured; see `build.problem_for`."""
    profile = calibration.profile
    assert profile.sp == training.sp, (profile.sp, training.sp)
    names = tuple(shape.form(layer).name for layer in range(shape.layers))
    profile = profile.model_copy(update={"layers": names})
    profile = coded(profile, shape, training, hardware)
    if training.coupling is not None:
        profile = reversible(profile, shape, training, hardware.memory_bytes_per_s)
    weights = _weights(profile, profile.layers)
    head = profile.head.model_copy(
        update={
            "step_peak_bytes": step_peak_bytes(training, hardware, weights),
            "step_s": optimizer_s(training, hardware, weights),
        }
    )

    def with_exchange(kind: KindProfile) -> KindProfile:
        assert kind.weights is not None
        return _with_exchange(kind, exchange_amount(shape, training, hardware, kind.weights.bytes, with_coding=False))

    whole = profile.model_copy(
        update={
            "kinds": tuple(with_exchange(kind) for kind in profile.kinds),
            "head": HeadProfile.model_validate(head.model_dump()),
            # `--longest` also asks for contexts of a single tile, which run untiled and need a little more
            "mlp_tile": profile.mlp_tile if (profile.mlp_tile or 0) < -(-context // training.sp) else None,
        }
    )
    return build_problem(
        whole,
        states=model_states(training, hardware, weights),
        context=context,
        budgets=hardware.budgets() if budgets is None else budgets,
        links=calibration.links.links,
        micro_batches=training.micro_batches,
    )


def _weights(profile: Profile, layers: tuple[str, ...]) -> Weights:
    """All of a model, from what its kinds of layers and the rest were seen to have."""
    assert profile.head.weights is not None, "a measured profile counts weights"
    of_kind = {kind.name: kind.weights for kind in profile.kinds}
    total = profile.head.weights
    for name in layers:
        one = of_kind[name]
        assert one is not None
        total = total + one
    return total


def _with_exchange(kind: KindProfile, exchange: Amount) -> KindProfile:
    def plus(amount: Amount) -> Amount:
        return amount.model_copy(
            update={
                "constant": amount.constant + exchange.constant,
                "per_row": amount.per_row + exchange.per_row,
            }
        )

    return kind.model_copy(
        update={
            "exchange_s": exchange,
            "forward_s": plus(kind.forward_s),
            "backward_s": plus(kind.backward_s),
        }
    )


ASSUMED_STILL = (
    "device_bytes",
    "host_bytes",
    "disk_bytes",
    "context_bytes",
    "collective_bytes",
    "all_to_all_bytes_per_s",
)


def sources_of(calibration: Calibration | None, hardware: Hardware) -> dict[str, Source]:
    """Where each group of numbers of a plan comes from."""
    if calibration is None:
        return hardware.sources
    left = {name: hardware.sources[name] for name in ASSUMED_STILL}
    optimizer = hardware.source("memory_bytes_per_s", "host_memory_bytes_per_s")
    return {**calibration.profile.sources, "links": calibration.links.source, "optimizer": optimizer, **left}
