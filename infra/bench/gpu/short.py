"""LoRA and full fine-tuning of 1B and 8B models from 8k to 64k rows, where nothing should be offloaded.

    python infra/bench/gpu/short.py [--lengths 8k] [--systems solve keep] [--toy] [--minutes 8.5]

The cells are those of `race.py`. What does not fit (full fine-tuning of 8B on one GPU) says so, by the plan.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from _common import Bench, main
from _plans import config_of, heads_of
from race import PEERS, PLANNED, cell, more_options, table

K = 1 << 10
LENGTHS = (8 * K, 16 * K, 32 * K, 64 * K)
SYSTEMS = ("solve", PLANNED, "keep", "recompute", *PEERS)
TOY_SYSTEMS = ("solve", "keep")


def run(bench: Bench, options: argparse.Namespace) -> None:
    models = ["toy"] if bench.toy else ["1B", "8B"]
    rank = 8 if bench.toy else 16
    bench.choose_kernels(heads_of(config_of(models[-1], lora=rank)), 256 if bench.toy else 16 * K)
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths or ([900] if bench.toy else LENGTHS):
            for model in models:
                for lora in (rank, 0):
                    for system in options.systems or (TOY_SYSTEMS if bench.toy else SYSTEMS):
                        cell(bench, config_of(model, lora=lora), length, system, options, folder)


if __name__ == "__main__":
    sys.exit(main(__doc__.split("\n", maxsplit=1)[0], sys.argv[1:], "short", run, table, more_options))
