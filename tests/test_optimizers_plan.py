"""What the planner counts of an optimizer, against storages and the allocator; what a job may not ask of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from executor_models import Model, differing, segments, tokens
from test_jobs_resolve import done, make

from farspan import PEQA, SFTJob
from farspan.errors import JobError
from farspan.jobs.facts import model_facts
from farspan.jobs.load import load
from farspan.jobs.optimizers import optimizer_shape
from farspan.jobs.plan import training_of
from farspan.memory.allocations import footprint
from farspan.memory.executor import Executor
from farspan.memory.hardware import load_hardware
from farspan.memory.optimizers import step_flop, workspace_bytes
from farspan.memory.samples import weights_in
from farspan.memory.shape import AdapterShape, ModelShape, Training
from farspan.memory.states import gradient_width, model_states, optimizer_s, step_peak_bytes, weights_of
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import (
    COAT,
    LAMB,
    AdamW8bit,
    DCTAdamW,
    FullFineTune,
    GaLore,
    LoRA,
    Muon,
    Optim,
    Optimizer,
    PaCA,
    Parallel,
    RandomModel,
    Reversible,
)
from farspan.trainer.engine_in_backward import InBackwardEngine
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.tiling import tile_mlp

CPU, H200 = load_hardware("cpu"), load_hardware("h200")
DEVICE = torch.device("cpu")
EVERY: tuple[Optimizer, ...] = (
    Optim(),
    AdamW8bit(),
    COAT(),
    DCTAdamW(rank=8),
    DCTAdamW(rank=8, feedback="8bit"),
    DCTAdamW(rank=8, feedback="4bit"),
    GaLore(rank=8),
    LAMB(),
    Muon(),
)
NAMES = [f"{o.type}{getattr(o, 'feedback', '')}" for o in EVERY]
LLAMA = ModelShape(hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=300)
ADAPTERS: dict[str, tuple[Any, AdapterShape | None]] = {
    "all": (FullFineTune(), None),
    "lora": (LoRA(rank=16), AdapterShape(rank=16)),
    "dora": (LoRA(rank=16, dora=True), AdapterShape(rank=16, dora=True)),
    "columns": (PaCA(rank=16), AdapterShape(kind="columns", rank=16)),
}


def training(optim: Optimizer, precision: Any, adapter: AdapterShape | None = None, **more: Any) -> Training:
    return Training(precision=precision, adapter=adapter, optimizer=optimizer_shape(optim), **more)


def held(engine: PlainEngine) -> int:
    """Bytes of state storages beyond the model's weights: gradients, masters, moments."""
    tensors = [engine._flat, *engine._masters.values()]
    tensors += [t for name in engine._masters for t in engine._rule.state(name).values()]
    weights = {p.untyped_storage().data_ptr() for p in engine.trainable.values()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(size for at, size in storages.items() if at not in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("optim", EVERY, ids=NAMES)
def test_counted_is_what_lies_in_memory(optim: Optimizer, adapter: str, precision: Any) -> None:
    given, shape = ADAPTERS[adapter]
    for in_backward in (False, True):
        optim = optim.model_copy(update={"in_backward": in_backward})
        model = Model(precision=precision, adapter=given)
        trainable = model.trainable()
        engine = (InBackwardEngine if in_backward else PlainEngine)(model.loss, trainable, optim, "cpu")
        plan = training(optim, precision, shape)
        states = {s.name: s.bytes for s in model_states(plan, CPU, weights_of(LLAMA, plan))}
        counted = sum(states.get(name, 0) for name in ("gradients", "masters", "moments"))
        slack = engine._flat.numel() - sum(p.numel() for p in trainable.values()) if engine._flat.numel() else 0
        assert counted == held(engine) - 4 * slack, "but for the alignment of slots in the flat buffer"
        measured = weights_in([p for n, p in trainable.items() if ".layers." in n], inside=True)
        measured += weights_in([p for n, p in trainable.items() if ".layers." not in n], inside=False)
        from_measured = {s.name: s.bytes for s in model_states(plan, CPU, measured)}
        assert from_measured["moments"] == states["moments"], "shapes of measured layers give the same"
        engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", EVERY, ids=NAMES)
def test_a_step_takes_what_is_planned(optim: Optimizer, precision: Any) -> None:
    """By the allocator, on matrices large enough to be cut into chunks."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = torch.nn.Sequential(torch.nn.Linear(700, 500, bias=False), torch.nn.Linear(500, 700)).to(dtype)
    engine = PlainEngine(module, dict(module.named_parameters()), optim, "cpu")
    (module(torch.randn(3, 700, dtype=dtype)).float().square().sum()).backward()
    took = footprint(lambda: engine.step(lr=1e-3, clip_norm=1.0), DEVICE).peak_bytes
    plan = training(optim, precision)
    planned = step_peak_bytes(plan, CPU, weights_in(module.parameters(), inside=True))
    if optim.type == "adamw":
        assert planned == 0 and took < 10_000
        return
    assert took <= planned <= 1.3 * took + 40_000, (took, planned)


def backward_peak(optim: Optimizer, layers: int) -> tuple[int, int, int]:
    """Most bytes during forward and backward of a few rows; what forward leaves; bytes of all gradients."""
    model = Model(layers=layers)
    trainable = model.trainable()
    engine = (InBackwardEngine if optim.in_backward else PlainEngine)(model.loss, trainable, optim, "cpu")
    ids, positions = tokens([8])

    def forward() -> torch.Tensor:
        return engine.module(ids, ids.roll(-1, 1), positions, PackedSequence((8,)))

    def once() -> None:
        engine.begin(lr=1e-3)
        engine.backward(forward(), last=True)

    once()
    engine.step(lr=1e-3, clip_norm=None)
    peak = footprint(once, DEVICE).peak_bytes
    engine.step(lr=1e-3, clip_norm=None)
    left = footprint(forward, DEVICE).kept_bytes
    engine.close()
    return peak, left, sum(p.nbytes for p in trainable.values())


@pytest.mark.parametrize("optim", [Optim(clip_norm=None), Muon(clip_norm=None), COAT(clip_norm=None)])
def test_gradients_never_coexist_in_backward(optim: Optimizer) -> None:
    inside = optim.model_copy(update={"in_backward": True})
    (peak_4, left_4, whole_4), (peak_12, left_12, whole_12) = (backward_peak(inside, layers) for layers in (4, 12))
    plain_12, *_ = backward_peak(optim, 12)
    layer = (whole_12 - whole_4) // 8
    assert plain_12 > whole_12, "all gradients are there at the end"
    assert peak_12 - peak_4 <= left_12 - left_4 + 0.01 * layer, "deeper: more activations, no more gradients"
    works = workspace_bytes(optimizer_shape(optim), Training().tensors(LLAMA), width=4, device="cpu")
    assert peak_12 - left_12 < 2 * layer + works, "one layer's, and the step of a matrix"
    assert peak_12 < plain_12 - 9 * layer + works
    assert gradient_width(training(inside, "fp32")) == 0 < gradient_width(training(optim, "fp32"))


def test_an_8b_model() -> None:
    """Bytes of state a weight, and that ranks share them."""
    shape = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
    weights = shape.parameters
    per_weight = {}
    for optim in (Optim(), AdamW8bit(), COAT(), Muon(), DCTAdamW(rank=256), GaLore(rank=256)):
        plan = training(optim, "bf16")
        states = {s.name: s.bytes for s in model_states(plan, H200, weights_of(shape, plan))}
        per_weight[optim.type] = states["moments"] / weights
        shared = training(optim, "bf16", dp=8)
        on_8 = {s.name: s.bytes for s in model_states(shared, H200, weights_of(shape, shared))}
        if optim.type == "adamw":
            assert on_8["moments"] == states["moments"]
        else:
            assert 0.9 < 8 * on_8["masters"] / states["masters"] < 1.1
            assert on_8["moments"] <= 0.4 * states["moments"], "embedding and head, fp32 under some, are on two ranks"
        assert 0 < optimizer_s(plan, H200, weights_of(shape, plan)) < 60
    assert per_weight["adamw"] == 8
    assert per_weight["adamw8bit"] == pytest.approx(2 + 8 / 256, abs=1e-3)
    assert per_weight["coat"] == pytest.approx(2 + 10 / 128, abs=1e-3)
    assert 4 < per_weight["muon"] < 4.6
    assert per_weight["dct_adamw"] < per_weight["galore"] < 2
    plan = training(Muon(), "bf16")
    assert step_flop(plan.optimizer, weights_of(shape, plan).tensors) > 5 * 4 * weights * 1024


def test_plans_of_jobs_have_their_optimizer(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: t\nmodel: {type: random}\ndata: stdlib\noptim: {lr: 0.001, steps: 7}\n", encoding="utf-8"
    )
    flags = ["optim.type=dct_adamw", "optim.rank=16", "optim.feedback=4bit", "optim.every=3"]
    job: SFTJob = load(str(tmp_path / "job.yaml"), flags).job
    assert job.optim == DCTAdamW(lr=0.001, steps=7, rank=16, feedback="4bit", every=3)
    assert load(str(tmp_path / "job.yaml"), ["optim=coat"]).job.optim == COAT(lr=0.001, steps=7)
    assert load(str(tmp_path / "job.yaml"), []).job.optim == Optim(lr=0.001, steps=7)
    shape = training_of(done(job, cpus=4).train, model_facts(job.model)).optimizer
    assert (shape.type, shape.rank, shape.feedback_bits, shape.every) == ("dct_adamw", 16, 4, 3)
    with pytest.raises(JobError, match="is of type adamw, which has no `momentum`"):
        load(str(tmp_path / "job.yaml"), ["optim.momentum=0.9"])


def test_owned_optimizers_choose_zero_0() -> None:
    big = RandomModel(hidden=2048, heads=16, layers=24, ffn=8192)
    assert done(make(model=big), cpus=4).train.zero > 0
    resolved = done(make(model=big, optim=AdamW8bit()), cpus=4)
    assert resolved.train.zero == 0
    assert "each on one rank" in (resolved.values["parallel.zero"].origin.why or "")
    assert done(make(model=big, optim=Optim(in_backward=True, clip_norm=None)), cpus=4).train.zero == 0


@pytest.mark.parametrize(
    ("job", "what", "at", "why", "try_"),
    [
        (make(optim=Muon(), parallel=Parallel(zero=2)), "muon does not go with ZeRO-2", "zero", "whole", "zero=0"),
        (
            make(optim=COAT(), parallel=Parallel(cpu_offload=True)),
            "coat does not run on the host",
            "cpu",
            "ZeRO",
            "false",
        ),
        (
            make(optim=Optim(in_backward=True, clip_norm=None), parallel=Parallel(zero=1)),
            "an optimizer in backward does not go with ZeRO-1",
            "parallel.zero",
            "while backward runs",
            "optim.in_backward=false",
        ),
        (make(optim=LAMB(in_backward=True)), "cannot clip", "optim.clip_norm", "by then", "optim.clip_norm=null"),
        (
            make(optim=Optim(in_backward=True, clip_norm=None, tokens_per_step="32k"), parallel=Parallel(dp=1)),
            "cannot add up 4 micro-batches",
            "optim.in_backward",
            "gone before",
            "optim.tokens_per_step=auto",
        ),
        (make(optim=GaLore(rank=256)), "subspace of 256", "optim.rank", "the model is 256 wide", "optim.rank=64"),
        (make(optim=DCTAdamW(), adapter=LoRA(rank=8)), "subspace of 128", "rank", "matrices are 8 wide", "rank=2"),
        (make(optim=Muon(), adapter=PEQA()), "muon has no matrices", "optim.type", "scales of rows", "type=adamw"),
        (make(optim=LAMB(trust_min=2, trust_max=1)), "wrong way round", "trust_min", "2.0 is above", "trust_min=1.0"),
    ],
)
def test_contradictions_are_refused_with_the_cure(job: SFTJob, what: str, at: str, why: str, try_: str) -> None:
    with pytest.raises(JobError) as error:
        done(job, cpus=4)
    found = error.value
    assert what in found.what and at in found.at and why in found.why and try_ in found.try_, found


INSIDE: dict[str, dict[str, Any]] = {
    "all, kept": {"placement": None},
    "all, rebuilt, tiled": {"tile": 24},
    "all, tied, every third stored": {"tie_word_embeddings": True, "every": 3},
    "LoRA": {"adapter": LoRA(rank=4, alpha=8.0)},
    "PaCA": {"adapter": PaCA(rank=4)},
    "PEQA": {"adapter": PEQA(bits=4)},
    "reversible 1": {"adapter": Reversible(wiring=1, bits=3, width=8, inside=LoRA(rank=4, alpha=8.0))},
    "reversible 2": {"adapter": Reversible(wiring=2, bits=3, width=8, inside=PaCA(rank=4))},
    "reversible 3, all": {"adapter": Reversible(wiring=3, bits=3, inside=FullFineTune())},
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_weight_is_updated_after_its_last_use(name: str) -> None:
    """In backward or after it, two steps leave the same bits: nothing that is rebuilt or computed back reads a weight
    that has moved already."""
    case = dict(INSIDE[name])
    tile, every, keeps = case.pop("tile", None), case.pop("every", 1), "placement" in case
    case.pop("placement", None)
    found = []
    for in_backward in (False, True):
        made = Model(**case)
        if tile is not None:
            tile_mlp(made.model, tile)
        if not keeps:
            Executor(made.layers, segments(every, 0.0, 60), None, hollow=True, coupling=made.coupling)
        optim = Optim(clip_norm=None, in_backward=in_backward)
        engine = (InBackwardEngine if in_backward else PlainEngine)(made.loss, made.trainable(), optim, "cpu")
        for step in range(2):
            engine.begin(lr=1e-2)
            engine.backward(made.forward([25, 35], step) / 60, last=True)
            engine.step(lr=1e-2, clip_norm=None)
        found.append({f"{f.name} {f.kind}": f.tensor.clone() for f in engine.fragments()})
        engine.close()
    assert not differing(*found)
    assert all(bool(tensor.any()) for key, tensor in found[0].items() if key.endswith("exp_avg_sq"))


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        AdapterShape(rank=8),
        AdapterShape(rank=8, dora=True),
        AdapterShape(kind="columns", rank=8),
        AdapterShape(kind="scales", rank=1, group=64),
        AdapterShape(kind="codes", rank=1),
        AdapterShape(kind="learned", rank=8, group=64),
        AdapterShape(kind="biases", rank=1, prompt=4, side=16),
        AdapterShape(kind="network", rank=32, targets=()),
    ],
)
def test_tensors_are_all_that_is_trained(adapter: AdapterShape | None) -> None:
    training = Training(adapter=adapter)
    tensors = training.tensors(LLAMA)
    assert sum(math.prod(t.shape) * t.count for t in tensors) == training.trained(LLAMA)
