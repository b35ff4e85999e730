"""Which failure is the cause, and whether a gang has room: no Ray needed."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
from cluster_jobs import gang_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.cluster.actor import Identity
from farspan.cluster.failure import Kind, RankFailure, how_it_ended, log_tail, raised_kind, root_cause
from farspan.cluster.gang import Gang, Member
from farspan.cluster.journal import Journal
from farspan.cluster.placement import Demand, bundles_by_node
from farspan.cluster.supervisor import next_attempt
from farspan.errors import CheckpointError, DataError, NonFinite, RunFailed
from farspan.trainer.run_folder import RunFolder


def failure(rank: int, kind: Kind, **more: object) -> RankFailure:
    fields = {"phase": "forward", "step": 3, "detail": "detail", "log": Path("log"), **more}
    return RankFailure(rank=rank, kind=kind, **fields)  # type: ignore[arg-type]


SYMPTOMS = [
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2345",
    "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv",
    "RuntimeError: [gloo/transport/tcp/pair.cc:553] Read error [127.0.0.1]:1: Connection reset by peer",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1333, remote process exited or there was a network error",
    "DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cuda//0",
    "DistNetworkError: The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29400).",
    "RuntimeError: Broken pipe",
]


@pytest.mark.parametrize("summary", SYMPTOMS)
def test_errors_about_a_peer_are_symptoms(summary: str) -> None:
    assert raised_kind(summary, None) is Kind.SYMPTOM


@pytest.mark.parametrize("summary", ["OutOfMemoryError: CUDA out of memory", "KeyError: 'x'", "TypeError: unsupported"])
def test_other_errors_are_causes(summary: str) -> None:
    assert raised_kind(summary, None) is Kind.RAISED


ON_CUDA = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 512.00 MiB is free. Including non-PyTorch memory, this process has 78.59 GiB memory in use."
)
OF_MEMORY = [
    ON_CUDA,
    "torch.cuda.OutOfMemoryError: CUDA out of memory.",
    "AcceleratorError: CUDA error: out of memory",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 35184372088832 bytes. Error code 12 (Cannot allocate memory)",
    "MemoryError:",
    "_ArrayMemoryError: Unable to allocate 8.00 GiB for an array with shape (1073741824,) and data type float64",
    "numpy.exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB",
]


@pytest.mark.parametrize("detail", OF_MEMORY)
def test_a_want_of_memory_is_seen_for_what_it_is(detail: str) -> None:
    assert failure(0, Kind.RAISED, detail=detail).of_memory
    assert raised_kind(detail, None) is Kind.RAISED
    passed_on = RunFailed("a worker failed", at="copy_out", why=detail, try_="d")
    assert failure(0, Kind.OURS, error=passed_on).of_memory
    assert not failure(0, Kind.SYMPTOM, detail=detail).of_memory
    assert failure(0, Kind.RAISED, detail=detail).of_device_memory == ("CUDA" in detail)


def test_a_process_ended_by_ray_for_memory_wants_memory_and_a_killed_one_may_not() -> None:
    by_ray = how_it_ended(7, "Task was killed due to the node running low on memory.", [])
    assert failure(0, Kind.GONE, detail=by_ray).of_memory
    assert not failure(0, Kind.GONE, detail=how_it_ended(7, "", [])).of_memory


@pytest.mark.parametrize(
    "detail", ["KeyError: 'MemoryError'", "RuntimeError: no memory of that", "ValueError: OutOfMemoryError", *SYMPTOMS]
)
def test_other_errors_want_no_memory(detail: str) -> None:
    assert not failure(0, Kind.RAISED, detail=detail).of_memory
    refused = DataError("what", at="at", why="MemoryError", try_="try")
    assert not failure(0, Kind.OURS, error=refused).of_memory


def test_the_rank_that_died_is_named_and_not_the_ranks_it_took_along() -> None:
    symptoms = [failure(rank, Kind.SYMPTOM) for rank in (0, 2, 3)]
    assert root_cause([*symptoms, failure(1, Kind.GONE)]).rank == 1
    assert root_cause([*symptoms, failure(3, Kind.RAISED)]).rank == 3
    assert root_cause([failure(0, Kind.OVERSTAYED, since_s=40.0), failure(2, Kind.SILENT)]).rank == 2
    assert root_cause([failure(0, Kind.RAISED), failure(1, Kind.OURS)]).rank == 1


def test_of_ranks_that_hang_the_one_behind_is_named() -> None:
    ahead, behind = (failure(rank, Kind.OVERSTAYED, phases_entered=count) for rank, count in ((0, 8), (1, 7)))
    assert root_cause([ahead, behind]).rank == 1


def test_only_what_a_restart_may_cure_is_retried() -> None:
    def own(kind: type) -> RankFailure:
        return failure(0, Kind.OURS, error=kind("what", at="at", why="why", try_="try"))

    assert all(own(kind).deterministic for kind in (DataError, NonFinite, CheckpointError))
    assert not own(RunFailed).deterministic
    assert not failure(0, Kind.GONE).deterministic
    again = failure(0, Kind.RAISED)
    assert again.same_as(failure(1, Kind.RAISED))
    assert not again.same_as(failure(0, Kind.RAISED, step=4))
    assert not failure(0, Kind.GONE).same_as(failure(0, Kind.GONE))


def test_how_a_process_ended(tmp_path: Path) -> None:
    assert "crashed: Aborted" in how_it_ended(7, "", ["Fatal Python error: Aborted", "", "stack"])
    assert "low on memory" in how_it_ended(7, "Task was killed due to the node running low on memory.", [])
    assert "node of process 7 is gone" in how_it_ended(7, "The actor is dead because its node has died.", [])
    generic = "common causes include: (1) the process was killed by the OOM killer due to high memory usage"
    assert "without a word" in how_it_ended(7, generic, ["step 3"])


def test_log_tail_reads_the_end_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10**6 + b"\nlast but one\n\n \xff last\n")
    assert log_tail(log, lines=2) == ["last but one", " � last"]
    assert log_tail(tmp_path / "none") == []


NODE = st.fixed_dictionaries({"CPU": st.integers(0, 4).map(float), "GPU": st.integers(0, 3).map(float)})


@settings(max_examples=150, deadline=None)
@given(
    nodes=st.lists(NODE, min_size=1, max_size=3),
    ranks=st.integers(1, 4),
    cpus=st.sampled_from([0.5, 1.0, 2.0]),
    gpu=st.booleans(),
    strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_room_agrees_with_trying_every_placement(
    nodes: list[dict[str, float]], ranks: int, cpus: float, gpu: bool, strategy: str
) -> None:
    bundle = {"CPU": cpus, **({"GPU": 1.0} if gpu else {})}

    def fits(choice: tuple[int, ...]) -> bool:
        used = set(choice)
        if strategy == "STRICT_PACK" and len(used) > 1:
            return False
        if strategy == "STRICT_SPREAD" and len(used) < ranks:
            return False
        return all(choice.count(at) * need <= nodes[at][key] for at in used for key, need in bundle.items())

    possible = any(fits(choice) for choice in itertools.product(range(len(nodes)), repeat=ranks))
    assert (Demand(ranks, bundle, strategy).room(nodes) >= ranks) == possible


def test_demand_against_supply_shows_the_arithmetic(tmp_path: Path) -> None:
    demand = Demand.of(gang_spec(tmp_path, world_size=4, cpus_per_actor=2))
    text = demand.against([{"CPU": 5.0}, {"CPU": 1.0}], {"CPU": 3.0})
    assert text == "needs 4 x 2 CPU = 8 CPU; 2 nodes with 6 CPU (3 free): room for 2 of 4 ranks (PACK)"


def test_a_resumed_run_overwrites_no_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert next_attempt(folder) == 1
    for attempt in (1, 2, 10):
        folder.log(attempt, "trainer", 0).parent.mkdir(parents=True)
    (tmp_path / "logs" / "latest").symlink_to("attempt_10")
    assert next_attempt(folder) == 11


def test_journal_is_told_and_written(tmp_path: Path) -> None:
    told: list[object] = []
    journal = Journal(RunFolder(tmp_path), told.append)
    journal.event("placing", "text", rank=1)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == len(told) == 1
    pickle.loads(pickle.dumps(told))


def test_a_full_disk_does_not_hide_the_error_of_the_run(tmp_path: Path) -> None:
    told: list[Any] = []
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    journal = Journal(RunFolder(in_the_way), told.append)
    for _ in range(2):
        journal.event("failure", "text")
        journal.status("failed", error="text")
    assert [entry["event"] for entry in told] == ["journal", "failure", "journal", "failure"]


def test_ranks_share_nodes_and_see_the_gpus_of_their_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"bundles_to_node_id": {0: "small", 1: "big", 2: "big", 3: "small", 4: "big"}}
    monkeypatch.setattr("ray.util.placement_group_table", lambda group: table)
    places = bundles_by_node(None)
    assert places == [(1, "big"), (2, "big"), (4, "big"), (0, "small"), (3, "small")]
    gpus = ["5", "3", "0", "0", "7"]
    members = [
        Member(rank, None, tmp_path, Identity(100 + rank, 0.0, node, f"ip-{node}", 5000 + rank, (gpus[rank],)))
        for rank, (_, node) in enumerate(places)
    ]
    spec = gang_spec(tmp_path, world_size=5).model_copy(update={"use_gpu": True})
    worlds = Gang(spec, members)._worlds()
    assert [world.rank for world, _ in worlds] == [0, 1, 2, 3, 4]
    assert [visible[world.local_rank] for world, visible in worlds] == gpus, "each rank finds its own GPU"
    assert [visible for _, visible in worlds] == [("5", "3", "0")] * 3 + [("0", "7")] * 2
    assert {(world.master_addr, world.master_port) for world, _ in worlds} == {("ip-big", 5000)}
