"""Adam in a subspace of a matrix: GaLore's singular vectors, and cosines.

    G [M, N], N the shorter side (else its transpose);  basis P [N, R];  L = G P;  U = Adam(L), moments [M, R]
    w <- (1 - lr decay) w - lr scale U P^T

Every `every` steps the subspace is chosen anew, from that step's gradient summed over all ranks: only one rank holds a
matrix' state, so nobody can choose otherwise. Matrices no wider than the subspace have AdamW instead (`select`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farspan.kernels.optimizer_states import CHUNK_ELEMENTS, GROUP, cosine, residual
from farspan.trainer.optimizers.adam import adam_direction
from farspan.trainer.optimizers.rule import Rule

if TYPE_CHECKING:
    from farspan.trainer.optimizers.config import DCTAdamW, GaLore, LowRank


class _Subspace(Rule):
    """Adam on gradients times a basis. States `exp_avg`, `exp_avg_sq` [M, R]."""

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float], optim: LowRank) -> None:
        super().__init__(masters, decay)
        self.optim = optim
        for name, master in masters.items():
            rows = turned(master).shape[0]
            moment = torch.zeros(rows, optim.rank, dtype=master.dtype, device=master.device)
            self.states[name] = {"exp_avg": moment, "exp_avg_sq": torch.zeros_like(moment)}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        for name, gradient in gradients.items():
            self._step(name, gradient, lr, count)

    def _step(self, name: str, gradient: Tensor, lr: float, count: int) -> None:
        master, state, g_MN = self.masters[name], self.states[name], turned(gradient)
        self.add_left_out(state, gradient.view(-1))
        if (count - 1) % self.optim.every == 0:
            self.choose(state, g_MN)
        basis_NR = self.basis(state, g_MN.shape[1])
        low_MR = g_MN @ basis_NR
        if "left_out" in state:
            g_MN.addmm_(low_MR, basis_NR.T, alpha=-1)
            self.leave_out(state, gradient.view(-1))
        direction = adam_direction(low_MR, state["exp_avg"], state["exp_avg_sq"], self.optim, count)
        master.mul_(1 - lr * self.decay[name])
        turned(master).addmm_(direction, basis_NR.T, alpha=-lr * self.optim.scale)

    @abstractmethod
    def choose(self, state: dict[str, Tensor], g_MN: Tensor) -> None:
        """A subspace for this gradient and the steps to come."""

    @abstractmethod
    def basis(self, state: dict[str, Tensor], n: int) -> Tensor:
        """[N, R], orthonormal columns."""

    def add_left_out(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        """Add to a flat gradient what earlier ones were cut by."""

    def leave_out(self, state: dict[str, Tensor], rest: Tensor) -> None:
        """Keep for the next step what the subspace cuts off a flat gradient."""
        raise NotImplementedError


class SingularVectors(_Subspace):
    """GaLore: the R right singular vectors of largest value (Zhao et al., 2024). State `projector` [N, R].

    A vector's sign is free, and moments carry over to the next basis: the largest element of each is made positive,
    so that rounding does not turn one around. The SVD takes about N^2 (4 M + 8 N) operations a matrix.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float], optim: GaLore) -> None:
        super().__init__(masters, decay, optim)
        for name, master in masters.items():
            columns = turned(master).shape[1]
            self.states[name]["projector"] = torch.zeros(columns, optim.rank, dtype=master.dtype, device=master.device)

    def choose(self, state: dict[str, Tensor], g_MN: Tensor) -> None:
        _, _, right_NN = torch.linalg.svd(g_MN, full_matrices=False)
        vectors_RN = right_NN[: self.optim.rank]
        largest = vectors_RN.gather(1, vectors_RN.abs().argmax(dim=1, keepdim=True))
        state["projector"].copy_((vectors_RN * largest.sign()).T)

    def basis(self, state: dict[str, Tensor], n: int) -> Tensor:
        return state["projector"]


class Cosines(_Subspace):
    """The R cosines on which a gradient's rows are strongest (SVD-Free Low-Rank Adaptive Gradient Optimization, 2025).

    States `index` int32 [R], in order; with error feedback `left_out` uint8 and `left_out.scale` fp32, in the order
    of the weight's elements. All strengths come from an FFT of the rows; only the chosen vectors are ever made. Two
    bases of cosines overlap in whole vectors, so the rotation of the moments from one to the next, P_old^T P_new, is
    a matching: columns that stay are copied, new ones start at zero.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float], optim: DCTAdamW) -> None:
        super().__init__(masters, decay, optim)
        self.power = 1 if optim.norm == "l1" else 2
        self.bits = {"none": 0, "8bit": 8, "4bit": 4}[optim.feedback]
        for name, master in masters.items():
            state = self.states[name]
            state["index"] = torch.arange(optim.rank, dtype=torch.int32, device=master.device)
            if self.bits:
                zero = torch.zeros_like(self.flat(name))
                state["left_out"], state["left_out.scale"] = residual.encode(zero, self.bits)

    def choose(self, state: dict[str, Tensor], g_MN: Tensor) -> None:
        strength_N = torch.zeros(g_MN.shape[1], dtype=g_MN.dtype, device=g_MN.device)
        for rows in g_MN.split(max(1, chunk_of(g_MN) // g_MN.shape[1])):
            strength_N += cosine.transform(rows).abs_().pow_(self.power).sum(dim=0)
        old, new = state["index"], strength_N.topk(self.optim.rank).indices.sort().values.int()
        place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
        stays = old[place] == new
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].copy_(state[moment].index_select(1, place).mul_(stays))
        old.copy_(new)

    def basis(self, state: dict[str, Tensor], n: int) -> Tensor:
        return cosine.vectors(n, state["index"], state["exp_avg"].dtype)

    def add_left_out(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        for piece, codes, scales in self._pieces(state, gradient) if self.bits else ():
            piece.add_(residual.decode(codes, scales, piece.numel(), self.bits))

    def leave_out(self, state: dict[str, Tensor], rest: Tensor) -> None:
        for piece, codes, scales in self._pieces(state, rest):
            for stored, new in zip((codes, scales), residual.encode(piece, self.bits)):
                stored.copy_(new)

    def _pieces(self, state: dict[str, Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some elements at a time, with their codes and scales."""
        chunk, codes, scales = chunk_of(flat), state["left_out"], state["left_out.scale"]
        for index, piece in enumerate(flat.split(chunk)):
            groups = slice(index * chunk // GROUP, -(-(index * chunk + piece.numel()) // GROUP))
            per_group = GROUP * self.bits // 8
            yield piece, codes[groups.start * per_group : groups.stop * per_group], scales[groups]


def chunk_of(tensor: Tensor) -> int:
    """Elements to take at a time on its device."""
    return CHUNK_ELEMENTS.get(tensor.device.type, CHUNK_ELEMENTS["cuda"])


def turned(matrix: Tensor) -> Tensor:
    """[M, N] with M >= N: the matrix, or its transpose."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
