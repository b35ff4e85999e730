"""The replay simulator: steps worked out by hand, invariants on random problems, and breaks the checks must notice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from farspan.memory.plan import TIERS, LayerPlan, Placement, Rows, Tier
from farspan.memory.problem import Budgets, Head, LayerKind, LinearClass, Links, OnHost, PlanProblem, State
from farspan.memory.replay import Replay, replay
from farspan.memory.replay_clock import LANES, Peak

ROWS = 8
KIND = LayerKind(
    name="decoder",
    x_bytes=80,
    o_bytes=40,
    linear=(
        LinearClass(name="q", bytes=80, matmul_s=2.0),
        LinearClass(name="gate", bytes=160, matmul_s=3.0),
    ),
    keep_bytes=500,
    forward_s=6.0,  # elementwise 1, q 2, gate 3
    attention_forward_s=4.0,
    backward_s=12.0,
    attention_backward_s=10.0,
    elementwise_s=1.0,
    forward_peak_bytes=200,
    keep_forward_peak_bytes=150,
    rebuild_peak_bytes=700,
    keep_backward_peak_bytes=300,
    gradient_bytes=100,
)
ON_HOST = OnHost(
    keep_bytes=60,
    keep_forward_peak_bytes=110,
    keep_backward_peak_bytes=240,
    rebuild_peak_bytes=330,
    keep_host_bytes=440,  # `SLOW`: 110 s out
    keep_fetched_bytes=520,  # 65 s in
    rebuild_host_bytes=360,  # 90 s out
    rebuild_fetched_bytes=400,  # 50 s in
)
SAVING = KIND.model_copy(update={"on_host": ON_HOST})
HEAD = Head(
    held_bytes=10,
    forward_s=5.0,
    peak_bytes=400,
    gradient_bytes=30,
    embedding_gradient_bytes=20,
    step_peak_bytes=50,
    step_s=7.0,
)
STATES = (State(name="weights", tier="device", bytes=2000), State(name="optimizer", tier="host", bytes=3000))
SLOW = Links(
    copy_out_bytes_per_s=4.0, copy_in_bytes_per_s=8.0, disk_write_bytes_per_s=2.0, disk_read_bytes_per_s=4.0
)  # 80 bytes of x: 20 s out, 10 s in, 40 s to disk, 20 s from disk
DEVICE, HOST, DISK = Rows(device=ROWS), Rows(host=ROWS), Rows(disk=ROWS)


def problem_of(layers: int, kind: LayerKind = KIND, **fields: object) -> PlanProblem:
    given = {
        "rows": ROWS,
        "attention_rows": ROWS,
        "kinds": (kind,),
        "layers": (kind.name,) * layers,
        "head": HEAD,
        "states": STATES,
        "budgets": Budgets(device_bytes=10**6, host_bytes=10**6, disk_bytes=10**6),
        "links": SLOW,
    }
    return PlanProblem.model_validate(given | fields)


def placement_of(*layers: LayerPlan, **fields: object) -> Placement:
    return Placement.model_validate({"rows": ROWS, "attention_rows": ROWS, "layers": layers} | fields)


def balance(run: Replay, tier: Tier, time_s: float) -> int:
    return sum(entry.bytes for entry in run.ledger if entry.tier == tier and entry.time_s <= time_s)


def held_during(run: Replay, label: str, tier: Tier = "device") -> int:
    """Bytes in the middle of the first operation of this label."""
    span = next(span for span in run.spans if span.label == label)
    return balance(run, tier, (span.start_s + span.end_s) / 2)


def causes(run: Replay) -> dict[str, float]:
    return {cause: seconds for cause, seconds in run.cause_s.items() if seconds}


def spans_of(run: Replay, lane: str) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in run.spans if span.lane == lane and span.end_s > span.start_s]


# Steps worked out by hand. A forward takes 6 + 4 = 10 s, a backward 12 + 10 = 22 s, head 5 s, step 7 s.
# Through a micro-batch the device holds 2000 of weights and 10 for the head; from the loss on 30 of gradients.


def test_every_input_on_the_device() -> None:
    run = replay(problem_of(2), placement_of(LayerPlan(x=DEVICE), LayerPlan(x=DEVICE)))
    assert causes(run) == {"forward": 20, "head": 5, "rebuild": 20, "backward": 44, "step": 7}
    assert run.seconds == 20 + 5 + 20 + 44 + 7
    assert held_during(run, "layer 0 forward") == 2010 + 80 + 200
    assert held_during(run, "layer 1 forward") == 2010 + 80 + 80 + 200  # x of layer 0 is stored
    assert held_during(run, "head") == 2040 + 160 + 400
    assert held_during(run, "layer 1 rebuild") == 2040 + 160 + 40 + 700  # complete O, working memory
    assert held_during(run, "layer 1 backward") == 2040 + 160 + 40 + 700 + 100
    assert held_during(run, "layer 0 rebuild") == 2040 + 100 + 80 + 40 + 700
    assert held_during(run, "layer 0 backward") == 2040 + 200 + 80 + 40 + 700
    assert held_during(run, "optimizer step") == 2000 + 30 + 200 + 20 + 50
    # forward 20, head 5, layer 1 10 + 22, rebuild of layer 0 10
    assert run.peaks["device"] == Peak(3060, 67.0, "layer 0 backward")
    assert run.peaks["host"] == Peak(3000, 0.0, "start")
    assert run.peaks["disk"].bytes == 0


def test_kept_layers() -> None:
    run = replay(problem_of(2), placement_of(LayerPlan(keep=True), LayerPlan(keep=True)))
    assert causes(run) == {"forward": 20, "head": 5, "backward": 44, "step": 7}
    assert held_during(run, "layer 0 forward") == 2010 + 80 + 500 + 150
    assert held_during(run, "layer 1 forward") == 2010 + 500 + 80 + 500 + 150
    assert held_during(run, "head") == 2040 + 1000 + 400
    assert held_during(run, "layer 1 backward") == 2040 + 1000 + 100 + 300
    assert held_during(run, "layer 0 backward") == 2040 + 500 + 200 + 300
    assert run.peaks["device"] == Peak(3440, 20.0, "head")  # as much again at 25 s in the backward of layer 1


@pytest.mark.parametrize("between", ["xo", "o"])
def test_segment_of_two(between: str) -> None:
    run = replay(problem_of(2), placement_of(LayerPlan(x=DEVICE), LayerPlan(), between=between))
    # layer 0 once in between with attention; then layer 1 with attention (10) and layer 0, whose O is there (6)
    assert causes(run) == {"forward": 20, "head": 5, "inner_forward": 10, "rebuild": 16, "backward": 44, "step": 7}
    assert held_during(run, "layer 0 inner forward") == 2040 + 80 + 80 + 200  # x and the gradient of the output
    assert held_during(run, "layer 1 rebuild") == 2040 + 80 + 80 + 40 + 40 + 700  # x of both, O of both
    assert held_during(run, "layer 0 rebuild") == 2040 + 100 + 80 + 40 + 700


@pytest.mark.parametrize("between", ["xo", "o"])
def test_segment_of_three(between: str) -> None:
    run = replay(problem_of(3), placement_of(LayerPlan(x=DEVICE), LayerPlan(), LayerPlan(), between=between))
    again = 6 if between == "o" else 0  # layer 0 once more for the input of layer 1, its O being complete
    assert causes(run) == {
        "forward": 30,
        "head": 5,
        "inner_forward": 20 + again,
        "rebuild": 10 + 6 + 6,
        "backward": 66,
        "step": 7,
    }
    input_1 = 80 if between == "xo" else 0  # given back as soon as layer 1 has made the input of layer 2
    assert held_during(run, "layer 0 inner forward") == 2040 + 80 + 80 + 200
    assert held_during(run, "layer 1 inner forward") == 2040 + 80 + 80 + 40 + 80 + 200
    assert held_during(run, "layer 2 rebuild") == 2040 + 80 + input_1 + 80 + 40 + 40 + 40 + 700
    assert held_during(run, "layer 1 rebuild") == 2040 + 100 + 80 + 80 + 40 + 40 + 700
    assert held_during(run, "layer 0 rebuild") == 2040 + 200 + 80 + 40 + 700
    if between == "o":
        (first, second) = [span for span in run.spans if span.label == "layer 0 inner forward"]
        assert (first.end_s - first.start_s, second.end_s - second.start_s) == (10, 6)
        # gradients of layer 2, x, gradient of the output, both O; the O in the peak of 200 is one of them
        assert balance(run, "device", second.start_s + 1) == 2040 + 100 + 80 + 80 + 80 + (200 - 40)


def test_partly_stored_rows() -> None:
    stored = LayerPlan(x=DEVICE, o=Rows(device=6), linear={"gate": Rows(device=2)})
    run = replay(problem_of(1), placement_of(stored))
    # attention over the first 2 of 8 rows: 4 * (1/4)^2; gate over 6 of 8 rows: 3 * 3/4
    assert run.cause_s["rebuild"] == 1 + 2 + 3 * 3 / 4 + 4 / 16
    assert held_during(run, "head") == 2040 + 400 + 80 + 30 + 40
    window = KIND.model_copy(update={"attention_growth": 1.0})
    assert replay(problem_of(1, window), placement_of(stored)).cause_s["rebuild"] == 1 + 2 + 3 * 3 / 4 + 4 / 4

    stored_all = LayerPlan(x=DEVICE, o=DEVICE, linear={"q": DEVICE, "gate": DEVICE})
    slow = KIND.model_copy(update={"elementwise_s": 1.5})  # more than 6 - 2 - 3, as measured numbers may have it
    assert replay(problem_of(1), placement_of(stored_all)).cause_s["rebuild"] == 1
    assert replay(problem_of(1, slow), placement_of(stored_all)).cause_s["rebuild"] == 1.5

    # part of the rows of the lower layer of a segment: attention and gate are short in the inner forward,
    # the rebuild has no attention to do, and the stored O goes when the complete one is there
    run = replay(problem_of(2), placement_of(stored, LayerPlan()))
    assert run.cause_s["inner_forward"] == 1 + 2 + 3 * 3 / 4 + 4 / 16
    assert run.cause_s["rebuild"] == 10 + 1 + 2 + 3 * 3 / 4
    assert held_during(run, "layer 0 inner forward") == 2040 + 80 + 30 + 40 + 80 + 200
    assert held_during(run, "layer 1 rebuild") == 2040 + 80 + 40 + 40 + 80 + 40 + 700


def test_classes_for_inner_forwards_only_and_exchange() -> None:
    down = LinearClass(name="down", bytes=80, matmul_s=5.0, inner_only=True)
    kind = KIND.model_copy(update={"linear": (*KIND.linear, down), "forward_s": 11.0, "exchange_s": 0.5})
    run = replay(problem_of(2, kind), placement_of(LayerPlan(x=DEVICE), LayerPlan()))
    assert run.cause_s["forward"] == 2 * (11 + 4)
    assert run.cause_s["inner_forward"] == 11 + 4 + 0.5
    assert run.cause_s["rebuild"] == (6 + 4 + 0.5) + (6 + 0.5)  # neither rebuild runs `down`
    given_down = LayerPlan(x=DEVICE, linear={"down": DEVICE})
    run = replay(problem_of(2, kind), placement_of(given_down, LayerPlan()))
    assert (run.cause_s["inner_forward"], run.cause_s["rebuild"]) == (6 + 4 + 0.5, 17)


def test_a_layer_without_o_to_give_runs_its_attention_each_time() -> None:
    kind = KIND.model_copy(update={"o_bytes": 0})
    run = replay(problem_of(3, kind), placement_of(LayerPlan(x=DEVICE), LayerPlan(), LayerPlan(), between="o"))
    assert (run.cause_s["inner_forward"], run.cause_s["rebuild"]) == (30, 30)


def test_offload_that_stalls_by_known_amounts() -> None:
    offload = LayerPlan(x=HOST)
    run = replay(problem_of(3), placement_of(offload, offload, offload, slots=1))
    assert spans_of(run, "copy_out") == [(10, 30), (30, 50), (50, 70)]
    # one layer may be under way: layer 2, ready at 20, waits until layer 0 is out at 30, and runs to 40; head to 45.
    # Layers 2 and 1 are asked for at 40, but layer 2 is only out at 70: 25 s more of copy out, then 10 s in.
    # Layer 2 80 to 112; layer 1, here at 90, to 144. Layer 0 is asked for at 112, here at 122, and runs to 176.
    assert spans_of(run, "copy_in") == [(70, 80), (80, 90), (112, 122)]
    work = {"forward": 30, "head": 5, "rebuild": 30, "backward": 66, "step": 7}
    assert causes(run) == {**work, "stall_copy_out": 10 + 25, "stall_copy_in": 10}
    assert run.seconds == 176 + 7
    assert run.lane_bytes == {"copy_out": 240, "disk_write": 0, "disk_read": 0, "copy_in": 240}
    assert run.peaks["host"] == Peak(3240, 50.0, "waiting for layer 2 rebuild")
    assert balance(run, "device", 15) == 2010 + 80 + 80 + 200  # x of layer 0 on its way out, while layer 1 runs
    assert balance(run, "device", 42) == 2040 + 80 + 80 + 2 * 80 + 400  # layers 1, 2 going out and asked for

    # nothing ahead: layer 1 is asked for when layer 2 is done (112), layer 0 when layer 1 is done: twice 10 s more
    run = replay(problem_of(3), placement_of(offload, offload, offload, slots=1, prefetch=0))
    assert spans_of(run, "copy_in") == [(70, 80), (112, 122), (154, 164)]
    assert causes(run) == {**work, "stall_copy_out": 35, "stall_copy_in": 30}

    # two may be under way: no wait in forward (30, head to 35); the copies end as before
    run = replay(problem_of(3), placement_of(offload, offload, offload, slots=2))
    assert causes(run) == {**work, "stall_copy_out": 35, "stall_copy_in": 10}
    assert spans_of(run, "compute")[3] == (30, 35)


def test_offload_to_disk() -> None:
    run = replay(problem_of(2), placement_of(LayerPlan(x=DEVICE), LayerPlan(x=DISK)))
    # layer 1 ends at 20: out 20 to 40, written to 80, read to 100, in by 110; the head ends at 25
    ways = {lane: spans_of(run, lane) for lane in LANES[1:]}
    assert ways == {
        "copy_out": [(20, 40)],
        "disk_write": [(40, 80)],
        "disk_read": [(80, 100)],
        "copy_in": [(100, 110)],
    }
    stalls = {cause: seconds for cause, seconds in causes(run).items() if cause.startswith("stall")}
    assert stalls == {"stall_copy_out": 15, "stall_disk_write": 40, "stall_disk_read": 20, "stall_copy_in": 10}
    assert run.seconds == 96 + 85
    assert [balance(run, "host", time_s) - 3000 for time_s in (10, 30, 60, 90, 105, 115)] == [0, 80, 80, 80, 80, 0]
    assert [balance(run, "disk", time_s) for time_s in (30, 60, 90, 105)] == [0, 80, 80, 0]


def test_rows_on_host_come_in_before_those_on_disk() -> None:
    run = replay(problem_of(1), placement_of(LayerPlan(x=Rows(host=4, disk=4))))
    # 40 bytes each. Layer ends at 10: host rows out by 20, in by 25; disk rows out by 30, written by 50, read by 60
    assert spans_of(run, "copy_out") == [(10, 20), (20, 30)]
    assert spans_of(run, "copy_in") == [(20, 25), (60, 65)]
    assert held_during(run, "layer 0 rebuild") == 2040 + 80 + 40 + 700


def test_forward_waits_for_disk_writes_too() -> None:
    run = replay(problem_of(3), placement_of(*[LayerPlan(x=DISK)] * 3, slots=1))
    # layer 2, ready at 20, waits for layer 0: out by 30, written by 70
    assert [start for start, _ in spans_of(run, "compute")][2] == 70
    kept_last = placement_of(LayerPlan(x=DISK), LayerPlan(x=DISK), LayerPlan(keep=True), slots=1)
    assert [start for start, _ in spans_of(replay(problem_of(3), kept_last), "compute")][2] == 70


def test_micro_batches_share_gradients() -> None:
    placement = placement_of(LayerPlan(x=DEVICE), LayerPlan(x=HOST))
    once, twice = (replay(problem_of(2, micro_batches=count), placement) for count in (1, 2))
    assert twice.seconds == 2 * (once.seconds - 7) + 7
    assert twice.lane_bytes["copy_out"] == 2 * once.lane_bytes["copy_out"]
    assert once.peaks["device"].bytes == 2040 + 80 + 200 + 40 + 700  # layer 0's backward: all gradients of layers
    assert twice.peaks["device"].bytes == 2040 + 80 + 80 + 200 + 20 + 40 + 700  # layer 1's, which finds them
    assert held_during(once, "optimizer step") == held_during(twice, "optimizer step") == 2000 + 250 + 50


def test_frozen_layers_run_forward_only() -> None:
    run = replay(problem_of(3, frozen_below=2), placement_of(LayerPlan(x=HOST), LayerPlan(), LayerPlan(x=DEVICE)))
    assert causes(run) == {"forward": 30, "head": 5, "rebuild": 10, "backward": 22, "step": 7}
    assert run.lane_bytes["copy_out"] == 0
    assert held_during(run, "layer 2 forward") == 2010 + 80 + 200
    assert held_during(run, "optimizer step") == 2000 + 30 + 100 + 50  # no gradient of the embedding


def test_kept_layers_with_saved_tensors_on_the_host() -> None:
    run = replay(problem_of(2, SAVING), placement_of(LayerPlan(keep=True), LayerPlan(keep=True), saved="host"))
    assert causes(run) == {"forward": 2 * (10 + 110), "head": 5, "backward": 2 * (22 + 65), "step": 7}
    assert run.lane_bytes == {"copy_out": 880, "disk_write": 0, "disk_read": 0, "copy_in": 1040}
    assert {span.lane for span in run.spans} == {"compute"}
    assert held_during(run, "layer 0 forward") == 2010 + 80 + 60 + 110
    assert held_during(run, "layer 1 forward") == 2010 + 60 + 80 + 60 + 110
    assert held_during(run, "layer 1 backward") == 2040 + 120 + 100 + 240
    assert held_during(run, "layer 0 backward") == 2040 + 60 + 200 + 240
    assert run.peaks["device"] == Peak(2040 + 120 + 400, 240.0, "head")
    operations = ("layer 0 forward", "layer 1 forward", "head", "layer 1 backward", "layer 0 backward")
    assert [held_during(run, each, "host") - 3000 for each in operations] == [440, 880, 880, 880, 440]
    assert run.peaks["host"] == Peak(3880, 120.0, "layer 1 forward")


def test_copies_of_saved_tensors_use_no_lane_and_wait_for_none() -> None:
    run = replay(problem_of(2, SAVING), placement_of(LayerPlan(x=HOST), LayerPlan(keep=True), saved="host"))
    # layer 0, rebuilt, copies nothing in forward. Its x leaves while layer 1 copies what it saves, from 10 to 130, and
    # is back while the head runs to 135. Layer 1 comes back until 222, the rebuild ends at 322, its backward at 394
    assert spans_of(run, "copy_out") == [(10, 30)]
    assert spans_of(run, "copy_in") == [(130, 140)]
    assert spans_of(run, "compute") == [(0, 10), (10, 130), (130, 135), (135, 222), (222, 322), (322, 394), (394, 401)]
    assert causes(run) == {"forward": 130, "head": 5, "rebuild": 10 + 90, "backward": 87 + 22 + 50, "step": 7}
    assert (run.lane_bytes["copy_out"], run.lane_bytes["copy_in"]) == (80 + 440 + 360, 80 + 520 + 400)
    on_host = [balance(run, "host", time_s) - 3000 for time_s in (5, 20, 132, 200, 300, 390, 394)]
    assert on_host == [0, 520, 520, 440, 360, 360, 0]
    assert run.peaks["host"] == Peak(3520, 10.0, "layer 1 forward")
    assert held_during(run, "layer 0 rebuild") == 2040 + 100 + 80 + 40 + 330


@pytest.mark.parametrize("between", ["xo", "o"])
def test_rebuilds_of_a_segment_with_saved_tensors_on_the_host(between: str) -> None:
    down = LinearClass(name="down", bytes=80, matmul_s=5.0, inner_only=True)
    kind = SAVING.model_copy(update={"linear": (*KIND.linear, down), "forward_s": 11.0})
    layers = LayerPlan(x=DEVICE, o=Rows(device=4), linear={"down": DEVICE}), LayerPlan()
    run = replay(problem_of(2, kind), placement_of(*layers, between=between, saved="host"))
    assert run.cause_s["forward"] == 2 * (11 + 4)
    assert run.cause_s["inner_forward"] == 6 + 4 / 4  # saves nothing; `down` and half of O are given
    assert run.cause_s["rebuild"] == (6 + 4 + 90) + (6 + 90)  # neither runs `down`; both make q and gate
    assert run.cause_s["backward"] == 2 * (22 + 50)
    assert (run.lane_bytes["copy_out"], run.lane_bytes["copy_in"]) == (720, 800)
    rebuilds = [f"layer {layer} {each}" for layer in (1, 0) for each in ("rebuild", "backward")]
    assert [held_during(run, each, "host") for each in rebuilds] == [3360] * 4
    assert held_during(run, "layer 0 inner forward", "host") == 3000
    # `down` of layer 0 is there, needed or not, and takes the place of nothing
    assert held_during(run, "layer 1 rebuild") == 2040 + 80 + 80 + 40 + 80 + 40 + 330
    assert held_during(run, "layer 0 rebuild") == 2040 + 100 + 80 + 80 + 40 + 330


def test_micro_batches_copy_anew_and_frozen_layers_save_nothing() -> None:
    problem = problem_of(2, SAVING, frozen_below=1, micro_batches=3)
    run = replay(problem, placement_of(LayerPlan(keep=True), LayerPlan(keep=True), saved="host"))
    assert run.seconds == 3 * (10 + (10 + 110) + 5 + (22 + 65)) + 7
    assert (run.lane_bytes["copy_out"], run.lane_bytes["copy_in"]) == (3 * 440, 3 * 520)
    assert run.peaks["host"] == Peak(3440, 10.0, "layer 1 forward")
    assert held_during(run, "layer 0 forward") == 2010 + 80 + 200


def test_over_budget_names_tier_amount_and_operation() -> None:
    placement = placement_of(LayerPlan(x=DEVICE), LayerPlan(x=DISK))
    budgets = Budgets(device_bytes=3019, host_bytes=3080, disk_bytes=79, disk_write_bytes=60)
    problem = problem_of(2, budgets=budgets, micro_batches=2)
    run = replay(problem, placement)
    device, disk, written = run.over_budget(problem)
    # the second micro-batch, from 174 s on, has all gradients when layer 1, here after 110 s, is rebuilt
    assert device == "device at 284 s, layer 1 rebuild: 3160 bytes, 141 more than the budget of 3019"
    assert disk == "disk at 40 s, waiting for layer 1 rebuild: 80 bytes, 1 more than the budget of 79"
    assert written == "disk writes of a micro-batch: 80 bytes, 20 more than the budget of 60"
    enough = Budgets(device_bytes=3160, host_bytes=3080, disk_bytes=80, disk_write_bytes=80)
    assert run.over_budget(problem_of(2, budgets=enough, micro_batches=2)) == []


# Invariants on random problems. Sizes are multiples of the rows, so that shares are whole.


@st.composite
def kinds(draw: st.DrawFn, name: str) -> LayerKind:
    seconds, size = st.integers(0, 12).map(lambda quarters: quarters / 4), st.integers(0, 20).map(lambda n: n * ROWS)
    linear = [
        LinearClass(name=each, bytes=draw(size), matmul_s=draw(seconds), inner_only=each == "down")
        for each in draw(st.sets(st.sampled_from(["q", "gate", "down"])))
    ]
    o_bytes, elementwise_s = draw(size), draw(seconds)
    return LayerKind(
        name=name,
        x_bytes=10 * ROWS,
        o_bytes=o_bytes,
        linear=tuple(linear),
        keep_bytes=draw(size),
        forward_s=elementwise_s + sum(each.matmul_s for each in linear),
        attention_forward_s=draw(seconds),
        attention_growth=draw(st.sampled_from([1.0, 2.0])),
        backward_s=draw(seconds),
        attention_backward_s=draw(seconds),
        elementwise_s=elementwise_s,
        exchange_s=draw(seconds),
        forward_peak_bytes=10 * ROWS + o_bytes + draw(size),
        keep_forward_peak_bytes=10 * ROWS + draw(size),
        rebuild_peak_bytes=20 * ROWS + draw(size),
        keep_backward_peak_bytes=20 * ROWS + draw(size),
        gradient_bytes=draw(size),
        on_host=OnHost(
            keep_bytes=draw(size),
            keep_forward_peak_bytes=10 * ROWS + draw(size),
            keep_backward_peak_bytes=20 * ROWS + draw(size),
            rebuild_peak_bytes=20 * ROWS + draw(size),
            keep_host_bytes=draw(size),
            keep_fetched_bytes=draw(size),
            rebuild_host_bytes=draw(size),
            rebuild_fetched_bytes=draw(size),
        ),
    )


@st.composite
def problems(draw: st.DrawFn) -> PlanProblem:
    size, bandwidth = st.integers(0, 500), st.integers(1, 400).map(float)
    layers = draw(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=6))
    return PlanProblem(
        rows=ROWS,
        attention_rows=ROWS,
        kinds=(draw(kinds("a")), draw(kinds("b"))),
        layers=tuple(layers),
        head=HEAD,
        states=tuple(State(name=f"of {tier}", tier=tier, bytes=draw(size)) for tier in TIERS),
        budgets=Budgets(device_bytes=10**6),
        links=Links(**{lane: draw(bandwidth) for lane in Links.model_fields}),
        micro_batches=draw(st.integers(1, 2)),
        frozen_below=draw(st.sampled_from([0, 0, 0, 1, len(layers)])),
    )


@st.composite
def placements(draw: st.DrawFn, problem: PlanProblem, tiers: tuple[Tier, ...] = TIERS) -> Placement:
    def rows(whole: bool = False) -> Rows:
        held = ROWS if whole else draw(st.integers(0, ROWS))
        cuts = sorted(draw(st.lists(st.integers(0, held), min_size=len(tiers) - 1, max_size=len(tiers) - 1)))
        return Rows(**{tier: end - start for tier, start, end in zip(tiers, [0, *cuts], [*cuts, held])})

    layers, saved = [], draw(st.sampled_from(["device", "host"]))
    problem = problem.saving(saved)
    for layer in range(len(problem.layers)):
        if draw(st.integers(0, 3)) == 0:
            layers.append(LayerPlan(keep=True))
            continue
        head = layer in (0, problem.frozen_below) or layers[-1].keep or draw(st.booleans())
        names = [each.name for each in problem.kind(layer).linear if draw(st.booleans())]
        o = rows() if problem.kind(layer).o_bytes and draw(st.booleans()) else Rows()
        x = rows(whole=True) if head else None
        layers.append(LayerPlan(x=x, o=o, linear={name: rows() for name in names}))
    between, prefetch, slots = draw(st.tuples(st.sampled_from(["xo", "o"]), st.integers(0, 3), st.integers(1, 3)))
    return placement_of(*layers, between=between, prefetch=prefetch, slots=slots, saved=saved)


@st.composite
def steps(draw: st.DrawFn, tiers: tuple[Tier, ...] = TIERS) -> tuple[PlanProblem, Placement]:
    problem = draw(problems())
    return problem, draw(placements(problem, tiers))


def state_bytes(problem: PlanProblem, tier: Tier) -> int:
    return sum(state.bytes for state in problem.states if state.tier == tier)


def units(problem: PlanProblem, placement: Placement) -> list[range]:
    heads = [n for n, layer in enumerate(placement.layers) if n >= problem.frozen_below and layer.head]
    return [range(start, end) for start, end in zip(heads, [*heads[1:], len(placement.layers)])]


def away_rows(problem: PlanProblem, placement: Placement, layer: int, tier: Tier) -> int:
    """Bytes of a layer that lie on a tier."""
    plan, kind = placement.layers[layer], problem.kind(layer)
    if plan.keep or layer < problem.frozen_below:
        return 0
    sizes = {"x": kind.x_bytes, "o": kind.o_bytes} | {each.name: each.bytes for each in kind.linear}
    rows = {"x": plan.x or Rows(), "o": plan.o} | plan.linear
    return sum(sizes[name] * rows[name].on(tier) // ROWS for name in rows)


def copied_bytes(problem: PlanProblem, placement: Placement, layer: int) -> tuple[int, int]:
    """Saved tensors of a trained layer that compute copies out and in, all micro-batches together."""
    kind, keep = problem.kind(layer), placement.layers[layer].keep
    out = kind.keep_host_bytes if keep else kind.rebuild_host_bytes
    back = kind.keep_fetched_bytes if keep else kind.rebuild_fetched_bytes
    return out * problem.micro_batches, back * problem.micro_batches


def check_closes(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """At the end of the step there is what was there before it."""
    for tier in TIERS:
        assert sum(entry.bytes for entry in run.ledger if entry.tier == tier) == state_bytes(problem, tier)


def check_balances(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """Time does not go back, nothing is freed before it is made, nor made twice."""
    blocks: dict[tuple[Tier, str], int] = defaultdict(int)
    time_s = 0.0
    for entry in run.ledger:
        assert entry.time_s >= time_s
        before, time_s = blocks[entry.tier, entry.label], entry.time_s
        blocks[entry.tier, entry.label] += entry.bytes
        assert before == 0 or before + entry.bytes == 0
        assert before + entry.bytes >= 0


def check_lanes(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """A lane does one thing at a time."""
    for lane in LANES:
        spans = sorted((span.start_s, span.end_s) for span in run.spans if span.lane == lane)
        assert all(start <= end for start, end in spans)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def check_seconds(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """Causes sum to the step; what is not a stall is what compute did, and no more than the step."""
    assert sum(run.cause_s.values()) == pytest.approx(run.seconds)
    busy_s = sum(span.end_s - span.start_s for span in run.spans if span.lane == "compute")
    stalls_s = [seconds for cause, seconds in run.cause_s.items() if cause.startswith("stall")]
    assert all(seconds >= 0 for seconds in stalls_s)
    assert run.seconds == pytest.approx(busy_s + sum(stalls_s))
    assert max(span.end_s for span in run.spans) <= run.seconds


def check_work(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """Seconds of work, summed layer by layer without a clock."""
    work = dict.fromkeys(("forward", "head", "inner_forward", "rebuild", "backward", "step"), 0.0)
    work["head"], work["step"] = HEAD.forward_s * problem.micro_batches, HEAD.step_s
    for layer in range(len(problem.layers)):
        kind = problem.kind(layer)
        each_s = (kind.forward_s + kind.attention_forward_s) * problem.micro_batches
        work["forward"] += each_s
    for unit in units(problem, placement):
        for layer in unit:
            kind, plan = problem.kind(layer), placement.layers[layer]
            work["backward"] += (kind.backward_s + kind.attention_backward_s) * problem.micro_batches
            if plan.keep:
                continue
            left = {c.name: 1 - plan.linear.get(c.name, Rows()).stored / ROWS for c in kind.linear}
            inner_s = kind.elementwise_s + kind.exchange_s + sum(c.matmul_s * left[c.name] for c in kind.linear)
            rebuild_s = inner_s - sum(c.matmul_s * left[c.name] for c in kind.linear if c.inner_only)
            attention_s = kind.attention_forward_s * (1 - plan.o.stored / ROWS) ** kind.attention_growth
            above = unit[-1] - layer
            passes = min(above, 1) if placement.between == "xo" else above
            attentions, inner_attentions = (1, min(above, 1)) if kind.o_bytes else (passes + 1, passes)
            work["inner_forward"] += (passes * inner_s + inner_attentions * attention_s) * problem.micro_batches
            work["rebuild"] += (rebuild_s + (attentions - inner_attentions) * attention_s) * problem.micro_batches
    for layer in range(problem.frozen_below, len(problem.layers)):
        out, back = copied_bytes(problem, placement, layer)
        work["forward" if placement.layers[layer].keep else "rebuild"] += out / problem.links.copy_out_bytes_per_s
        work["backward"] += back / problem.links.copy_in_bytes_per_s
    for cause, seconds in work.items():
        assert run.cause_s[cause] == pytest.approx(seconds), cause


def check_peaks(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """Peaks are those of the ledger, and no operation was given less than its working memory."""
    held, most = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, (0, 0.0))
    for entry in run.ledger:
        held[entry.tier] += entry.bytes
        if held[entry.tier] > most[entry.tier][0]:
            most[entry.tier] = (held[entry.tier], entry.time_s)
    assert {tier: (peak.bytes, peak.time_s) for tier, peak in run.peaks.items()} == most
    largest = max(HEAD.peak_bytes, HEAD.step_peak_bytes)
    for layer, plan in enumerate(placement.layers):
        kind = problem.kind(layer)
        if layer < problem.frozen_below:
            largest = max(largest, kind.forward_peak_bytes)
        elif plan.keep:
            largest = max(largest, kind.keep_bytes + kind.keep_forward_peak_bytes, kind.keep_backward_peak_bytes)
        else:
            largest = max(largest, kind.x_bytes + kind.forward_peak_bytes, kind.x_bytes + kind.rebuild_peak_bytes)
    assert run.peaks["device"].bytes >= state_bytes(problem, "device") + largest
    trained = range(problem.frozen_below, len(problem.layers))
    kept_bytes = sum(problem.kind(layer).keep_host_bytes for layer in trained if placement.layers[layer].keep)
    rebuilt = [problem.kind(layer).rebuild_host_bytes for layer in trained if not placement.layers[layer].keep]
    assert run.peaks["host"].bytes >= state_bytes(problem, "host") + max([kept_bytes, *rebuilt])


def check_bytes(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """Rows on host are moved out and in, those on disk also to and from it, once in a micro-batch."""
    moved = {
        tier: problem.micro_batches
        * sum(away_rows(problem, placement, layer, tier) for layer in range(len(problem.layers)))
        for tier in TIERS
    }
    both = moved["host"] + moved["disk"]
    expected = {"copy_out": both, "disk_write": moved["disk"], "disk_read": moved["disk"], "copy_in": both}
    saved = [copied_bytes(problem, placement, layer) for layer in range(problem.frozen_below, len(problem.layers))]
    by_compute = {"copy_out": sum(out for out, _ in saved), "copy_in": sum(back for _, back in saved)}
    assert run.lane_bytes == {lane: size + by_compute.get(lane, 0) for lane, size in expected.items()}
    for lane, size in expected.items():
        assert sum(span.bytes for span in run.spans if span.lane == lane) == size


def transfers(run: Replay, layer: int) -> dict[str, list[tuple[float, float]]]:
    """(start, end) of each transfer of a layer's rows in the order in which they began, by block."""
    found = defaultdict(list)
    for span in run.spans:
        if span.lane != "compute" and span.label.startswith(f"layer {layer} "):
            found[span.label.rsplit(", ", 1)[0]].append((span.start_s, span.end_s))
    return found


def first_start_s(run: Replay, *labels: str) -> float:
    return next(span.start_s for span in run.spans if span.label in labels)


def check_order(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """Rows go out after their layer, come back only once they are out, and are there before their unit runs."""
    for unit in units(problem, placement):
        unit_starts_s = first_start_s(
            run, *(f"layer {unit.start} {op}" for op in ("inner forward", "rebuild", "backward"))
        )
        for layer in unit:
            for block, moves in transfers(run, layer).items():
                moves = moves[: 4 if block.endswith("disk") else 2]  # of the first micro-batch
                assert moves[0][0] >= first_start_s(run, f"layer {layer} forward") + problem.kind(layer).forward_s
                assert all(end <= start for (_, end), (start, _) in pairwise(moves))
                assert moves[-1][1] <= unit_starts_s


def check_slots(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    """When a layer starts, no more than `slots` layers are under way."""
    out_s: list[float] = []
    for layer in range(len(problem.layers)):
        start_s = first_start_s(run, f"layer {layer} forward")
        assert sum(end > start_s for end in out_s) <= placement.slots
        moves = transfers(run, layer)
        out_s += [max(m[1 if b.endswith("disk") else 0][1] for b, m in moves.items())] if moves else []


def check_no_stall(problem: PlanProblem, placement: Placement, run: Replay) -> None:
    assert not any(cause.startswith("stall") for cause in causes(run))


CHECKS = (
    check_closes,
    check_balances,
    check_lanes,
    check_seconds,
    check_work,
    check_peaks,
    check_bytes,
    check_order,
    check_slots,
)


@settings(max_examples=150, deadline=None)
@given(steps())
def test_invariants(step: tuple[PlanProblem, Placement]) -> None:
    problem, placement = step
    run = replay(problem, placement)
    for check in CHECKS:
        check(problem.saving(placement.saved), placement, run)


@settings(max_examples=60, deadline=None)
@given(steps(tiers=("device",)))
def test_without_offload_nothing_stalls(step: tuple[PlanProblem, Placement]) -> None:
    check_no_stall(*step, replay(*step))


@settings(max_examples=100, deadline=None)
@given(steps(), st.sampled_from(sorted(Links.model_fields)), st.floats(1, 100))
def test_more_bandwidth_is_never_slower(step: tuple[PlanProblem, Placement], lane: str, factor: float) -> None:
    problem, placement = step
    links = problem.links.model_copy(update={lane: getattr(problem.links, lane) * factor})
    assert replay(problem.model_copy(update={"links": links}), placement).seconds <= replay(problem, placement).seconds


def freed_last(run: Replay) -> Replay:
    """The last block is never freed."""
    return replace(run, ledger=run.ledger[:-1])


def freed_early(run: Replay) -> Replay:
    """A block is freed before it is made."""
    ledger = list(run.ledger)
    ledger.insert(0, ledger.pop()._replace(time_s=0.0))
    return replace(run, ledger=tuple(ledger))


def moved_span(lane: str, by_s: float) -> Callable[[Replay], Replay]:
    """The second operation of a lane that takes time runs earlier."""

    def break_(run: Replay) -> Replay:
        spans = list(run.spans)
        at = [n for n, span in enumerate(spans) if span.lane == lane and span.end_s > span.start_s][1]
        spans[at] = spans[at]._replace(start_s=spans[at].start_s - by_s, end_s=spans[at].end_s - by_s)
        return replace(run, spans=tuple(spans))

    return break_


def longer(cause: str) -> Callable[[Replay], Replay]:
    return lambda run: replace(run, cause_s=run.cause_s | {cause: run.cause_s[cause] + 1})


def without_working_memory(run: Replay) -> Replay:
    """The optimizer and the rebuild of layers are given nothing; peaks are what is left."""
    ledger = tuple(entry for entry in run.ledger if not entry.label.endswith(("work", "rebuild and backward")))
    held, most = 0, Peak(0, 0.0, "")
    for entry in ledger:
        held += entry.bytes if entry.tier == "device" else 0
        most = max(most, Peak(held, entry.time_s, ""), key=lambda peak: peak.bytes)
    return replace(run, ledger=ledger, peaks=run.peaks | {"device": most})


def lower_peak(run: Replay) -> Replay:
    peak = run.peaks["device"]
    return replace(run, peaks=run.peaks | {"device": peak._replace(bytes=peak.bytes - 1)})


def fewer_bytes(run: Replay) -> Replay:
    return replace(run, lane_bytes=run.lane_bytes | {"copy_in": run.lane_bytes["copy_in"] - 1})


def layer_that_does_not_wait(run: Replay) -> Replay:
    """Layer 2 starts when it is ready, at 20 s, not when layer 0 is out."""
    spans = [s._replace(start_s=20.0, end_s=30.0) if s.label == "layer 2 forward" else s for s in run.spans]
    return replace(run, spans=tuple(spans))


BREAKS = [
    (check_closes, freed_last),
    (check_balances, freed_early),
    (check_lanes, moved_span("copy_in", 1.0)),
    (check_lanes, moved_span("compute", 1.0)),
    (check_seconds, longer("stall_copy_in")),
    (check_work, longer("rebuild")),
    (check_work, longer("inner_forward")),
    (check_peaks, lower_peak),
    (check_peaks, without_working_memory),
    (check_bytes, fewer_bytes),
    (check_order, moved_span("copy_in", 60.0)),
    (check_slots, layer_that_does_not_wait),
    (check_no_stall, lambda run: run),
]


@pytest.mark.parametrize(("check", "break_"), BREAKS, ids=lambda each: each.__name__)
def test_checks_notice_a_break(check: Callable[..., None], break_: Callable[[Replay], Replay]) -> None:
    problem, placement = problem_of(3), placement_of(*[LayerPlan(x=HOST)] * 3, slots=1)
    run = replay(problem, placement)
    if check is not check_no_stall:
        check(problem, placement, run)
    with pytest.raises(AssertionError):
        check(problem, placement, break_(run))


@pytest.mark.parametrize("check", [check_work, check_bytes, check_peaks])
@pytest.mark.parametrize("layer", [LayerPlan(keep=True), LayerPlan(x=DEVICE)])
def test_checks_notice_that_saved_tensors_are_not_copied(check: Callable[..., None], layer: LayerPlan) -> None:
    problem, placement = problem_of(2, SAVING), placement_of(layer, layer, saved="host")
    check(problem.saving("host"), placement, replay(problem, placement))
    with pytest.raises(AssertionError):
        check(problem.saving("host"), placement, replay(problem, placement.model_copy(update={"saved": "device"})))


def test_placements_that_mean_nothing_are_refused() -> None:
    nonsense = [
        [LayerPlan(), LayerPlan(x=DEVICE)],  # nothing to recompute layer 0 from
        [LayerPlan(keep=True), LayerPlan()],  # a kept layer heads no segment
        [LayerPlan(x=Rows(device=5)), LayerPlan(x=DEVICE)],  # part of an input
    ]
    for layers in nonsense:
        with pytest.raises(ValidationError):
            placement_of(*layers)
    wrong = [
        [LayerPlan(x=DEVICE, linear={"up": DEVICE}), LayerPlan(x=DEVICE)],  # no such class
        [LayerPlan(x=DEVICE, linear={"q": Rows(host=9)}), LayerPlan(x=DEVICE)],  # more rows than there are
        [LayerPlan(x=DEVICE)],  # a layer without plan
    ]
    for layers in wrong:
        with pytest.raises(AssertionError):
            replay(problem_of(2), placement_of(*layers))
    with pytest.raises(AssertionError):  # the rebuild makes `q` anew
        replay(problem_of(1, SAVING), placement_of(LayerPlan(x=DEVICE, linear={"q": DEVICE}), saved="host"))
    with pytest.raises(AssertionError):  # nobody knows what this would take
        replay(problem_of(1), placement_of(LayerPlan(x=DEVICE), saved="host"))
    without_o = KIND.model_copy(update={"o_bytes": 0})
    with pytest.raises(AssertionError):
        replay(problem_of(1, without_o), placement_of(LayerPlan(x=DEVICE, o=DEVICE)))
