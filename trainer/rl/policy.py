"""One rank of the trainer of an RL job: it is told what to do, call by call.

The model, its adapter, its memory plan, its engine and its checkpoints are those of supervised training. What differs
is who has the loop: the driver (`cluster.rl`) sends every rank of the gang the same call with the same samples, and
each takes its share of the packs. Losses are sums with weights that the driver computed over the whole step, so a step
is the same on any mesh.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import NonFinite
from farspan.trainer import models
from farspan.trainer.addresses import PlannedAddresses, planned_arena
from farspan.trainer.batch import Rows, rows_of
from farspan.trainer.checkpoint import Checkpointer, checkpoint_group
from farspan.trainer.config import DensityLoss, FullFineTune
from farspan.trainer.data.packing import IGNORED_LABEL, Pack
from farspan.trainer.engine import make_engine
from farspan.trainer.engine_bits import BitsEngine
from farspan.trainer.optimizer import lr_at
from farspan.trainer.parallel.mesh import join
from farspan.trainer.parallel.ulysses import Ulysses
from farspan.trainer.part_clock import EXPORT_S, PartClock
from farspan.trainer.process_memory import PeakMemory
from farspan.trainer.rl.batch import PolicyPack, TrainedSample, pack_samples, unpack
from farspan.trainer.rl.config import RLSpec
from farspan.trainer.rl.objective import PolicyObjective, ScoreOnly
from farspan.trainer.run_folder import RunFolder
from farspan.trainer.sft_start import Start
from farspan.trainer.world import Progress, Silent, World

DRIVER_STATE = "driver.npz"
"""In each checkpoint: what the driver needs to go on."""


class PolicyRank:
    """See the module text. Every method is collective over the gang; results are rank 0's, None elsewhere."""

    def __init__(self, spec: RLSpec, world: World, progress: Progress | None = None) -> None:
        self.spec, self.train = spec, spec.train
        self.clock = PartClock(progress or Silent())
        self.folder = RunFolder(Path(self.train.run_dir))
        arena = planned_arena(self.train, use_gpu=world.use_gpu)
        self.clock.progress.phase("join", planned_s=60.0)
        self.grid = join(world, self.train.mesh, alone_too=self.train.zero > 0)
        self.ulysses = Ulysses(self.grid.sp_group) if self.grid.sp_group is not None else None
        self.clock.progress.phase("load", planned_s=600.0)
        probes = _Probes(spec.vocab, self.train.data.context)
        start = Start(self.train, self.grid, self.ulysses, self.folder, probes, self.clock.progress)
        self.tiers = models.open_store(self.train, self.grid.device)
        self.module, trainable = models.build(self.train, self.grid.device, self.tiers)
        start.choose_attention(self.module)
        bits = start.learned_bits(self.module)
        start.self_test(self.module, bits)
        start.adapter(self.module)
        self.reference = self._frozen() if spec.loss.kl_weight else None
        self.engine = make_engine(
            self.module,
            trainable,
            self.train.optim,
            self.grid,
            zero=self.train.zero,
            precision=self.train.precision,
            cpu_offload=self.train.cpu_offload,
        )
        if bits is not None:
            self.engine = BitsEngine(self.engine, bits)
        self.memory = PeakMemory(self.grid.device, arena)
        self.addresses = PlannedAddresses(arena, self.module.layers, lambda layout: None)
        self.checkpointer = Checkpointer(
            self.folder,
            self.train,
            group=checkpoint_group(),
            rank=self.grid.rank,
            world_size=self.grid.world_size,
        )
        self.position: dict[str, Any] = {"step": 0, "updates": 0}
        self.driver_state: bytes | None = None
        self._restore()
        start.set_range(self.module, self.engine.module, self.position)

    def begin(self) -> dict[str, Any] | None:
        """Where this run stands: optimizer steps done, and what the driver saved with them."""
        state = self.driver_state
        self.driver_state = None
        return {"step": self.position["step"], "driver": state} if self.grid.rank == 0 else None

    def update(
        self, samples: Sequence[TrainedSample], log_probs: dict[str, Sequence[np.ndarray]] | None = None
    ) -> dict[str, Any] | None:
        """One optimizer step on these samples.

        Args:
            log_probs: more values of their trained tokens, by `batch.FIELDS`.

        Returns:
            loss, gradient norm, learning rate and means over trained tokens.

        Raises:
            NonFinite: loss or gradient norm is NaN or infinite; weights are as before.
        """
        began_s = time.perf_counter()
        self.memory.reset()
        packs = pack_samples(samples, context=self.train.data.context, log_probs=log_probs)
        number = self.position["updates"] + 1
        lr = lr_at(number, self.train.optim, self.train.warmup_steps)
        objectives: list[PolicyObjective] = []
        total = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        self.engine.begin(lr=lr)
        mine = self._share(packs)
        with self.addresses.step():
            for index, pack in enumerate(mine):
                torch.manual_seed((self.train.optim.seed << 40 ^ number << 20 ^ index << 8 ^ self.grid.rank) % 2**63)
                rows, objective = self._rows(pack)
                objectives.append(objective)
                with self.clock.part("forward"):
                    loss = self.engine.module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence, objective)
                total += loss.detach()
                with self.clock.part("backward"):
                    self.engine.backward(loss, last=index + 1 == len(mine))
            with self.clock.part("reduce"):
                sums = self._summed(objectives, total)
            self._require_finite("loss", sums["loss"])
            with self.clock.part("optimizer"):
                norm = self.engine.step(lr=lr, clip_norm=self.train.optim.clip_norm)
        self._require_finite("gradient norm", norm)
        self.position["updates"] = number
        tokens = max(sums.pop("tokens"), 1.0)
        loss = sums.pop("loss")
        record = {
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "trained_tokens": int(tokens),
            "tokens": sum(pack.pack.tokens for pack in packs),
            "packs": len(packs),
            **{
                f"{name}_mean" if name != "clipped" else "clipped_share": value / tokens for name, value in sums.items()
            },
            "update_s": time.perf_counter() - began_s,
            "parts_s": self.clock.take(),
            **self.memory.read(),
        }
        record["mastered_share"] = record.pop("mastered_mean")
        return record if self.grid.rank == 0 else None

    @torch.no_grad()
    def score(self, samples: Sequence[TrainedSample], *, reference: bool = False) -> dict[str, list[np.ndarray]] | None:
        """Log-probabilities and entropies of the samples' trained tokens, float32.

        Args:
            reference: under the weights that RL began with, not those of now; there with `loss.kl_weight` alone.
        """
        packs = pack_samples(samples, context=self.train.data.context)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        module = self.reference if reference else self.engine.module
        assert module is not None
        self.module.eval()
        with self.clock.part("score"):
            for pack in self._share(packs):
                rows, _ = self._rows(pack)
                objective = ScoreOnly(self.spec.temperature)
                module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence, objective)
                assert objective.log_probs is not None and objective.entropies is not None
                found.append((objective.log_probs.float().cpu().numpy(), objective.entropies.float().cpu().numpy()))
        self.module.train()
        everywhere: list[Any] = [found]
        if self.grid.world_size > 1:
            everywhere = [None] * self.grid.world_size
            dist.all_gather_object(everywhere, found)
        if self.grid.rank:
            return None
        whole = [self._joined(everywhere, index) for index in range(len(packs))]
        return {
            name: unpack(packs, [values[at] for values in whole], len(samples))
            for at, name in enumerate(("log_probs", "entropies"))
        }

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor] | None:
        """What trains, by name, on the host: what rollout workers are sent."""
        with self.clock.part("publish"):
            found = self._whole_weights()
        return found if self.grid.rank == 0 else None

    def save(self, step: int, driver: bytes) -> None:
        """Checkpoint after step `step`, with the driver's own state in it; goes on in the background."""
        self.position["step"] = step

        def finalize(folder: Path) -> None:
            (folder / DRIVER_STATE).write_bytes(driver)

        with self.clock.part("checkpoint", planned_s=EXPORT_S):
            self.checkpointer.save(step, self.engine.fragments(), self.position, finalize)

    def wait(self) -> str | None:
        """Wait for the checkpoint under way; its folder."""
        with self.clock.part("checkpoint", planned_s=EXPORT_S):
            saved = self.checkpointer.wait()
        return str(saved.path) if saved is not None and self.grid.rank == 0 else None

    def close(self) -> None:
        """Stop background work and release what this rank holds."""
        for part in ("checkpointer", "engine", "tiers"):
            if getattr(self, part, None) is not None:
                getattr(self, part).close()

    def _frozen(self) -> models.CausalLMLoss:
        """The policy that RL begins with, which stays."""
        plain = {"adapter": FullFineTune(), "placement": None, "tiers": None, "density": DensityLoss()}
        module, _ = models.build(self.train.model_copy(update=plain), self.grid.device)
        return module.requires_grad_(False).eval()

    def _share(self, packs: Sequence[PolicyPack]) -> list[PolicyPack]:
        """Packs of this dp group, as many for each: every rank takes part in every gather of weights."""
        dp, turns = self.train.mesh.dp, -(-len(packs) // self.train.mesh.dp)
        mine = list(packs[self.grid.dp_index :: dp])
        return mine + [_idle(packs[0])] * (turns - len(mine))

    def _rows(self, pack: PolicyPack) -> tuple[Rows, PolicyObjective]:
        mesh, device = self.train.mesh, self.grid.device
        rows = rows_of(pack.pack, sp=mesh.sp, sp_index=self.grid.sp_index, ulysses=self.ulysses, device=device)
        shard = rows.labels.shape[1]
        mine = slice(self.grid.sp_index * shard, (self.grid.sp_index + 1) * shard)
        trained = pack.pack.labels[mine] != IGNORED_LABEL

        def here(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values[mine][trained])).to(device)

        objective = PolicyObjective(
            self.spec.loss,
            self.spec.temperature,
            here(pack.samples).long(),
            here(pack.rewarded),
            {name: here(values) for name, values in pack.values.items()},
            self.grid.sp_group,
        )
        return rows, objective

    def _summed(self, objectives: Sequence[PolicyObjective], loss: Tensor) -> dict[str, float]:
        """Over packs and ranks."""
        names = list(objectives[0].sums)
        totals = torch.stack([loss, *(torch.stack([each.sums[name] for each in objectives]).sum() for name in names)])
        if self.grid.world_size > 1:
            dist.all_reduce(totals)
        return dict(zip(("loss", *names), totals.tolist()))

    def _joined(self, everywhere: Sequence[Any], index: int) -> tuple[np.ndarray, np.ndarray]:
        """Values of one pack's trained rows, from the ranks of the dp group that had it."""
        dp, sp = self.train.mesh.dp, self.train.mesh.sp
        group, turn = index % dp, index // dp
        parts = [everywhere[group * sp + at][turn] for at in range(sp)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _whole_weights(self) -> dict[str, Tensor]:
        if self.train.zero == 3:
            import deepspeed

            found = {}
            for name, parameter in self.engine.trainable.items():
                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().cpu().clone()
            return found
        return {name: parameter.detach().cpu().clone() for name, parameter in self.engine.trainable.items()}

    def _require_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        raise NonFinite(
            f"{what} is {value} at update {self.position['updates'] + 1}",
            at=f"samples of step {self.position['step'] + 1}",
            why="a NaN or infinity entered the weights or the arithmetic; the update was not applied",
            try_="resume from the last checkpoint with a lower optim.lr or optim.clip_norm, or --set precision=fp32",
        )

    def _restore(self) -> None:
        self.clock.progress.phase("restore", planned_s=EXPORT_S)
        restored = self.checkpointer.load_latest(self.engine.fragments())
        if restored is not None:
            self.position = restored.progress
            self.engine.restored(step=self.position["updates"])
            self.driver_state = (restored.path / DRIVER_STATE).read_bytes()


def _idle(pack: PolicyPack) -> PolicyPack:
    """The same rows, of which none is trained."""
    rows = pack.pack
    nothing = replace(rows, labels=np.full_like(rows.labels, IGNORED_LABEL), trained_tokens=0)
    return PolicyPack(nothing, np.full_like(pack.samples, -1), pack.rewarded, pack.values)


class _Probes:
    """Packs of random tokens, where supervised training would look at its data."""

    def __init__(self, vocab: int, context: int) -> None:
        self.vocab, self.context = vocab, context

    def pack(self, index: int) -> Pack:
        """One document of at most 1,024 tokens."""
        rows = min(self.context, 1024)
        ids = np.random.default_rng(index).integers(0, self.vocab, size=rows)
        labels = np.append(ids[1:], IGNORED_LABEL)
        return Pack(ids, labels, np.arange(rows), np.array([0, rows], np.int32), rows, rows - 1, 1)
