"""Formats for matrices within a budget: brute force on small cases, the Lagrangian bound on large ones."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import JobError
from farspan.kernels.quantized.formats import FULL
from farspan.memory.bit_budget import Choice, allocate

CHOICES = st.lists(st.builds(Choice, st.floats(0, 100), st.integers(1, 40)), min_size=1, max_size=4)


@given(st.lists(CHOICES, min_size=1, max_size=5), st.integers(1, 120))
@settings(max_examples=120, deadline=None)
def test_the_best_of_all(table: list[list[Choice]], budget: int) -> None:
    every = [
        (sum(row[i].error for row, i in zip(table, pick)), pick)
        for pick in itertools.product(*(range(len(row)) for row in table))
        if sum(row[i].bytes for row, i in zip(table, pick)) <= budget
    ]
    if not every:
        with pytest.raises(JobError, match="do not fit"):
            allocate(table, budget)
        return
    found = allocate(table, budget)
    assert found.bytes == sum(row[i].bytes for row, i in zip(table, found.chosen)) <= budget
    assert found.error == pytest.approx(sum(row[i].error for row, i in zip(table, found.chosen)))
    best = min(every)[0]
    assert found.bound <= best * (1 + 1e-9) + 1e-12
    assert found.error <= best + 2e-4 * max(best, 1e-6), "HiGHS closes the gap to 1e-4"


def test_where_the_best_step_first_is_not_the_best() -> None:
    """One step of 6 bytes gains most for a byte; the two of 5 that it shuts out gain more together."""
    table = [[Choice(10.0, 1), Choice(4.0, 7)], *[[Choice(10.0, 1), Choice(5.5, 6)]] * 2]
    found = allocate(table, 13)
    assert found.chosen == (0, 1, 1) and found.error == 21.0 and found.bound == pytest.approx(21.0)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_matrices_of_a_large_model(share: float) -> None:
    """224 matrices in 432 formats: within a thousandth of the bound, and never beyond the budget."""
    draw = random.Random(0)
    table = []
    for _ in range(224):
        count, size = draw.choice([4096 * 4096, 4096 * 1024, 4096 * 14336]), draw.random()
        table.append(
            [Choice(count * size * 4**-f.bits_per_weight * draw.uniform(0.9, 1.1), f.bytes(count)) for f in FULL]
        )
    least, most = (sum(end(c.bytes for c in row) for row in table) for end in (min, max))
    budget = int(least + share * (most - least))
    found = allocate(table, budget)
    assert budget * 0.9999 <= found.bytes <= budget
    assert found.bound <= found.error <= found.bound * 1.001
    wider = allocate(table, int(budget * 1.05))
    assert wider.error < found.error
    assert allocate(table, most).error == pytest.approx(sum(min(c.error for c in row) for row in table))
