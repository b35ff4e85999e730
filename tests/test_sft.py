"""The SFT loop on spawned ranks: resuming bit for bit, on another mesh and ZeRO stage, and stopping on NaN."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sp_ranks import on_ranks, train_rank

from farspan import Checkpoint, Evaluate, LoRA, MemoryBudget, Optim, RandomModel, TextData, Track
from farspan.memory.config import Tiers
from farspan.memory.plan import LayerPlan, Placement, Rows, checkpoint_every_layer
from farspan.memory.self_test import RebuildDiffers
from farspan.trainer.config import (
    AMAQ,
    COAT,
    S2A,
    AdamW8bit,
    DCTAdamW,
    DensityLoss,
    FullFineTune,
    Mesh,
    Muon,
    Reversible,
    TrainSpec,
    UniPT,
)
from farspan.trainer.data.packing import PackedStream
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.store import TokenStore
from farspan.trainer.run_folder import read_metrics
from farspan.trainer.sft import train
from farspan.trainer.world import Silent, World

MODEL = RandomModel(family="llama", hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, vocab=300)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store whose epoch ends after a few packs."""
    root = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    with open(root / "data.jsonl", "w") as file:
        for _ in range(60):
            text = " ".join(rng.choice(words, int(rng.integers(5, 60))))
            file.write(json.dumps({"text": text}) + "\n")
    data = TextData(str(root / "data.jsonl"), context=256)
    return prepare(data, MODEL, Evaluate(share=0.1), cache_root=root / "cache")


def spec(tokens: Path, run_dir: Path, **changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "run_dir": str(run_dir),
        "tokens_dir": str(tokens),
        "model": MODEL,
        "data": TextData("unused", context=256),
        "adapter": FullFineTune(),
        "precision": "fp32",
        "mesh": Mesh(dp=1, sp=1),
        "zero": 0,
        "cpu_offload": False,
        "accumulation": 1,
        "warmup_steps": 2,
        "optim": Optim(lr=1e-2, steps=12),
        "memory": MemoryBudget(loss_tile=64),
        "checkpoint": Checkpoint(every=6, keep=9, export=False),
        "evaluate": Evaluate(every=6, max_tokens=512),
        "track": Track(tensorboard=False),
    }
    return TrainSpec(**fields | changes)


def run(spec: TrainSpec) -> list[dict[str, Any]]:
    on_ranks(train_rank, spec.mesh.world_size, spec.model_dump_json())
    return read_metrics(Path(spec.run_dir) / "metrics.jsonl")


def resumed_from(source: Path, target: Path, step: int) -> None:
    """A run folder as a run killed after `step` leaves it."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.copytree(source / "base_model", target / "base_model")
    shutil.copytree(source / f"checkpoints/step_{step}", target / f"checkpoints/step_{step}")
    shutil.copy(source / "metrics.jsonl", target / "metrics.jsonl")


COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_total", "trained_tokens", "epoch", "eval_loss")


def numbers(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(record.get(key) for key in COMPARED) for record in records]


@pytest.mark.parametrize(
    ("mesh", "zero", "precision", "adapter"),
    [
        (Mesh(dp=1, sp=1), 0, "fp32", FullFineTune()),
        (Mesh(dp=1, sp=2), 0, "bf16", LoRA(rank=4, dropout=0.1)),
        (Mesh(dp=2, sp=1), 3, "bf16", FullFineTune()),
        (Mesh(dp=1, sp=2), 2, "fp32", FullFineTune()),
        (Mesh(dp=1, sp=2), 2, "bf16", S2A(prompt=3, side=8)),
        (Mesh(dp=1, sp=2), 0, "fp32", UniPT(reduction=4)),
    ],
    ids=["one rank", "sp 2 lora dropout", "zero 3 bf16", "zero 2", "sp 2 zero 2 s2a", "sp 2 unipt"],
)
def test_resuming_is_bit_exact_across_an_epoch_edge(
    tokens: Path, tmp_path: Path, mesh: Mesh, zero: int, precision: str, adapter: Any
) -> None:
    whole = spec(tokens, tmp_path / "whole", mesh=mesh, zero=zero, precision=precision, adapter=adapter)
    records = run(whole)
    assert [record["step"] for record in records] == list(range(1, 13))
    epochs = [record["epoch"] for record in records]
    assert epochs[0] < epochs[-1], "the run must cross an epoch"
    resumed_from(tmp_path / "whole", tmp_path / "half", 6)
    again = run(whole.model_copy(update={"run_dir": str(tmp_path / "half")}))
    assert numbers(again) == numbers(records)
    assert records[-1]["loss"] < records[0]["loss"]


OTHERS: dict[str, Any] = {
    "coat": {"optim": COAT(lr=1e-2, steps=12), "precision": "bf16"},
    "cosines, 4 bits left out": {"optim": DCTAdamW(lr=1e-2, steps=12, rank=8, every=4, feedback="4bit")},
    "muon in backward, tiled": {
        "optim": Muon(lr=1e-2, steps=12, in_backward=True, clip_norm=None),
        "memory": MemoryBudget(loss_tile=64, mlp_tile=64),
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_another_optimizer_is_bit_exact(tokens: Path, tmp_path: Path, name: str) -> None:
    """Each rank writes and reads what it owns; on another number of ranks the same training goes on."""
    whole = spec(tokens, tmp_path / "whole", mesh=Mesh(dp=1, sp=2), **OTHERS[name])
    records = run(whole)
    assert records[-1]["loss"] < records[0]["loss"]
    resumed_from(tmp_path / "whole", tmp_path / "half", 6)
    again = run(whole.model_copy(update={"run_dir": str(tmp_path / "half")}))
    assert numbers(again) == numbers(records)
    resumed_from(tmp_path / "whole", tmp_path / "alone", 6)
    alone = run(whole.model_copy(update={"run_dir": str(tmp_path / "alone"), "mesh": Mesh(dp=1, sp=1)}))
    close = 2e-5 if whole.precision == "fp32" else 1e-2
    assert [r["loss"] for r in alone[6:]] == pytest.approx([r["loss"] for r in records[6:]], rel=close)


@pytest.mark.parametrize(("zero", "adapter"), [(0, FullFineTune()), (2, LoRA(rank=4))])
def test_a_run_with_learned_bits_between_ranks(tokens: Path, tmp_path: Path, zero: int, adapter: Any) -> None:
    """It trains as without, sends what it says, and resumes bit for bit, gates included."""
    exact = spec(tokens, tmp_path / "exact", mesh=Mesh(dp=1, sp=2), zero=zero, adapter=adapter)
    # so that attention is rebuilt, and its exchange with it
    placement = checkpoint_every_layer(MODEL.layers, rows=128, attention_rows=256)
    whole = exact.model_copy(
        update={
            "run_dir": str(tmp_path / "whole"),
            "exchange": AMAQ(bits=4, start=6, settle=0.5, lr=0.2),
            "placement": placement,
        }
    )
    records, without = run(whole), run(exact)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in without], rel=0.05)
    assert [r["loss"] for r in records] != [r["loss"] for r in without]
    bits = [record["exchange_bits"] for record in records]
    assert bits[0] == pytest.approx(6, abs=0.02) and bits[-1] == pytest.approx(4, abs=0.02)
    # the last pack of an epoch is short, and a channel's 8 bytes beside its codes weigh more
    full = [record for record in records if record["tokens"] > 240]
    shares = [record["exchange_bytes"] / record["exchange_exact_bytes"] for record in full]
    assert shares == pytest.approx([r["exchange_bits"] / 32 + 8 / 128 / 4 for r in full], rel=0.05)
    resumed_from(tmp_path / "whole", tmp_path / "half", 6)
    again = run(whole.model_copy(update={"run_dir": str(tmp_path / "half")}))
    assert numbers(again) == numbers(records)
    assert [r["exchange_bits"] for r in again] == bits


def test_an_optimizer_in_backward_trains_the_same(tokens: Path, tmp_path: Path) -> None:
    """Bit for bit, with tiles of the MLP, whose gradients come in parts, and layers that are rebuilt."""
    placement = checkpoint_every_layer(MODEL.layers, rows=256, attention_rows=256)
    for precision in ("fp32", "bf16"):
        found = []
        for in_backward in (False, True):
            optim = AdamW8bit(lr=1e-2, steps=3, clip_norm=None, in_backward=in_backward)
            how = {"optim": optim, "placement": placement, "memory": MemoryBudget(loss_tile=64, mlp_tile=100)}
            folder = tmp_path / f"{precision} {in_backward}"
            found.append(numbers(run(spec(tokens, folder, precision=precision, **how))))
        plain, inside = ([(row[1], row[-1]) for row in rows] for rows in found)
        assert plain == inside


def test_resuming_on_another_mesh_and_zero_stage(tokens: Path, tmp_path: Path) -> None:
    first = spec(tokens, tmp_path / "whole", accumulation=2)
    records = run(first)
    for name, mesh, zero, accumulation in (("a", Mesh(dp=1, sp=2), 3, 2), ("b", Mesh(dp=2, sp=1), 1, 1)):
        resumed_from(tmp_path / "whole", tmp_path / name, 6)
        changed = {"run_dir": str(tmp_path / name), "mesh": mesh, "zero": zero, "accumulation": accumulation}
        again = run(first.model_copy(update=changed))
        assert [record["tokens_total"] for record in again] == [record["tokens_total"] for record in records]
        for got, want in zip(again[6:], records[6:]):
            assert got["loss"] == pytest.approx(want["loss"], rel=2e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-4)


def test_the_loss_is_that_of_transformers_on_the_same_documents(tokens: Path, tmp_path: Path) -> None:
    """Step 1 of a packed run, against each document alone through plain transformers."""
    from transformers import AutoModelForCausalLM

    record = run(spec(tokens, tmp_path / "run", optim=Optim(lr=1e-2, steps=1), mesh=Mesh(dp=1, sp=2)))[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/base_model", dtype=torch.float64)
    pack = PackedStream(TokenStore(tokens).train, 256, "error", True, 0).pack(0)
    assert len(pack.cu_seqlens) > 2, "several documents in the pack"
    total = 0.0
    with torch.no_grad():
        for start, stop in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:]):
            ids = torch.from_numpy(pack.input_ids[start:stop])[None]
            logits = model(input_ids=ids).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert record["loss"] == pytest.approx(total / pack.trained_tokens, rel=1e-6)


def test_a_density_loss_is_told_and_works(tokens: Path, tmp_path: Path) -> None:
    """The same numbers over any mesh; activations become sparser than without."""
    common = {"optim": Optim(lr=1e-2, steps=8), "memory": MemoryBudget(loss_tile=64, mlp_tile=48)}
    found = {}
    for name, weight, mesh, accumulation in (
        ("none", 0.0, Mesh(dp=1, sp=1), 2),
        ("one", 30.0, Mesh(dp=1, sp=1), 2),
        ("two", 30.0, Mesh(dp=1, sp=2), 2),
        ("dp", 30.0, Mesh(dp=2, sp=1), 1),
    ):
        density = DensityLoss(weight=weight, eps=1e-2, threshold=0.01)
        job = spec(tokens, tmp_path / name, mesh=mesh, accumulation=accumulation, density=density, **common)
        found[name] = run(job)
    assert "density" not in found["none"][0]
    for other in ("two", "dp"):
        for got, want in zip(found[other], found["one"]):
            for key in ("loss", "density", "density_loss"):
                assert got[key] == pytest.approx(want[key], rel=1e-4), (other, key, got["step"])
    first, last = found["one"][0], found["one"][-1]
    assert 0 < last["density"] < first["density"] <= 1
    assert 0 < last["density_loss"] < first["density_loss"] <= MODEL.layers


def test_streams_in_floating_point_resume_bit_exact(tokens: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 on two ranks of a sequence; anchors are measured at the first start, and then in the checkpoint."""
    placement = checkpoint_every_layer(5, rows=128, attention_rows=256)
    job = spec(
        tokens,
        tmp_path / "whole",
        model=MODEL.model_copy(update={"layers": 5}),
        adapter=Reversible(form="float", width=8, inside=LoRA(rank=4)),
        mesh=Mesh(dp=1, sp=2),
        zero=3,
        optim=Optim(lr=1e-2, steps=4),
        checkpoint=Checkpoint(every=2, keep=9, export=False),
        placement=placement,
    )
    whole = run(job)
    progress = json.loads((tmp_path / "whole/checkpoints/step_2/manifest.json").read_text())["progress"]
    assert 1 <= progress["anchor_every"] <= 3 and whole[-1]["loss"] < whole[0]["loss"]
    resumed_from(tmp_path / "whole", tmp_path / "resumed", 2)
    assert numbers(run(job.model_copy(update={"run_dir": str(tmp_path / "resumed")}))) == numbers(whole)


class Events(Silent):
    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def record(self, record: dict[str, Any]) -> None:
        self.told.append(("step", str(record["step"])))

    def event(self, event: str, text: str) -> None:
        self.told.append((event, text))


def test_a_run_that_rebuilds_tests_itself_before_its_first_step(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Optim(lr=1e-2, steps=2)
    kept = run(spec(tokens, tmp_path / "kept", optim=short))
    placement = checkpoint_every_layer(2, rows=256, attention_rows=256)
    rebuilding, events = spec(tokens, tmp_path / "rebuilt", optim=short, placement=placement), Events()
    train(rebuilding, World(), events)
    assert [event for event, _ in events.told] == ["self-test", "step", "step"]
    assert events.told[0][1].startswith("self-test 1 unit, 10 gradients bit-equal to keep, ")
    assert numbers(read_metrics(tmp_path / "rebuilt/metrics.jsonl")) == numbers(kept)

    coded, events = rebuilding.memory.model_copy(update={"activations": "int4"}), Events()
    train(rebuilding.model_copy(update={"run_dir": str(tmp_path / "coded"), "memory": coded}), World(), events)
    assert [event for event, _ in events.told] == ["self-test", "activations", "step", "step"]
    told = re.fullmatch(
        r"in int4 a layer's gradients are off by (.+)%, at most (.+)% \(layer [01]\)", events.told[1][1]
    )
    assert told is not None and 0.5 < float(told[1]) <= float(told[2]) < 15
    losses = [record["loss"] for record in read_metrics(tmp_path / "coded/metrics.jsonl")]
    want = [record["loss"] for record in read_metrics(tmp_path / "kept/metrics.jsonl")]
    assert losses[0] == want[0] and losses[1] == pytest.approx(want[1], rel=0.02)

    monkeypatch.setattr("farspan.memory.executor.Tape._input_of", lambda tape, index: torch.zeros(1, 256, 32))
    events = Events()
    with pytest.raises(RebuildDiffers, match="rebuilding decoder layer 1 does not give the gradients of keeping it"):
        train(rebuilding.model_copy(update={"run_dir": str(tmp_path / "broken")}), World(), events)
    assert events.told == []


def test_nan_stops_the_run_before_the_update(tokens: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run(spec(tokens, tmp_path / "run", optim=Optim(lr=1e-2, steps=1), checkpoint=Checkpoint(export=False)))
    weights = tmp_path / "run/base_model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(AssertionError, match=r"loss is nan at step 1(.|\n)*the update was not applied"):
        run(spec(tokens, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_rows_in_codes_on_the_host_and_on_disk(tokens: Path, tmp_path: Path) -> None:
    """Against rows as they are: half of the bytes, nearly the losses; what gradients lose is said; int4 resumes."""
    model = MODEL.model_copy(update={"hidden": 128})
    plan = LayerPlan(x=Rows(host=256), o=Rows(host=128, disk=128))
    tiers = Tiers(host_bytes=1 << 20, disk_dir=str(tmp_path), disk_bytes=1 << 20)
    runs: dict[str, tuple[list[dict[str, Any]], Events]] = {}
    for codec in ("exact", "fp8", "int4"):
        placement = Placement(rows=256, attention_rows=256, layers=(plan,) * 2, tier_codec=codec)  # type: ignore[arg-type]
        how = {"model": model, "placement": placement, "tiers": tiers, "precision": "bf16"}
        how |= {"optim": Optim(lr=1e-2, steps=8), "checkpoint": Checkpoint(every=4, keep=9, export=False)}
        made, events = spec(tokens, tmp_path / codec, **how), Events()
        train(made, World(), events)
        runs[codec] = read_metrics(tmp_path / codec / "metrics.jsonl"), events
    exact, exact_events = runs["exact"]
    assert "tiers" not in [event for event, _ in exact_events.told]
    for codec, share, close in (("fp8", 0.5625, 0.01), ("int4", 0.28125, 0.05)):
        found, events = runs[codec]
        peak, whole = (max(r["tier_peak_bytes"]["host"] for r in records) for records in (found, exact))
        # whole pages, and what is on its way to disk: more or less of it, as the threads are scheduled
        assert peak < (share + 0.25) * whole
        assert found[0]["loss"] == exact[0]["loss"], "the forward keeps its bits"
        assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in exact], rel=close)
        assert found[-1]["loss"] != exact[-1]["loss"] and found[-1]["loss"] < found[0]["loss"]
        assert [event for event, _ in events.told[:2]] == ["self-test", "tiers"]
        assert f"bit-equal to keep before rows on other tiers become {codec}, " in events.told[0][1]
        errors = re.fullmatch(
            rf"with rows on host and disk in {codec} a unit's gradients are off by (.+)%, at most (.+)% \(layer [01]\)",
            events.told[1][1],
        )
        assert errors is not None and 0.1 < float(errors[1]) <= float(errors[2]) < 60
    resumed_from(tmp_path / "int4", tmp_path / "half", 4)
    train(made.model_copy(update={"run_dir": str(tmp_path / "half")}), World(), Silent())
    assert numbers(read_metrics(tmp_path / "half" / "metrics.jsonl")) == numbers(runs["int4"][0])
