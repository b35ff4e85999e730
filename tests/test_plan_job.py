"""`farspan plan`: tables, JSON, exit codes, policies; and that a run carries the plan out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan import AMAQ, LoRA, MemoryBudget, Parallel, RandomModel, SFTJob, TextData
from farspan.errors import DoesNotFit, JobError
from farspan.jobs import cli
from farspan.jobs.facts import Machine, ModelFacts, hardware_of, machine_beside, model_facts
from farspan.jobs.origins import origins_in_python
from farspan.jobs.plan import plan, require_fit, shape_of
from farspan.jobs.plan_view import error_line, exchange_line, kept_line, kept_tensors, placed_shares, to_json
from farspan.jobs.resolve import resolve
from farspan.memory.config import split_disk
from farspan.memory.problem import GradientError
from farspan.trainer.parallel.config import ExactExchange

LLAMA_8B = RandomModel(family="llama", hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab="125k")


def planned(context: str, *, model: RandomModel = LLAMA_8B, parallel: Parallel | None = None, **memory: Any) -> Any:
    job = SFTJob(
        name="p",
        model=model,
        data=TextData("stdlib", context=context),
        adapter=LoRA(rank=16),
        parallel=parallel or Parallel(),
        memory=MemoryBudget(**{"hardware": "h200", **memory}),
    )
    facts, machine = model_facts(job.model), machine_beside(job)
    resolved = resolve(job, facts, machine, origins_in_python(job))
    hardware = hardware_of(job, machine, ranks=resolved.gang.world_size, use_gpu=resolved.gang.use_gpu)
    return plan(job, resolved.train, facts, hardware)


def test_short_sequences_stay_on_the_device() -> None:
    found = planned("8k")
    assert found.placement.keeps_everything
    assert found.prediction.moved_bytes == dict.fromkeys(found.prediction.moved_bytes, 0)


def test_longer_ones_never_recompute_much_attention_and_stay_within_budget() -> None:
    found = planned("128k")
    assert found.prediction.fits and found.solution.gap < 0.05
    assert placed_shares(found)["O"]["recompute"] < 0.05
    fixed = [planned("128k", plan=policy) for policy in ("recompute", "offload-inputs", "memo")]
    assert found.prediction.step_s <= min(p.prediction.step_s for p in fixed if p.prediction.fits)


def test_where_no_rebuilt_layer_fits_its_saved_tensors_wait_on_the_host() -> None:
    found = planned("512k")
    assert found.prediction.fits and found.placement.saved == "host"
    assert "saved tensors on the host" in found.solution.kind
    copied = sum(kind.rebuild_host_bytes for kind in found.problem.saving("host").kinds)
    assert found.prediction.moved_bytes["copy_out"] > 31 * copied > 0
    assert found.prediction.parts.backward_copies_s > 0
    tiled = planned("512k", mlp_tile=2048)
    assert tiled.placement.saved == "device"
    assert found.tiled_s == tiled.prediction.step_s < found.prediction.step_s


def test_a_policy_that_does_not_fit_is_refused_with_the_sum() -> None:
    found = planned("128k", plan="keep")
    assert not found.prediction.fits
    with pytest.raises(DoesNotFit, match="the policy keep does not fit") as refused:
        require_fit(found)
    assert "memory.plan=solve" in refused.value.try_


def test_more_ranks_hold_longer_sequences() -> None:
    with pytest.raises(DoesNotFit):
        planned("2M")
    assert planned("2M", parallel=Parallel(sp=8)).prediction.fits


@pytest.mark.parametrize(("family", "kept_kib"), [("llama", 181.2), ("qwen3", 201.5)])
def test_shape_from_a_job(family: Any, kept_kib: float) -> None:
    """What autograd keeps per token and layer at the 8B width under bf16 LoRA, as measured on unmodified layers."""
    found = planned("8k", model=LLAMA_8B.model_copy(update={"family": family}))
    assert found.problem.kinds[0].keep_bytes / 8192 / 1024 == pytest.approx(kept_kib, rel=0.01)


def test_windows_of_a_config(tmp_path: Path) -> None:
    config = {
        "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    from farspan import Model

    facts = model_facts(Model(str(tmp_path)))
    assert facts.windows == (128, None, 128)
    assert [shape_of(facts).form(layer).window for layer in range(3)] == [128, None, 128]


def test_this_machine_is_planned_for_its_share_of_memory() -> None:
    job = SFTJob(name="p", model=RandomModel(), data=TextData("stdlib", context="8k"))
    machine = Machine(({"CPU": 4.0},), cpu_memory_bytes=8 << 30)
    assert hardware_of(job, machine, ranks=2, use_gpu=False).device_bytes == 4 << 30
    gpus = Machine(({"CPU": 8.0, "GPU": 2.0},), 256 << 30, gpu_memory_bytes=80 << 30, gpu_name="NVIDIA H100 80GB HBM3")
    hardware = hardware_of(job, gpus, ranks=2, use_gpu=True)
    assert hardware.device_type == "cuda" and hardware.device_bytes <= 80 << 30
    assert hardware.host_bytes <= 128 << 30


def test_disk_as_users_write_it() -> None:
    assert split_disk("/nvme:2TiB") == ("/nvme", 2 << 40)
    assert split_disk("64GiB") == (None, 64 << 30)
    assert MemoryBudget(disk=1000).disk == "1000"
    with pytest.raises(ValueError, match="not a size"):
        MemoryBudget(disk="/nvme")


JOB = """
from farspan import SFTJob, RandomModel, TextData, LoRA, MemoryBudget
job = SFTJob(name="p", model=RandomModel(family="llama", hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336,
             vocab="125k"), data=TextData("stdlib", context="64k"), adapter=LoRA(rank=16),
             memory=MemoryBudget(hardware="h200"))
"""


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    assert cli.main(["plan", str(path), "--json", "--longest"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["step_s"] > 0 and found["solve_s"] > 0
    assert found["longest_context_tokens"] > 300_000
    assert found["next_best"]["step_s"] >= found["step_s"] * 0.999
    assert any(line.startswith("matmul_flop_per_s") for line in found["assumed"])
    assert cli.main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "fits on NVIDIA H200" in shown and "next best" in shown and "device peak at" in shown
    assert cli.main(["plan", str(path), "--set", "memory.plan=keep", "--set", "data.context=1M"]) == 3
    assert cli.main(["plan", str(path), "--set", "data.context=8M"]) == 3
    refused = capsys.readouterr().err
    assert refused.count("\n") == 4 and "GiB" in refused, refused
    assert cli.main(["plan", str(path), "--set", "memory.hardware=h300"]) == 2
    assert "h200" in capsys.readouterr().err


def test_neither_torch_nor_ray_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    code = (
        "import sys; from farspan.jobs import cli; "
        f"assert cli.main(['plan', {str(path)!r}, '--json']) == 0; "
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr


def test_models_that_are_not_counted_are_refused_by_name() -> None:
    facts = ModelFacts(64, 2, 4, 2, 16, 128, 300, False, experts=8)
    job = SFTJob(name="p", model=RandomModel(), data=TextData("stdlib", context="8k"))
    machine = machine_beside(job)
    train = resolve(job, facts, machine, origins_in_python(job)).train
    with pytest.raises(JobError, match="8 experts"):
        plan(job, train, facts, hardware_of(job, machine, ranks=1, use_gpu=False))


def test_gpus_of_this_machine_are_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    lines = ["0, GPU-aa, NVIDIA H200, 143771", "1, GPU-bb, NVIDIA H200, 143771", "2, GPU-cc, NVIDIA H200, 143771"]
    tool.write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    job = SFTJob(name="p", model=LLAMA_8B, data=TextData("stdlib", context="8k"))
    here = machine_beside(job)
    assert (here.gpus, here.gpu_memory_bytes, here.gpu_name) == (3, 143771 << 20, "NVIDIA H200")
    for visible, count in (("0,2", 2), ("GPU-bb", 1), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine_beside(job).gpus == count
    assert machine_beside(job.model_copy(update={"memory": MemoryBudget(hardware="cpu")})).gpus == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'No devices were found'; exit 6")
    assert machine_beside(job).gpus == 0


def test_what_codes_between_ranks_cost_and_save_is_told() -> None:
    """Exchanges take 4 / 16 of their time and that of coding; over a fast link this is no gain."""
    made = {}
    for exchange in (ExactExchange(), AMAQ(bits=4)):
        parallel, memory = Parallel(sp=8, exchange=exchange), MemoryBudget(hardware="h200", plan="keep")
        job = SFTJob(name="p", model=LLAMA_8B, data=TextData("stdlib", context="64k"), memory=memory, parallel=parallel)
        facts, machine = model_facts(job.model), machine_beside(job)
        train = resolve(job, facts, machine, origins_in_python(job)).train
        hardware = hardware_of(job, machine, ranks=8, use_gpu=True)
        slow = hardware.model_copy(update={"all_to_all_bytes_per_s": 1e10})
        made[exchange.type] = [plan(job, train, facts, link) for link in (hardware, slow)]
    exchange_s = {name: [p.problem.kinds[0].exchange_s for p in planned] for name, planned in made.items()}
    assert exchange_s["amaq"][0] > exchange_s["exact"][0] and exchange_s["amaq"][1] < 0.5 * exchange_s["exact"][1]
    found = made["amaq"][0]
    assert "4 bits: gradients are off by what was not measured" in (exchange_line(found) or "")
    assert exchange_line(made["exact"][0]) is None
    (kind,) = found.problem.kinds
    measured = kind.model_copy(update={"exchange_error": GradientError(weights=0.071, input=0.042)})
    known = replace(found, problem=found.problem.model_copy(update={"kinds": (measured,)}))
    assert "weights are off by 7.1%, of its input by 4.2%" in (exchange_line(known) or "")
    assert to_json(known)["exchange_errors"] == {kind.name: {"weights": 0.071, "input": 0.042}}


def test_what_codes_do_to_gradients_is_told() -> None:
    memory = MemoryBudget(hardware="h200", plan="keep", activations="int4")
    job = SFTJob(name="p", model=LLAMA_8B, data=TextData("stdlib", context="8k"), memory=memory)
    facts, machine = model_facts(job.model), machine_beside(job)
    resolved = resolve(job, facts, machine, origins_in_python(job))
    found = plan(job, resolved.train, facts, hardware_of(job, machine, ranks=1, use_gpu=True))
    assert "not measured" in (error_line(found) or "") and to_json(found)["gradient_errors"] == {}
    (kind,) = found.problem.kinds
    measured = kind.model_copy(update={"gradient_error": GradientError(weights=0.051, input=0.032)})
    known = replace(found, problem=found.problem.model_copy(update={"kinds": (measured,)}))
    assert "weights are off by 5.1%, of its input by 3.2%" in (error_line(known) or "")
    assert to_json(known)["gradient_errors"] == {kind.name: {"weights": 0.051, "input": 0.032}}
    assert error_line(replace(found, activations="fused")) is None


def test_what_autograd_keeps_is_told_by_operator_and_storage() -> None:
    kept = {}
    for name, adapter in (("full", None), ("LoRA", LoRA(rank=16)), ("dropout", LoRA(rank=16, dropout=0.1))):
        job = SFTJob(
            name="p",
            model=LLAMA_8B.model_copy(update={"layers": 2}),
            data=TextData("stdlib", context="8k"),
            memory=MemoryBudget(hardware="h200", plan="keep"),
            **({"adapter": adapter} if adapter else {}),  # type: ignore[arg-type]
        )
        facts, machine = model_facts(job.model), machine_beside(job)
        resolved = resolve(job, facts, machine, origins_in_python(job))
        hardware = hardware_of(job, machine, ranks=1, use_gpu=True)
        found = plan(job, resolved.train, facts, hardware)
        (tensors,) = kept_tensors(found).values()
        total = sum(tensor["bytes_per_row"] for tensor in tensors)
        assert total * found.problem.rows == pytest.approx(found.problem.kinds[0].keep_bytes)
        kept[name] = {tensor["name"]: tensor for tensor in tensors}
        line = kept_line(found)
        assert line is not None and f"{total / 1024:.1f} KiB a token and layer" in line
        assert to_json(found)["kept_tensors"] == kept_tensors(found)
    # q, k and v share their input, with dropout too
    assert kept["full"]["norm1 out"]["kept_by"] == ["q_proj", "k_proj", "v_proj"]
    assert kept["LoRA"]["norm1 out"]["kept_by"] == ["q_proj adapter", "k_proj adapter", "v_proj adapter"]
    assert kept["dropout"] == kept["LoRA"]
