"""The V step for one matrix: which integers change, and to what.

Of the gradient G of a matrix only the largest elements take part, S. They move by -eta G with eta so large that the
move has the length trust x |W|, and are rounded to the nearest integer; changes are taken, largest first, as long as
they stay within that length. S is as large as it can be while such a move still takes its last element half way to
another integer, and no larger than the share that is asked for: the more elements the shorter each one's way, and a
step on all of a matrix would round back to where it began. G comes some rows at a time and is let go of: it is never
whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.quantized.integers import pack, unpack


class Changes(NamedTuple):
    """New integers of a matrix.

    Attributes:
        at: int64 [k], in the flattened matrix; code: uint8 [k].
    """

    at: Tensor
    code: Tensor


class Largest:
    """The elements of largest gradient so far, and the length of the matrix.

    Args:
        count: how many are looked for.
        top: the highest integer.
    """

    def __init__(self, count: int, top: int) -> None:
        self.count, self.top = count, top
        self.index: Tensor | None = None
        self.gradient: Tensor | None = None
        self.square: Tensor | None = None

    def look(self, first: int, gradient: Tensor, integers: Tensor, zero: Tensor, scale: Tensor) -> None:
        """At some rows; overwrites `gradient` and `integers`.

        Args:
            first: of their elements, in the flattened matrix.
            gradient, integers: [n, groups, elements]; integers less their zero points.
            zero, scale: [n, groups, 1].
        """
        square = (integers * scale).square_().sum()
        self.square = square if self.square is None else self.square + square
        codes = integers.add_(zero)
        # an integer at its end cannot move on
        gradient.masked_fill_((codes <= 0).logical_and_(gradient * scale > 0), 0)
        gradient.masked_fill_((codes >= self.top).logical_and_(gradient * scale < 0), 0)
        found = gradient.view(-1)
        index = found.abs().topk(min(self.count, found.numel()), sorted=False).indices
        found, index = found[index], index + first
        if self.index is not None and self.gradient is not None:
            found, index = torch.cat([self.gradient, found]), torch.cat([self.index, index])
        order = found.abs().topk(min(self.count, found.numel())).indices  # the largest first
        self.gradient, self.index = found[order], index[order]

    def changes(self, packed: Tensor, bits: int, zero: Tensor, scale: Tensor, trust: float) -> Changes:
        """Of what was looked at.

        Args:
            packed: the matrix [N, C * bits / 8].
            zero, scale: [N, groups].
            trust: of the matrix's length.
        """
        assert self.index is not None and self.gradient is not None and self.square is not None
        columns = packed.shape[1] * 8 // bits
        row, column = self.index // columns, self.index % columns
        step = scale[row, column // (columns // zero.shape[1])]
        old = codes_at(packed, bits, self.index).to(step.dtype)
        budget = trust * self.square.sqrt()
        # a move of this length on the first element, the first two, ...: how far the last of them gets, in integers
        eta = budget / self.gradient.square().cumsum(0).sqrt()
        reaches = (eta * self.gradient / step).abs() >= 0.5
        last = (reaches * torch.arange(1, len(reaches) + 1, device=reaches.device)).amax()  # 0: none
        taking_part = torch.arange(len(reaches), device=reaches.device) < last
        move = torch.where(taking_part, self.gradient * eta[(last - 1).clamp_min(0)] / step, 0)
        new = (old - move.nan_to_num_(0.0, 0.0, 0.0)).round_().clamp_(0, self.top)
        spent = ((new - old) * step).square_().cumsum(0)
        taken = (new != old).logical_and_(spent <= budget * budget)
        return Changes(self.index[taken], new[taken].to(torch.uint8))


def codes_at(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """uint8 [k]: integers of a packed matrix by their place in the flattened one."""
    eights = unpack(packed.view(-1, bits).index_select(0, index // 8), bits)
    return eights.gather(1, (index % 8)[:, None])[:, 0]


def change(packed: Tensor, bits: int, changes: Changes) -> None:
    """Write new integers into a packed matrix."""
    eights, of = torch.unique(changes.at // 8, return_inverse=True)
    flat = packed.view(-1, bits)
    codes = unpack(flat.index_select(0, eights), bits)
    codes[of, changes.at % 8] = changes.code
    flat.index_copy_(0, eights, pack(codes, bits))
