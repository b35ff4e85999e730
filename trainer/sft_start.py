"""What a training rank does between building its model and the first step: choose, test, measure, and say so.

Every part is collective, and runs before the engine takes the model over unless it says otherwise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from farspan.errors import FarspanError
from farspan.memory.coupling import Coupling
from farspan.memory.problem import GradientError
from farspan.trainer import models
from farspan.trainer.adapters.config import inner
from farspan.trainer.adapters.lora import start
from farspan.trainer.attention_choice import choose_attention
from farspan.trainer.batch import Rows, rows_of
from farspan.trainer.config import AMAQ, LoRA, RandomModel, TrainSpec
from farspan.trainer.data.packing import Pack
from farspan.trainer.parallel.learned_bits import LearnedBits
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.parallel.ulysses import Ulysses
from farspan.trainer.part_clock import FIRST_TIME_S
from farspan.trainer.run_folder import RunFolder
from farspan.trainer.self_test import (
    check_rebuilding,
    gradient_errors,
    reversible_anchors,
    reversible_range,
    tier_errors,
)
from farspan.trainer.world import Progress

ERROR_ROWS = 1024
"""Of the first pack, on which the effect of codes on gradients is measured."""


class Packs(Protocol):
    """Where rows to try things on come from."""

    def pack(self, index: int) -> Pack:
        """The pack of this number, the same on every rank."""


@dataclass(frozen=True)
class Start:
    """One rank at its start."""

    spec: TrainSpec
    grid: RankGrid
    ulysses: Ulysses | None
    folder: RunFolder
    stream: Packs
    progress: Progress

    def base_model(self, meta: dict[str, Any]) -> None:
        model, folder = self.spec.model, self.folder.base_model
        if isinstance(model, RandomModel) and self.grid.rank == 0 and not folder.exists():
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

    def choose_attention(self, module: models.CausalLMLoss) -> None:
        spec, dtype = self.spec, models.DTYPES[self.spec.precision]
        asked, rows = spec.memory.attention, spec.data.context
        name = choose_attention(asked, module.decoder.config, dtype, self.grid, self.folder, rows)
        if self.grid.rank == 0 and self.grid.device.type != "cpu":
            self.progress.event("attention", f"{name}, {'the fastest here' if asked == 'fastest' else 'as asked'}")

    def learned_bits(self, module: models.CausalLMLoss) -> LearnedBits | None:
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

    def self_test(self, module: models.CausalLMLoss, bits: LearnedBits | None) -> None:
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
        if bits is not None:
            settled = bits.config.bits
            bits.uniform(settled)
            errors = self._errors(module, bits.measured_against)
            self._tell_errors("exchange", f"in {settled:g} bits a layer's", errors)

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

    def adapter(self, module: models.CausalLMLoss) -> None:
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

    def set_range(self, module: models.CausalLMLoss, whole: nn.Module, position: dict[str, Any]) -> None:
        """Range or anchors of reversible streams: as in the checkpoint, or from the first pack's hidden states."""
        coupling = module.coupling
        if coupling is None:
            return
        name, attribute = ("fraction_bits", "fraction") if coupling.form == "exact" else ("anchor_every",) * 2
        error = None
        if getattr(self.spec.adapter, name, "auto") == "auto" and position.get(name) is not None:
            setattr(coupling, attribute, position[name])
        else:
            error = self._measure_streams(whole, module, coupling)
        position[name] = getattr(coupling, attribute)
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

    def _rows(self, pack: Pack) -> Rows:
        return rows_of(
            pack, sp=self.spec.mesh.sp, sp_index=self.grid.sp_index, ulysses=self.ulysses, device=self.grid.device
        )
