"""Every method of fine-tuning in one table: what it trains, what it stores, how long a step takes, how well it learns.

A small language model, trained here on the standard library's source, is adapted to another domain, the English text
of Python's reference. Each method gets the same steps; its learning rate is the best of four on one seed, of which
three are tried (the outer one next to the better of the inner two), and two more seeds are run at that rate. Bytes are
counted: weights and optimizer by tensor, activations by the allocator's events in a forward and a step at 512 rows, in
bf16. Seconds are medians of interleaved steps of all methods in one process and thread.

    farspan bench adapters                   results/adapters.json (resumable cell by cell), adapters.md
    farspan bench adapters --only LoRA       methods whose name contains it
    farspan bench adapters --workers 2       two methods at a time
    farspan bench adapters --toy             seconds, for the test
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import multiprocessing
import os
import pydoc_data.topics as topics
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from _pretrained import ROWS, batch, pretrained
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from farspan.memory.allocations import footprint
from farspan.memory.config import Tiles
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.lora import start as lora_start
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.config import (
    LQ,
    NF4,
    Base,
    Int8,
    Unquantized,
)
from farspan.trainer.bases.prepared.prepare import prepare
from farspan.trainer.bases.prepared.store import PreparedBase, start_adapters
from farspan.trainer.config import (
    COAT,
    L4Q,
    LAMB,
    PEQA,
    PV,
    S2A,
    AdamW8bit,
    Adapter,
    Checkpoint,
    DCTAdamW,
    Evaluate,
    FullFineTune,
    GaLore,
    LoRA,
    Mesh,
    Model,
    Muon,
    Optim,
    Optimizer,
    PaCA,
    Reversible,
    TextData,
    Track,
    TrainSpec,
    UniPT,
    is_prepared,
)
from farspan.trainer.engine_codes import with_codes
from farspan.trainer.engine_in_backward import InBackwardEngine
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.models import load_model, prepare_model
from farspan.trainer.optimizer import lr_at

RESULTS = Path(__file__).parent / "results"
STEPS, TOY_STEPS = 80, 2
LAYERS, PRETRAINING_STEPS = 8, 600
SEQUENCES = 2
SLOW_BF16 = 0.25
"""Of fp32's matrix products a second; a CPU that does fewer in bf16 trains in fp32."""
SEEDS = (0, 1, 2)
CPU = torch.device("cpu")
LORA = LoRA(rank=8, alpha=16.0)
LORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FULL_RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
PACA_RATES = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
PEQA_RATES = (3e-5, 1e-4, 3e-4, 1e-3)


PLAIN, ADAMW = Unquantized(), Optim()


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    adapter: Adapter
    base: Base = PLAIN
    rates: tuple[float, ...] = LORA_RATES
    optim: Optimizer = ADAMW
    how: str = ""
    """`peft`: peft's own forward and fp32 adapters; `checkpoint`: torch's checkpointing of every layer."""
    activations: Literal["autograd", "fused", "fp8", "int4"] = "autograd"

    @property
    def rebuilt(self) -> bool:
        return isinstance(self.adapter, Reversible)


def full(optim: Optimizer, rates: tuple[float, ...] = FULL_RATES) -> Method:
    """Every weight trained, by another optimizer than AdamW."""
    return Method(FullFineTune(), rates=rates, optim=optim)


METHODS = {
    "full fine-tuning": Method(FullFineTune(), rates=FULL_RATES),
    "full, AdamW in backward": full(Optim(in_backward=True)),
    "full, adamw8bit": full(AdamW8bit()),
    "full, coat": full(COAT()),
    "full, dct_adamw of 32": full(DCTAdamW(rank=32, every=20)),
    "full, dct_adamw of 32, 4 bits left out": full(DCTAdamW(rank=32, every=1, feedback="4bit")),
    "full, galore of 32": full(GaLore(rank=32, every=20, scale=1.0)),
    "full, lamb": full(LAMB(), (1e-3, 2e-3, 4e-3, 8e-3)),
    "full, muon": full(Muon()),
    "LoRA, peft's default": Method(LORA, how="peft"),
    "LoRA": Method(LORA),
    "LoRA, dropout 0.05": Method(LORA.model_copy(update={"dropout": 0.05})),
    "LoRA, every layer checkpointed": Method(LORA, how="checkpoint"),
    "reversible 1, 3 bits, LoRA": Method(Reversible(wiring=1, bits=3, inside=LORA)),
    "reversible 1, 2 bits, width 16, LoRA": Method(Reversible(wiring=1, bits=2, width=16, inside=LORA)),
    "reversible 2, 3 bits, width 16, LoRA": Method(Reversible(wiring=2, bits=3, width=16, inside=LORA)),
    "reversible 3, 3 bits, LoRA": Method(Reversible(wiring=3, bits=3, inside=LORA)),
    "PaCA": Method(PaCA(rank=16), rates=PACA_RATES),
    "reversible 1, 3 bits, PaCA": Method(Reversible(wiring=1, bits=3, inside=PaCA(rank=16)), rates=PACA_RATES),
    "reversible 1, float, anchors of 2, LoRA": Method(
        Reversible(form="float", wiring=1, anchor_every=2, tolerance=1e-2, inside=LORA)
    ),
    "LoRA from pissa": Method(LORA.model_copy(update={"init": "pissa"})),
    "LoRA from lora_ga": Method(LORA.model_copy(update={"init": "lora_ga"})),
    "LoRA, 30 % of the rows": Method(LORA.model_copy(update={"keep_rows": 0.3})),
    "LoRA, activations fused": Method(LORA, activations="fused"),
    "LoRA, activations in fp8": Method(LORA, activations="fp8"),
    "LoRA, activations in 4 bits": Method(LORA, activations="int4"),
    "full, activations in 4 bits": Method(FullFineTune(), rates=FULL_RATES, activations="int4"),
    "PaCA, activations in 4 bits": Method(PaCA(rank=16), rates=PACA_RATES, activations="int4"),
    "DoRA": Method(LORA.model_copy(update={"dora": True})),
    "LoRA on int8": Method(LORA, Int8()),
    "LoRA on nf4": Method(LORA, NF4()),
    "LoRA at what nf4 lost (LoRC)": Method(LORA.model_copy(update={"init": "lorc"}), NF4()),
    "LoRA on lq, 4.1 bits": Method(LORA, LQ(bits=4.127)),
    "LoRA on lq, 2.75 bits": Method(LORA, LQ(bits=2.75)),
    "PaCA on nf4": Method(PaCA(rank=16), NF4(), rates=PACA_RATES),
    "reversible 1, 3 bits, LoRA on nf4": Method(Reversible(wiring=1, bits=3, inside=LORA), NF4()),
    "S2A, biases": Method(S2A(), rates=(1e-3, 3e-3, 6e-3, 1.2e-2)),
    "S2A, biases, prompt of 8, side 32": Method(S2A(prompt=8, side=32), rates=(1e-3, 3e-3, 6e-3, 1.2e-2)),
    "UniPT": Method(UniPT(reduction=4)),
    "UniPT on nf4": Method(UniPT(reduction=4), NF4()),
    "PEQA, 4 bits": Method(PEQA(bits=4), rates=PEQA_RATES),
    "PEQA, 3 bits": Method(PEQA(bits=3), rates=PEQA_RATES),
    "PV-Tuning, 4 bits": Method(PV(bits=4), rates=PEQA_RATES),
    "PV-Tuning, 3 bits": Method(PV(bits=3), rates=PEQA_RATES),
    "L4Q, 4 bits": Method(L4Q(rank=8, bits=4)),
    "L4Q, 3 bits": Method(L4Q(rank=8, bits=3)),
}


@lru_cache(maxsize=1)
def domain() -> tuple[Tensor, Tensor]:
    """Bytes of the reference's topics: to train on, and a tenth held out, whole topics."""
    texts = [text.encode() for _, text in sorted(topics.topics.items())]
    first = len(texts) * 9 // 10
    train, held = b"\n".join(texts[:first]), b"\n".join(texts[first:])
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, held))  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _prepared(method: Method, source: str) -> PreparedBase:
    """Its base, decomposed here."""
    root = Path(tempfile.mkdtemp(prefix="farspan-bench-"))
    spec = TrainSpec(
        run_dir=str(root / "run"),
        tokens_dir="",
        model=Model(source),
        data=TextData("stdlib"),
        adapter=method.adapter,
        base=method.base,
        precision="bf16",
        mesh=Mesh(),
        zero=0,
        cpu_offload=False,
        accumulation=1,
        warmup_steps=0,
        optim=Optim(),
        memory=Tiles(),
        checkpoint=Checkpoint(),
        evaluate=Evaluate(),
        track=Track(),
    )
    return PreparedBase.open(prepare(spec, cache_root=root / "cache"))


def source_model(toy: bool) -> str:
    return str(pretrained(toy=toy, layers=LAYERS, steps=PRETRAINING_STEPS))


class Run:
    """One method's model, engine and data."""

    def __init__(self, method: Method, seed: int, lr: float, steps: int, toy: bool, dtype: torch.dtype) -> None:
        self.method, self.steps, self.rows = method, steps, SEQUENCES * ROWS
        source, prepared = source_model(toy), None
        if is_prepared(method.base, method.adapter):
            prepared = _prepared(method, source)
        causal = load_model(source, revision=None, dtype=dtype, device=CPU, base=method.base, prepared=prepared)
        layers = decoder_layers(causal)
        plan = LayerPlan(x=Rows(device=self.rows))
        placement = Placement(rows=self.rows, attention_rows=self.rows, layers=(plan,) * len(layers))
        if method.how == "peft":
            self.module, trainable = _by_peft(causal, seed)
        else:
            self.module, trainable = prepare_model(
                causal,
                adapter=method.adapter,
                memory=Tiles(loss_tile=512, activations=method.activations),
                seed=seed,
                placement=placement if method.rebuilt else None,
            )
        if prepared is not None:
            start_adapters(self.module.model, prepared)
        adapter = method.adapter
        if isinstance(adapter, LoRA) and adapter.init == "pissa":
            for layer in lora_start.lora_layers(self.module.model).values():
                lora_start.begin(layer, *lora_start.from_weights(layer, adapter))
        if isinstance(adapter, LoRA) and adapter.init == "lora_ga":
            probe = batch(domain()[0], 2 * SEQUENCES, torch.Generator().manual_seed(100 + seed))
            lora_start.from_gradients(self.module.model, adapter, lambda: self.loss(probe).backward(), seed=seed)
        if method.how == "checkpoint":
            for layer in layers:
                layer.gradient_checkpointing = True  # type: ignore[assignment]
                layer._gradient_checkpointing_func = lambda call, x: checkpoint(call, x, use_reentrant=False)  # type: ignore[assignment]
        self.trained = sum(p.numel() for p in trainable.values())
        self.weight_bytes = sum(t.nbytes for t in (*causal.parameters(), *causal.buffers()))
        self.optim = method.optim.model_copy(update={"lr": lr, "steps": steps, "beta2": 0.95})
        engine = InBackwardEngine if self.optim.in_backward else PlainEngine
        self.plain = engine(self.module, trainable, self.optim, "cpu")
        self.engine = with_codes(self.plain, self.module, self.optim)
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

    def batch(self) -> Tensor:
        return batch(domain()[0], SEQUENCES, self.draw)

    def loss(self, ids: Tensor) -> Tensor:
        """Sum over all trained bytes of some sequences, packed into one."""
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        positions = torch.arange(ids.shape[1]).repeat(ids.shape[0])[None]
        pack = PackedSequence((ids.shape[1],) * ids.shape[0])
        return self.module(ids.flatten()[None], labels.flatten()[None], positions, pack)  # type: ignore[no-any-return]

    def step(self, step: int = 1, ids: Tensor | None = None) -> float:
        ids = self.batch() if ids is None else ids
        trained, lr = ids.numel() - ids.shape[0], lr_at(step, self.optim, max(1, self.steps // 20))
        self.engine.begin(lr=lr)
        loss = self.loss(ids)
        self.engine.backward(loss / trained, last=True)
        self.engine.step(lr=lr, clip_norm=None if self.optim.in_backward else 1.0)
        return float(loss.detach()) / trained

    def held_out(self, toy: bool) -> float:
        ids = batch(domain()[1], 4 if toy else 48, torch.Generator().manual_seed(3))
        self.module.eval()
        with torch.no_grad():
            losses = [float(self.loss(part)) / (part.numel() - part.shape[0]) for part in ids.split(SEQUENCES)]
        self.module.train()
        return statistics.mean(losses)

    def state_bytes(self) -> int:
        """Masters, moments and the buffer that gradients are added up in."""
        states = {f.tensor.data_ptr(): f.tensor.nbytes for f in self.plain.fragments()}
        weights = {p.data_ptr() for p in self.module.parameters()}
        flat = self.plain._flat
        return sum(size for at, size in states.items() if at not in weights) + (flat.nbytes if flat is not None else 0)


def _by_peft(causal: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    from farspan.trainer.models import CausalLMLoss

    torch.manual_seed(seed)
    adapted = get_peft_model(causal, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    module = CausalLMLoss(adapted, causal, loss_tile=512)
    module.train()
    return module, {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def machine() -> dict[str, Any]:
    """What this CPU multiplies in a second, and the dtype that weights and activations are trained in."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(3):
            began_s = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began_s)
        rates[dtype] = 2 * 512**3 / min(times)
    slow = rates[torch.bfloat16] < SLOW_BF16 * rates[torch.float32]
    gflops = {f"{str(dtype).removeprefix('torch.')}_gflop_per_s": rate / 1e9 for dtype, rate in rates.items()}
    return {"trained_in": "float32" if slow else "bfloat16", **gflops}


def trained_cell(method: Method, seed: int, lr: float, steps: int, toy: bool, dtype: torch.dtype) -> dict[str, Any]:
    run = Run(method, seed, lr, steps, toy, dtype)
    start = run.held_out(toy) if toy or (seed == 0 and lr == method.rates[1]) else None
    began_s = time.perf_counter()
    losses = [run.step(step) for step in range(1, steps + 1)]
    took_s = time.perf_counter() - began_s
    return {"start": start, "held_out": run.held_out(toy), "last": statistics.mean(losses[-10:]), "seconds": took_s}


def bytes_cell(method: Method, toy: bool) -> dict[str, Any]:
    """Always of a model in bf16."""
    run = Run(method, 0, 1e-3, 2, toy, torch.bfloat16)
    ids = run.batch()
    run.step(1, ids)
    footprint(lambda: None, CPU)
    kept = footprint(lambda: run.loss(ids), CPU)
    kept_bytes = kept.kept_bytes
    del kept
    return {
        "trained": run.trained,
        "weights": run.weight_bytes,
        "states": run.state_bytes(),
        "kept_per_row": kept_bytes / run.rows,
        "peak_per_row": footprint(lambda: run.step(1, ids), CPU).peak_bytes / run.rows,
    }


def times_cell(names: list[str], repeats: int, toy: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Interleaved, so that a busy moment of the machine meets all of them."""
    runs = {name: Run(METHODS[name], 0, 1e-4, 2, toy, dtype) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            ids = run.batch()
            began_s = time.perf_counter()
            run.step(1, ids)
            if repeat:
                taken[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(times) for name, times in taken.items()}


def best_rate(cells: dict[str, Any], name: str) -> float | None:
    """Of those that are there and finite; None: none is."""
    found = {lr: cells.get(f"{name}/{lr:g}/0", {}).get("held_out", math.inf) for lr in METHODS[name].rates}
    best = min(found, key=lambda lr: found[lr])
    return best if math.isfinite(found[best]) else None


def started(cells: dict[str, Any], name: str) -> float:
    """Held-out loss before training: measured once for a method."""
    found = [cells.get(f"{name}/{lr:g}/0", {}).get("start") for lr in METHODS[name].rates]
    return next(float(loss) for loss in found if loss is not None)


def report(cells: dict[str, Any], steps: int) -> str:
    names = [name for name in METHODS if best_rate(cells, name) is not None and f"bytes/{name}" in cells]
    start = started(cells, names[0])
    times = cells.get("times", {})
    base_s = times.get("LoRA")
    lines = [
        "# Methods of fine-tuning",
        "",
        f"`farspan bench adapters`: a Llama of {LAYERS} layers, 3 million parameters, trained on Python source, "
        f"adapted to English text in {steps} steps of {SEQUENCES} x {ROWS} bytes on one CPU thread, weights and "
        f"activations in {cells['machine']['trained_in']}. Loss in nats a byte on held-out text, {start:.3f} at the "
        "start; mean and range of three seeds at the best learning rate of four, three of them tried. Bytes are "
        "counted in bf16 with fp32 masters; those of activations are of a row.",
        "",
        "| method | trained | weights MiB | optimizer MiB | kept KiB | peak KiB | step | of LoRA's | lr | start "
        "| loss | range |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        size, lr = cells[f"bytes/{name}"], best_rate(cells, name)
        seeds = [cells[key] for seed in SEEDS if (key := f"{name}/{lr:g}/{seed}") in cells]
        losses = [cell["held_out"] for cell in seeds]
        edge = "*" if lr in (METHODS[name].rates[0], METHODS[name].rates[-1]) else ""
        took = f"{times[name] * 1e3:.0f} ms | {times[name] / base_s:.2f}" if name in times and base_s else "– | –"
        lines.append(
            f"| {name} | {size['trained']:,} | {size['weights'] / 2**20:.2f} | {size['states'] / 2**20:.2f} "
            f"| {size['kept_per_row'] / 1024:.1f} | {size['peak_per_row'] / 1024:.1f} | {took} | {lr:g}{edge} "
            f"| {started(cells, name):.3f} | {statistics.mean(losses):.4f} | {max(losses) - min(losses):.4f} |"
        )
    lines += ["", "`*`: the best rate is the lowest or highest that was tried."]
    return "\n".join(lines) + "\n"


class Cells:
    """What was measured so far, in a file that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell that is missing."""
        if key in self.read():
            return
        found = measure()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.path.write_text(json.dumps({**self.read(), key: found}, indent=1, sort_keys=True) + "\n")
        finally:
            os.close(folder)
        print(f"{key:<50} {json.dumps(found)[:120]}", flush=True)


def measure_method(name: str, path: Path, toy: bool) -> None:
    """Its bytes, its rates on one seed, two more seeds at the best of them."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    cells, method, steps = Cells(path), METHODS[name], TOY_STEPS if toy else STEPS
    dtype = getattr(torch, cells.read()["machine"]["trained_in"])
    cells.add(f"bytes/{name}", lambda: bytes_cell(method, toy))
    rates = method.rates[:1] if toy else method.rates[1:3]
    for _ in range(1 if toy else 2):
        for lr in rates:
            cells.add(f"{name}/{lr:g}/0", lambda lr=lr: trained_cell(method, 0, lr, steps, toy, dtype))  # type: ignore[misc]
        # of the outer ones that beside the better of the two in the middle
        rates = (method.rates[0] if best_rate(cells.read(), name) == method.rates[1] else method.rates[3],)
    best = best_rate(cells.read(), name)
    for seed in () if toy or best is None else SEEDS[1:]:
        cells.add(f"{name}/{best:g}/{seed}", lambda seed=seed: trained_cell(method, seed, best, steps, toy, dtype))  # type: ignore[misc]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench adapters", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model, two steps, two rates")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--workers", type=int, default=1, help="methods measured at a time, one thread each")
    parser.add_argument("--out", type=Path, help="default: results/adapters.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) / "adapters.json" if options.toy else RESULTS / "adapters.json"
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    source_model(options.toy)
    names, cells = [name for name in METHODS if options.only in name], Cells(options.out)
    cells.add("machine", machine)
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(measure_method, name, options.out, options.toy) for name in names]:
            done.result()
    if names == list(METHODS):
        dtype = getattr(torch, cells.read()["machine"]["trained_in"])
        cells.add("times", lambda: times_cell(names, 1 if options.toy else 9, options.toy, dtype))
    text = report(cells.read(), TOY_STEPS if options.toy else STEPS)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
