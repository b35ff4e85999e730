"""From shares to whole rows, and the last steps to a placement that nothing near it beats.

The linear program deals in shares of rows; the executor in whole blocks of O and whole tiles of linear layers.
`decode` rounds so that totals over the layers stay what the program said: what one layer loses to rounding, the next
one gains. `improve` is a local search through `memory.evaluate` alone, over changes to one, two and three tensors at a
time: on small or coarsely tiled problems, where rounding matters, it is what finds the optimum; on large ones the
number of walks is limited and there is little left to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from random import Random

import numpy as np

from farspan.memory.evaluate import Evaluator, Walk
from farspan.memory.milp import alike
from farspan.memory.plan import TIERS, LayerPlan, Placement, Rows
from farspan.memory.policies import KEEP, grid_parts, grid_rows
from farspan.memory.problem import LayerKind, LinearClass
from farspan.memory.row_program import Shape, Solved

Key = tuple[float, ...]
Change = tuple[int, str, object]
"""Layer (-1: the placement), field or linear class, new value."""
WALKED_LAYERS = 20_000
"""Layers walked by one `best_near` at most from its starts together, and again from the best: a second or two."""


def decode(evaluator: Evaluator, shape: Shape, solved: Solved) -> Placement:
    """The placement nearest to a program's shares."""
    problem = evaluator.problem
    carried: dict[tuple[str, str], np.ndarray] = {}

    def rounded(kind: LayerKind, name: str, share: np.ndarray, rows: int, part_rows: int) -> Rows:
        parts = grid_parts(rows, part_rows)
        wanted = share * parts + carried.get((kind.name, name), 0.0)
        taken = np.floor(wanted + 1e-6).astype(int)
        if name == "x":
            taken[0] = parts - min(parts, int(taken[1:].sum()))
        for tier in (2, 1, 0):
            taken[tier] = max(0, min(taken[tier], parts - (int(taken.sum()) - taken[tier])))
        carried[kind.name, name] = wanted - taken
        return tiered(rows, part_rows, taken)

    def tiles(kind: LayerKind, classes: list[LinearClass], share: np.ndarray) -> dict[str, Rows]:
        """Tiles of classes of one price, the large ones first: lanes see even bytes, whichever class they are of."""
        size = sum(c.bytes for c in classes)
        wanted = share * size + carried.get((kind.name, classes[0].name), 0.0)
        taken = {c.name: [0, 0, 0] for c in classes}
        parts = {c.name: grid_parts(problem.rows, c.tile_rows) for c in classes}
        for tier in (2, 1, 0):
            for c in sorted(classes, key=lambda c: -c.bytes / parts[c.name]):
                tile = c.bytes / parts[c.name]
                fitting = int(wanted[tier] / tile + 1e-6) if tile else parts[c.name]
                taken[c.name][tier] = max(0, min(fitting, parts[c.name] - sum(taken[c.name])))
                wanted[tier] -= taken[c.name][tier] * tile
        carried[kind.name, classes[0].name] = wanted
        return {c.name: tiered(problem.rows, c.tile_rows, taken[c.name]) for c in classes if any(taken[c.name])}

    layers: list[LayerPlan] = [KEEP] * len(evaluator.kinds)
    for layer in range(problem.frozen_below, shape.kept_from):
        kind = evaluator.kinds[layer]
        x, o, shares = solved.x.get(layer), solved.o.get(layer), solved.linear.get(layer, {})
        groups = [group for group in alike(kind.linear) if group[0].name in shares]
        layers[layer] = LayerPlan(
            x=None if x is None else rounded(kind, "x", x, problem.rows, 1),
            o=Rows() if o is None else rounded(kind, "o", o, problem.attention_rows, kind.o_block_rows),
            linear={n: rows for group in groups for n, rows in tiles(kind, group, shares[group[0].name]).items()},
        )
    return Placement(
        rows=problem.rows,
        attention_rows=problem.attention_rows,
        layers=tuple(layers),
        between=shape.between,
        prefetch=shape.prefetch,
        slots=shape.slots,
        frozen_below=problem.frozen_below,
        saved=problem.saved,
        tier_codec=problem.tier_codec,
    )


def tiered(rows: int, part_rows: int | None, taken: Sequence[int] | np.ndarray) -> Rows:
    """Rows of so many parts on device, host and disk, from the end of the sequence."""
    ends = [grid_rows(rows, part_rows, int(sum(taken[: count + 1]))) for count in range(3)]
    return Rows(device=ends[0], host=ends[1] - ends[0], disk=ends[2] - ends[1])


def split(rows: Rows, whole: int, part_rows: int | None) -> list[int]:
    """Parts on device, host and disk: the reverse of `tiered`."""
    parts, size = grid_parts(whole, part_rows), part_rows or whole
    ends = np.cumsum([rows.device, rows.host, rows.disk])
    counts = [parts - (whole - int(end)) // size if end else 0 for end in ends]
    return [counts[0], counts[1] - counts[0], counts[2] - counts[1]]


def best_near(
    evaluator: Evaluator, placements: Sequence[Placement], key: Callable[[Walk], Key], almost: Sequence[Placement] = ()
) -> Placement:
    """The best that local search finds from the best of some placements.

    Few layers make a rough landscape and cheap walks: there it starts from several, some of them placements that
    `almost` fit; on a deep model from one.
    """
    starts = min(8, max(1, 24 // len(evaluator.kinds)))
    taken = list(almost[: starts // 2])
    walked = [(key(evaluator.walk(placement)), index, placement) for index, placement in enumerate(placements)]
    best = [placement for _, _, placement in sorted(walked)[: starts - len(taken)]] + taken
    if starts > 1:
        walked_layers = WALKED_LAYERS // len(best)
        improved = [improve(evaluator, placement, key, at_once=2, walked_layers=walked_layers) for placement in best]
        best = sorted(improved, key=lambda placement: key(evaluator.walk(placement)))
    return improve(evaluator, best[0], key, at_once=3)


def improve(
    evaluator: Evaluator,
    placement: Placement,
    key: Callable[[Walk], Key],
    *,
    at_once: int,
    walked_layers: int = WALKED_LAYERS,
) -> Placement:
    """The best placement that a local search finds, by the smallest `key`.

    A round makes one change after another and keeps what helps; when a round finds nothing, pairs and then up to
    `at_once` changes together are tried, and the first that helps starts over.
    """
    best, best_key = placement, key(evaluator.walk(placement))
    walks, order, size = walked_layers // len(placement.layers), Random(0), 1
    while size <= at_once:
        found = False
        singles = list(changes(evaluator, best))
        order.shuffle(singles)
        for combined in combinations(singles, size):
            candidate = changed(evaluator, best, combined)
            if candidate is None:
                continue
            walks -= 1
            if walks < 0:
                return best
            if (candidate_key := key(evaluator.walk(candidate))) < best_key:
                best, best_key, found = candidate, candidate_key, True
                if size > 1:
                    break
        size = 1 if found else size + 1
    return best


def changes(evaluator: Evaluator, placement: Placement) -> Iterator[Change]:
    """Every way to move one tensor's rows between tiers and recompute, whole or by one part, and other switches."""
    problem = evaluator.problem
    if not problem.reversible:
        yield from ((-1, "between", between) for between in ("o", "xo") if between != placement.between)
    yield from ((-1, "prefetch", count) for count in range(4) if count != placement.prefetch)
    yield from ((-1, "slots", count) for count in range(1, 5) if count != placement.slots)
    trained = range(problem.frozen_below, len(placement.layers))
    for one, other in combinations(trained, 2):
        if placement.layers[one] != placement.layers[other]:
            yield one, "exchanged", other
    for layer in trained:
        plan, kind = placement.layers[layer], evaluator.kinds[layer]
        if not plan.keep:
            yield from [(layer, "plan", KEEP)] * (not problem.reversible)
        elif placement.saved == "host":  # there the best layers to keep need not be the top ones
            for tier in TIERS:
                o = Rows(**{tier: problem.attention_rows}) if kind.o_bytes else Rows()
                yield layer, "plan", LayerPlan(x=Rows(**{tier: problem.rows}), o=o)
        for rows in moves(plan.x or Rows(), problem.rows, 1):
            if rows.stored == problem.rows:
                yield layer, "x", rows
        if plan.x is not None and not problem.reversible:
            yield layer, "x", None
        if kind.o_bytes:
            yield from ((layer, "o", rows) for rows in moves(plan.o, problem.attention_rows, kind.o_block_rows))
        for linear in kind.linear:
            stored = plan.linear.get(linear.name, Rows())
            yield from ((layer, linear.name, rows) for rows in moves(stored, problem.rows, linear.tile_rows))


def moves(stored: Rows, rows: int, part_rows: int | None) -> Iterator[Rows]:
    taken, parts = split(stored, rows, part_rows), grid_parts(rows, part_rows)
    levels = [*taken, parts - sum(taken)]
    seen = {tuple(levels)}
    for source, target in [(a, b) for a in range(4) for b in range(4) if a != b]:
        for count in {1, levels[source]} if levels[source] else ():
            moved = list(levels)
            moved[source] -= count
            moved[target] += count
            if tuple(moved) not in seen:
                seen.add(tuple(moved))
                yield tiered(rows, part_rows, moved[:3])
    for target in range(4):
        whole = tuple(parts if tier == target else 0 for tier in range(4))
        if whole not in seen:
            seen.add(whole)
            yield tiered(rows, part_rows, whole[:3])


def adapted(plan: LayerPlan, kind: LayerKind, other: LayerKind) -> LayerPlan:
    """The plan of a layer of one kind for a layer of another, as far as they share a grid."""
    if kind is other:
        return plan
    grid = {c.name: c.tile_rows for c in other.linear}
    shared = {c.name for c in kind.linear if c.name in grid and grid[c.name] == c.tile_rows}
    return plan.model_copy(
        update={
            "o": plan.o if kind.o_block_rows == other.o_block_rows and other.o_bytes else Rows(),
            "linear": {name: rows for name, rows in plan.linear.items() if name in shared},
        }
    )


def changed(evaluator: Evaluator, placement: Placement, combined: Sequence[Change]) -> Placement | None:
    """The placement with some changes made; None when it makes no sense."""
    if len({change[:2] for change in combined}) < len(combined):
        return None
    layers = list(placement.layers)
    fields: dict[str, object] = {}
    for layer, name, value in combined:
        if layer < 0:
            fields[name] = value
            continue
        plan = layers[layer]
        if name == "exchanged":
            assert isinstance(value, int)
            kind, other = evaluator.kinds[layer], evaluator.kinds[value]
            layers[layer] = adapted(layers[value], other, kind)
            layers[value] = adapted(plan, kind, other)
        elif name == "plan":
            assert isinstance(value, LayerPlan)
            layers[layer] = value
        elif plan.keep and name != "x":
            return None
        elif name in ("x", "o"):
            layers[layer] = plan.model_copy(update={name: value, "keep": False})
        else:
            assert isinstance(value, Rows)
            linear = {n: rows for n, rows in {**plan.linear, name: value}.items() if rows.stored}
            layers[layer] = plan.model_copy(update={"linear": linear})
    for index in range(placement.frozen_below, len(layers)):
        if not layers[index].head and (index == placement.frozen_below or layers[index - 1].keep):
            return None
    return placement.model_copy(update={**fields, "layers": tuple(layers)})
