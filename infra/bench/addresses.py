"""Addresses for the blocks of a training step: recorded traces packed, beside what torch's caching allocator reserves.

Two decoder layers at the widths of an 8B model, random weights, bf16, run one step through the executor on a CPU with
every layer rebuilt; the allocator's own events say which blocks lived when. Weights and optimizer are not among them.
Packed are the whole step at once, and layer by layer (MEMO's two levels); beside that the most bytes alive at one
moment, which no layout can undercut, and what torch's allocator for CUDA would have reserved, told from its rules.

    farspan bench addresses                  results/addresses.json (resumable), addresses.md
    farspan bench addresses --toy            seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from _memory_cells import adapter_of
from transformers import AutoModelForCausalLM

from farspan.memory.addresses import ORDERS, Block, Piece, best_fit, most_alive, pack, pack_in_pieces
from farspan.memory.block_traces import recorded
from farspan.memory.caching_allocator import reserved_bytes
from farspan.memory.config import Tiles
from farspan.memory.plan import checkpoint_every_layer
from farspan.trainer.attention import NAME, PackedSequence
from farspan.trainer.config import RandomModel
from farspan.trainer.models import DTYPES, decoder_layers, prepare_model, random_config

RESULTS = Path(__file__).parent / "results"
WIDE: dict[str, Any] = {"hidden": 4096, "layers": 2, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 512}
NARROW: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 512}
FAMILIES, ADAPTERS, ROWS = ("llama", "qwen3"), {"full": 0, "LoRA": 16}, (512, 1024, 2048)
CUT_BYTES = 5
ALIGN = 512
"""Bytes: as torch rounds requests on CUDA."""


def mark(*_: object) -> None:
    torch.empty(CUT_BYTES, dtype=torch.uint8)


def trace(family: str, rank: int, rows: int, widths: dict[str, Any]) -> tuple[list[Block], list[Piece]]:
    """Blocks of the second step, and the stretches between two runs of a layer."""
    shape = RandomModel.model_validate({"family": family, **widths})
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(
        random_config(shape, context=rows, eos_id=0, pad_id=1), dtype=DTYPES["bf16"], attn_implementation=NAME
    )
    module, trained = prepare_model(
        causal,
        adapter=adapter_of({"lora": rank}),
        memory=Tiles(loss_tile=512),
        seed=0,
        placement=checkpoint_every_layer(widths["layers"], rows=rows, attention_rows=rows),
    )
    for layer in decoder_layers(causal):  # the first thing a layer runs, whoever runs it
        layer.input_layernorm.register_forward_pre_hook(mark)  # type: ignore[union-attr, operator]
    ids = torch.randint(2, widths["vocab"], (1, rows))

    def step() -> None:
        for parameter in trained.values():
            parameter.grad = None
        loss = module(ids, ids.roll(-1, 1), torch.arange(rows)[None], PackedSequence((rows,)))
        (loss / rows).backward()

    step()
    blocks, cuts = recorded(step, cut_bytes=CUT_BYTES)
    ends = [*cuts, 1 + max(block.end for block in blocks)]
    return blocks, [Piece(start, end) for start, end in pairwise(ends)]


def cell(blocks: list[Block], pieces: list[Piece]) -> dict[str, Any]:
    rounded = [block._replace(bytes=-(-block.bytes // ALIGN) * ALIGN) for block in blocks]
    greedy = {
        name: max(offset + block.bytes for offset, block in zip(best_fit(rounded, order), rounded))
        for name, order in ORDERS.items()
    }
    started_s = time.perf_counter()
    whole = pack(blocks, align=ALIGN)
    packed_s = time.perf_counter()
    levels = pack_in_pieces(blocks, pieces, align=ALIGN)
    return {
        "blocks": len(blocks),
        "alive": most_alive(rounded),
        "whole": whole.peak_bytes,
        "how": whole.how,
        "levels": levels.peak_bytes,
        "pieces": len(pieces),
        "whole_s": round(packed_s - started_s, 3),
        "levels_s": round(time.perf_counter() - packed_s, 3),
        "best_fit": greedy,
        "caching": reserved_bytes(blocks),
        "expandable": reserved_bytes(blocks, expandable=True),
    }


def report(cells: dict[str, Any]) -> str:
    lines = [
        "# Addresses of a step's blocks",
        "",
        "`farspan bench addresses`. Above what is alive at once, in percent.",
        "",
    ]
    lines += [
        "| layers | rows | blocks | alive MiB | packed whole | layer by layer | best fit, best and worst order "
        "| caching allocator | expandable segments | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in cells.items():
        alive = found["alive"]
        over = {what: f"{found[what] / alive - 1:.2%}" for what in ("whole", "levels", "caching", "expandable")}
        greedy = sorted(found["best_fit"].values())
        kind, rows = name.rsplit("/", 1)
        lines.append(
            f"| {kind} | {rows} | {found['blocks']} | {alive / 2**20:.0f} | {over['whole']} | {over['levels']} "
            f"| {greedy[0] / alive - 1:.2%}, {greedy[-1] / alive - 1:.2%} | {over['caching']} | {over['expandable']} "
            f"| {found['whole_s']:.1f}, {found['levels_s']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench addresses", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="narrow layers, one length")
    parser.add_argument("--out", type=Path, default=RESULTS / "addresses.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    widths, lengths = (NARROW, (900,)) if options.toy else (WIDE, ROWS)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for family, (adapter, rank), rows in product(FAMILIES, ADAPTERS.items(), lengths):
        key = f"{family}, {adapter}/{rows}"
        if key not in done:
            done[key] = cell(*trace(family, rank, rows, widths))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{key:<28} {done[key]}", flush=True)
    text = report(done)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
