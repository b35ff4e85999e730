"""Where LoRA starts: initialisations whose product B A is not zero, with the base left as it is.

The pretrained function must be the start, so the papers take s B0 A0 off the weights. Here the weights stay, in 16 bits
or quantized, and the start is a second pair that is frozen: y = W0 x + s (B A - B0 A0) x, exactly. A trained adapter is
then the difference of the two products, a plain LoRA of twice the rank that opens on the untouched base.

    pissa     A, B from the largest singular values of W0 (Meng et al., 2024, https://arxiv.org/abs/2404.02948)
    olora     from its QR decomposition (Buyukakyuz, 2024, https://arxiv.org/abs/2406.01775)
    lora_ga   from the gradient's singular vectors, so that the first step goes along the gradient of W: A from the
              first r on the right, B from those r to 2r on the left, each scaled by out^(1/4) / sqrt(gamma)
              (Wang et al., LoRA-GA, 2024, https://arxiv.org/abs/2407.05000)

The gradient G is never formed: some packs run forward and backward a few times over, and each layer adds up products of
G with a few vectors, from which the singular vectors follow (randomized subspace iteration: Halko et al., 2011,
https://arxiv.org/abs/0909.4061). That takes (in + out) times a few r numbers a matrix, on any base.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from farspan.errors import CheckpointError, JobError
from farspan.trainer.adapters.lora.config import LoRA

STARTED = ("pissa", "olora", "lora_ga")
"""Initialisations that need a frozen pair."""
START_A, START_B = "start_A", "start_B"
OVERSAMPLE = 16
CHUNK_ELEMENTS = 1 << 22
"""Of inputs and gradients that are in fp32 at one time while a gradient is sketched."""
PASSES = 4
"""Over the packs whose gradient is taken; even."""
WHOLE_SVD = 1024
"""Matrices no wider are decomposed whole; wider ones by subspace iteration."""
WHOLE_SUM = 1 << 20
"""Elements of a gradient that is added up whole: 4 MiB."""
PROBE = "gradient_probe"
"""Attribute of a base layer: called with input and output gradient in backward."""


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's LoRA layers by name."""
    from peft.tuners.lora import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def reserve(model: nn.Module) -> None:
    """Give every LoRA layer room for its frozen pair, zero at first.

    Raises:
        JobError: a matrix has fewer directions than the adapter.
    """
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        rank, most = layer.r["default"], min(base.in_features, base.out_features)
        if rank > most:
            raise JobError(
                f"{name} has {most} directions, fewer than the {rank} it was to start at",
                at="adapter.rank",
                why="singular vectors of a matrix are no more than its rows or columns",
                try_=f"--set adapter.rank={most}, or --set adapter.init=default",
            )
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.register_buffer(START_A, torch.zeros_like(a), persistent=False)
        layer.register_buffer(START_B, torch.zeros_like(b), persistent=False)


def begin(layer: Any, a: Tensor, b: Tensor) -> None:
    """Start a layer at A, B, rounded to its dtype, with the frozen pair that takes them off again."""
    for parameter, start, value in (
        (layer.lora_A["default"].weight, getattr(layer, START_A), a),
        (layer.lora_B["default"].weight, getattr(layer, START_B), b),
    ):
        parameter.data.copy_(value)
        start.copy_(parameter.data)


def from_weights(layer: Any, adapter: LoRA) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] by `pissa` or `olora`. fp32."""
    weight = layer.get_base_layer().weight.detach().float()
    rank = adapter.rank
    if adapter.init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if min(weight.shape) <= WHOLE_SVD:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLE, *weight.shape), niter=16)
        vh = v.t()
    root = (s[:rank] / layer.scaling["default"]).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


class Sketch:
    """The leading singular vectors of a gradient G [out, in] that is too large to be formed.

    Found by subspace iteration over passes of the same rows: G omega gives a basis of the range, its product with G a
    basis of the rows, and so on. A small matrix is added up whole in each pass instead.
    """

    def __init__(self, name: str, outputs: int, inputs: int, rank: int, seed: int, device: torch.device) -> None:
        k = min(2 * rank + OVERSAMPLE, inputs, outputs)
        self.whole = outputs * inputs <= max(WHOLE_SUM, k * (outputs + inputs))
        draw = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        self.right = torch.linalg.qr(torch.randn(inputs, k, generator=draw))[0].to(device)
        """Orthonormal [in, k], given to G in the passes before the basis of its range is known."""
        self.left: Tensor | None = None
        """Orthonormal [out, k], the basis of the range."""
        self.sum = torch.zeros(outputs, inputs if self.whole else k, device=device)

    def add(self, x_RC: Tensor, dy_RN: Tensor) -> None:
        """One backward's rows: G += dy^T x."""
        step = max(1, CHUNK_ELEMENTS // (x_RC.shape[1] + dy_RN.shape[1]))
        for first in range(0, x_RC.shape[0], step):
            x, dy = x_RC[first : first + step].float(), dy_RN[first : first + step].float()
            if self.whole:
                self.sum.addmm_(dy.t(), x)
            elif self.left is None:
                self.sum.addmm_(dy.t(), x @ self.right)
            else:
                self.sum.addmm_((dy @ self.left).t(), x)

    def next_pass(self) -> None:
        """All rows have been seen: what they gave is what the next pass looks through."""
        if self.whole:
            self.sum.zero_()
        elif self.left is None:
            self.left = torch.linalg.qr(self.sum)[0]
            self.sum = torch.zeros(self.left.shape[1], self.right.shape[0], device=self.sum.device)
        else:
            self.right, left, self.left = torch.linalg.qr(self.sum.t())[0], self.left, None
            self.sum = torch.zeros(left.shape[0], self.right.shape[1], device=self.sum.device)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, k], S [k], Vh [k, in] after an even number of passes."""
        u, s, vh = torch.linalg.svd(self.sum, full_matrices=False)
        return (u if self.left is None else self.left @ u), s, vh


def from_gradients(
    model: nn.Module, adapter: LoRA, run: Callable[[], None], *, seed: int, group: dist.ProcessGroup | None = None
) -> None:
    """Start every LoRA layer by LoRA-GA. Collective.

    Args:
        run: forward and backward of this rank's share of some packs, the same each time; called a few times.
            Gradients it leaves are deleted.
        group: ranks whose gradients are summed; None: the world, if there is one.
    """
    layers, sketches = lora_layers(model), {}
    for name, layer in layers.items():
        base, weight = layer.get_base_layer(), layer.lora_A["default"].weight
        size = base.out_features, base.in_features
        sketch = sketches[name] = Sketch(name, *size, adapter.rank, seed, weight.device)
        setattr(base, PROBE, sketch.add)
    try:
        for turn in range(PASSES):
            for sketch in sketches.values() if turn else ():
                sketch.next_pass()
            run()
            for sketch in sketches.values():
                if dist.is_initialized() and dist.get_world_size(group) > 1:
                    dist.all_reduce(sketch.sum, group=group)
    finally:
        for layer in layers.values():
            delattr(layer.get_base_layer(), PROBE)
        for parameter in model.parameters():
            parameter.grad = None
    for name, layer in layers.items():
        u, _, vh = sketches[name].svd()
        scale = layer.get_base_layer().out_features ** 0.25 / adapter.gamma**0.5
        rank = adapter.rank
        a, b = scale * vh[:rank], scale * u[:, rank : 2 * rank]
        missing = rank - b.shape[1]  # a matrix of fewer than 2r rows or columns has no more directions
        if missing > 0:
            b = torch.cat([b, torch.zeros(b.shape[0], missing, device=b.device)], 1)
        begin(layer, a, b)


def must_be_made(kept: Path, made_for: str, checkpoints: Sequence[Path]) -> bool:
    """Whether a run has no start yet, or one of another job that never came to a checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and what they start from is gone.
    """
    if kept.exists():
        with safe_open(kept, framework="pt") as file:
            same = (file.metadata() or {}).get("made_for") == made_for
        return not same and not checkpoints
    if checkpoints:
        raise CheckpointError(
            "where the adapter started is not known",
            at=str(kept),
            why="its checkpoints hold the difference to it, and the file is not in the run folder",
            try_="copy it from where the run was, or start a run under another name",
        )
    return True


def pairs(model: nn.Module) -> dict[str, Tensor]:
    """The frozen pairs by name, on the CPU: what a run keeps beside its checkpoints."""
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in lora_layers(model).items()
        for part in (START_A, START_B)
    }


def restore(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Start as `pairs` says."""
    for name, layer in lora_layers(model).items():
        begin(layer, kept[f"{name}.{START_A}"], kept[f"{name}.{START_B}"])
