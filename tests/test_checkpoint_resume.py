"""What may change on resume: every field has a rule, and the table means what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from checkpoint_gang import spec
from pydantic import BaseModel

from farspan.errors import JobError
from farspan.memory.config import MemoryBudget
from farspan.trainer.config import (
    AMAQ,
    NF4,
    ChatData,
    Checkpoint,
    Evaluate,
    LoRA,
    Mesh,
    Model,
    Optim,
    TextData,
    Track,
    TrainSpec,
)
from farspan.trainer.resume_rules import RULES, check_resume, resume_changes, resume_conflicts, rule_of

SPEC = spec(Path("/run"), dp=2, accumulation=2, adapter=LoRA(rank=4))
OLD = SPEC.model_dump(mode="json")


def leaves(annotation: Any, prefix: str) -> list[str]:
    """Dotted names of every field below a schema, all variants of unions included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [
            leaf
            for name, field in annotation.model_fields.items()
            for leaf in leaves(field.annotation, f"{prefix}.{name}" if prefix else name)
        ]
    inner = [leaf for part in get_args(annotation) for leaf in leaves(part, prefix) if leaf != prefix]
    return inner or [prefix]


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    names = leaves(TrainSpec, "")
    assert len(names) > 60
    assert [name for name in names if "no rule" in rule_of(name)[1]] == []
    prefixes = {name[: len(name) - len(rest)].rstrip(".") for name in names for rest in _tails(name)}
    assert set(RULES) - prefixes == {"packs_per_step"}


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) + 1)]


EXCHANGE = [f"exchange.{name}" for name in AMAQ.model_fields if name != "type"]
CHANGES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({}, {}),
    ({"mesh": Mesh(dp=1, sp=4), "accumulation": 4, "zero": 3, "cpu_offload": True}, {}),
    ({"memory": MemoryBudget(mlp_tile=64), "attempt": 3}, {}),
    ({"checkpoint": Checkpoint(every=1, keep=9), "track": Track(wandb="x"), "run_dir": "/moved"}, {}),
    ({"evaluate": Evaluate(every=3)}, {}),
    ({"optim": Optim(tokens_per_step="256")}, {}),
    ({"optim": Optim(lr=1e-3)}, {"optim.lr": "said"}),
    ({"optim": Optim(steps=200), "warmup_steps": 6}, {"warmup_steps": "said", "optim.steps": "said"}),
    ({"adapter": LoRA(rank=4, dropout=0.1)}, {"adapter.dropout": "said"}),
    ({"mesh": Mesh(dp=1)}, {"packs_per_step": "fixed"}),
    ({"accumulation": 1}, {"packs_per_step": "fixed"}),
    ({"optim": Optim(seed=1, beta2=0.99)}, {"optim.beta2": "fixed", "optim.seed": "fixed"}),
    ({"precision": "bf16"}, {"precision": "fixed"}),
    ({"evaluate": Evaluate(share=0.1)}, {"evaluate.share": "fixed"}),
    ({"data": TextData("stdlib", context=128)}, {"data.context": "fixed"}),
    ({"data": TextData(("a", "b"), context=64, pack=False)}, {"data.source": "fixed", "data.pack": "fixed"}),
    ({"adapter": LoRA(rank=8)}, {"adapter.rank": "fixed"}),
    ({"exchange": AMAQ()}, dict.fromkeys(("exchange.type",), "fixed") | dict.fromkeys(EXCHANGE, "said")),
]


@pytest.mark.parametrize(("update", "expected"), CHANGES, ids=[str(list(update)) for update, _ in CHANGES])
def test_changes_are_judged_by_the_table(update: dict[str, Any], expected: dict[str, str]) -> None:
    new = SPEC.model_copy(update=update)
    assert {change.field: change.rule for change in resume_changes(OLD, new)} == expected
    fixed = [name for name, rule in expected.items() if rule == "fixed"]
    assert [change.field for change in resume_conflicts(OLD, new)] == fixed
    if not fixed:
        assert [change.field for change in check_resume(OLD, new, at="step_1")] == list(expected)


def test_another_variant_is_a_conflict_in_every_field_it_lacks() -> None:
    new = SPEC.model_copy(update={"model": Model("org/name"), "data": ChatData("stdlib", context=64)})
    found = {change.field for change in resume_conflicts(OLD, new)}
    assert {"model.type", "model.id", "model.hidden", "data.type", "data.text_field", "data.messages_field"} <= found


def test_fields_that_an_older_version_did_not_write_are_its_defaults() -> None:
    old = json.loads(json.dumps(OLD))
    del old["base"], old["adapter"]["dora"], old["adapter"]["gamma"]
    assert resume_changes(old, SPEC) == []
    assert [c.field for c in resume_conflicts(old, SPEC.model_copy(update={"base": NF4()}))] == [
        "base.type",
        "base.double",
    ]
    old["nobody knows"] = 1  # of a later version: compared as it is
    assert "nobody knows" in {change.field for change in resume_conflicts(old, SPEC)}


def test_every_conflict_is_listed() -> None:
    new = SPEC.model_copy(update={"precision": "bf16", "optim": Optim(seed=5, lr=1.0)})
    with pytest.raises(JobError) as error:
        check_resume(OLD, new, at="checkpoints/step_5")
    assert error.value.exit_code == 2 and "2 setting(s)" in error.value.what
    assert "precision was fp32, is bf16" in error.value.why and "optim.seed was 0, is 5" in error.value.why
    assert "optim.lr" not in error.value.why
