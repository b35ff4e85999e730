"""LoRA in one decoder layer: what is stored for backward and how long a step of the layer takes, beside peft.

An unmodified Llama layer in bf16, all linear layers adapted: peft's default (adapters in fp32), peft with adapters in
the layer's dtype, and Farspan's layers, with and without dropout. Stored bytes are counted by storage, without weights;
the peak is the allocator's of forward and backward; seconds are medians of interleaved runs in one process and thread.

    farspan bench lora                       results/lora.json (resumable), lora.md
    farspan bench lora --toy                 seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.memory.allocations import footprint
from farspan.memory.operators import keep_less
from farspan.trainer.adapters.lora.apply import install
from farspan.trainer.attention import NAME, PackedSequence

RESULTS = Path(__file__).parent / "results"
WIDTHS = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
"""The proportions of an 8B model at a quarter of its width."""
TOY = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 1}
SYSTEMS = ("peft, its default", "peft, adapters in bf16", "Farspan", "Farspan, activations fused")
DROPOUTS = (0.0, 0.05)
RANK = 16


class Layer:
    """One layer under one system."""

    def __init__(self, system: str, dropout: float, rows: int, widths: dict[str, int]) -> None:
        config = AutoConfig.for_model(
            "llama", num_hidden_layers=1, vocab_size=128, pad_token_id=0, attn_implementation=NAME, **widths
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        options = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules="all-linear")
        adapted = get_peft_model(model, options, autocast_adapter_dtype=system == SYSTEMS[0])
        if system.startswith("Farspan"):
            install(adapted)
        if system == SYSTEMS[3]:
            keep_less(list(model.model.layers), "fused", hidden_act=config.hidden_act)
        model.train()
        self.layer: nn.Module = model.model.layers[0]
        positions = torch.arange(rows)[None]
        self.x = torch.randn(1, rows, widths["hidden_size"]).bfloat16().requires_grad_()
        self.given = {
            "position_embeddings": model.model.rotary_emb(self.x, positions),
            "position_ids": positions,
            "packed_sequence": PackedSequence((rows,)),
        }

    def forward(self) -> Tensor:
        return self.layer(self.x, **self.given)  # type: ignore[no-any-return]

    def step(self) -> None:
        self.forward().backward(torch.ones_like(self.x))
        self.x.grad = None
        for p in self.layer.parameters():
            p.grad = None

    def stored_bytes(self) -> int:
        beside = {
            t.untyped_storage().data_ptr() for t in (*self.layer.parameters(), *self.given["position_embeddings"])
        }
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in beside:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.forward()
        del y
        return sum(seen.values())


def seconds(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def measure(dropout: float, rows: int, widths: dict[str, int], repeats: int) -> dict[str, Any]:
    layers = {system: Layer(system, dropout, rows, widths) for system in SYSTEMS}
    for layer in layers.values():
        layer.step()
    footprint(lambda: None, torch.device("cpu"))
    found: dict[str, Any] = {
        system: {
            "stored_bytes_per_row": layer.stored_bytes() / rows,
            "peak_bytes_per_row": footprint(layer.step, torch.device("cpu")).peak_bytes / rows,
        }
        for system, layer in layers.items()
    }
    taken: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(repeats):
        for system, layer in layers.items():
            taken[system].append(seconds(layer.step))
    for system, times in taken.items():
        found[system]["step_s"] = statistics.median(times)
    return found


def report(cells: dict[str, Any], widths: dict[str, int]) -> str:
    lines = [
        "# LoRA in one decoder layer",
        "",
        f"`farspan bench lora`: Llama, {', '.join(f'{name} {width}' for name, width in widths.items())}, bf16, "
        f"rank {RANK}, one CPU thread. Bytes are of a row, without weights.",
        "",
        "| dropout, rows | system | stored KiB | of peft's default | peak KiB | step | of peft's default |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, found in cells.items():
        base = found[SYSTEMS[0]]
        for system, one in found.items():
            lines.append(
                f"| {key} | {system} | {one['stored_bytes_per_row'] / 1024:.1f} "
                f"| {one['stored_bytes_per_row'] / base['stored_bytes_per_row']:.3f} "
                f"| {one['peak_bytes_per_row'] / 1024:.1f} | {one['step_s'] * 1e3:.0f} ms "
                f"| {one['step_s'] / base['step_s']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench lora", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="a narrow layer, few repeats")
    parser.add_argument("--out", type=Path, help="default: results/lora.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) / "lora.json" if options.toy else RESULTS / "lora.json"
    torch.set_num_threads(1)
    widths, rows, repeats = (TOY, 300, 2) if options.toy else (WIDTHS, 2048, 9)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for dropout in DROPOUTS:
        key = f"{dropout}, {rows}"
        if key not in done:
            done[key] = measure(dropout, rows, widths, repeats)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{key:<14} {done[key]}", flush=True)
    text = report(done, widths)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
