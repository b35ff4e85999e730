"""Farspan: fine-tune and RL-train language models on sequences that do not fit, on Ray.

The public names are imported on first use, so that `import farspan` costs nothing and a job file that names only
`SFTJob` and its parts loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "SFTJob": "farspan.jobs.config",
    "Model": "farspan.trainer.config",
    "RandomModel": "farspan.trainer.config",
    "TextData": "farspan.trainer.config",
    "ChatData": "farspan.trainer.config",
    "LoRA": "farspan.trainer.config",
    "PaCA": "farspan.trainer.config",
    "PEQA": "farspan.trainer.config",
    "L4Q": "farspan.trainer.config",
    "PV": "farspan.trainer.config",
    "Reversible": "farspan.trainer.config",
    "S2A": "farspan.trainer.config",
    "UniPT": "farspan.trainer.config",
    "LQ": "farspan.trainer.config",
    "Grid": "farspan.trainer.config",
    "NF4": "farspan.trainer.config",
    "Int8": "farspan.trainer.config",
    "FullFineTune": "farspan.trainer.config",
    "Parallel": "farspan.trainer.config",
    "Optim": "farspan.trainer.config",
    "AdamW8bit": "farspan.trainer.config",
    "COAT": "farspan.trainer.config",
    "DCTAdamW": "farspan.trainer.config",
    "GaLore": "farspan.trainer.config",
    "AMAQ": "farspan.trainer.config",
    "LAMB": "farspan.trainer.config",
    "Muon": "farspan.trainer.config",
    "Checkpoint": "farspan.trainer.config",
    "DensityLoss": "farspan.trainer.config",
    "Evaluate": "farspan.trainer.config",
    "Track": "farspan.trainer.config",
    "MemoryBudget": "farspan.memory.config",
    "Cluster": "farspan.cluster.config",
    "RLJob": "farspan.jobs.config",
    "WarmStart": "farspan.jobs.config",
    "Arithmetic": "farspan.trainer.rl.tasks",
    "Prompts": "farspan.trainer.rl.tasks",
    "Sorting": "farspan.trainer.rl.tasks",
    "Maze": "farspan.trainer.rl.tasks",
    "Countdown": "farspan.trainer.rl.tasks",
    "Rollout": "farspan.trainer.rl.config",
    "Reward": "farspan.trainer.rl.config",
    "PolicyLoss": "farspan.trainer.rl.config",
    "Mastered": "farspan.trainer.rl.config",
    "RLEvaluate": "farspan.trainer.rl.config",
    "Cosine": "farspan.trainer.rl.shapers",
    "GRPOLambda": "farspan.trainer.rl.shapers",
    "Kimi": "farspan.trainer.rl.shapers",
    "L1Exact": "farspan.trainer.rl.shapers",
    "L1Max": "farspan.trainer.rl.shapers",
    "Laser": "farspan.trainer.rl.shapers",
    "LaserD": "farspan.trainer.rl.shapers",
    "LaserDE": "farspan.trainer.rl.shapers",
    "Repetition": "farspan.trainer.rl.shapers",
    "SoftOverlong": "farspan.trainer.rl.shapers",
    "StopProperly": "farspan.trainer.rl.shapers",
    "FarspanError": "farspan.errors",
}

if TYPE_CHECKING:
    from farspan.cluster.config import Cluster
    from farspan.errors import FarspanError
    from farspan.jobs.config import RLJob, SFTJob, WarmStart
    from farspan.memory.config import MemoryBudget
    from farspan.trainer.config import (
        AMAQ,
        COAT,
        L4Q,
        LAMB,
        LQ,
        NF4,
        PEQA,
        PV,
        S2A,
        AdamW8bit,
        ChatData,
        Checkpoint,
        DCTAdamW,
        DensityLoss,
        Evaluate,
        FullFineTune,
        GaLore,
        Grid,
        Int8,
        LoRA,
        Model,
        Muon,
        Optim,
        PaCA,
        Parallel,
        RandomModel,
        Reversible,
        TextData,
        Track,
        UniPT,
    )
    from farspan.trainer.rl.config import Mastered, PolicyLoss, Reward, RLEvaluate, Rollout
    from farspan.trainer.rl.shapers import (
        Cosine,
        GRPOLambda,
        Kimi,
        L1Exact,
        L1Max,
        Laser,
        LaserD,
        LaserDE,
        Repetition,
        SoftOverlong,
        StopProperly,
    )
    from farspan.trainer.rl.tasks import Arithmetic, Countdown, Maze, Prompts, Sorting

__all__ = [
    "SFTJob",
    "Model",
    "RandomModel",
    "TextData",
    "ChatData",
    "LoRA",
    "PaCA",
    "PEQA",
    "L4Q",
    "PV",
    "Reversible",
    "S2A",
    "UniPT",
    "LQ",
    "Grid",
    "NF4",
    "Int8",
    "FullFineTune",
    "Parallel",
    "Optim",
    "AdamW8bit",
    "COAT",
    "DCTAdamW",
    "GaLore",
    "AMAQ",
    "LAMB",
    "Muon",
    "Checkpoint",
    "DensityLoss",
    "Evaluate",
    "Track",
    "MemoryBudget",
    "Cluster",
    "RLJob",
    "WarmStart",
    "Arithmetic",
    "Prompts",
    "Sorting",
    "Maze",
    "Countdown",
    "Rollout",
    "Reward",
    "PolicyLoss",
    "Mastered",
    "RLEvaluate",
    "Cosine",
    "GRPOLambda",
    "Kimi",
    "L1Exact",
    "L1Max",
    "Laser",
    "LaserD",
    "LaserDE",
    "Repetition",
    "SoftOverlong",
    "StopProperly",
    "FarspanError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'farspan' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
