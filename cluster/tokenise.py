"""Spread independent items over the cluster's CPUs as Ray tasks: tokenisation, before any process group exists.

Only so many tasks are in flight that every core has one and one waits behind it, so the driver holds few results and
an error stops the work early. Ray runs a task again when its worker or node is lost; an exception is not retried,
since the same item would raise it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from farspan.errors import ClusterNotReady, FarspanError, RunFailed

Item = TypeVar("Item")
Result = TypeVar("Result")

QUIET_S = 1800.0


def map_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    cpus_per_task: float = 1.0,
    quiet_s: float = QUIET_S,
) -> list[Result]:
    """`[function(item) for item in items]`, each call a Ray task on the connected cluster.

    Args:
        function: importable by workers, without side effects a second run would spoil.
        quiet_s: give up when no task at all ends for so long.

    Raises:
        FarspanError: raised by `function`; arrives as it is.
        ClusterNotReady: no node has `cpus_per_task` CPUs.
        RunFailed: a task raised another exception, its worker was lost too often, or nothing ended for `quiet_s`.
    """
    import ray

    if not items:
        return []
    slots = _slots(cpus_per_task)
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus_per_task))), "TOKENIZERS_PARALLELISM": "false"}
    task = ray.remote(num_cpus=cpus_per_task, max_retries=3, runtime_env={"env_vars": environment})(function)
    waiting = iter(enumerate(items))
    flying: dict[object, int] = {}
    results: dict[int, Result] = {}
    try:
        while len(results) < len(items):
            while len(flying) < 2 * slots and (following := next(waiting, None)) is not None:
                flying[task.remote(following[1])] = following[0]
            began = time.monotonic()
            ended, _ = ray.wait(list(flying), num_returns=1, timeout=quiet_s)
            if not ended:
                raise _quiet(flying, items, time.monotonic() - began)
            for reference in ended:
                index = flying.pop(reference)
                results[index] = _result(reference, index, items)
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
    return [results[index] for index in range(len(items))]


def _slots(cpus_per_task: float) -> int:
    import ray

    cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    slots = sum(int(count / cpus_per_task + 1e-6) for count in cores)
    if slots == 0:
        raise ClusterNotReady(
            "no node can run a tokenisation task",
            at="this Ray cluster",
            why=f"a task needs {cpus_per_task:g} CPU; the {len(cores)} nodes have {', '.join(f'{c:g}' for c in cores)}",
            try_="start a node with CPUs (`ray start --num-cpus`)",
        )
    return slots


def _result(reference: object, index: int, items: Sequence[Item]) -> Result:  # type: ignore[type-var]
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FarspanError):
            raise error.cause from None
        raise _failed(f"{type(error.cause).__name__}: {error.cause}", index, items) from error
    except RayError as error:
        raise _failed(" ".join(str(error).split()), index, items) from error


def _failed(why: str, index: int, items: Sequence[Item]) -> RunFailed:
    return RunFailed(
        f"tokenisation task {index + 1} of {len(items)} failed",
        at=f"item {str(items[index])[:200]}",
        why=why[:800],
        try_="look at this item; leave it out, or mend what the reason names",
    )


def _quiet(flying: dict[object, int], items: Sequence[Item], waited_s: float) -> RunFailed:
    first = min(flying.values())
    return RunFailed(
        f"no tokenisation task ended for {waited_s:.0f} s",
        at=f"{len(flying)} tasks in flight, the first is item {first + 1} of {len(items)}: {str(items[first])[:200]}",
        why="its worker hangs, or no CPU became free for it",
        try_="look at `ray status` and at this item",
    )
