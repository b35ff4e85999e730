"""SPT's sparse attention beside flash attention and attention that stores its weights: bytes, peak, time.

The paper compares with attention that stores S x S weights. Flash attention stores none, so that the claim is measured
again against it here: one attention of four heads in fp32, forward and backward, by length, codebooks and choice of
blocks included. Bytes are the allocator's own events; seconds are medians of interleaved runs in one thread.

    farspan bench spt                 results/spt.json (resumable), spt.md
    farspan bench spt --toy           seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _sparse_attention import BLOCK_ROWS, choose_blocks, sparse_attention, stored_by_csr, stored_bytes
from lora import seconds
from torch import Tensor

from farspan.kernels.attention import causal_attention
from farspan.memory.allocations import footprint

RESULTS = Path(__file__).parent / "results"
LENGTHS, TOY_LENGTHS = (512, 1024, 2048, 4096), (256, 512)
HEADS, KV_HEADS, SIZE = 4, 2, 64
STORED, FLASH, SPARSE = "weights stored", "flash attention", "SPT, blocks"
SYSTEMS = (STORED, FLASH, SPARSE)
CPU = torch.device("cpu")


def attend(system: str, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """[H, S, D] by one of the systems."""
    rows, scale = q.shape[1], SIZE**-0.5
    if system == FLASH:
        return causal_attention(q[None], k[None], v[None], lengths=(rows,), scale=scale)[0][0]
    if system == SPARSE:
        return sparse_attention(q, k, v, documents, choose_blocks(q, k, documents), scale=scale)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    mask = torch.ones(rows, rows, dtype=torch.bool).tril()
    return (q @ keys.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ values


def measure(rows: int, repeats: int) -> dict[str, Any]:
    made = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(h, rows, SIZE, generator=made).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS))
    documents, weight = torch.zeros(rows).long(), torch.randn(HEADS, rows, SIZE, generator=made)
    found: dict[str, Any] = {}
    inputs = sum(x.nbytes for x in (q, k, v))

    def step(system: str) -> None:
        q.grad = k.grad = v.grad = None
        attend(system, q, k, v, documents).backward(weight)

    footprint(lambda: None, CPU)
    for system in SYSTEMS:
        step(system)
        kept = footprint(lambda system=system: attend(system, q, k, v, documents), CPU)  # type: ignore[misc]
        found[system] = {"kept_bytes": kept.kept_bytes + inputs}
        del kept
        q.grad = k.grad = v.grad = None
        found[system]["peak_bytes"] = footprint(lambda system=system: step(system), CPU).peak_bytes  # type: ignore[misc]
    taken: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(repeats):
        for system in SYSTEMS:
            taken[system].append(seconds(lambda system=system: step(system)))  # type: ignore[misc]
    for system, times in taken.items():
        found[system]["step_s"] = statistics.median(times)
    with torch.no_grad():
        blocks = choose_blocks(q, k, documents)
        found["choose_s"] = statistics.median(seconds(lambda: choose_blocks(q, k, documents)) for _ in range(repeats))
        off = attend(SPARSE, q, k, v, documents) - attend(FLASH, q, k, v, documents)
        found["output_error"] = float(off.norm() / attend(FLASH, q, k, v, documents).norm())
    found["kept_blocks"] = blocks.shape[-1]
    return found


def report(cells: dict[str, Any]) -> str:
    lines = [
        "# SPT: attention over the blocks that product-quantized codes point to",
        "",
        f"`farspan bench spt`: forward and backward of one attention, {HEADS} query and {KV_HEADS} KV heads of {SIZE}, "
        f"fp32, one thread; an eighth of the keys in blocks of {BLOCK_ROWS}. Kept: for backward, inputs and output "
        "included. Random vectors: where the codes point says nothing of a trained model.",
        "",
        "| rows | system | kept KiB | of flash | peak KiB | of flash | step | of flash |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_rows = {int(rows): cell for rows, cell in cells.items()}
    for rows, cell in sorted(by_rows.items()):
        for system in SYSTEMS:
            one, base = cell[system], cell[FLASH]
            lines.append(
                f"| {rows} | {system} | {one['kept_bytes'] / 1024:,.0f} "
                f"| {one['kept_bytes'] / base['kept_bytes']:.2f} | {one['peak_bytes'] / 1024:,.0f} "
                f"| {one['peak_bytes'] / base['peak_bytes']:.2f} | {one['step_s'] * 1e3:.0f} ms "
                f"| {one['step_s'] / base['step_s']:.2f} |"
            )
    lines += [
        "",
        "| rows | kept by the formula, blocks, KiB | by the paper's CSR form, KiB | choosing | output off by |",
        "|---|---|---|---|---|",
    ]
    for rows, cell in sorted(by_rows.items()):
        ours = stored_bytes(rows, HEADS, KV_HEADS, SIZE, 4, cell["kept_blocks"], BLOCK_ROWS)
        csr = stored_by_csr(rows, HEADS, KV_HEADS, SIZE, 4)
        lines.append(
            f"| {rows} | {ours / 1024:,.0f} | {csr / 1024:,.0f} | {cell['choose_s'] * 1e3:.0f} ms "
            f"| {cell['output_error']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench spt", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="short, one repeat")
    parser.add_argument("--out", type=Path, help="default: results/spt.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) / "spt.json" if options.toy else RESULTS / "spt.json"
    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for rows in TOY_LENGTHS if options.toy else LENGTHS:
        if str(rows) not in done:
            done[str(rows)] = measure(rows, 1 if options.toy else 5)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=1) + "\n")
    text = report(done)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
