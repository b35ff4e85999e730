"""Supervised fine-tuning: the SPMD loop every rank runs, and nothing else.

Read `Trainer.run` first: it is the whole job. The loss of a step is the sum over its trained tokens divided by their
global number, whatever the mesh, the accumulation and the packing, so that a run can be moved to another `dp x sp`.
What is random is keyed by (seed, step, micro-batch, rank), so a resumed run needs no generator state.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farspan.errors import NonFinite
from farspan.memory.addresses import TwoLevels
from farspan.memory.tiers.base import Interval
from farspan.trainer import models
from farspan.trainer.addresses import PlannedAddresses, planned_arena
from farspan.trainer.batch import rows_of
from farspan.trainer.checkpoint import Checkpointer, checkpoint_group
from farspan.trainer.config import OnTooLong, TrainSpec
from farspan.trainer.data.packing import Pack, PackedStream, validation_packs
from farspan.trainer.data.store import TokenStore
from farspan.trainer.engine import make_engine
from farspan.trainer.engine_bits import BitsEngine
from farspan.trainer.metrics import MetricsWriter
from farspan.trainer.optimizer import lr_at
from farspan.trainer.parallel.mesh import join
from farspan.trainer.parallel.ulysses import Ulysses
from farspan.trainer.part_clock import EXPORT_S, PartClock
from farspan.trainer.process_memory import PeakMemory
from farspan.trainer.run_folder import RunFolder
from farspan.trainer.sft_start import Start
from farspan.trainer.trace import Span, add_process
from farspan.trainer.world import Progress, Silent, TrainResult, World


def train(spec: TrainSpec, world: World, progress: Progress | None = None) -> TrainResult:
    """Train on this rank until the job's last step, resuming from the newest complete checkpoint in its run folder.

    Raises:
        FarspanError: the data, the model or the numbers make going on impossible; the same on every rank.
    """
    trainer = Trainer(spec, world, progress or Silent())
    try:
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """One rank of an SFT job: model, data and optimizer state, and the step that ties them together."""

    def __init__(self, spec: TrainSpec, world: World, progress: Progress) -> None:
        self.spec, self.progress = spec, progress
        self.clock = PartClock(progress)
        self.folder = RunFolder(Path(spec.run_dir))
        arena = planned_arena(spec, use_gpu=world.use_gpu)
        progress.phase("join", planned_s=60.0)
        self.grid = join(world, spec.mesh, alone_too=spec.zero > 0)
        self.ulysses = Ulysses(self.grid.sp_group) if self.grid.sp_group is not None else None
        progress.phase("load", planned_s=600.0)
        self.store = TokenStore(Path(spec.tokens_dir))
        data = spec.data
        self.stream = PackedStream(self.store.train, data.context, data.on_too_long, data.pack, spec.optim.seed)
        too_long: OnTooLong = "truncate" if data.on_too_long == "truncate" else "split"
        self.held_out = validation_packs(self.store.validation, data.context, spec.evaluate.max_tokens, too_long)
        start = Start(spec, self.grid, self.ulysses, self.folder, self.stream, progress)
        start.base_model(self.store.meta)
        self.tiers = models.open_store(spec, self.grid.device)
        module, trainable = models.build(spec, self.grid.device, self.tiers)
        start.choose_attention(module)
        self.bits = start.learned_bits(module)
        start.self_test(module, self.bits)
        start.adapter(module)
        self.density = module.density
        if self.density is not None:
            self.density.take(self.grid.device)  # of trials before the first step
        self.engine = make_engine(
            module,
            trainable,
            spec.optim,
            self.grid,
            zero=spec.zero,
            precision=spec.precision,
            cpu_offload=spec.cpu_offload,
        )
        if self.bits is not None:
            self.engine = BitsEngine(self.engine, self.bits)
        self.memory = PeakMemory(self.grid.device, arena)
        self.addresses = PlannedAddresses(arena, module.layers, self._addresses_planned)
        self.checkpointer = Checkpointer(
            self.folder,
            spec,
            group=checkpoint_group(),
            rank=self.grid.rank,
            world_size=self.grid.world_size,
            tokenizer_dir=self.store.tokenizer_dir,
        )
        self.position: dict[str, Any] = {"step": 0, "next_pack": 0, "tokens_total": 0, "trained_total": 0}
        self.restored: Path | None = None
        self._restore()
        start.set_range(module, self.engine.module, self.position)
        self.writer = self._writer() if self.grid.rank == 0 else None
        self.record: dict[str, Any] = {}

    def _writer(self) -> MetricsWriter:
        return MetricsWriter(
            self.folder,
            self.spec.track,
            run_name=self.folder.root.name,
            config=self.spec.model_dump(mode="json"),
            restored_step=self.position["step"] or None,
        )

    def run(self) -> TrainResult:
        """The job, from where it stands to its last step."""
        spec, first = self.spec, self.position["step"] + 1
        for step in range(first, spec.optim.steps + 1):
            last = step == spec.optim.steps
            self.clock.spans = [] if step == first + 1 and self.grid.rank == 0 else None
            self.memory.reset()
            started = time.perf_counter()
            with self.addresses.step():
                record = self._counted_step(step) if step == first and self.grid.rank == 0 else self.train_step(step)
            if last or _due(step, spec.evaluate.every):
                record["eval_loss"] = self.evaluate()
            if last or _due(step, spec.checkpoint.every):
                self.save(step)
            self._publish(record, started)
        with self.clock.part("checkpoint", planned_s=EXPORT_S):
            saved = self.checkpointer.wait()
        return TrainResult("done", self.position["step"], self.record, str(saved.path if saved else self.restored))

    def _counted_step(self, step: int) -> dict[str, Any]:
        """With what CPU tensors take meanwhile."""
        arena = self.tiers.arena_address if self.tiers is not None else None
        return self.memory.counted(lambda: self.train_step(step), besides=arena)

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step over `accumulation` packs per dp group.

        Raises:
            NonFinite: loss or gradient norm is NaN or infinite; weights are as before the step, unless the optimizer
                runs in backward.
        """
        spec, grid = self.spec, self.grid
        with self.clock.part("data"):
            packs = self._packs_of_step()
            mine = packs[grid.dp_index :: spec.mesh.dp]
            trained = sum(pack.trained_tokens for pack in packs)
        total = torch.zeros((), dtype=torch.float64, device=grid.device)
        lr = lr_at(step, spec.optim, spec.warmup_steps)
        self.engine.begin(lr=lr)
        for micro, pack in enumerate(mine):
            torch.manual_seed(_random_key(spec.optim.seed, step, micro, grid.rank))
            with self.clock.part("data"):
                rows = self._rows(pack)
            with self.clock.part("forward"):
                loss = self.engine.module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
            total += loss.detach()
            with self.clock.part("backward"):
                self.engine.backward(loss / max(trained, 1), last=micro + 1 == len(mine))
        with self.clock.part("reduce"):
            mean_loss = self._sum_over_ranks(total) / max(trained, 1)
            more = self._density(trained) | self._traffic()
        self._require_finite("loss", mean_loss, step, len(packs))
        with self.clock.part("optimizer"):
            norm = self.engine.step(lr=lr, clip_norm=spec.optim.clip_norm)
        self._require_finite("gradient norm", norm, step, len(packs))
        tokens = sum(pack.tokens for pack in packs)
        first = self.position["next_pack"]
        self.position |= {
            "step": step,
            "next_pack": first + len(packs),
            "tokens_total": self.position["tokens_total"] + tokens,
            "trained_total": self.position["trained_total"] + trained,
        }
        return {
            "step": step,
            "loss": mean_loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_total": self.position["tokens_total"],
            "trained_tokens": trained,
            "packing_efficiency": tokens / (len(packs) * spec.data.context),
            "epoch": self.stream.epoch_of(first),
            **more,
        }

    def evaluate(self) -> float | None:
        """Mean loss over the held-out packs; None when the job holds nothing out. Collective."""
        if not self.held_out:
            return None
        mesh = self.spec.mesh
        total = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        self.engine.module.eval()
        with self.clock.part("evaluate"), torch.no_grad():
            # every dp group runs the same number of packs, since ZeRO-3 gathers weights in each forward
            for turn in range(math.ceil(len(self.held_out) / mesh.dp)):
                index = turn * mesh.dp + self.grid.dp_index
                rows = self._rows(self.held_out[min(index, len(self.held_out) - 1)])
                loss = self.engine.module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
                total += loss if index < len(self.held_out) else 0.0
        self.engine.module.train()
        return self._sum_over_ranks(total) / max(sum(pack.trained_tokens for pack in self.held_out), 1)

    def save(self, step: int) -> None:
        """Snapshot now; writing and the export go on in the background. Waits for an earlier save."""
        with self.clock.part("checkpoint", planned_s=EXPORT_S):
            self.checkpointer.save(step, self.engine.fragments(), self.position)

    def close(self) -> None:
        """Stop background work and release what this rank holds."""
        for part in ("checkpointer", "writer", "engine", "tiers"):
            if getattr(self, part, None) is not None:
                getattr(self, part).close()

    def _packs_of_step(self) -> list[Pack]:
        first, count = self.position["next_pack"], self.spec.mesh.dp * self.spec.accumulation
        return [self.stream.pack(index) for index in range(first, first + count)]

    def _rows(self, pack: Pack) -> Any:
        return rows_of(
            pack, sp=self.spec.mesh.sp, sp_index=self.grid.sp_index, ulysses=self.ulysses, device=self.grid.device
        )

    def _sum_over_ranks(self, value: torch.Tensor) -> float:
        if self.grid.world_size > 1:
            dist.all_reduce(value)
        return float(value)

    def _density(self, trained: int) -> dict[str, float]:
        """Penalty and share of dense activations over the step, where the job has a penalty. Collective."""
        if self.density is None:
            return {}
        totals = self.density.take(self.grid.device)
        if self.grid.world_size > 1:
            dist.all_reduce(totals)
        penalty, dense, rows = totals.tolist()
        return {"density": dense / max(rows, 1.0), "density_loss": penalty / max(trained, 1)}

    def _traffic(self) -> dict[str, float]:
        """Bits of the exchange, and what this rank sent of it in the step so far, where it is in codes."""
        if self.bits is None:
            return {}
        traffic = self.bits.traffic
        return {
            "exchange_bits": float(self.bits.bits_LID.double().mean()),
            "exchange_bytes": traffic.sent_bytes,
            "exchange_exact_bytes": traffic.exact_bytes,
        }

    def _require_finite(self, what: str, value: float, step: int, packs: int) -> None:
        if math.isfinite(value):
            return
        first = self.position["next_pack"]
        raise NonFinite(
            f"{what} is {value} at step {step}",
            at=f"packs {first} to {first + packs - 1} of the data stream",
            why="a NaN or infinity entered the weights or the arithmetic; the update was "
            + (
                "applied as backward ran, which checkpoints do not have"
                if self.spec.optim.in_backward
                else "not applied"
            ),
            try_="resume from the last checkpoint with a lower optim.lr or optim.clip_norm, or --set precision=fp32",
        )

    def _publish(self, record: dict[str, Any], started: float) -> None:
        step_s = time.perf_counter() - started
        parts_s = self.clock.take()
        record |= {
            "step_s": step_s,
            "tokens_per_s": record["tokens"] / max(step_s - parts_s.get("evaluate", 0.0), 1e-9),
            "plan_step_s": self.spec.plan_step_s,
            "plan_device_peak_bytes": self.spec.plan_device_peak_bytes,
            "disk_bytes": 0,
            "stall_s": {"checkpoint": parts_s.get("checkpoint", 0.0)},
            "parts_s": parts_s,
            "attempt": self.spec.attempt,
            "time": time.time(),
            **self.memory.read(),
        }
        intervals: tuple[Interval, ...] = ()
        if self.tiers is not None:
            moved = self.tiers.statistics(restart=True)
            intervals = moved.intervals
            record["stall_s"] |= moved.stall_s
            record["disk_bytes"] = moved.moved_bytes["disk_write"]
            record["moved_bytes"] = dict(moved.moved_bytes)
            record["tier_peak_bytes"] = dict(moved.peak_bytes)
        if self.clock.spans is not None:
            lanes = [Span(i.lane.replace("_", " "), i.start_s, i.end_s, i.label, i.bytes) for i in intervals]
            add_process(self.folder.trace, "measured", [*self.clock.spans, *lanes], begin_s=started)
        if self.writer is not None:
            self.writer.write(record)
            self.record = record
            self.progress.record(record)

    def _addresses_planned(self, layout: TwoLevels) -> None:
        if self.grid.rank == 0:
            peak, gap = layout.peak_bytes, layout.gap
            self.progress.event("addresses", f"{len(layout.offsets)} blocks in {peak} bytes, {gap:.1%} above the least")

    def _restore(self) -> None:
        self.progress.phase("restore", planned_s=EXPORT_S)
        restored = self.checkpointer.load_latest(self.engine.fragments())
        if restored is not None:
            self.restored, self.position = restored.path, restored.progress
            self.engine.restored(step=self.position["step"])


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _random_key(seed: int, step: int, micro: int, rank: int) -> int:
    """A generator seed that never repeats within a run: 20 bits of step, 12 of micro-batch, 16 of rank."""
    return (seed << 48 ^ step << 28 ^ micro << 16 ^ rank) & (2**63 - 1)
