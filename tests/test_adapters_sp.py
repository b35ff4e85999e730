"""Every deterministic method gives the same losses, gradients and updates on one rank and on two of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, codes_on_rank, step_on_rank
from sp_ranks import on_ranks

from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.trainer.bases.config import LQ, NF4, Int8
from farspan.trainer.config import (
    L4Q,
    PEQA,
    PV,
    S2A,
    DensityLoss,
    LoRA,
    PaCA,
    Reversible,
    UniPT,
)

pytestmark = pytest.mark.timeout(300)

LORA = LoRA(rank=4, alpha=8.0)
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": LORA},
    "DoRA": {"adapter": LORA.model_copy(update={"dora": True})},
    "PaCA": {"adapter": PaCA(rank=4)},
    "PEQA": {"adapter": PEQA(bits=4)},
    "PEQA, groups": {"adapter": PEQA(bits=3, group=16)},
    "S2A": {"adapter": S2A(prompt=3, side=16)},
    "UniPT": {"adapter": UniPT(reduction=4)},
    "UniPT on int8, inputs kept": {"adapter": UniPT(reduction=2, store="inputs"), "base": Int8()},
    "S2A on nf4": {"adapter": S2A(), "base": NF4()},
    "LoRA, density loss": {"adapter": LORA, "density": DensityLoss(weight=0.3, eps=1e-3)},
    "L4Q": {"adapter": L4Q(rank=4, bits=4)},
    "L4Q, groups": {"adapter": L4Q(rank=4, bits=3, group=16, start="lsq")},
    "LoRA on nf4": {"adapter": LORA, "base": NF4()},
    "LoRA on lq": {"adapter": LORA, "base": LQ(bits=3.2)},
    "PaCA on int8": {"adapter": PaCA(rank=4), "base": Int8()},
    "reversible 1": {"adapter": Reversible(wiring=1, bits=3, width=8, inside=LORA)},
    "reversible 1, L4Q": {"adapter": Reversible(wiring=1, bits=3, inside=L4Q(rank=4))},
    "reversible 2": {"adapter": Reversible(wiring=2, bits=3, width=8, inside=PaCA(rank=4))},
    "reversible 1, float": {"adapter": Reversible(form="float", wiring=1, width=8, inside=LORA)},
    "reversible 2, float": {"adapter": Reversible(form="float", wiring=2, factors=(0.7, 0.4), inside=LORA)},
    "reversible 3, float": {"adapter": Reversible(form="float", wiring=3, inside=PaCA(rank=4))},
    "reversible 3 on nf4": {"adapter": Reversible(wiring=3, bits=3, inside=LORA), "base": NF4()},
}


def cases(sp: int) -> list[dict[str, Any]]:
    plan = LayerPlan(x=Rows(device=300 // sp))
    placement = Placement(rows=300 // sp, attention_rows=300, layers=(plan,) * LAYERS)
    return [{**case, "placement": placement} for case in CASES.values()]


def test_one_rank_and_two_agree() -> None:
    """To 1e-5 of the largest element, fp32; a stream's rounding may move a hidden state by 2^-17."""
    (alone,) = on_ranks(step_on_rank, 1, (1, 1), cases(1))
    shared, _ = on_ranks(step_on_rank, 2, (1, 2), cases(2))
    for name, one, two in zip(CASES, alone, shared):
        compared = 0
        for key, want in one.items():
            if key.endswith((" exp_avg", " exp_avg_sq", " master")):
                continue  # each rank has its slice of these
            scale = float(want.abs().max())
            off = float((two[key] - want).abs().max()) / max(scale, 1e-12)
            allowed = 1e-5 if "reversible" not in name else 2e-4
            assert off <= allowed, (name, key, off)
            compared += 1
        assert compared > (2 * LAYERS if "UniPT" not in name else 7), name
    assert all(torch.isfinite(t).all() for run in alone for t in run.values())


@pytest.mark.parametrize("group", [None, 16])
def test_integers_change_alike(group: int | None) -> None:
    """Four steps of PV-Tuning, two of which choose integers: one rank against two of a sequence, which agree."""
    adapter = PV(bits=3, group=group, share=0.05, trust=0.1)
    (alone,) = on_ranks(codes_on_rank, 1, (1, 1), adapter)
    one, two = on_ranks(codes_on_rank, 2, (1, 2), adapter)
    untrained = {name: b for name, b in Model(adapter=adapter).model.named_buffers() if name.endswith(".packed")}
    changed = 0
    for name, want in alone.items():
        assert torch.equal(one[name], two[name]), name
        if name.endswith(" codes"):
            assert torch.equal(one[name], want), name
            changed += int((want != untrained[name.removesuffix(" codes")]).sum())
        else:
            torch.testing.assert_close(one[name], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert changed > 100
