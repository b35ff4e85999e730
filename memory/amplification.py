"""How far the error of reversible floating-point streams grows, by the coupling's factors. No torch: jobs ask too.

A pretrained layer has the identity inside, so that one coupled layer, to first order, multiplies its two streams by a
2 x 2 matrix with eigenvalues m+ > |m-|. Forward, hidden states grow by m+; undone, an error grows by 1 / |m-|. Relative
to the streams it grows by kappa = m+ / |m-| a layer (derived from Liao et al., 2023, which does not give it):

    wiring 1, 2   m^2 - m - r = 0, r = lambda beta (wiring 1) or beta / lambda (wiring 2)
                  kappa = (1 + sqrt(1 + 4 r))^2 / (4 r)
    wiring 3      m^2 - (1 + lambda + beta) m + lambda beta = 0

Streams are fp32, and undoing starts with one rounding. Where layers compute in bf16, what a layer reads is the stream
rounded to bf16: an error e of the stream moves a share e / u of these roundings by a whole step u, so that a layer
sees an error of about sqrt(e u), far more than e.
"""

from __future__ import annotations

import math
from typing import Literal

from farspan.memory.shape import Precision

Wiring = Literal[1, 2, 3]
STREAM_ROUNDING = 2.0**-23
"""Of an element of an fp32 stream."""
LAYER_ROUNDING: dict[Precision, float] = {"fp32": STREAM_ROUNDING, "bf16": 2.0**-8}
PUBLISHED: dict[Wiring, tuple[float, float]] = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}
"""Lambda and beta of the paper."""


def amplification(wiring: Wiring, factors: tuple[float, float]) -> float:
    """kappa: how much the relative error of the streams grows in a layer that is undone.

    Args:
        factors: lambda and beta, both above 0.
    """
    lam, beta = factors
    if wiring == 3:
        total, product = 1.0 + lam + beta, lam * beta
    else:
        total, product = 1.0, lam * beta if wiring == 1 else beta / lam
    root = math.sqrt(total**2 - 4.0 * product) if wiring == 3 else math.sqrt(1.0 + 4.0 * product)
    # (total + root) / |total - root|, without the difference of near numbers
    return (total + root) ** 2 / (4.0 * product)


def error_after(layers: int, kappa: float) -> float:
    """The least relative error of streams after so many layers were undone: eps kappa^layers."""
    return STREAM_ROUNDING * kappa**layers


def expected_error(layers: int, kappa: float, precision: Precision) -> float:
    """The same with what layers in this precision add to it."""
    error, rounding = STREAM_ROUNDING * kappa, LAYER_ROUNDING[precision]
    for _ in range(layers - 1):
        error = kappa * max(error, math.sqrt(error * rounding))
    return error


def most_layers(kappa: float, tolerance: float) -> int:
    """The most layers k that may be undone in a row: eps kappa^k <= tolerance; 0: not even one."""
    return max(0, math.floor(math.log(tolerance / STREAM_ROUNDING) / math.log(kappa) + 1e-9))


def likely_layers(kappa: float, tolerance: float, precision: Precision) -> int:
    """The most by `expected_error`, and at least one: what is planned with, before a run has measured it."""
    layers = 1
    while layers < most_layers(kappa, tolerance) and expected_error(layers + 1, kappa, precision) <= tolerance:
        layers += 1
    return layers
