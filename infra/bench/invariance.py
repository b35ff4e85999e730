"""Is the gradient the same whatever the mesh? Every mode against transformers in float64.

One step of a small model runs on a gang of real processes over gloo, for every combination of (dp, sp), model shape,
KV heads, packing, adapter, ZeRO stage, accumulation and memory plan. Loss and every gradient are compared with plain
transformers (stock sdpa, one document at a time, whole logits, peft for LoRA) in float64. The yardstick is the error of
that same plain code in fp32 on one process: ours may be at most twice it, tensor by tensor, in the relative L2 norm.

What it does not cover: bf16 (its error hides scale mistakes), GPUs, more than four ranks.

    farspan bench invariance            the full product, resumable, table in infra/bench/results/invariance.md
    farspan bench invariance --pairwise a cover in which every pair of values meets at least once
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FACTORS: dict[str, list[Any]] = {
    "mesh": [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)],
    "family": ["llama", "qwen3"],
    "heads": [(4, 4), (4, 2), (4, 1), (6, 3)],  # query heads, KV heads: sp > KV heads, heads that do not divide
    "packing": ["packed", "single"],
    "adapter": ["full", "lora"],
    "zero": [0, 1, 2, 3],
    "accumulation": [1, 2],
    "memory": ["keep", "recompute+tiles"],
}
RESULTS = Path(__file__).parent / "results"
ALLOWED_RATIO = 2.0
LAYERS = 2


@dataclass(frozen=True)
class Case:
    mesh: tuple[int, int]
    family: str
    heads: tuple[int, int]
    packing: str
    adapter: str
    zero: int
    accumulation: int
    memory: str

    @property
    def key(self) -> str:
        return "/".join(str(value).replace(" ", "") for value in asdict(self).values())

    @property
    def packs(self) -> int:
        return self.mesh[0] * self.accumulation

    @property
    def reference(self) -> tuple[Any, ...]:
        """What the truth depends on: everything but how the work is spread."""
        return self.family, self.heads, self.packing, self.adapter, self.packs


def product() -> list[Case]:
    return [Case(*values) for values in itertools.product(*FACTORS.values())]


def pairwise(seed: int = 0) -> list[Case]:
    """A small set of cases in which every two values of different factors meet (greedy, seeded)."""
    rng, names = random.Random(seed), list(FACTORS)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}
    cases = []
    while missing:
        candidates = [Case(*(rng.choice(values) for values in FACTORS.values())) for _ in range(60)]
        best = max(candidates, key=lambda case: len(_pairs(case, names) & missing))
        missing -= _pairs(best, names)
        cases.append(best)
    return sorted(cases, key=lambda case: (case.mesh[0] * case.mesh[1], case.mesh))


def _pairs(case: Case, names: list[str]) -> set[Any]:
    return {((a, getattr(case, a)), (b, getattr(case, b))) for a, b in itertools.combinations(names, 2)}


def packs_of(case: Case) -> list[Any]:
    """Packs of random tokens: several documents, or one, of lengths that no SP degree divides."""
    import numpy as np

    from farspan.trainer.data.packing import Pack

    layout = [[61, 5, 1, 120, 36], [90, 100], [3, 149, 14], [187]] if case.packing == "packed" else [[197], [161]] * 2
    packs = []
    for index, lengths in enumerate(layout[: case.packs]):
        rng = np.random.default_rng(index)
        ids = rng.integers(0, 256, sum(lengths))
        labels, positions, at = np.full(len(ids), -100), np.zeros(len(ids), np.int64), 0
        for n in lengths:
            labels[at : at + n - 1] = ids[at + 1 : at + n]
            positions[at : at + n] = np.arange(n)
            at += n
        labels[rng.random(len(ids)) < 0.1] = -100  # an uneven share of trained tokens per rank
        packs.append(
            Pack(
                input_ids=ids,
                labels=labels,
                position_ids=positions,
                cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
                tokens=len(ids),
                trained_tokens=int((labels != -100).sum()),
                pieces=len(lengths),
            )
        )
    return packs


def _model_folder(case: Case, root: Path) -> Path:
    from farspan.trainer.config import RandomModel
    from farspan.trainer.models import write_random_model

    folder = root / f"{case.family}-{case.heads[0]}-{case.heads[1]}"
    if not folder.exists():
        model = RandomModel(
            family=case.family,  # type: ignore[arg-type]
            hidden=16 * case.heads[0],
            layers=LAYERS,
            heads=case.heads[0],
            kv_heads=case.heads[1],
            ffn=160,
            vocab=260,
        )
        write_random_model(model, folder, precision="fp32", context=256, eos_id=0, pad_id=1)
    return folder


def _adapter(case: Case) -> Any:
    from farspan.trainer.config import FullFineTune, LoRA

    return LoRA(rank=4) if case.adapter == "lora" else FullFineTune()


def _fill_lora_b(named: Any) -> None:
    """peft starts B at zero, which makes A's gradient zero too; give it values, the same everywhere."""
    import torch

    for index, (name, parameter) in enumerate(sorted(named)):
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.data.copy_(drawn * 0.05)


def reference(case: Case, folder: Path, dtype: Any) -> tuple[float, dict[str, Any]]:
    """Mean loss and gradients by plain transformers and peft: one process, one document at a time, whole logits."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from farspan.trainer.models import add_adapter

    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model: Any = add_adapter(causal, _adapter(case), seed=0)
    _fill_lora_b([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    model = model.to(dtype).train()
    packs = packs_of(case)
    trained = sum(pack.trained_tokens for pack in packs)
    total = 0.0
    for pack in packs:
        for start, stop in itertools.pairwise(pack.cu_seqlens):
            ids, labels = (torch.from_numpy(x[start:stop]) for x in (pack.input_ids, pack.labels))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / trained
            loss.backward()
            total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def relative_error(got: Any, want: Any) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class Rank:
    """One process of a gang, living through many cases."""

    def __init__(self, rank: int, world_size: int, port: int, root: Path) -> None:
        import torch

        from farspan.trainer.config import Mesh
        from farspan.trainer.parallel.mesh import join
        from farspan.trainer.world import World

        torch.set_num_threads(1)
        self.root, self.world_size = root, world_size
        world = World(rank=rank, world_size=world_size, local_rank=rank, master_port=port)
        self.grids = {(world_size, 1): join(world, Mesh(dp=world_size), alone_too=True)}
        self.truths: dict[tuple[Any, ...], Any] = {}

    def grid(self, mesh: tuple[int, int]) -> Any:
        from farspan.trainer.config import Mesh
        from farspan.trainer.parallel.mesh import form_groups

        if mesh not in self.grids:
            self.grids[mesh] = form_groups(Mesh(dp=mesh[0], sp=mesh[1]), self.grids[self.world_size, 1].device)
        return self.grids[mesh]

    def run(self, case: Case) -> dict[str, Any]:
        """Errors of loss and gradients against float64, and those of the yardstick; whole on rank 0 only."""
        import torch
        import torch.distributed as dist

        grid = self.grid(case.mesh)
        if grid.rank == 0:
            _model_folder(case, self.root)
        dist.barrier()
        loss, gradients = self._ours(case, grid)
        if grid.rank != 0:
            return {}
        if case.reference not in self.truths:
            folder = _model_folder(case, self.root)
            truth, single = (reference(case, folder, dtype) for dtype in (torch.float64, torch.float32))
            self.truths[case.reference] = (truth, {n: relative_error(single[1][n], g) for n, g in truth[1].items()})
        (true_loss, truth_gradients), yardstick = self.truths[case.reference]
        assert gradients.keys() == truth_gradients.keys(), gradients.keys() ^ truth_gradients.keys()
        errors = {n: relative_error(gradients[n], g) for n, g in truth_gradients.items()}
        ratios = {n: errors[n] / yardstick[n] for n in errors}
        worst = max(ratios, key=lambda n: ratios[n])
        return {
            "loss_error": abs(loss - true_loss) / true_loss,
            "worst_ratio": ratios[worst],
            "worst_tensor": worst,
            "worst_error": errors[worst],
            "yardstick": yardstick[worst],
            "median_ratio": sorted(ratios.values())[len(ratios) // 2],
            "tensors": len(ratios),
        }

    def _ours(self, case: Case, grid: Any) -> tuple[float, dict[str, Any]]:
        import torch
        import torch.distributed as dist

        from farspan.memory.config import MemoryBudget
        from farspan.memory.plan import checkpoint_every_layer
        from farspan.trainer.batch import rows_of
        from farspan.trainer.config import Optim
        from farspan.trainer.engine import make_engine
        from farspan.trainer.models import load_model, prepare_model, zero3
        from farspan.trainer.parallel.ulysses import Ulysses

        memory, placement = MemoryBudget(loss_tile=64), None
        if case.memory != "keep":
            memory = MemoryBudget(loss_tile=64, mlp_tile=32)
            placement = checkpoint_every_layer(LAYERS, rows=256, attention_rows=256)
        folder = _model_folder(case, self.root)
        with zero3(case.zero == 3, grid.device):
            causal = load_model(str(folder), revision=None, dtype=torch.float32, device=grid.device)
        module, trainable = prepare_model(causal, adapter=_adapter(case), memory=memory, seed=0, placement=placement)
        _fill_lora_b(list(trainable.items()))
        engine = make_engine(module, trainable, Optim(), grid, zero=case.zero, precision="fp32")  # type: ignore[arg-type]
        ulysses = Ulysses(grid.sp_group) if grid.sp_group is not None else None
        packs = packs_of(case)
        trained = sum(pack.trained_tokens for pack in packs)
        mine = packs[grid.dp_index :: case.mesh[0]]
        total = torch.zeros((), dtype=torch.float64)
        for micro, pack in enumerate(mine):
            rows = rows_of(pack, sp=case.mesh[1], sp_index=grid.sp_index, ulysses=ulysses, device=grid.device)
            loss = engine.module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
            total += loss.detach()
            engine.backward(loss / trained, last=micro + 1 == len(mine))
        gradients = engine.full_gradients()
        engine.close()
        dist.all_reduce(total)
        return float(total) / trained, gradients


def _serve(rank: int, world_size: int, port: int, root: Path, pipe: Connection) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        member = Rank(rank, world_size, port, root)
        while (case := pipe.recv()) is not None:
            pipe.send(member.run(case))
    except EOFError:
        return
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


class Gang:
    """Persistent processes that run one case after another."""

    def __init__(self, world_size: int, root: Path) -> None:
        import multiprocessing

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["farspan.trainer.models", "farspan.trainer.data.packing"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, root, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Case, *, timeout_s: float = 240.0) -> dict[str, Any]:
        """The result of rank 0.

        Raises:
            RuntimeError: a rank failed or answered nothing in time.
        """
        for pipe in self.pipes:
            pipe.send(case)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout_s):
                raise RuntimeError(f"rank {rank} did not finish {case.key} in {timeout_s:.0f} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise RuntimeError(f"rank {rank} died in {case.key}") from None
        failed = [answer["error"] for answer in answers if "error" in answer]
        if failed:
            raise RuntimeError(f"{case.key}\n{failed[0]}")
        return answers[0]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench invariance", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairwise", action="store_true", help="a pairwise cover instead of the full product")
    parser.add_argument("--out", type=Path, default=RESULTS / "invariance.json")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    cases = pairwise() if options.pairwise else product()
    todo = [case for case in cases if case.key not in done]
    print(f"{len(cases)} cases, {len(cases) - len(todo)} done before")
    with tempfile.TemporaryDirectory() as root:
        for world_size, group in itertools.groupby(
            sorted(todo, key=lambda case: case.mesh[0] * case.mesh[1]), key=lambda case: case.mesh[0] * case.mesh[1]
        ):
            gang, started = Gang(world_size, Path(root)), time.monotonic()
            for index, case in enumerate(group):
                done[case.key] = {"case": asdict(case), **gang.run(case)}
                if index % 20 == 19:
                    print(f"{world_size} ranks: {index + 1} cases, {time.monotonic() - started:.0f} s", flush=True)
                    _save(options.out, done)
            gang.close()
            _save(options.out, done)
    options.out.with_suffix(".md").write_text(table([done[case.key] for case in cases]))
    failed = [key for key, result in done.items() if result["worst_ratio"] > ALLOWED_RATIO]
    print(options.out.with_suffix(".md").read_text())
    print(f"{len(cases) - len(failed)} of {len(cases)} cases within {ALLOWED_RATIO} x single-process fp32")
    return 1 if failed else 0


def _save(path: Path, done: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(result)}" for key, result in done.items())
    path.write_text(f"{{\n{rows}\n}}\n")


def table(results: list[dict[str, Any]]) -> str:
    """Worst and median ratio by mesh and ZeRO stage, as markdown."""
    lines = [
        "# Gradients against float64, by mesh and ZeRO stage",
        "",
        "Relative L2 error of each gradient, divided by that of plain transformers in fp32 on one process.",
        "`farspan bench invariance`; factors: " + ", ".join(f"{k} ({len(v)})" for k, v in FACTORS.items()) + ".",
        "",
        "| dp x sp | ZeRO | cases | worst ratio | median ratio | worst loss error |",
        "|---|---|---|---|---|---|",
    ]
    for mesh, zero in itertools.product(FACTORS["mesh"], FACTORS["zero"]):
        mine = [r for r in results if tuple(r["case"]["mesh"]) == mesh and r["case"]["zero"] == zero]
        if mine:
            medians = sorted(r["median_ratio"] for r in mine)
            lines.append(
                f"| {mesh[0]} x {mesh[1]} | {zero} | {len(mine)} | {max(r['worst_ratio'] for r in mine):.2f} "
                f"| {medians[len(medians) // 2]:.2f} | {max(r['loss_error'] for r in mine):.1e} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
