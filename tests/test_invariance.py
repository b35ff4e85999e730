"""Loss and gradients do not depend on the mesh: a pairwise cover of `infra/bench/invariance.py` on persistent gangs.

The full product is `farspan bench invariance`. Every gradient is compared with plain transformers in float64 and may
be at most twice as far from it as plain transformers in fp32 on one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from invariance import ALLOWED_RATIO, FACTORS, Case, Gang, pairwise

CASES = pairwise()


def test_every_pair_of_values_meets() -> None:
    names = list(FACTORS)
    for a, b in itertools.combinations(names, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in CASES}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Gang]]:
    """One gang per world size, made when first used."""
    root = tmp_path_factory.mktemp("models")

    class Gangs(dict[int, Gang]):
        def __missing__(self, world_size: int) -> Gang:
            for gang in self.values():  # cases come sorted by world size: the smaller gangs are done
                gang.close()
            self[world_size] = Gang(world_size, Path(root))
            return self[world_size]

    made = Gangs()
    yield made
    for gang in made.values():
        gang.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_loss_and_gradients_agree_with_float64(case: Case, gangs: dict[int, Gang]) -> None:
    result = gangs[case.mesh[0] * case.mesh[1]].run(case)
    assert result["loss_error"] < 1e-6, result
    assert result["worst_ratio"] <= ALLOWED_RATIO, result
