"""Farspan against TRL's SFTTrainer and a bare torch loop: same model, data, length, precision and machine.

Every cell is a fresh process that trains the same small Llama (fp32, AdamW, clipping at 1, activation checkpointing of
every layer, one sequence per step) on the same token sequences, one OpenMP thread per rank. Cells are interleaved
(system by system, then again), so that a slow minute of the machine hits all. Reported: median tokens/s over the
repeats, peak resident memory of a rank during steps, and ratios to TRL within each repeat.

- `farspan-1`, `farspan-2`: `job.run()` on a local Ray with sp=1 and sp=2 actors, as a user runs it;
- `trl`: SFTTrainer with its defaults (checkpointing on, chunked loss), tokens given, no packing;
- `bare`: transformers model, torch checkpointing by transformers' own switch, whole logits, fused AdamW.

    farspan bench sft                    results/sft.json (resumable), results/sft.md
    farspan bench sft --toy              seconds instead of half an hour, for the test
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("farspan-1", "farspan-2", "trl", "bare")
STEPS = {256: 2, 2048: 12, 8192: 5, 32768: 2}
"""Measured steps by length; one more comes before and does not count."""
REPEATS = 5
MODEL = {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 344, "vocab": 4096}
ALLOWED_RATIO = 0.97


def sequences(length: int, count: int) -> Any:
    """int64 [count, length], the same for every system."""
    import numpy as np

    return np.random.default_rng(0).integers(10, MODEL["vocab"], (count, length))


def _job(folder: Path, length: int, sp: int) -> Any:
    from farspan import Checkpoint, Evaluate, MemoryBudget, Optim, Parallel, SFTJob, TextData, Track

    return SFTJob(
        name=f"bench-{sp}",
        model={"type": "pretrained", "id": str(folder / "model")},
        data=TextData(str(folder / "data.jsonl"), context=length),
        precision="fp32",
        parallel=Parallel(sp=sp, dp=1, zero=0),
        memory=MemoryBudget(plan="recompute"),
        optim=Optim(lr=1e-4, steps=STEPS[length] + 1, schedule="constant", warmup_steps=0),
        checkpoint=Checkpoint(export=False),
        evaluate=Evaluate(share=0),
        track=Track(tensorboard=False),
        output_dir=str(folder / "outputs"),
    )


def farspan_cell(folder: Path, length: int, sp: int) -> dict[str, Any]:
    from farspan.trainer.run_folder import read_metrics

    result = _job(folder, length, sp).run()
    records = read_metrics(result.run_dir / "metrics.jsonl")[1:]
    saving_s = [record["parts_s"].get("checkpoint", 0.0) for record in records]
    assert all(record["tokens"] == length for record in records), [record["tokens"] for record in records]
    return {
        "step_s": [record["step_s"] - saved_s for record, saved_s in zip(records, saving_s)],
        "peak_bytes": max(record["rss_peak_bytes"] for record in records),
        "loss": records[-1]["loss"],
    }


def trl_cell(folder: Path, length: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from farspan.trainer.process_memory import PeakMemory

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.step_s: list[float] = []
            self.memory = PeakMemory(torch.device("cpu"))
            self.peak_bytes: list[int] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.memory.reset()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step_s.append(time.perf_counter() - self.started)
            self.peak_bytes.append(self.memory.read()["rss_peak_bytes"])

    clock = Clock()
    ids = sequences(length, STEPS[length] + 1)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_length=length,
            per_device_train_batch_size=1,
            max_steps=STEPS[length] + 1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step_s": clock.step_s[1:], "peak_bytes": max(clock.peak_bytes[1:]), "loss": losses[-1]}


def bare_cell(folder: Path, length: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from farspan.trainer.process_memory import PeakMemory

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.activation_checkpointing_enable()
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    memory, step_s, peaks = PeakMemory(torch.device("cpu")), [], []
    for ids in torch.from_numpy(sequences(length, STEPS[length] + 1)):
        memory.reset()
        started = time.perf_counter()
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        step_s.append(time.perf_counter() - started)
        peaks.append(memory.read()["rss_peak_bytes"])
    return {"step_s": step_s[1:], "peak_bytes": max(peaks[1:]), "loss": loss.item()}


CELLS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "farspan-1": lambda folder, length: farspan_cell(folder, length, 1),
    "farspan-2": lambda folder, length: farspan_cell(folder, length, 2),
    "trl": trl_cell,
    "bare": bare_cell,
}


def write_inputs(folder: Path, length: int) -> None:
    """Model, tokenizer and data of one length: token i is the word `w<i>`, so text and ids are the same thing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from farspan.trainer.config import RandomModel
    from farspan.trainer.models import write_random_model

    model = RandomModel(family="llama", **MODEL)
    write_random_model(model, folder / "model", precision="fp32", context=length, eos_id=0, pad_id=1)
    words = {"</s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, MODEL["vocab"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    with open(folder / "data.jsonl", "w") as file:
        for ids in sequences(length, STEPS[length] + 1):
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in ids[:-1])}) + "\n")  # the end token makes it whole


def fresh_inputs(folder: Path, length: int) -> None:
    """`write_inputs` in a process of its own."""
    write = subprocess.run(
        [sys.executable, __file__, "--inputs", str(folder), "--length", str(length)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert write.returncode == 0, write.stderr


def run_cell(inputs: Path, system: str, length: int) -> dict[str, Any]:
    """One cell in a process of its own, on a copy of `inputs`: it leaves outputs and a cache there."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FARSPAN_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        cell = subprocess.run(
            [sys.executable, __file__, "--cell", system, "--inputs", folder, "--length", str(length)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if cell.returncode != 0:
            raise RuntimeError(f"{system} at {length}:\n{cell.stdout[-2000:]}\n{cell.stderr[-4000:]}")
        return json.loads(cell.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench sft", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="one repeat at 256 tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "sft.json")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    for internal in ("--cell", "--inputs"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        print(json.dumps(CELLS[options.cell](Path(options.inputs), options.length)))
        return 0
    if options.inputs:
        write_inputs(Path(options.inputs), options.length)
        return 0
    lengths, repeats = ([256], 1) if options.toy else (options.lengths, options.repeats)
    done = json.loads(options.out.read_text()) if options.out.exists() else {"machine": machine(), "cells": {}}
    for length in lengths:
        keys = {f"{length}/{repeat}/{system}": system for repeat in range(repeats) for system in SYSTEMS}
        missing = {key: system for key, system in keys.items() if key not in done["cells"]}
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as inputs:
            fresh_inputs(Path(inputs), length)
            for key, system in missing.items():
                done["cells"][key] = cell = run_cell(Path(inputs), system, length)
                print(f"{key:<22} {length / statistics.median(cell['step_s']):8.0f} tok/s", flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(done, indent=1) + "\n")
    text = table(done, lengths, repeats)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if options.toy else verdict(done, lengths, repeats)


def machine() -> dict[str, Any]:
    import psutil
    import torch
    import transformers
    import trl

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def speed(done: dict[str, Any], length: int, repeat: int, system: str) -> float:
    """Tokens per second of a cell, from its median step."""
    return length / statistics.median(done["cells"][f"{length}/{repeat}/{system}"]["step_s"])


def table(done: dict[str, Any], lengths: list[int], repeats: int) -> str:
    lines = [
        "# Farspan, TRL and a bare torch loop",
        "",
        "`farspan bench sft`. Llama shape "
        + ", ".join(f"{k} {v}" for k, v in MODEL.items())
        + "; fp32, checkpointing of",
        "every layer, one sequence per step, one thread per rank; medians over "
        f"{repeats} interleaved repeats. Machine: {', '.join(f'{k} {v}' for k, v in done['machine'].items())}.",
        "",
        "| length | system | tokens/s | ratio to TRL (median, range) | peak RSS of a rank | peak to TRL | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in lengths:
        for system in SYSTEMS:
            ratios = sorted(speed(done, length, r, system) / speed(done, length, r, "trl") for r in range(repeats))
            cells = [done["cells"][f"{length}/{r}/{system}"] for r in range(repeats)]
            peak = statistics.median(cell["peak_bytes"] for cell in cells)
            trl = statistics.median(done["cells"][f"{length}/{r}/trl"]["peak_bytes"] for r in range(repeats))
            typical = statistics.median(speed(done, length, r, system) for r in range(repeats))
            lines.append(
                f"| {length} | {system} | {typical:.0f} "
                f"| {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) "
                f"| {peak / 2**20:.0f} MiB | {peak / trl:.3f} | {cells[0]['loss']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def verdict(done: dict[str, Any], lengths: list[int], repeats: int) -> int:
    """1 when Farspan on one rank is slower than allowed, or needs more memory at the longest length."""
    failed = False
    for length in lengths:
        ratio = statistics.median(
            speed(done, length, r, "farspan-1") / speed(done, length, r, "trl") for r in range(repeats)
        )
        failed |= ratio < ALLOWED_RATIO
        print(f"farspan sp=1 / TRL at {length}: {ratio:.3f} (at least {ALLOWED_RATIO})")
    ours, theirs = (
        statistics.median(done["cells"][f"{lengths[-1]}/{r}/{s}"]["peak_bytes"] for r in range(repeats))
        for s in ("farspan-1", "trl")
    )
    print(f"peak at {lengths[-1]}: {ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB")
    return 1 if failed or ours >= theirs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
