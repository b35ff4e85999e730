"""What the machine can do at most: products, copies, the link to the host, the disk, attention kernels.

    python infra/bench/gpu/ceilings.py [--toy] [--minutes 8.5]

The numbers a plan's hardware file has, measured: products at the widths of an 8B model, whole and in tiles of rows;
device memory; the link each way, both ways, and beside products; the disk tier; every attention back end forward and
backward from 32k to 1M rows, with the largest length each accepts, its error at the last rows against fp64 (past 2^31
elements a kernel may be finite and wrong), and whether a prefix has the bits of the whole run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

from _common import Bench, main, markdown, rows_of, seconds

from farspan.kernels.attention_backends import BACKENDS

K, M = 1 << 10, 1 << 20
WIDTHS = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
TOY_WIDTHS = {"q, o": (64, 64)}
HEADS = {"heads": 32, "kv_heads": 8, "size": 128}
TOY_HEADS = {"heads": 4, "kv_heads": 2, "size": 16}
LONGEST_OF_EFFICIENT = 128 * K
"""It is several times slower; longer runs say nothing new."""
LENGTHS = (32 * K, 64 * K, 128 * K, 256 * K, 512 * K, 1024 * K)


def tasks(toy: bool, folder: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (inner, out) in (TOY_WIDTHS if toy else WIDTHS).items():
        for rows in (256,) if toy else (2 * K, 32 * K):
            found[f"matmul/{name}/{rows}"] = {"what": "matmul", "rows": rows, "inner": inner, "out": out}
    found["copies"] = {"what": "copies", "bytes": 4 * M if toy else 2048 * M, "matmul": 64 if toy else 8192}
    size, count = (M, 4) if toy else (512 * M, 16)
    found["disk"] = {"what": "disk", "bytes": size, "count": count, "folder": folder}
    for rows in (1000,) if toy else LENGTHS:
        repeats = 1 if rows >= 512 * K else 3
        for backend in BACKENDS:
            if backend == "efficient" and rows > LONGEST_OF_EFFICIENT:
                continue
            found[f"attention/{rows}/{backend}"] = {
                "what": "attention", "rows": rows, "repeats": repeats, "backend": backend,
                **(TOY_HEADS if toy else HEADS),
            }  # fmt: skip
    return found


def run(bench: Bench, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.out.parent if options.out.parent.exists() else None) as folder:
        for key, task in tasks(bench.toy, folder).items():
            bench.cell(key, task, limit_s=570)


def table(bench: Bench) -> str:
    cells = bench.done["cells"]
    rows = [
        [f"product, {key.split('/')[1]}, {key.split('/')[2]} rows", f"{cell['flop_per_s'] / 1e12:.4g} TFLOP/s"]
        for key, cell in cells.items()
        if key.startswith("matmul/") and "failed" not in cell
    ]
    for key in ("copies", "disk"):
        cell = cells.get(key, {})
        if "failed" in cell:
            rows.append([key, cell["failed"]])
            continue
        for name, value in cell.items():
            told = f"{value:.3f} x" if "slowed" in name else f"{value / 1e9:.4g} GB/s"
            rows.append([f"{'copy, ' if key == 'copies' else ''}{name.replace('_', ' ')}", told])
    text = markdown(["what", "measured"], rows)
    kernels = []
    for key, cell in cells.items():
        if not key.startswith("attention/"):
            continue
        _, rows_text, name = key.split("/")
        length = rows_of(int(rows_text))
        if "failed" in cell:
            kernels.append([length, name, cell["failed"], "", "", "", ""])
            continue
        kernels.append(
            [
                length,
                name,
                seconds(cell["forward_s"]),
                seconds(cell["backward_s"]),
                f"{cell['forward_flop_per_s'] / 1e12:.3g} / {cell['backward_flop_per_s'] / 1e12:.3g}",
                f"{cell['error']:.1e}",
                "yes" if cell["prefix_bit_equal"] else "no",
            ]
        )
    header = ["rows", "attention kernel", "forward", "backward", "TFLOP/s", "error, fp64", "prefix bit-equal"]
    return f"{text}\n{markdown(header, kernels)}"


if __name__ == "__main__":
    sys.exit(main(__doc__.split("\n", maxsplit=1)[0], sys.argv[1:], "ceilings", run, table))
