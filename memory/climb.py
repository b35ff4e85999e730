"""Which segments: shapes to start from, and one shape's neighbours.

Backward begins with everything in memory, so the best shapes have short segments at the top and longer ones below;
where exactly is found by climbing, a program solved at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from farspan.memory.evaluate import Evaluator
from farspan.memory.row_program import Shape, even_shape

LENGTHS = (*range(1, 17), 20, 24, 32, 48, 64, 96, 128)
"""Longest segments that are tried."""


def lengths(evaluator: Evaluator) -> list[int]:
    """Longest segments of a problem's plans that are tried; a reversible layer is always one of its own."""
    layers = len(evaluator.problem.layers) - evaluator.problem.frozen_below
    if evaluator.problem.reversible:
        return [1]
    return [length for length in LENGTHS if length < layers] + [layers]


def climb(evaluator: Evaluator, shape: Shape, value: Callable[[Shape], float], tries: int) -> Shape:
    """First improvement over neighbouring shapes."""
    first, layers = evaluator.problem.frozen_below, len(evaluator.kinds)
    seen, improved = {shape}, True
    while improved:
        improved = False
        for neighbour in neighbours(shape, first, layers, fixed=evaluator.problem.reversible):
            if neighbour in seen:
                continue
            seen.add(neighbour)
            tries -= 1
            if tries < 0:
                return shape
            if value(neighbour) < value(shape) * (1 - 1e-6):
                shape, improved = neighbour, True
                break
    return shape


def topped(evaluator: Evaluator, shape: Shape, top: tuple[int, ...]) -> Shape:
    """Short segments at the top, where backward begins and memory is full; even ones below."""
    kept = len(evaluator.kinds) - shape.kept_from
    first, below = evaluator.problem.frozen_below, shape.kept_from - sum(top)
    segments = max(1, -(-(below - first) // shape.longest))
    even = even_shape(evaluator, segments, kept + sum(top)).starts
    starts = [*even]
    for length in reversed(top):
        starts.append(below)
        below += length
    return replace(shape, starts=tuple(starts))


def neighbours(shape: Shape, first: int, layers: int, *, fixed: bool = False) -> Iterator[Shape]:
    """Shapes one boundary, one kept layer or one switch away, the top of the model first. `fixed`: segments stay."""
    yield from (replace(shape, prefetch=prefetch) for prefetch in (0, 1, 2) if fixed and prefetch != shape.prefetch)
    if fixed:
        return
    starts = shape.starts
    for index in range(len(starts) - 1, 0, -1):
        yield replace(shape, starts=starts[:index] + starts[index + 1 :])
        low, high = starts[index - 1], (*starts, shape.kept_from)[index + 1]
        for start in (starts[index] - 1, starts[index] + 1):
            if low < start < high:
                yield replace(shape, starts=(*starts[:index], start, *starts[index + 1 :]))
    if shape.kept_from - 1 > first:
        fewer = tuple(start for start in starts if start < shape.kept_from - 1)
        yield replace(shape, starts=fewer, kept_from=shape.kept_from - 1)
    if shape.kept_from < layers:
        yield replace(shape, kept_from=shape.kept_from + 1)
        yield replace(shape, starts=(*starts, shape.kept_from), kept_from=shape.kept_from + 1)
    for prefetch in {0, 1, 2} - {shape.prefetch}:
        yield replace(shape, prefetch=prefetch)
    if shape.longest > 2:
        yield replace(shape, between="xo" if shape.between == "o" else "o")
    for unit in shape.units:
        if len(unit) > 1:
            middle = unit.start + len(unit) // 2
            yield replace(shape, starts=tuple(sorted({*starts, middle})))
