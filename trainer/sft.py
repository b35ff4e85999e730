"""Supervised fine-tuning: the SPMD loop every rank runs, and nothing else.

Read `Trainer.run` first: it is the whole job. The loss of a step is the sum over its trained tokens divided by their
global number, whatever the mesh, the accumulation and the packing, so that a run can be moved to another `dp x sp`.
What is random is keyed by (seed, step, micro-batch, rank), so a resumed run needs no generator state.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from farspan.errors import FarspanError, NonFinite
from farspan.memory.addresses import TwoLevels
from farspan.memory.coupling import Coupling
from farspan.memory.problem import GradientError
from farspan.memory.tiers.base import Interval
from farspan.trainer import models
from farspan.trainer.adapters.config import inner
from farspan.trainer.adapters.lora import start
from farspan.trainer.addresses import PlannedAddresses, planned_arena
from farspan.trainer.attention_choice import choose_attention
from farspan.trainer.batch import rows_of
from farspan.trainer.checkpoint import Checkpointer, checkpoint_group
from farspan.trainer.config import AMAQ, LoRA, OnTooLong, RandomModel, TrainSpec
from farspan.trainer.data.packing import Pack, PackedStream, validation_packs
from farspan.trainer.data.store import TokenStore
from farspan.trainer.engine import make_engine
from farspan.trainer.engine_bits import BitsEngine
from farspan.trainer.metrics import MetricsWriter
from farspan.trainer.optimizer import lr_at
from farspan.trainer.parallel.learned_bits import LearnedBits
from farspan.trainer.parallel.mesh import join
from farspan.trainer.parallel.ulysses import Ulysses
from farspan.trainer.process_memory import PeakMemory
from farspan.trainer.run_folder import RunFolder
from farspan.trainer.self_test import (
    check_rebuilding,
    gradient_errors,
    reversible_anchors,
    reversible_range,
    tier_errors,
)
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


ERROR_ROWS = 1024
"""Of the first pack, on which the effect of codes on gradients is measured."""


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
        self._write_base_model()
        self.tiers = models.open_store(spec, self.grid.device)
        module, trainable = models.build(spec, self.grid.device, self.tiers)
        self._choose_attention(module)
        self.bits = self._learned_bits(module)
        self._self_test(module)
        self._start_adapter(module)
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
        self._set_range(module)
        self.writer = (
            MetricsWriter(
                self.folder,
                spec.track,
                run_name=self.folder.root.name,
                config=spec.model_dump(mode="json"),
                restored_step=self.position["step"] or None,
            )
            if self.grid.rank == 0
            else None
        )
        self.record: dict[str, Any] = {}

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

    def _choose_attention(self, module: models.CausalLMLoss) -> None:
        spec, dtype = self.spec, models.DTYPES[self.spec.precision]
        asked, rows = spec.memory.attention, spec.data.context
        name = choose_attention(asked, module.decoder.config, dtype, self.grid, self.folder, rows)
        if self.grid.rank == 0 and self.grid.device.type != "cpu":
            self.progress.event("attention", f"{name}, {'the fastest here' if asked == 'fastest' else 'as asked'}")

    def _learned_bits(self, module: models.CausalLMLoss) -> LearnedBits | None:
        """Gates of the exchange between the ranks of an sp group, where the job has them."""
        spec = self.spec
        if not isinstance(spec.exchange, AMAQ) or self.ulysses is None:
            return None
        return LearnedBits.of(
            module.layers,
            module.decoder.config,
            spec.exchange,
            device=self.grid.device,
            steps=spec.optim.steps,
            seed=spec.optim.seed,
        )

    def _addresses_planned(self, layout: TwoLevels) -> None:
        if self.grid.rank == 0:
            peak, gap = layout.peak_bytes, layout.gap
            self.progress.event("addresses", f"{len(layout.offsets)} blocks in {peak} bytes, {gap:.1%} above the least")

    def _self_test(self, module: models.CausalLMLoss) -> None:
        """At every start, since library versions may have changed since the last one."""
        self.progress.phase("self-test", planned_s=FIRST_TIME_S)
        seed, zero = self.spec.optim.seed, self.spec.zero
        found = check_rebuilding(module, self.grid, self.ulysses, zero=zero, seed=seed)
        if found is not None and self.grid.rank == 0:
            self.progress.event("self-test", str(found))
            if module.coupling is not None and module.coupling.store != getattr(self.spec.adapter, "store", None):
                self.progress.event(
                    "reversible",
                    "layers do not give the same bits twice here: they store their inputs, which takes more memory "
                    "than planned (adapter.store=inputs plans it)",
                )

        if self.spec.memory.activations in ("fp8", "int4"):
            self._tell_errors("activations", f"in {self.spec.memory.activations} a layer's", self._errors(module))
        if self.spec.placement is not None and self.spec.placement.tier_codec != "exact":
            rows = self._rows(self.stream.pack(self.grid.dp_index)).input_ids[:, :ERROR_ROWS]
            errors = tier_errors(module, rows, self.grid, self.ulysses, zero=zero, seed=seed)
            codec = self.spec.placement.tier_codec
            self._tell_errors("tiers", f"with rows on host and disk in {codec} a unit's", errors)
        if self.bits is not None:
            bits = self.bits.config.bits
            self.bits.uniform(bits)
            errors = self._errors(module, self.bits.measured_against)
            self._tell_errors("exchange", f"in {bits:g} bits a layer's", errors)

    def _errors(
        self, module: models.CausalLMLoss, without: Callable[[], AbstractContextManager[None]] | None = None
    ) -> dict[range, GradientError]:
        """What each layer's gradients lose by codes, on the first rows; `without` as for `gradient_errors`."""
        rows = self._rows(self.stream.pack(self.grid.dp_index)).input_ids[:, :ERROR_ROWS]
        zero, seed = self.spec.zero, self.spec.optim.seed
        found = gradient_errors(module, rows, self.grid, self.ulysses, zero=zero, seed=seed, without=without)
        return {range(layer, layer + 1): error for layer, error in enumerate(found)}

    def _tell_errors(self, what: str, whose: str, found: dict[range, GradientError]) -> None:
        """Said before anything is trained with them."""
        if self.grid.rank or not found:
            return
        errors = {unit: e.weights if e.weights is not None else e.input for unit, e in found.items()}
        worst = max(errors, key=errors.__getitem__)
        where = f"layer {worst[0]}" if len(worst) == 1 else f"layers {worst[0]} to {worst[-1]}"
        self.progress.event(
            what,
            f"{whose} gradients are off by {statistics.median(errors.values()):.1%}, at most {errors[worst]:.1%} "
            f"({where})",
        )

    def _start_adapter(self, module: models.CausalLMLoss) -> None:
        """Where LoRA starts, if not at zero: decided once for all attempts of a run."""
        adapter = inner(self.spec.adapter)
        if not isinstance(adapter, LoRA) or adapter.init not in start.STARTED:
            return
        self.progress.phase("adapter", planned_s=FIRST_TIME_S)
        kept, spec = self.folder.adapter_start, self.spec
        made_for = json.dumps(
            [adapter.init, adapter.rank, adapter.alpha, adapter.target_modules, spec.optim.seed, spec.base.type]
        )
        if self._first_says(lambda: start.must_be_made(kept, made_for, self.folder.complete_checkpoints())):
            if adapter.init == "lora_ga":
                probe = partial(self._probe, module, adapter)
                if module.coupling is not None:
                    self._measure_streams(module, module, module.coupling)
                start.from_gradients(module.model, adapter, probe, seed=spec.optim.seed)
            elif self.grid.rank == 0:
                for layer in start.lora_layers(module.model).values():
                    start.begin(layer, *start.from_weights(layer, adapter))
            if self.grid.rank == 0:
                beside = kept.with_name(f".{kept.name}.tmp")
                save_file(start.pairs(module.model), beside, metadata={"made_for": made_for})
                beside.replace(kept)
            if self.grid.world_size > 1:
                dist.barrier()
        start.restore(module.model, load_file(kept))  # on all ranks the same bits
        if self.grid.rank == 0:
            self.progress.event("adapter", f"starts at {adapter.init}, with a frozen pair that takes the start off")

    def _first_says(self, decide: Callable[[], bool]) -> bool:
        """What rank 0 finds, on all ranks; an error it meets too. Collective."""
        found: list[Any] = [None]
        if self.grid.rank == 0:
            try:
                found[0] = decide()
            except FarspanError as error:
                found[0] = error
        if self.grid.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], FarspanError):
            raise found[0]
        return bool(found[0])

    def _probe(self, module: models.CausalLMLoss, adapter: LoRA) -> None:
        """Gradients of the first packs, of this dp group's share."""
        for index in range(self.grid.dp_index, max(adapter.init_packs, self.spec.mesh.dp), self.spec.mesh.dp):
            pack = self.stream.pack(index)
            rows = self._rows(pack)
            loss = module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
            (loss / max(pack.trained_tokens, 1)).backward()

    def _set_range(self, module: models.CausalLMLoss) -> None:
        """Range or anchors of reversible streams: as in the checkpoint, or from the first pack's hidden states."""
        coupling = module.coupling
        if coupling is None:
            return
        name, attribute = ("fraction_bits", "fraction") if coupling.form == "exact" else ("anchor_every",) * 2
        error = None
        if getattr(self.spec.adapter, name, "auto") == "auto" and self.position.get(name) is not None:
            setattr(coupling, attribute, self.position[name])
        else:
            error = self._measure_streams(self.engine.module, module, coupling)
        self.position[name] = getattr(coupling, attribute)
        if self.grid.rank == 0:
            told = f"streams have {coupling.fraction} bits behind the point"
            if coupling.form == "float" and coupling.store == "inputs":
                told = "layers store what they read, streams are not computed back"
            elif coupling.form == "float":
                told = f"streams are stored whole every {coupling.anchor_every} layers"
                told += f" and come back within {error:.2g}" if error is not None else ""
                if coupling.anchor_every < coupling.anchors_planned:
                    every = f"adapter.anchor_every={coupling.anchor_every}"
                    told += f"; {coupling.anchors_planned} were planned, with less memory ({every} plans it)"
            self.progress.event("reversible", told)

    def _measure_streams(self, whole: Any, module: models.CausalLMLoss, coupling: Coupling) -> float | None:
        """Sets what the job leaves to be measured; returns the error of streams in floating point. Collective."""
        asked = getattr(self.spec.adapter, "fraction_bits" if coupling.form == "exact" else "anchor_every", "auto")
        if coupling.store == "inputs" and coupling.form == "float":
            return None  # nothing is computed back
        if coupling.form == "exact" and asked != "auto":
            return None
        rows = self._rows(self.stream.pack(self.grid.dp_index))
        if coupling.form == "exact":
            coupling.fraction = reversible_range(whole, module, rows, self.grid)
            return None
        number = None if asked == "auto" else int(asked)
        coupling.anchor_every, error = reversible_anchors(whole, module, rows, self.grid, number)
        return error

    def _restore(self) -> None:
        self.progress.phase("restore", planned_s=EXPORT_S)
        restored = self.checkpointer.load_latest(self.engine.fragments())
        if restored is not None:
            self.restored, self.position = restored.path, restored.progress
            self.engine.restored(step=self.position["step"])

    def _write_base_model(self) -> None:
        model, folder = self.spec.model, self.folder.base_model
        if isinstance(model, RandomModel) and self.grid.rank == 0 and not folder.exists():
            meta = self.store.meta
            models.write_random_model(
                model,
                folder,
                precision=self.spec.precision,
                context=self.spec.data.context,
                eos_id=meta["eos_id"],
                pad_id=meta["pad_id"],
            )
        if self.grid.world_size > 1:
            dist.barrier()


class PartClock:
    """Seconds of each part of a step, and the phase the watchdog sees.

    A phase is planned to last as long as the longest seen so far, so that a rank which hangs is told from a slow one.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.parts_s: dict[str, float] = {}
        self.longest_s: dict[str, float] = {}
        self.spans: list[Span] | None = None
        """Every part as it happened, where somebody wants to see it; None: nobody does."""

    @contextmanager
    def part(self, name: str, *, planned_s: float | None = None) -> Iterator[None]:
        planned = max(planned_s or 0.0, self.longest_s.get(name, 0.0)) or FIRST_TIME_S
        self.progress.phase(name, planned_s=planned)
        started = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            seconds = ended - started
            if self.spans is not None:
                self.spans.append(Span("compute", started, ended, name))
            self.parts_s[name] = self.parts_s.get(name, 0.0) + seconds
            self.longest_s[name] = max(self.longest_s.get(name, 0.0), seconds)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        parts, self.parts_s = self.parts_s, {}
        return parts


EXPORT_S = 1800.0
"""How long writing a checkpoint with its export may take: the bound the checkpointer itself works with."""
FIRST_TIME_S = 600.0
"""How long a phase may take before anything is known about it: first steps compile, page in and warm up."""


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _random_key(seed: int, step: int, micro: int, rank: int) -> int:
    """A generator seed that never repeats within a run: 20 bits of step, 12 of micro-batch, 16 of rank."""
    return (seed << 48 ^ step << 28 ^ micro << 16 ^ rank) & (2**63 - 1)
