"""RL on verifiable tasks: samples and groups, shapers of rewards, advantages, losses.

Names are imported on first use: shapers and samples need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PUBLIC = {
    "ScoredSample": "farspan.trainer.rl.samples",
    "PromptGroup": "farspan.trainer.rl.samples",
    "group_advantages": "farspan.trainer.rl.advantages",
    "gae": "farspan.trainer.rl.advantages",
    "policy_loss": "farspan.trainer.rl.losses",
    "mastered_token_mask": "farspan.trainer.rl.mastered",
}

if TYPE_CHECKING:
    from farspan.trainer.rl.advantages import gae, group_advantages
    from farspan.trainer.rl.losses import policy_loss
    from farspan.trainer.rl.mastered import mastered_token_mask
    from farspan.trainer.rl.samples import PromptGroup, ScoredSample

__all__ = ["ScoredSample", "PromptGroup", "group_advantages", "gae", "policy_loss", "mastered_token_mask"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
