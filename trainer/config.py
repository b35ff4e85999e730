"""What the SPMD core is told: models, data, adapters, mesh, optimizer, checkpoints. Neither torch nor ray.

The classes in the first half are written by users inside a job; `TrainSpec` at the end is what a job resolves to: no
"auto" is left in it, and every rank gets the same one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from farspan.memory.config import Tiers, Tiles
from farspan.memory.plan import Placement
from farspan.schema import Count, Leading, Schema
from farspan.trainer.adapters.config import (
    L4Q,
    PEQA,
    PV,
    S2A,
    Adapter,
    FullFineTune,
    LoRA,
    PaCA,
    Reversible,
    UniPT,
    inner,
)
from farspan.trainer.bases.config import LQ, NF4, Base, Grid, Int8, Unquantized
from farspan.trainer.optimizers.config import COAT, LAMB, AdamW8bit, DCTAdamW, GaLore, Muon, Optim, Optimizer
from farspan.trainer.parallel.config import AMAQ, ExactExchange, Exchange
from farspan.trainer.run_folder import RunFolder

__all__ = [
    "AMAQ",
    "ExactExchange",
    "Exchange",
    "LQ",
    "Grid",
    "COAT",
    "LAMB",
    "NF4",
    "PEQA",
    "AdamW8bit",
    "Adapter",
    "Base",
    "DCTAdamW",
    "FullFineTune",
    "GaLore",
    "Int8",
    "LoRA",
    "Muon",
    "Optim",
    "Optimizer",
    "PaCA",
    "Reversible",
    "S2A",
    "UniPT",
    "L4Q",
    "PV",
    "Unquantized",
]
PREPARED_INITS = ("lorc", "loftq", "apiq")
"""Initialisations that are found with the rounding, before training."""


def is_prepared(base: Base, adapter: Adapter) -> bool:
    """Whether the base's matrices are rounded before training, together with where the adapter starts."""
    inside = inner(adapter)
    return isinstance(base, LQ) or (isinstance(inside, LoRA) and inside.init in PREPARED_INITS)


class Model(Leading):
    """A transformers causal language model by hub id or local folder."""

    type: Literal["pretrained"] = "pretrained"
    id: str = Field(kw_only=False)
    """Hub id (`Qwen/Qwen3-8B`) or a local folder with `config.json` and safetensors."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer than the model's own."""


class RandomModel(Leading):
    """A model with random weights made on the spot, of a family transformers knows."""

    type: Literal["random"] = "random"
    family: Literal["llama", "qwen2", "qwen3", "mistral", "olmo2", "phi3", "granite", "smollm3"] = Field(
        default="llama", kw_only=False
    )
    hidden: int = Field(default=256, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=8, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    ffn: int = Field(default=688, ge=8)
    vocab: Count = Field(default=4096, ge=260)
    """Rows of the embedding. A byte-level BPE of at most this size is trained on the data."""
    tie_embeddings: bool = False
    rope_theta: float = Field(default=500_000.0, gt=0)
    init_seed: int = 0


OnTooLong = Literal["error", "truncate", "split", "drop"]


class TextData(Leading):
    """Plain text: files, globs, jsonl, parquet, a `datasets` id, or `"stdlib"`."""

    type: Literal["text"] = "text"
    source: str | tuple[str, ...] = Field(kw_only=False)
    """A path, a glob, several of them, a `datasets` id, or `stdlib`: the source of the running Python's library."""
    context: Count = Field(default=8192, ge=16)
    """Rows of one pack: the longest sequence the model sees."""
    on_too_long: OnTooLong = "error"
    """A document longer than the context stops the job, is cut, is split into pieces, or is dropped (counted)."""
    text_field: str = "text"
    """Key of the text in jsonl, parquet and datasets rows."""
    split: str = "train"
    """Split of a `datasets` id."""
    streaming: bool = False
    """Read a `datasets` id as a stream instead of downloading it first."""
    limit_documents: Count | None = Field(default=None, ge=1)
    """Read at most so many documents."""
    pack: bool = True
    """Put several documents into one pack, boundaries kept. Off: one document a pack."""


class ChatData(Leading):
    """Conversations in the `messages` form; the loss is taken on assistant turns only."""

    type: Literal["chat"] = "chat"
    source: str | tuple[str, ...] = Field(kw_only=False)
    """A jsonl or parquet path, a glob, several of them, or a `datasets` id."""
    context: Count = Field(default=8192, ge=16)
    """Rows of one pack: the longest sequence the model sees."""
    on_too_long: Literal["error", "truncate", "drop"] = "error"
    """A conversation longer than the context stops the job, is cut, or is dropped (counted)."""
    messages_field: str = "messages"
    """Key of the list of `{"role", "content"}`."""
    split: str = "train"
    """Split of a `datasets` id."""
    streaming: bool = False
    """Read a `datasets` id as a stream instead of downloading it first."""
    limit_documents: Count | None = Field(default=None, ge=1)
    """Read at most so many conversations."""
    pack: bool = True
    """Put several conversations into one pack, boundaries kept. Off: one conversation a pack."""


class Rollouts(Schema):
    """What an RL run trains on: responses that it generates itself, packed."""

    type: Literal["rollouts"] = "rollouts"
    context: Count = Field(ge=16)
    """Rows of one pack: the longest prompt with its response."""
    on_too_long: Literal["error"] = "error"
    pack: bool = True


ModelSource = Annotated[Model | RandomModel, Field(discriminator="type")]
DataSource = Annotated[TextData | ChatData, Field(discriminator="type")]
Precision = Literal["bf16", "fp32"]


class Parallel(Schema):
    """How many ranks, and what they share."""

    sp: int | Literal["auto"] = "auto"
    """SP degree: ranks that share one sequence (Ulysses). `auto`: of those that ranks, heads and context allow, the one
    that is predicted to take the fewest seconds per token."""
    dp: int | Literal["auto"] = "auto"
    """Groups of `sp` ranks that train on different sequences. `auto`: what is left after sp."""
    zero: Literal[0, 1, 2, 3, "auto"] = "auto"
    """DeepSpeed ZeRO stage over the joined dp x sp group. 0: nothing is sharded, but for the state of optimizers
    other than AdamW, of which each rank holds some parameters'."""
    cpu_offload: bool = False
    """Keep optimizer states in host memory and update there (DeepSpeed CPU Adam; needs ZeRO >= 1)."""
    exchange: Exchange = ExactExchange()
    """How rows and heads change ranks in an sp group: as they are, or in learned codes of few bits (`AMAQ`), which pay
    where the link between ranks is slow."""


class DensityLoss(Schema):
    """A penalty that makes MLP activations sparse, beside any adapter.

    Added to the loss is weight * the sum over layers of mean(o^2 / (o^2 + eps)), o the activated gate of the MLP. It
    pays where inference skips zeros. Source: Runwal et al., From PEFT to DEFT, 2024.
    """

    weight: float = Field(default=0.0, ge=0)
    """0: no penalty."""
    eps: float = Field(default=1e-7, gt=0)
    """An activation of sqrt(eps) counts half. The larger, the further from zero the penalty still pulls."""
    threshold: float = Field(default=1e-3, ge=0)
    """`density` in `metrics.jsonl` is the share of activations that are larger; `density_loss` there is the penalty
    before its weight."""


class Checkpoint(Schema):
    """When a checkpoint is written and how many stay."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; null: only at the end."""
    keep: int = Field(default=2, ge=1)
    """Complete checkpoints that stay on disk; older ones are deleted after a newer one is complete."""
    export: bool = True
    """Write an HF / PEFT folder into each checkpoint, reopened and compared before it counts."""


class Evaluate(Schema):
    """Held-out loss during training."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations; null: at the end only."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of documents held out, chosen by a hash of their text. 0: no validation."""
    max_tokens: Count = Field(default=131072, ge=1)
    """Tokens of one evaluation at most."""


class Track(Schema):
    """Where metrics go, besides `metrics.jsonl`."""

    tensorboard: bool = True
    wandb: str | None = None
    """W&B project (needs `farspan[wandb]`)."""
    mlflow: str | None = None
    """MLflow experiment (needs `farspan[mlflow]`)."""


class Mesh(Schema):
    """Ranks as a grid: rank = dp_index * sp + sp_index."""

    dp: int = Field(default=1, ge=1)
    sp: int = Field(default=1, ge=1)

    @property
    def world_size(self) -> int:
        return self.dp * self.sp


class CalibrationRequest(Schema):
    """What to measure on a machine: one layer of each kind of a job's model, as it will be trained."""

    model: ModelSource
    adapter: Adapter
    base: Base = Unquantized()
    precision: Precision
    memory: Tiles
    density: DensityLoss = DensityLoss()
    context: int
    sp: int = Field(ge=1)
    exchange: Exchange = ExactExchange()
    kinds: tuple[str, ...]
    """Kind of each decoder layer, bottom first."""
    gradients: Literal["handed on", "first", "added"]
    """See `memory.samples.Gradients`."""
    disk_dir: str | None = None
    """Folder whose disk is measured; None: no disk tier."""


class TrainSpec(Schema):
    """All the SPMD core needs to train, identical on every rank. No "auto" is left."""

    run_dir: str
    """Run folder, on storage every rank reaches."""
    tokens_dir: str
    """Folder of the token store written by `farspan.trainer.data.prepare`."""
    model: ModelSource
    data: Annotated[TextData | ChatData | Rollouts, Field(discriminator="type")]
    adapter: Adapter
    base: Base = Unquantized()
    precision: Precision
    mesh: Mesh
    exchange: Exchange = ExactExchange()
    zero: Literal[0, 1, 2, 3]
    cpu_offload: bool
    addresses: Literal["torch", "planned"] = "torch"
    """Who gives device memory out."""
    accumulation: int = Field(ge=1)
    """Micro-batches (packs) per dp group in one optimizer step."""
    warmup_steps: int = Field(ge=0)
    optim: Optimizer
    density: DensityLoss = DensityLoss()
    memory: Tiles
    placement: Placement | None = None
    """What each decoder layer stores and where; None: autograd's own way."""
    tiers: Tiers | None = None
    """Host and disk, where the placement uses them."""
    plan_step_s: float | None = None
    plan_device_peak_bytes: int | None = None
    checkpoint: Checkpoint
    evaluate: Evaluate
    track: Track
    attempt: int = 1
    """1 at first, plus one for each restart; names the log folder."""

    @property
    def prepared_base(self) -> Path | None:
        """Folder of the base that was prepared for this run (`bases.prepared`); None: it needs none."""
        return RunFolder(Path(self.run_dir)).prepared_base if is_prepared(self.base, self.adapter) else None
