"""Bytes of an optimizer's state, tensor by tensor, and which rank holds them.

At ZeRO 0 AdamW is the same on all ranks. Every other optimizer keeps the master and the state of a parameter on one
rank, its owner, which steps it and sends the new weights to the others. The planner counts here what
`trainer.optimizers` allocates; the trainer asks here who owns what.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from farspan.kernels.optimizer_states import CHUNK_ELEMENTS, dynamic8_bytes, expanded8_bytes, residual_bytes
from farspan.memory.shape import OptimizerShape, TrainedTensor

FP32 = 4
MOMENTS = 2
LEAST_8BIT = 4096
"""Smaller tensors keep fp32 moments under `adamw8bit`, as bitsandbytes has it."""
INT64 = 8
CODED_BYTES = {"adamw8bit": 27, "coat": 22}
TRANSFORM_BYTES, LEFT_OUT_BYTES = 19, 13
"""What an element of a chunk takes while its moments are coded in 8 bits, while it is transformed, while what is left
out of it is coded: read off the allocator."""
SMALL_BYTES = 1 << 15
"""Scalars, norms of pieces, what BLAS and LAPACK take for themselves."""
SENT_ELEMENTS = 1 << 24
"""Weights that an owner sends at a time: with more a message is hardly faster, and only takes memory."""


def owners(numels: Sequence[int], ranks: int) -> list[int]:
    """The rank of each tensor: largest first, each to the rank with the fewest elements so far (Graham, 1969: no rank
    has more than 4/3 of what the best division would give it)."""
    loads = [(0, rank) for rank in range(ranks)]
    found = [0] * len(numels)
    for index in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        load, rank = heapq.heappop(loads)
        found[index] = rank
        heapq.heappush(loads, (load + numels[index], rank))
    return found


def state_bytes(optimizer: OptimizerShape, tensor: TrainedTensor) -> int:
    """What is kept for one tensor besides its master."""
    numel = math.prod(tensor.shape)
    if optimizer.type == "adamw8bit" and numel >= LEAST_8BIT:
        return MOMENTS * dynamic8_bytes(numel)
    if optimizer.type == "coat":
        return MOMENTS * expanded8_bytes(numel)
    if optimizer.type == "muon" and tensor.is_matrix:
        return FP32 * numel
    if optimizer.low_rank(tensor):
        short, long = sorted(tensor.shape)
        moments = MOMENTS * FP32 * long * optimizer.rank
        if optimizer.type == "galore":
            return moments + FP32 * short * optimizer.rank
        left_out = residual_bytes(numel, optimizer.feedback_bits) if optimizer.feedback_bits else 0
        return moments + FP32 * optimizer.rank + left_out
    return MOMENTS * FP32 * numel


def rank_bytes(optimizer: OptimizerShape, tensors: Sequence[TrainedTensor], ranks: int) -> tuple[int, int]:
    """Elements, and bytes of state, of what the fullest rank owns."""
    each = [one for tensor in tensors for one in [tensor] * tensor.count]
    numels, states = [0] * ranks, [0] * ranks
    for rank, tensor in zip(owners([math.prod(tensor.shape) for tensor in each], ranks), each):
        numels[rank] += math.prod(tensor.shape)
        states[rank] += state_bytes(optimizer, tensor)
    fullest = max(range(ranks), key=lambda rank: FP32 * numels[rank] + states[rank])
    return numels[fullest], states[fullest]


def largest_elements(tensors: Sequence[TrainedTensor]) -> int:
    return max((math.prod(tensor.shape) for tensor in tensors), default=0)


def workspace_bytes(optimizer: OptimizerShape, tensors: Sequence[TrainedTensor], *, width: int, device: str) -> int:
    """Most that a step takes for a moment, beyond gradients and state: for the largest tensor, or for a chunk.

    Args:
        width: bytes of an element of the model's weights.
        device: on `cpu` counted; the SVD of GaLore takes more on a GPU, which is assumed.
    """
    return max((_workspace(optimizer, tensor, width, device) for tensor in tensors), default=0)


def _workspace(optimizer: OptimizerShape, tensor: TrainedTensor, width: int, device: str) -> int:
    numel, rank = math.prod(tensor.shape), optimizer.rank
    most = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"])
    chunk = min(numel, most)
    if optimizer.type == "lamb":
        return FP32 * numel + SMALL_BYTES  # its direction
    if optimizer.type == "coat" or (optimizer.type == "adamw8bit" and numel >= LEAST_8BIT):
        return CODED_BYTES[optimizer.type] * chunk + SMALL_BYTES
    if not tensor.is_matrix:
        return SMALL_BYTES
    short, long = sorted(tensor.shape)
    if optimizer.type == "muon":
        # two matrices of the iteration, and two Gram matrices; in bf16 on a CPU one more, laid out anew for a product
        anew = width < FP32 and device == "cpu"
        return width * ((2 + anew) * numel + 2 * short * short) + SMALL_BYTES * (1 + anew)
    if not optimizer.low_rank(tensor):
        return SMALL_BYTES
    basis, low = short * rank, long * rank
    projected = FP32 * (basis + 2 * low)
    if optimizer.type == "galore":
        svd = FP32 * (2 * numel + short * short + 32 * short) * (1 if device == "cpu" else 2)
        return max(svd, projected) + SMALL_BYTES
    chosen = TRANSFORM_BYTES * min(numel, max(most, short))
    left_out = FP32 * (basis + low) + LEFT_OUT_BYTES * chunk if optimizer.feedback_bits else 0
    angles = 2 * INT64 * basis + 8 * INT64 * short
    return max(chosen, left_out, angles, projected) + SMALL_BYTES


def step_flop(optimizer: OptimizerShape, tensors: Sequence[TrainedTensor]) -> float:
    """Multiplications and additions of matrix products in one step, on average, of all tensors."""
    return sum(tensor.count * _flop(optimizer, tensor) for tensor in tensors)


def _flop(optimizer: OptimizerShape, tensor: TrainedTensor) -> float:
    if len(tensor.shape) != 2:
        return 0.0
    short, long = sorted(tensor.shape)
    if optimizer.type == "muon" and tensor.is_matrix:
        return optimizer.iterations * (4 * short * short * long + 2 * short**3)
    if not optimizer.low_rank(tensor):
        return 0.0
    products = (6 if optimizer.feedback_bits else 4) * short * long * optimizer.rank
    if optimizer.type == "galore":
        return products + short * short * (4 * long + 8 * short) / optimizer.every
    return products + 5 * long * short * math.log2(short) / optimizer.every
