"""An estimate of a step's seconds and of the longest context that a person makes on paper; `plan.py` compares with it.

It knows FLOP and bytes per token and nothing of layers, lanes or moments. `longest_apart` corrects its one large error.
"""

from __future__ import annotations

import math
from typing import Any

from farspan.memory.hardware import Hardware
from farspan.memory.shape import ModelShape

W_KIB = 40.0
"""Working set of one layer's backward, per token: x, O, their gradients and one group of heads, MLP in tiles."""


def closed_form(shape: ModelShape, hardware: Hardware, tokens: int) -> dict[str, Any]:
    """Seconds of a LoRA step in bf16.

    Every k-th layer's x is stored, and O of the last share beta of the rows of every layer; all tiers are one pool:

        x L/k + O (L beta + k (1 - beta)) + W = (device - weights - context + host + disk) / tokens
        seconds = linear and attention, forward and backward
                  + passes * linear forward of the body + (1 - beta)^2 * attention forward

    One pass for k = 1. Else (k + 1) / 2, each layer from its segment's head, and one more to make O where it is
    missing. The least over k. The bytes must suffice.
    """
    x, o = row_bytes(shape)
    pool = pooled_bytes(shape, hardware) / tokens
    head_s = 4 * shape.vocab * shape.hidden * tokens / hardware.matmul_flop_per_s["bf16"]
    linear_s = 2 * sum(i * o for i, o in shape.linears().values()) * tokens / hardware.matmul_flop_per_s["bf16"]
    flop, rate = 2 * shape.q_width * tokens**2 * shape.layers, hardware.attention["bf16"][0]
    floor = {
        "linear layers and loss": 2 * shape.layers * linear_s + head_s,
        "attention forward": flop / rate.forward_flop_per_s,
        "attention backward": 2.5 * flop / rate.backward_flop_per_s,
    }
    found = []
    for k in range(1, shape.layers):
        spare = pool - W_KIB * 1024 - x * math.ceil(shape.layers / k) - o * k
        beta = min(1.0, spare / (o * (shape.layers - k)))
        if beta >= 0:
            passes = 1.0 if k == 1 else (k + 1) / 2 + (beta < 1)
            terms = {
                **floor,
                "linear layers again": passes * shape.layers * linear_s,
                "attention again": (1 - beta) ** 2 * floor["attention forward"],
                "elementwise work, waiting": 0.0,
            }
            found.append({"k": k, "beta": round(beta, 3), "terms": terms, "step_s": sum(terms.values())})
    return min(found, key=lambda estimate: estimate["step_s"])


def longest_pooled(shape: ModelShape, hardware: Hardware) -> int:
    """Tokens at which the pool is empty with no O stored (beta = 0)."""
    x, o = row_bytes(shape)
    least = min(x * math.ceil(shape.layers / k) + o * k for k in range(1, shape.layers))
    return int(pooled_bytes(shape, hardware) / (least + W_KIB * 1024))


def longest_apart(shape: ModelShape, hardware: Hardware, working_kib: float, states_bytes: int) -> int:
    """The same, with what must be on the device in one moment kept apart from what may lie anywhere.

    That is the working set of the layer in backward (its x and O among it), O of the layers below it in its segment,
    and x of the segment's head.
    """
    x, o = row_bytes(shape)
    device = hardware.device_bytes - states_bytes
    pool = device + hardware.host_bytes + hardware.disk_bytes
    most = 0.0
    for k in range(1, shape.layers):
        here = working_kib * 1024 + o * (k - 1) + (x if k > 1 else 0)
        most = max(most, min(device / here, pool / (here + x * (math.ceil(shape.layers / k) - 1))))
    return int(most)


def row_bytes(shape: ModelShape) -> tuple[int, int]:
    """x and O of a layer per token, the latter with its log-sum-exp."""
    return 2 * shape.hidden, 2 * shape.q_width + 4 * shape.heads


def pooled_bytes(shape: ModelShape, hardware: Hardware) -> int:
    device = hardware.device_bytes - 2 * shape.parameters - hardware.context_bytes
    return device + hardware.host_bytes + hardware.disk_bytes
