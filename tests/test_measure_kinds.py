"""Models whose layers differ, or have no analytic profile: measured kind by kind, and planned from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.errors import JobError, NoProfile
from farspan.jobs.facts import ModelFacts, model_facts
from farspan.jobs.plan import shape_of
from farspan.memory.allocations import allocated_bytes, footprint
from farspan.memory.analytic import analytic_profile
from farspan.memory.calibration import Calibration, Measured, calibrated_problem
from farspan.memory.config import Tiles
from farspan.memory.evaluate import evaluate
from farspan.memory.hardware import load_hardware
from farspan.memory.policies import FixedPolicy, fixed_policy
from farspan.memory.problem import Budgets, PlanProblem
from farspan.memory.shape import Training
from farspan.memory.solve import solve
from farspan.trainer.attention import NAME, PackedSequence
from farspan.trainer.calibrate import profile_of
from farspan.trainer.config import (
    AMAQ,
    CalibrationRequest,
    ExactExchange,
    FullFineTune,
    Model,
    Optim,
    RandomModel,
)
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.models import prepare_model

CPU = load_hardware("cpu")
ROWS = 3072
AMPLE = Budgets(device_bytes=1 << 40, host_bytes=1 << 40, disk_bytes=1 << 40)
COMMON = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160,
    "vocab_size": 300, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], **EXPERTS}),
    "windows": ("qwen3", {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0,
    }),
    "recurrence": ("qwen3_next", {
        "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [], **EXPERTS,
    }),
}  # fmt: skip


def made(tmp_path: Path, name: str) -> tuple[Path, ModelFacts, Any]:
    family, special = MODELS[name]
    config = AutoConfig.for_model(family, **COMMON, **special)
    config.save_pretrained(tmp_path / name)
    return tmp_path / name, model_facts(Model(str(tmp_path / name))), config


def test_codes_between_ranks_are_measured_on_a_lone_rank() -> None:
    """More bits, less error; none asked for, none measured."""
    errors = []
    for bits in (3.0, 6.0):
        request = CalibrationRequest(
            model=RandomModel(hidden=64, layers=1, heads=4, kv_heads=2, ffn=96, vocab=300),
            adapter=FullFineTune(),
            precision="fp32",
            memory=Tiles(loss_tile=128),
            context=512,
            sp=2,
            exchange=AMAQ(bits=bits),
            kinds=("layer",),
            gradients="first",
        )
        (kind,) = profile_of(request, torch.device("cpu")).kinds
        assert kind.exchange_error is not None and kind.exchange_error.weights is not None
        errors.append(kind.exchange_error.weights)
        (exact,) = profile_of(request.model_copy(update={"exchange": ExactExchange()}), torch.device("cpu")).kinds
        assert exact.exchange_error is None
    assert 0 < errors[1] < errors[0] / 4 < 0.25, errors


def problem_of(folder: Path, facts: ModelFacts) -> tuple[PlanProblem, Measured]:
    shape, training = shape_of(facts), Training(precision="fp32", loss_tile=128)
    request = CalibrationRequest(
        model=Model(str(folder)),
        adapter=FullFineTune(),
        precision="fp32",
        memory=Tiles(loss_tile=128),
        context=ROWS,
        sp=1,
        kinds=tuple(shape.form(layer).name for layer in range(shape.layers)),
        gradients="first",
    )
    profile = profile_of(request, torch.device("cpu"))
    links: Any = {"links": CPU.links().model_dump(), "source": {"how": "measured", "what": "a test"}}
    measured = Measured(profile=profile, links=links)
    calibration = Calibration(key={}, profile=profile, links=measured.links)
    return calibrated_problem(calibration, shape, training, CPU, ROWS, budgets=AMPLE), measured


def peak_of_a_step(config: Any, placement: Any) -> int:
    before = allocated_bytes()
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=NAME)
    module, trainable = prepare_model(
        causal,
        adapter=FullFineTune(),
        memory=Tiles(loss_tile=128),
        seed=0,
        placement=None if placement.keeps_everything else placement,
    )
    engine = PlainEngine(module, trainable, Optim(), "cpu")

    def step(rows: int = ROWS) -> None:
        ids = torch.randint(2, 300, (1, rows), generator=torch.Generator().manual_seed(1))
        loss = module(ids, ids.roll(-1, 1), torch.arange(rows)[None], PackedSequence((rows,)))
        engine.backward(loss / rows, last=True)
        engine.step(lr=1e-4, clip_norm=1.0)

    step(1024)
    states = allocated_bytes() - before
    took = footprint(step, torch.device("cpu"))
    engine.close()
    return states + took.peak_bytes


@pytest.mark.parametrize(
    ("name", "policy"),
    [("experts", "keep"), ("experts", "recompute"), ("windows", "recompute"), ("recurrence", "recompute")],
)
def test_planned_peaks_of_mixed_layers(tmp_path: Path, name: str, policy: FixedPolicy) -> None:
    folder, facts, config = made(tmp_path, name)
    problem, _ = problem_of(folder, facts)
    assert len(problem.kinds) == 2
    placement = fixed_policy(problem, policy)
    planned = evaluate(problem, placement).device_peak_bytes
    measured = peak_of_a_step(config, placement)
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_and_kinds_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    folder, facts, config = made(tmp_path, name)
    problem, measured = problem_of(folder, facts)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    (weights,) = (state.bytes for state in problem.states if state.name == "weights")
    assert weights == sum(p.nbytes for p in whole.parameters())
    forms = [facts.form(layer).name for layer in range(4)]
    assert list(problem.layers) == forms
    assert {kind.name for kind in measured.profile.kinds} == set(forms)
    if name == "experts":
        assert forms == ["full", "full, 4 experts"] * 2
    if name == "recurrence":
        assert forms == ["linear, 4 experts", "full, 4 experts"] * 2
        assert problem.kind(0).o_bytes == 0 < problem.kind(1).o_bytes
    scarce = evaluate(problem, fixed_policy(problem, "recompute")).device_peak_bytes
    tight = problem.model_copy(update={"budgets": Budgets(device_bytes=scarce, host_bytes=1 << 24)})
    assert solve(tight).prediction.fits


def test_without_measuring_they_are_refused(tmp_path: Path) -> None:
    for name in ("experts", "recurrence"):
        _, facts, _ = made(tmp_path, name)
        assert facts.must_be_measured
        with pytest.raises(NoProfile):
            analytic_profile(shape_of(facts), Training(), CPU)
    assert issubclass(NoProfile, JobError)
