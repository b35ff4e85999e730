"""What may change between a run and its resumption: one table, one rule for each field of `TrainSpec`.

    fixed   the state on disk, or the meaning of the steps already done, depends on it: resuming is refused
    said    it changes what the next steps do, by the user's will: allowed, and reported
    free    it changes how the steps are computed or watched, not what they compute (beyond rounding): allowed

A field without a rule of its own follows the nearest one above it; a field that nothing covers is fixed. Needs no
torch: the command line checks before anything starts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from farspan.errors import JobError
from farspan.trainer.config import TrainSpec

Rule = Literal["fixed", "said", "free"]

_SAME_PARAMETERS = "masters and moments belong to these parameters"
_SAME_ORDER = "the place in the data is a count of packs, and packs would be others"
_NEW_CURVE = "the learning rate of later steps is computed from it; earlier steps used the old one"
_MOMENTS = "the moments were averaged with it"

RULES: dict[str, tuple[Rule, str]] = {
    "run_dir": ("free", "a run folder may be moved"),
    "tokens_dir": ("free", "a token store may be moved; what is in it follows from data and model"),
    "model": ("fixed", _SAME_PARAMETERS),
    "adapter": ("fixed", _SAME_PARAMETERS),
    "adapter.dropout": ("said", "the next steps drop another share"),
    "adapter.keep_rows": ("said", "the next steps estimate A's gradient from another share of the rows"),
    "adapter.init_packs": ("free", "the start was found before the first step"),
    "adapter.fraction_bits": ("said", "hidden states are rounded to other steps from now on"),
    "adapter.anchor_every": ("said", "streams come back with another error from now on"),
    "adapter.tolerance": ("said", "streams may come back with another error from now on"),
    "adapter.inside.keep_rows": ("said", "the next steps estimate A's gradient from another share of the rows"),
    "adapter.inside.init_packs": ("free", "the start was found before the first step"),
    "adapter.inside.dropout": ("said", "the next steps drop another share"),
    "adapter.store": ("free", "the same steps from what is stored instead of computed back"),
    "base": ("fixed", "the adapter was trained against these weights"),
    "data": ("fixed", _SAME_ORDER),
    "precision": ("fixed", "the steps done were computed in it, and the exported weights are rounded to it"),
    "packs_per_step": ("fixed", "a step would mean another number of tokens, and the cursor counts steps' packs"),
    "mesh": ("free", "state is addressed by parameter and offset, packs by their global number"),
    "exchange": ("said", "the next steps' attention is rounded so between ranks"),
    "exchange.type": ("fixed", "the bits of the exchange are trained with the model"),
    "zero": ("free", "state is addressed by parameter and offset"),
    "cpu_offload": ("free", "the same update in another place"),
    "addresses": ("free", "the same tensors in other places"),
    "accumulation": ("free", "covered by packs_per_step = mesh.dp x accumulation"),
    "warmup_steps": ("said", _NEW_CURVE),
    "optim.type": ("fixed", _MOMENTS),
    "optim.lr": ("said", _NEW_CURVE),
    "optim.steps": ("said", _NEW_CURVE),
    "optim.tokens_per_step": ("free", "covered by packs_per_step"),
    "optim.warmup_steps": ("free", "covered by warmup_steps"),
    "optim.schedule": ("said", _NEW_CURVE),
    "optim.min_lr_ratio": ("said", _NEW_CURVE),
    "optim.decay_share": ("said", _NEW_CURVE),
    "optim.weight_decay": ("said", "the next steps decay by it"),
    "optim.beta1": ("fixed", _MOMENTS + ", and bias correction assumes one value for all steps"),
    "optim.beta2": ("fixed", _MOMENTS + ", and bias correction assumes one value for all steps"),
    "optim.eps": ("said", "the next steps divide by it"),
    "optim.rank": ("fixed", "the moments are so wide"),
    "optim.every": ("said", "the next subspaces are chosen in other steps"),
    "optim.scale": ("said", _NEW_CURVE),
    "optim.norm": ("said", "the next subspaces are chosen by it"),
    "optim.feedback": ("fixed", "what was left out is stored so"),
    "optim.trust_min": ("said", "the next steps are bounded by it"),
    "optim.trust_max": ("said", "the next steps are bounded by it"),
    "optim.momentum": ("fixed", _MOMENTS),
    "optim.nesterov": ("said", "the next steps look ahead or not"),
    "optim.ns_steps": ("said", "the next steps are made orthogonal so far"),
    "optim.in_backward": ("free", "the same update at another moment"),
    "optim.clip_norm": ("said", "the next steps are clipped to it"),
    "density": ("said", "the next steps are penalised by it"),
    "optim.seed": ("fixed", "order of the data and the adapter's first weights come from it"),
    "memory": ("free", "where activations live and in what tiles they are computed"),
    "placement": ("free", "where activations live"),
    "tiers": ("free", "where activations live"),
    "plan_step_s": ("free", "a prediction"),
    "plan_device_peak_bytes": ("free", "a prediction"),
    "checkpoint": ("free", "when and what is saved"),
    "evaluate": ("free", "when the held-out loss is taken"),
    "evaluate.share": ("fixed", "documents would move between training and validation"),
    "track": ("free", "where metrics go"),
    "attempt": ("free", "counts starts"),
}


@dataclass(frozen=True)
class Change:
    """One field that differs between a checkpoint's job and the job that resumes it."""

    field: str
    old: Any
    new: Any
    rule: Rule
    reason: str

    def __str__(self) -> str:
        return f"{self.field} was {self.old}, is {self.new} ({self.reason})"


def resume_changes(old: dict[str, Any], new: TrainSpec) -> list[Change]:
    """Every difference that is not free, in the order of the fields.

    Args:
        old: `Manifest.job` of the checkpoint.
        new: the job that resumes.
    """
    with contextlib.suppress(ValidationError):  # what an older version did not write yet is what it did: the default
        old = TrainSpec.model_validate(old).model_dump(mode="json")
    before, after = _flat(old), _flat(new.model_dump(mode="json"))
    changes = []
    for name in [*after, *(name for name in before if name not in after)]:
        if before.get(name) != after.get(name):
            rule, reason = rule_of(name)
            if rule != "free":
                changes.append(Change(name, before.get(name), after.get(name), rule, reason))
    return changes


def resume_conflicts(old: dict[str, Any], new: TrainSpec) -> list[Change]:
    """The differences that forbid resuming."""
    return [change for change in resume_changes(old, new) if change.rule == "fixed"]


def check_resume(old: dict[str, Any], new: TrainSpec, *, at: str) -> list[Change]:
    """Refuse a job that contradicts its checkpoint; returns the allowed changes that must be reported.

    Args:
        old: `Manifest.job` of the checkpoint.
        new: the job that resumes.
        at: the checkpoint, for the error.

    Raises:
        JobError: lists every conflict.
    """
    conflicts = resume_conflicts(old, new)
    if conflicts:
        raise JobError(
            f"the job cannot resume this run: {len(conflicts)} setting(s) changed that must stay",
            at=at,
            why="; ".join(map(str, conflicts)),
            try_="set them back, or start a run under another name",
        )
    return [change for change in resume_changes(old, new) if change.rule == "said"]


def rule_of(name: str) -> tuple[Rule, str]:
    """Rule of a dotted field name: its own, or that of the nearest field above it."""
    while name not in RULES:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return "fixed", "no rule says that it may change"
    return RULES[name]


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    """Dotted leaves of a dumped `TrainSpec`, with the packs of a step as a field of their own."""
    leaves: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            leaves[prefix] = value

    walk("", spec)
    leaves["packs_per_step"] = leaves.get("mesh.dp", 1) * leaves.get("accumulation", 1)
    return leaves
