"""Attention's exchange between two ranks in few bits: learned by channel, the same for all, and as it is.

The small model of `farspan bench adapters` is adapted by LoRA on two ranks of one sequence, with the same schedule of
bits whether they are learned or not, at several budgets. What is told: held-out loss with the codes still on and
without them (which is what is exported), bytes that a rank sends, and how far a layer's gradients were off at start.

    farspan bench exchange            results/exchange.json (resumable cell by cell), exchange.md
    farspan bench exchange --toy      seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _method_run import SEQUENCES, domain, source_model
from _methods import LORA
from _pretrained import ROWS, batch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from farspan.memory.config import Tiles
from farspan.memory.operators import gradient_error
from farspan.memory.single_layers import hooked
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import AMAQ, Optim
from farspan.trainer.engine import Engine
from farspan.trainer.engine_bits import BitsEngine
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.models import decoder_layers, load_model, prepare_model
from farspan.trainer.optimizer import lr_at
from farspan.trainer.parallel.learned_bits import LearnedBits
from farspan.trainer.parallel.ulysses import Ulysses

RESULTS = Path(__file__).parent / "results"
STEPS, TOY_STEPS, LR = 80, 3, 8e-3
BUDGETS = {"4 bits": (2, 4.0, 8), "3 bits": (2, 3.0, 8), "2 bits": (1, 2.0, 6)}
"""Least, average and most."""
SEEDS, RANKS = (0, 1, 2), 2
CPU = torch.device("cpu")


def cases(toy: bool) -> dict[str, AMAQ | None]:
    found: dict[str, AMAQ | None] = {"exact": None}
    for name, (least, bits, most) in list(BUDGETS.items())[: 1 if toy else None]:
        asked = AMAQ(least=least, bits=bits, most=most, start=min(7.0, most - 0.5))
        found |= {f"{name}, the same for all": asked.model_copy(update={"lr": 0.0}), f"{name}, learned": asked}
    return found


class Rank:
    """One of the two: model, engine, its half of every sequence."""

    def __init__(self, exchange: AMAQ | None, seed: int, steps: int, toy: bool) -> None:
        causal = load_model(source_model(toy), revision=None, dtype=torch.float32, device=CPU)
        self.module, self.trainable = prepare_model(causal, adapter=LORA, memory=Tiles(loss_tile=512), seed=seed)
        self.optim = Optim(lr=LR, steps=steps, beta2=0.95)
        self.engine: Engine | None = None
        self.bits, self.ulysses, self.layers = None, Ulysses(dist.group.WORLD), decoder_layers(causal)  # type: ignore[arg-type]
        if exchange is not None:
            sizes: Any = {"device": CPU, "steps": steps, "seed": seed}
            self.bits = LearnedBits.of(self.layers, causal.config, exchange, **sizes)
        self.draw = torch.Generator().manual_seed(seed)

    def loss(self, ids: Tensor) -> Tensor:
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        positions = torch.arange(ids.shape[1]).repeat(ids.shape[0])
        pack = PackedSequence((ids.shape[1],) * ids.shape[0], self.ulysses)
        rows = ids.numel() // RANKS
        mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
        return self.module(ids.flatten()[None, mine], labels.flatten()[None, mine], positions[None, mine], pack)  # type: ignore[no-any-return]

    def start(self) -> None:
        """Have an engine listen to gradients from here on."""
        plain = PlainEngine(self.module, self.trainable, self.optim, "cpu")
        self.engine = plain if self.bits is None else BitsEngine(plain, self.bits)

    def step(self, step: int) -> None:
        assert self.engine is not None
        ids, lr = batch(domain()[0], SEQUENCES, self.draw), lr_at(step, self.optim, 4)
        self.engine.begin(lr=lr)
        self.engine.backward(self.loss(ids) / (ids.numel() - ids.shape[0]), last=True)
        self.engine.step(lr=lr, clip_norm=1.0)

    def held_out(self, toy: bool, *, codes: bool) -> float:
        """In training mode what crosses is in codes; there is no dropout."""
        ids = batch(domain()[1], 4 if toy else 48, torch.Generator().manual_seed(3))
        self.module.train(codes)
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for part in ids.split(SEQUENCES):
                total += self.loss(part)
        self.module.train()
        dist.all_reduce(total)
        return float(total) / (ids.numel() - ids.shape[0])

    def error_at_start(self) -> float:
        """Of the weights' gradients, the median of all layers, all channels with the budget's bits."""
        assert self.bits is not None
        self.bits.uniform(self.bits.config.bits)
        ids, found = batch(domain()[0], SEQUENCES, torch.Generator().manual_seed(9)), []

        def look(index: int, call: Any, x: Tensor) -> Tensor:
            assert self.bits is not None
            layer, without = self.layers[index], self.bits.measured_against
            error = gradient_error(layer, call, x.detach(), without=without)
            assert error is not None and error.weights is not None
            found.append(error.weights)
            return call(x)  # type: ignore[no-any-return]

        hooks = {index: lambda call, x, index=index: look(index, call, x) for index in range(len(self.layers))}
        with torch.no_grad(), hooked(self.layers, hooks):
            self.loss(ids)
        return statistics.median(found)


def run_rank(rank: int, port: int, exchange: AMAQ | None, seed: int, toy: bool, out: str) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    steps = TOY_STEPS if toy else STEPS
    run, found, sent = Rank(exchange, seed, steps, toy), dict[str, Any](), 0
    if run.bits is not None:
        found["error"] = run.error_at_start()
    run.start()
    for step in range(1, steps + 1):
        run.step(step)
        if run.bits is not None:
            sent += run.bits.traffic.sent_bytes
            found["bits"] = float(run.bits.bits_LID.double().mean())
            found["share"] = run.bits.traffic.sent_bytes / run.bits.traffic.exact_bytes
    if run.bits is not None:
        counts = run.bits.bits_LID.flatten().bincount(minlength=9).tolist()
        found |= {"sent_bytes_a_step": sent / steps, "channels_by_bits": counts}
    found |= {"with codes": run.held_out(toy, codes=True), "held_out": run.held_out(toy, codes=False)}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def cell(exchange: AMAQ | None, seed: int, toy: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = f"{folder}/cell.json"
        mp.spawn(run_rank, (port, exchange, seed, toy, out), nprocs=RANKS)  # type: ignore[no-untyped-call]
        return json.loads(Path(out).read_text())  # type: ignore[no-any-return]


def report(done: dict[str, Any], toy: bool) -> str:
    lines = [
        "# Attention's exchange in few bits",
        "",
        f"`farspan bench exchange`: LoRA of rank 8 on two ranks of a sequence of {SEQUENCES * ROWS} rows, "
        f"{TOY_STEPS if toy else STEPS} steps, fp32, up to three seeds. Held-out loss in nats a byte, with codes on "
        "and without; bits on average, and a rank's bytes as a share of 16 bits a number, in the last step; error of a "
        "layer's weight gradients before training, all channels alike.",
        "",
        "| exchange | bits | bytes | gradients off by | loss with codes | loss | range |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in cases(toy):
        cells = [done[key] for seed in SEEDS if (key := f"{name}/{seed}") in done]
        if not cells:
            continue
        losses, coded = [one["held_out"] for one in cells], statistics.mean(one["with codes"] for one in cells)
        told = "16 | 1.00 | – | –"
        if "bits" in cells[0]:
            first = cells[0]
            told = f"{first['bits']:.2f} | {2 * first['share']:.2f} | {first['error']:.1%} | {coded:.4f}"
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "one seed"
        lines.append(f"| {name} | {told} | {statistics.mean(losses):.4f} | {spread} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench exchange", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model, three steps, one budget, one seed")
    parser.add_argument("--out", type=Path, help="default: results/exchange.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) / "exchange.json" if options.toy else RESULTS / "exchange.json"
    source_model(options.toy)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in SEEDS[:1] if options.toy else SEEDS:
        for name, exchange in cases(options.toy).items():
            key = f"{name}/{seed}"
            if key in done:
                continue
            done[key] = cell(exchange, seed, options.toy)
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{key:<40} {json.dumps(done[key])[:120]}", flush=True)
    text = report(done, options.toy)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
