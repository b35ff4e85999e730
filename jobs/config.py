"""Job definitions: what a user writes. Neither torch nor ray is imported, so a job validates in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from farspan.cluster.config import Cluster
from farspan.memory.config import MemoryBudget
from farspan.memory.plan import Policy
from farspan.schema import Schema
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
    Track,
    UniPT,
    Unquantized,
)

if TYPE_CHECKING:
    from farspan.jobs.run import RunResult


class SFTJob(Schema):
    """Supervised fine-tuning (or pre-training) on long sequences."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
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
