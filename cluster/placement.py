"""A place for every rank of a gang: one placement group, one bundle a rank, and the arithmetic when there is none.

A placement group takes all its bundles or none, so two gangs cannot block each other half placed. Waiting for it is
bounded and says every ten seconds what is asked for and what there is; a local Ray cannot grow, so there a demand
beyond its size is refused at once. A cluster that was joined may still be growing, so there the wait is the answer.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farspan.cluster.config import GangSpec
from farspan.errors import ClusterNotReady

REPORT_S = 10.0
WAIT_STEP_S = 0.5


@dataclass(frozen=True)
class Demand:
    """What a gang asks of the cluster."""

    ranks: int
    bundle: Mapping[str, float]
    """Resources of one rank, as Ray names them: `CPU`, `GPU`."""
    strategy: str

    @classmethod
    def of(cls, gang: GangSpec) -> Demand:
        bundle = {"CPU": gang.cluster.cpus_per_actor}
        if gang.use_gpu:
            bundle["GPU"] = 1.0
        return cls(ranks=gang.actors, bundle=bundle, strategy=gang.cluster.placement)

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many bundles the nodes could hold if they were idle, under this placement strategy."""
        each = [
            min(math.floor(node.get(key, 0.0) / need + 1e-6) for key, need in self.bundle.items()) for node in nodes
        ]
        if self.strategy == "STRICT_PACK":
            return max(each, default=0)
        if self.strategy == "STRICT_SPREAD":
            return sum(count >= 1 for count in each)
        return sum(each)

    def against(self, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
        """`4 ranks x 1 CPU = 4 CPU; 1 node with 2 CPU, 1 free: room for 2 of 4 ranks (PACK)`."""
        each = " + ".join(f"{need:g} {key}" for key, need in self.bundle.items())
        total = " + ".join(f"{need * self.ranks:g} {key}" for key, need in self.bundle.items())
        supply = ", ".join(
            f"{sum(node.get(key, 0.0) for node in nodes):g} {key} ({free.get(key, 0.0):g} free)" for key in self.bundle
        )
        room = min(self.room(nodes), self.ranks)
        return (
            f"needs {self.ranks} x {each} = {total}; {len(nodes)} node{'s' * (len(nodes) != 1)} with {supply}: "
            f"room for {room} of {self.ranks} ranks ({self.strategy})"
        )


def place(
    gang: GangSpec, *, can_grow: bool, on_wait: Callable[[str], None], check: Callable[[], None] = lambda: None
) -> Any:
    """Reserve one bundle a rank and return the ready placement group.

    Args:
        can_grow: nodes may still join; when False, a demand the cluster cannot hold is refused at once.
        on_wait: called every ten seconds of waiting with demand against supply.
        check: called about every half second of waiting; may raise to end it.

    Raises:
        ClusterNotReady: no room, at once or after `cluster.wait_s`.
    """
    import ray

    demand = Demand.of(gang)
    nodes = _node_resources()
    if not can_grow and demand.room(nodes) < demand.ranks:
        raise _no_room(gang, demand, "this Ray cannot hold the gang")
    group = ray.util.placement_group(
        [dict(demand.bundle) for _ in range(demand.ranks)], strategy=demand.strategy, name=f"farspan-{gang.name}"
    )
    began = time.monotonic()
    reported_s = 0.0
    try:
        while not group.wait(timeout_seconds=WAIT_STEP_S):
            check()
            waited_s = time.monotonic() - began
            if waited_s >= gang.cluster.wait_s:
                raise _no_room(gang, demand, f"no room for the gang after {waited_s:.0f} s")
            if waited_s - reported_s >= REPORT_S:
                reported_s = waited_s
                text = demand.against(_node_resources(), ray.available_resources())
                on_wait(f"waiting for the gang, {waited_s:.0f} of {gang.cluster.wait_s:.0f} s: {text}")
        return group
    except BaseException:
        ray.util.remove_placement_group(group)
        raise


def bundles_by_node(group: Any) -> list[tuple[int, str]]:
    """(bundle index, node id) in rank order: nodes with most bundles first, so neighbouring ranks share a node."""
    import ray

    table = ray.util.placement_group_table(group)
    nodes: dict[str, list[int]] = defaultdict(list)
    for index, node in sorted(table["bundles_to_node_id"].items()):
        nodes[node].append(index)
    fullest_first = sorted(nodes.items(), key=lambda item: -len(item[1]))
    return [(index, node) for node, indices in fullest_first for index in indices]


def _no_room(gang: GangSpec, demand: Demand, what: str) -> ClusterNotReady:
    import ray

    return ClusterNotReady(
        what,
        at=f"gang {gang.name}: {_actors(gang)}, cluster.cpus_per_actor = {gang.cluster.cpus_per_actor:g}",
        why=demand.against(_node_resources(), ray.available_resources()),
        try_="fewer ranks (parallel.sp, parallel.dp), smaller cluster.cpus_per_actor, or --address of a larger cluster",
    )


def _actors(gang: GangSpec) -> str:
    workers = f" and {gang.rollout_workers} rollout workers" if gang.rollout_workers else ""
    return f"{gang.world_size} ranks{workers}"


def _node_resources() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
