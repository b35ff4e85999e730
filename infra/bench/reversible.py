"""Reversible layers beside checkpointing: what is stored, the peak, the time of a step, and where training starts.

A small Llama in bf16, LoRA inside, by depth: autograd keeping everything (full fine-tuning and LoRA), torch's
checkpointing of every layer, and reversible layers. Bytes are the allocator's own events, without weights and their
gradients; seconds are medians of interleaved steps in one process and thread. Beside checkpointing and the bit-exact
form also the published one in floating point, with as many layers between anchors as a run would measure. The start is
the held-out loss of a small model trained here on the standard library's source, coupled without further training,
beside MEFT's own coupling, which adds lambda x1 to a layer that has the identity inside.

    farspan bench reversible                 results/reversible.json (resumable), reversible.md
    farspan bench reversible --toy           seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _pretrained import held_out_loss, pretrained
from lora import seconds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from farspan.memory.allocations import footprint
from farspan.memory.config import Tiles
from farspan.memory.coupling import halves
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.reversible.apply import couple
from farspan.trainer.attention import NAME, PackedSequence
from farspan.trainer.batch import Rows as PackRows
from farspan.trainer.config import Adapter, FullFineTune, LoRA, Mesh, RandomModel, Reversible
from farspan.trainer.models import prepare_model, random_config
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.self_test import reversible_anchors

RESULTS = Path(__file__).parent / "results"
DEPTHS, TOY_DEPTHS = (2, 4, 8, 16, 32), (2, 4)
BITS = (1, 2, 3, 4, 6)
INSIDE = LoRA(rank=8, alpha=16.0)
KEPT_FULL, KEPT, CHECKPOINTED = "full fine-tuning, all kept", "LoRA, all kept", "LoRA, every layer checkpointed"
REVERSIBLE = {
    "LoRA, reversible, wiring 1": Reversible(wiring=1, bits=3, inside=INSIDE),
    "LoRA, reversible, wiring 1, width 16": Reversible(wiring=1, bits=3, width=16, inside=INSIDE),
    "LoRA, reversible, wiring 3": Reversible(wiring=3, bits=3, inside=INSIDE),
    "full fine-tuning, reversible": Reversible(wiring=1, bits=3, inside=FullFineTune()),
}
SYSTEMS = (KEPT_FULL, KEPT, CHECKPOINTED, *REVERSIBLE)
FLOAT = {
    "LoRA, float, lambda 0.1 (published)": Reversible(form="float", wiring=1, inside=INSIDE),
    "LoRA, float, lambda 0.1, 1 % allowed": Reversible(form="float", wiring=1, tolerance=1e-2, inside=INSIDE),
    "LoRA, float, lambda 1": Reversible(form="float", wiring=1, factors=(1.0, 1.0), inside=INSIDE),
    "LoRA, float, wiring 3, 0.1 (published)": Reversible(form="float", wiring=3, inside=INSIDE),
}
FLOAT_SYSTEMS = (CHECKPOINTED, "LoRA, reversible, wiring 1", *FLOAT)
FLOAT_DEPTHS, TOY_FLOAT_DEPTHS = (8, 16), (4,)
PRECISIONS = ("bf16", "fp32")
COUPLED: dict[str, Reversible] = REVERSIBLE | FLOAT


class Step:
    """One model under one system, and its step without the optimizer's."""

    def __init__(self, system: str, depth: int, rows: int, toy: bool, precision: str = "bf16") -> None:
        shape = RandomModel(
            hidden=64 if toy else 256,
            layers=depth,
            heads=4 if toy else 8,
            kv_heads=2 if toy else 4,
            ffn=160 if toy else 688,
            vocab=512,
        )
        adapter: Adapter = COUPLED.get(system, FullFineTune() if system == KEPT_FULL else INSIDE)
        plan = LayerPlan(x=Rows(device=rows))
        placement = Placement(rows=rows, attention_rows=rows, layers=(plan,) * depth)
        torch.manual_seed(0)
        config = random_config(shape, context=rows, eos_id=0, pad_id=1)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
        self.module, trainable = prepare_model(
            causal,
            adapter=adapter,
            memory=Tiles(loss_tile=128),
            seed=0,
            placement=placement if system in COUPLED else None,
        )
        self.ids = torch.randint(2, 512, (1, rows), generator=torch.Generator().manual_seed(1))
        self.positions, self.sequence = torch.arange(rows)[None], PackedSequence((rows,))
        self.anchors: tuple[int, float] | None = None
        if self.module.coupling is not None and self.module.coupling.form == "float":
            self.anchors = self._anchors()
        if system == CHECKPOINTED:
            for layer in decoder_layers(causal):
                layer.gradient_checkpointing = True  # type: ignore[assignment]
                layer._gradient_checkpointing_func = lambda call, x: checkpoint(call, x, use_reentrant=False)  # type: ignore[assignment]
        for p in trainable.values():
            p.grad = torch.zeros_like(p)  # what is made in backward is added to it: gradients are in no peak

    def _anchors(self) -> tuple[int, float]:
        """The layers between anchors, and the error at them; on the rows that are trained on."""
        found = reversible_anchors(
            self.module,
            self.module,
            PackRows(self.ids, self.ids.roll(-1, 1), self.positions, self.sequence),
            RankGrid(Mesh(), 0, torch.device("cpu"), None),
        )
        assert self.module.coupling is not None
        self.module.coupling.anchor_every = found[0]
        return found

    def forward(self) -> Tensor:
        return self.module(self.ids, self.ids.roll(-1, 1), self.positions, self.sequence)  # type: ignore[no-any-return]

    def step(self) -> None:
        self.forward().backward()


def measure(
    depth: int, rows: int, repeats: int, toy: bool, systems: tuple[str, ...] = SYSTEMS, precision: str = "bf16"
) -> dict[str, Any]:
    steps = {system: Step(system, depth, rows, toy, precision) for system in systems}
    footprint(lambda: None, torch.device("cpu"))
    found: dict[str, Any] = {}
    for system, step in steps.items():
        step.step()
        kept = footprint(step.forward, torch.device("cpu"))
        kept_bytes = kept.kept_bytes
        kept.result.backward()
        del kept
        found[system] = {
            "kept_bytes_per_row": kept_bytes / rows,
            "peak_bytes_per_row": footprint(step.step, torch.device("cpu")).peak_bytes / rows,
        }
        if step.anchors is not None:
            found[system] |= {"anchor_every": step.anchors[0], "anchor_error": step.anchors[1]}
    taken: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(repeats):
        for system, step in steps.items():
            taken[system].append(seconds(step.step))
    for system, times in taken.items():
        found[system]["step_s"] = statistics.median(times)
    return found


def start(toy: bool) -> dict[str, Any]:
    """Held-out loss of a trained model, coupled: ours by the layers themselves, MEFT's by its formula."""
    folder = pretrained(toy=toy)
    found: dict[str, Any] = {"layers": 0, "base": held_out_loss(_opened(folder), toy=toy)}
    for wiring in (1, 3):
        for bits in BITS:
            model = _opened(folder)
            layers = decoder_layers(model)
            found["layers"] = len(layers)
            adapter = Reversible(wiring=wiring, bits=bits, inside=FullFineTune())  # type: ignore[arg-type]
            couple(model, adapter, seed=0)
            published = _opened(folder)
            _published(decoder_layers(published), wiring, 2.0**-bits)
            losses = [held_out_loss(each, toy=toy) for each in (model, published)]
            found[f"wiring {wiring}, {bits}"] = dict(zip(("Farspan", "MEFT"), losses))
    return found


def _published(layers: list[nn.Module], wiring: int, share: float) -> None:
    """y1 = lambda x1 + F(x2), y2 = x2 (wiring 1, its adapter at zero); both halves with lambda (wiring 3)."""
    streams: dict[str, Tensor] = {}

    def forward(index: int, whole: Callable[..., Tensor], parts: Any, x: Tensor, **kwargs: Any) -> Tensor:
        other = streams["other"] if index else x
        if wiring == 1:
            streams["other"] = x
            return share * other + whole(x, **kwargs)
        attention, mlp = parts
        y1 = share * other + attention(x, **kwargs)
        streams["other"] = y1
        return share * x + mlp(y1)

    for index, layer in enumerate(layers):
        whole, parts = layer.forward, halves(layer) if wiring == 3 else None
        layer.forward = lambda x, i=index, w=whole, p=parts, **kwargs: forward(i, w, p, x, **kwargs)  # type: ignore[method-assign, misc]


def _opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def report(cells: dict[str, Any]) -> str:
    depths = {int(key.split("/")[1]): cell for key, cell in cells.items() if key.startswith("depth/")}
    deepest, half = max(depths), max(depths) // 2
    lines = [
        "# Reversible layers",
        "",
        f"`farspan bench reversible`: Llama in bf16, hidden {depths[deepest]['hidden']}, {depths[deepest]['rows']} "
        "rows, one CPU thread, LoRA of rank 8 inside unless said, 3 side bits. Bytes are of a row, without weights and "
        "their gradients.",
        "",
        f"## {deepest} layers",
        "",
        "| system | stored by a layer | of checkpointing | peak KiB | of full fine-tuning | step | of checkpointing |",
        "|---|---|---|---|---|---|---|",
    ]
    one_layer = {
        system: (depths[deepest][system]["kept_bytes_per_row"] - depths[half][system]["kept_bytes_per_row"])
        / (deepest - half)
        for system in SYSTEMS
    }
    for system in SYSTEMS:
        cell, base = depths[deepest][system], depths[deepest]
        lines.append(
            f"| {system} | {one_layer[system]:,.0f} B | {one_layer[system] / one_layer[CHECKPOINTED]:.3f} "
            f"| {cell['peak_bytes_per_row'] / 1024:.1f} "
            f"| {cell['peak_bytes_per_row'] / base[KEPT_FULL]['peak_bytes_per_row']:.3f} "
            f"| {cell['step_s'] * 1e3:.0f} ms | {cell['step_s'] / base[CHECKPOINTED]['step_s']:.3f} |"
        )
    lines += ["", "## Peak by depth, KiB a row", "", "| layers | " + " | ".join(SYSTEMS) + " |"]
    lines.append("|---" * (len(SYSTEMS) + 1) + "|")
    for depth, found in sorted(depths.items()):
        peaks = " | ".join(f"{found[system]['peak_bytes_per_row'] / 1024:.1f}" for system in SYSTEMS)
        lines.append(f"| {depth} | {peaks} |")
    if even := break_even(depths):
        lines += [
            "",
            f"Wiring 1 needs less than checkpointing from {even} layers on (a line through the depths above).",
        ]
    for precision in PRECISIONS:
        lines += floating(cells, precision)
    if (begun := cells.get("start")) is not None:
        lines += [
            "",
            f"## Start: held-out loss of a trained model of {begun['layers']} layers, coupled",
            "",
            f"The model itself: {begun['base']:.4f}.",
            "",
            "| side bits | wiring 1 | MEFT's 1 | wiring 3 | MEFT's 3 |",
            "|---|---|---|---|---|",
        ]
        for bits in BITS:
            ones = [begun[f"wiring {w}, {bits}"][who] for w in (1, 3) for who in ("Farspan", "MEFT")]
            lines.append(f"| {bits} | " + " | ".join(f"{loss:.4f}" for loss in ones) + " |")
    return "\n".join(lines) + "\n"


def floating(cells: dict[str, Any], precision: str) -> list[str]:
    """The published form beside the others, by depth."""
    found = {int(key.split("/")[2]): cell for key, cell in cells.items() if key.startswith(f"float/{precision}/")}
    if not found:
        return []
    lines = [
        "",
        f"## The published form in floating point, {precision}",
        "",
        "Wiring 1 unless said. Streams are stored whole every k layers, k measured on the rows trained on; the error "
        "is that of streams computed back over k layers. Kept bytes are of a row, divided by the layers.",
        "",
        "| layers | system | k | error | kept B a layer | peak KiB | of checkpointing | step | of checkpointing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for depth, cell in sorted(found.items()):
        for system in FLOAT_SYSTEMS:
            one, base = cell[system], cell[CHECKPOINTED]
            every = one.get("anchor_every", "")
            error = f"{one['anchor_error']:.1e}" if every else ""
            lines.append(
                f"| {depth} | {system} | {every} | {error} | {one['kept_bytes_per_row'] / depth:,.0f} "
                f"| {one['peak_bytes_per_row'] / 1024:.1f} "
                f"| {one['peak_bytes_per_row'] / base['peak_bytes_per_row']:.3f} "
                f"| {one['step_s'] * 1e3:.0f} ms | {one['step_s'] / base['step_s']:.3f} |"
            )
    return lines


def break_even(depths: dict[int, Any]) -> int | None:
    """The first depth at which wiring 1's peak is below checkpointing's, both linear in the depth."""
    low, high = min(depths), max(depths)

    def line(system: str) -> tuple[float, float]:
        a, b = (depths[depth][system]["peak_bytes_per_row"] for depth in (low, high))
        slope = (b - a) / (high - low)
        return slope, a - slope * low

    (slope, base), (slope_c, base_c) = line(next(iter(REVERSIBLE))), line(CHECKPOINTED)
    return max(1, int((base - base_c) / (slope_c - slope)) + 1) if slope_c > slope else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench reversible", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="narrow and shallow, few repeats")
    parser.add_argument("--out", type=Path, help="default: results/reversible.json; of --toy a temporary file")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) / "reversible.json" if options.toy else RESULTS / "reversible.json"
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows, repeats = (128, 1) if options.toy else (1024, 5)

    def cell(key: str, made: Callable[[], dict[str, Any]]) -> None:
        if key not in done:
            done[key] = made()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            print(key, flush=True)

    for depth in TOY_DEPTHS if options.toy else DEPTHS:
        told = {"rows": rows, "hidden": 64 if options.toy else 256}
        cell(f"depth/{depth}", lambda depth=depth, told=told: {**measure(depth, rows, repeats, options.toy), **told})  # type: ignore[misc]
    for precision in PRECISIONS:
        for depth in TOY_FLOAT_DEPTHS if options.toy else FLOAT_DEPTHS:
            how = (depth, rows // 2, repeats, options.toy, FLOAT_SYSTEMS, precision)
            cell(f"float/{precision}/{depth}", lambda how=how: measure(*how))  # type: ignore[misc]
    cell("start", lambda: start(options.toy))
    text = report(done)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
