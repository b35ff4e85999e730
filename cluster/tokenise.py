"""Spread independent items over the cluster's CPUs as Ray tasks: tokenisation and the rounding of matrices, before any
process group exists.

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
    gpus_per_task: float = 0.0,
    quiet_s: float = QUIET_S,
    what: str = "tokenisation",
) -> list[Result]:
    """`[function(item) for item in items]`, each call a Ray task on the connected cluster.

    Args:
        function: importable by workers, without side effects a second run would spoil.
        quiet_s: give up when no task at all ends for so long.
        what: kind of the tasks, for errors.

    Raises:
        FarspanError: raised by `function`; arrives as it is.
        ClusterNotReady: no node has `cpus_per_task` CPUs and `gpus_per_task` GPUs.
        RunFailed: a task raised another exception, its worker was lost too often, or nothing ended for `quiet_s`.
    """
    import ray

    if not items:
        return []
    slots = _slots(cpus_per_task, gpus_per_task, what)
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus_per_task))), "TOKENIZERS_PARALLELISM": "false"}
    resources = {"num_cpus": cpus_per_task, "num_gpus": gpus_per_task}
    task = ray.remote(**resources, max_retries=3, runtime_env={"env_vars": environment})(function)
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
                raise _quiet(flying, items, time.monotonic() - began, what)
            for reference in ended:
                index = flying.pop(reference)
                results[index] = _result(reference, index, items, what)
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
    return [results[index] for index in range(len(items))]


def _slots(cpus_per_task: float, gpus_per_task: float, what: str) -> int:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [node.get("CPU", 0.0) for node in nodes]
    slots = 0
    for node, count in zip(nodes, cores):
        room = count / cpus_per_task
        if gpus_per_task:
            room = min(room, node.get("GPU", 0.0) / gpus_per_task)
        slots += int(room + 1e-6)
    if slots == 0:
        gpu = f" and {gpus_per_task:g} GPU" if gpus_per_task else ""
        raise ClusterNotReady(
            f"no node can run a {what} task",
            at="this Ray cluster",
            why=f"a task needs {cpus_per_task:g} CPU{gpu}; the {len(cores)} nodes have "
            f"{', '.join(f'{c:g}' for c in cores)} CPUs",
            try_="start a node with CPUs (`ray start --num-cpus`)",
        )
    return slots


def _result(reference: object, index: int, items: Sequence[Item], what: str) -> Result:  # type: ignore[type-var]
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FarspanError):
            raise error.cause from None
        raise _failed(f"{type(error.cause).__name__}: {error.cause}", index, items, what) from error
    except RayError as error:
        raise _failed(" ".join(str(error).split()), index, items, what) from error


def _failed(why: str, index: int, items: Sequence[Item], what: str) -> RunFailed:
    return RunFailed(
        f"{what} task {index + 1} of {len(items)} failed",
        at=f"item {str(items[index])[:200]}",
        why=why[:800],
        try_="look at this item; leave it out, or mend what the reason names",
    )


def _quiet(flying: dict[object, int], items: Sequence[Item], waited_s: float, what: str) -> RunFailed:
    first = min(flying.values())
    return RunFailed(
        f"no {what} task ended for {waited_s:.0f} s",
        at=f"{len(flying)} tasks in flight, the first is item {first + 1} of {len(items)}: {str(items[first])[:200]}",
        why="its worker hangs, or no CPU became free for it",
        try_="look at `ray status` and at this item",
    )
