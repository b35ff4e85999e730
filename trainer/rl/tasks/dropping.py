"""Leaving pieces of demonstrated traces out (Dualformer, 2024, https://arxiv.org/abs/2410.09918).

A model that learns from traces of which more and less is missing can answer at once, in short, or at length. The
paper's four levels for its search traces: close clauses; costs as well; a third of create clauses as well; everything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from farspan.schema import Ratio, Schema
from farspan.trainer.rl.tasks.base import Demonstration


class DropLevel(Schema):
    """What is left out together, and how often."""

    share: Ratio
    """Of the demonstrations."""
    kinds: tuple[str, ...] = ()
    """Kinds of steps that are left out."""
    details: bool = False
    """Steps lose their details."""
    some: tuple[str, ...] = ()
    """Kinds of which `part` of the steps is left out, each by itself."""
    part: Ratio = 0.3
    everything: bool = False
    """No step is left."""


def drop(shown: Demonstration, levels: Sequence[DropLevel], draw: random.Random) -> Demonstration:
    """At one of the levels, or, with the share that they leave, whole."""
    at = draw.random()
    for level in levels:
        if at < level.share:
            kept = [
                replace(step, detail="") if level.details else step
                for step in shown.steps
                if not level.everything
                and step.kind not in level.kinds
                and not (step.kind in level.some and draw.random() < level.part)
            ]
            return Demonstration(kept, shown.ending)
        at -= level.share
    return shown
