"""Rewards that know about length, behind one interface; none of them needs torch."""

from farspan.trainer.rl.shapers.base import Plain, Shaper
from farspan.trainer.rl.shapers.cosine import Cosine
from farspan.trainer.rl.shapers.grpo_lambda import GRPOLambda
from farspan.trainer.rl.shapers.kimi import Kimi
from farspan.trainer.rl.shapers.l1 import L1Exact, L1Max
from farspan.trainer.rl.shapers.laser import Laser, LaserD, LaserDE
from farspan.trainer.rl.shapers.overlong import SoftOverlong, StopProperly
from farspan.trainer.rl.shapers.repetition import Repetition

__all__ = [
    "Cosine",
    "GRPOLambda",
    "Kimi",
    "L1Exact",
    "L1Max",
    "Laser",
    "LaserD",
    "LaserDE",
    "Plain",
    "Repetition",
    "Shaper",
    "SoftOverlong",
    "StopProperly",
]
