"""Job definitions: what a user writes. Neither torch nor ray is imported, so a job validates in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from farspan.cluster.config import Cluster
from farspan.memory.config import MemoryBudget
from farspan.memory.plan import Policy
from farspan.schema import Count, Schema
from farspan.trainer.config import (
    Adapter,
    Base,
    Checkpoint,
    DataSource,
    DensityLoss,
    Evaluate,
    FullFineTune,
    ModelSource,
    Optim,
    Optimizer,
    Parallel,
    Precision,
    TextData,
    Track,
    UniPT,
    Unquantized,
)
from farspan.trainer.rl.config import PolicyLoss, Reward, RLEvaluate, Rollout
from farspan.trainer.rl.tasks import TaskSource
from farspan.trainer.rl.tasks.dropping import DropLevel

if TYPE_CHECKING:
    from farspan.jobs.run import RunResult

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SFTJob(Schema):
    """Supervised fine-tuning (or pre-training) on long sequences."""

    name: RunName
    """Name of the run and of its folder."""
    model: ModelSource
    data: DataSource
    adapter: Adapter = FullFineTune()
    base: Base = Unquantized()
    """How the pretrained weights are stored while an adapter trains."""
    precision: Precision = "bf16"
    """Dtype of weights and activations; masters are always fp32, moments as the optimizer has them."""
    parallel: Parallel = Parallel()
    memory: MemoryBudget = MemoryBudget()
    optim: Optimizer = Optim()
    density: DensityLoss = DensityLoss()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    track: Track = Track()
    cluster: Cluster = Cluster()
    output_dir: str = "outputs"
    """Run folders are made in here; storage every node reaches."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name

    @property
    def policy(self) -> Policy:
        """Who decides what layers store: `memory.plan`, unless they store nothing whatever it says."""
        return "keep" if isinstance(self.adapter, UniPT) else self.memory.plan

    def run(self, *, address: str | None = None, resume: bool = False, clean: bool = False) -> RunResult:
        """Train here on a local Ray, or on the cluster at `address`.

        Returns:
            status, run folder, last metrics and last checkpoint of the run.

        Raises:
            FarspanError: four lines that say what, at, why and what to try.
        """
        from farspan.jobs.run import run

        return run(self, address=address, resume=resume, clean=clean)

    def submit(self, address: str) -> str:
        """Send this job to the Ray cluster whose dashboard is at `address`; returns the submission id."""
        from farspan.jobs.submit import submit

        return submit(self, address)


class WarmStart(Schema):
    """Supervised fine-tuning on demonstrations of the task, before RL."""

    examples: Count = Field(default=20000, ge=1)
    """Demonstrations that are made."""
    drop: tuple[DropLevel, ...] = ()
    """Levels at which pieces of their traces are left out."""
    context: Count = Field(default=4096, ge=16)
    """Rows of one pack of them."""
    optim: Optimizer = Optim(lr=1e-4, steps=300)
    parallel: Parallel = Parallel()


class RLJob(Schema):
    """Reinforcement learning on a task whose answers can be verified."""

    name: RunName
    """Name of the run and of its folder."""
    model: ModelSource
    task: TaskSource
    warm_start: WarmStart | None = None
    """What the model learns before RL. A model made on the spot needs one. Done once, and kept for later runs that have
    the same."""
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    loss: PolicyLoss = PolicyLoss()
    context: Count = Field(default=2048, ge=16)
    """Rows of one pack in training: the longest prompt with its response."""
    adapter: Adapter = FullFineTune()
    base: Base = Unquantized()
    precision: Precision = "bf16"
    parallel: Parallel = Parallel(sp=1, dp=1)
    memory: MemoryBudget = MemoryBudget()
    optim: Optimizer = Optim(lr=1e-6, steps=100, schedule="constant")
    """`steps` are those of the loop; `tokens_per_step` is not used."""
    checkpoint: Checkpoint = Checkpoint()
    evaluate: RLEvaluate = RLEvaluate()
    track: Track = Track()
    cluster: Cluster = Cluster()
    output_dir: str = "outputs"
    """Run folders are made in here; storage every node reaches."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name

    def trainer(self, model: ModelSource | None = None) -> SFTJob:
        """The trainer of this job as a job of supervised training, by which it is planned and resolved.

        Args:
            model: what RL begins with, where that is not the job's own.
        """
        return SFTJob(
            name=self.name,
            model=model or self.model,
            data=TextData("rollouts", context=self.context),
            adapter=self.adapter,
            base=self.base,
            precision=self.precision,
            parallel=self.parallel,
            memory=self.memory,
            optim=self.optim.model_copy(update={"tokens_per_step": "auto"}),
            checkpoint=self.checkpoint,
            evaluate=Evaluate(share=0.0),
            track=self.track,
            cluster=self.cluster,
            output_dir=self.output_dir,
        )

    def run(self, *, address: str | None = None, resume: bool = False, clean: bool = False) -> RunResult:
        """Train here on a local Ray, or on the cluster at `address`; as `SFTJob.run`."""
        from farspan.jobs.rl import run_rl

        return run_rl(self, address=address, resume=resume, clean=clean)


JOBS: tuple[type[SFTJob], type[RLJob]] = (SFTJob, RLJob)
"""Kinds of job."""
