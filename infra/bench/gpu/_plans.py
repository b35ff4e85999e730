"""Plans for the benchmarks' models, from layers measured on the device at hand."""

from __future__ import annotations

from typing import Any

from _common import Bench

from farspan.memory.calibration import Calibration, Measured, calibrated_problem
from farspan.memory.hardware import Hardware, load_hardware
from farspan.memory.plan import Placement
from farspan.memory.prediction import Prediction
from farspan.memory.problem import Budgets, PlanProblem
from farspan.memory.shape import AdapterShape, ModelShape, Training

GIB = 1 << 30
FAMILY = {"family": "llama", "vocab": 128256}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {**FAMILY, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14336},
    "1B": {**FAMILY, "hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn": 8192},
    "toy": {"family": "llama", "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 300},
}


def heads_of(config: dict[str, Any]) -> dict[str, int]:
    shape = shape_of(config)
    return {"heads": shape.heads, "kv_heads": shape.kv_heads, "size": shape.head_dim}


def config_of(model: str, *, lora: int, mlp_tile: int = 0) -> dict[str, Any]:
    toy = model == "toy"
    return {
        "name": f"{model} {'LoRA' if lora else 'full'}",
        "model": {"type": "random", **MODELS[model]},
        "precision": "fp32" if toy else "bf16",  # many processors have no instructions for bf16
        "lora": lora,
        "loss_tile": 512 if toy else 2048,
        "mlp_tile": mlp_tile,
    }


def shape_of(config: dict[str, Any]) -> ModelShape:
    model = config["model"]
    numbers = {key: model[key] for key in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab")}
    return ModelShape.model_validate({**numbers, "head_dim": model["hidden"] // model["heads"]})


def training_of(config: dict[str, Any]) -> Training:
    return Training(
        precision=config["precision"],
        adapter=AdapterShape(rank=config["lora"], precision=config["precision"]) if config["lora"] else None,
        loss_tile=config["loss_tile"],
        mlp_tile=config["mlp_tile"] or None,
    )


def hardware_of(bench: Bench) -> Hardware:
    """The nearest machine that is known, with this one's memory."""
    machine = bench.done["machine"]
    if not machine["gpu"]:
        return load_hardware("cpu")
    return load_hardware("h200").model_copy(update={"device_bytes": int(machine["device_bytes"] * 0.97)})


def budgets_of(bench: Bench, options: Any) -> Budgets:
    machine = bench.done["machine"]
    if not machine["gpu"]:
        return Budgets(device_bytes=1 << 40, host_bytes=1 << 40, disk_bytes=1 << 40)
    host_bytes = int(options.host_gib * GIB) if options.host_gib else int(machine["host_bytes"] * 0.8)
    return Budgets(
        device_bytes=hardware_of(bench).device_bytes, host_bytes=host_bytes, disk_bytes=int(options.disk_gib * GIB)
    )


def calibration_of(bench: Bench, config: dict[str, Any], folder: str) -> Measured | str:
    """Layers of a model, measured here once for all lengths; why not, if that failed."""
    shape = shape_of(config)
    request = {
        "model": config["model"],
        "adapter": {"type": "lora", "rank": config["lora"]} if config["lora"] else {"type": "full"},
        "precision": config["precision"],
        "memory": {"loss_tile": config["loss_tile"], "mlp_tile": config["mlp_tile"] or "off"},
        "context": 32768,
        "sp": 1,
        "kinds": [shape.form(layer).name for layer in range(shape.layers)],
        "gradients": "handed on",
        "disk_dir": folder,
    }
    name = f"{config['name']}, mlp tile {config['mlp_tile'] or 'off'}"
    found = bench.cell(f"calibration/{name}", {"what": "calibrate", "request": request})
    if "failed" in found:
        return str(found["failed"])
    return Measured.model_validate({field: found[field] for field in Measured.model_fields})


def problem_of(bench: Bench, config: dict[str, Any], measured: Measured, length: int, budgets: Budgets) -> PlanProblem:
    calibration = Calibration(key={}, profile=measured.profile, links=measured.links)
    shape, training = shape_of(config), training_of(config)
    return calibrated_problem(calibration, shape, training, hardware_of(bench), length, budgets=budgets)


def allocated_bytes(problem: PlanProblem, prediction: Prediction) -> int:
    """Of a predicted peak, what the allocator counts: not the context."""
    outside = sum(s.bytes for s in problem.states if s.tier == "device" and s.name in ("context", "collectives"))
    workspaces = 2 * 32 * (1 << 20) if outside else 0  # cuBLAS's, of the main and of the autograd thread
    return prediction.device_peak_bytes - outside + workspaces


def tiers_of(problem: PlanProblem, placement: Placement, prediction: Prediction) -> dict[str, int] | None:
    if not any(prediction.moved_bytes.values()):
        return None
    pages = 4096 * 64 * len(placement.layers)  # a tensor takes whole ones
    states = sum(state.bytes for state in problem.states if state.tier == "host")
    disk_bytes = prediction.disk_bytes + pages if prediction.disk_bytes else 0
    return {
        "host_bytes": prediction.host_bytes - states + pages,
        "disk_bytes": disk_bytes,
        "slots": placement.slots,
    }
