"""From a profile to a planning problem: rows put into its formulas, states and budgets beside them.

Needs neither torch nor the machine, so that `farspan plan` answers anywhere; `jobs` fills the shapes.
"""

from __future__ import annotations

import math

from farspan.memory.analytic import WorkingSet, analytic_profile
from farspan.memory.hardware import Hardware
from farspan.memory.problem import Budgets, Head, LayerKind, LinearClass, Links, OnHost, PlanProblem, State
from farspan.memory.profile import HeadProfile, KindProfile, LinearProfile, OnHostProfile, Profile
from farspan.memory.reversible import reversible
from farspan.memory.shape import ModelShape, Training
from farspan.memory.states import model_states, weights_of
from farspan.memory.tier_codes import coded

O_BLOCK_ROWS = 256
"""Rows of O are stored in blocks of so many: attention kernels compute whole blocks of query rows."""


def build_problem(
    profile: Profile,
    *,
    states: tuple[State, ...],
    context: int,
    budgets: Budgets,
    links: Links,
    micro_batches: int = 1,
    frozen_below: int = 0,
) -> PlanProblem:
    """The problem of one rank at `context` rows of the whole sequence, padded to what `profile.sp` ranks share evenly.

    Args:
        profile: measured or analytic; its tile of the MLP must be smaller than the rank's rows.
        states: what is in memory through the whole step.
        frozen_below: layers below this one need no gradient.
    """
    rows = -(-context // profile.sp)
    assert profile.mlp_tile is None or profile.mlp_tile < rows, "so few rows run in one tile, that is untiled"
    attention_rows = rows * profile.sp
    return PlanProblem(
        rows=rows,
        attention_rows=attention_rows,
        kinds=tuple(_kind(kind, rows, attention_rows) for kind in profile.kinds),
        layers=profile.layers,
        head=_head(profile.head, rows),
        states=states,
        budgets=budgets,
        links=links,
        micro_batches=micro_batches,
        frozen_below=frozen_below,
        codes=profile.codes,
        reversible=any(kind.side_bytes_per_row is not None for kind in profile.kinds),
    )


def problem_for(
    shape: ModelShape,
    training: Training,
    hardware: Hardware,
    context: int,
    *,
    working_set: WorkingSet = "today",
    budgets: Budgets | None = None,
) -> PlanProblem:
    """The problem of a job from shapes and rates alone.

    Args:
        context: rows of a sequence, over all ranks that share it.
        budgets: bytes a rank may use; default all the hardware has.

    Raises:
        JobError: the model has layers that are not counted, or more ranks share a sequence than there are heads.
    """
    if training.mlp_tile is not None and -(-context // training.sp) <= training.mlp_tile and working_set == "today":
        training = training.model_copy(update={"mlp_tile": None})  # one tile: the MLP runs as it is
    profile = coded(analytic_profile(shape, training, hardware, working_set=working_set), shape, training, hardware)
    return build_problem(
        profile if training.coupling is None else reversible(profile, shape, training, hardware.memory_bytes_per_s),
        states=model_states(training, hardware, weights_of(shape, training)),
        context=context,
        budgets=hardware.budgets() if budgets is None else budgets,
        links=hardware.links(),
        micro_batches=training.micro_batches,
    )


def _kind(kind: KindProfile, rows: int, attention_rows: int) -> LayerKind:
    o_bytes, coded_o_bytes, forward_s, backward_s, growth = 0, None, 0.0, 0.0, 2.0
    if kind.attention is not None:
        o_bytes = math.ceil(kind.attention.o_bytes_per_row * attention_rows)
        coded_o_bytes = _all_rows(kind.attention.coded_o_bytes_per_row, attention_rows)
        forward_s, backward_s = kind.attention.seconds(attention_rows)
        if kind.attention.window is not None and kind.attention.window < attention_rows:
            growth = 1.0
    return LayerKind(
        name=kind.name,
        x_bytes=math.ceil(kind.x_bytes_per_row * rows),
        side_bytes=_all_rows(kind.side_bytes_per_row, rows),
        o_bytes=o_bytes,
        coded_x_bytes=_all_rows(kind.coded_x_bytes_per_row, rows),
        coded_o_bytes=coded_o_bytes,
        o_block_rows=O_BLOCK_ROWS,
        linear=tuple(_linear(linear, rows) for linear in kind.linear),
        keep_bytes=math.ceil(kind.keep_bytes.at(rows)),
        forward_s=kind.forward_s.at(rows),
        attention_forward_s=forward_s,
        attention_growth=growth,
        backward_s=kind.backward_s.at(rows),
        attention_backward_s=backward_s,
        elementwise_s=kind.elementwise_s.at(rows),
        exchange_s=kind.exchange_s.at(rows),
        forward_peak_bytes=kind.forward_peak.bytes_at(rows),
        keep_forward_peak_bytes=kind.keep_forward_peak.bytes_at(rows),
        rebuild_peak_bytes=kind.rebuild_peak.bytes_at(rows),
        keep_backward_peak_bytes=kind.keep_backward_peak.bytes_at(rows),
        gradient_bytes=kind.gradient_bytes,
        saved=kind.saved,
        gradient_error=kind.gradient_error,
        exchange_error=kind.exchange_error,
        tier_error=kind.tier_error,
        on_host=None if kind.on_host is None else _on_host(kind.on_host, rows),
    )


def _all_rows(bytes_per_row: float | None, rows: int) -> int | None:
    return None if bytes_per_row is None else math.ceil(bytes_per_row * rows)


def _on_host(kind: OnHostProfile, rows: int) -> OnHost:
    return OnHost(
        keep_bytes=math.ceil(kind.keep_bytes.at(rows)),
        keep_forward_peak_bytes=kind.keep_forward_peak.bytes_at(rows),
        keep_backward_peak_bytes=kind.keep_backward_peak.bytes_at(rows),
        rebuild_peak_bytes=kind.rebuild_peak.bytes_at(rows),
        keep_host_bytes=math.ceil(kind.keep_host_bytes.at(rows)),
        keep_fetched_bytes=math.ceil(kind.keep_fetched_bytes.at(rows)),
        rebuild_host_bytes=math.ceil(kind.rebuild_host_bytes.at(rows)),
        rebuild_fetched_bytes=math.ceil(kind.rebuild_fetched_bytes.at(rows)),
    )


def _linear(linear: LinearProfile, rows: int) -> LinearClass:
    return LinearClass(
        name=linear.name,
        bytes=math.ceil(linear.bytes_per_row * rows),
        coded_bytes=_all_rows(linear.coded_bytes_per_row, rows),
        matmul_s=linear.matmul_s.at(rows),
        tile_rows=linear.tile_rows,
        inner_only=linear.inner_only,
    )


def _head(head: HeadProfile, rows: int) -> Head:
    return Head(
        held_bytes=math.ceil(head.held_bytes.at(rows)),
        forward_s=head.forward_s.at(rows),
        peak_bytes=head.peak.bytes_at(rows),
        gradient_bytes=head.gradient_bytes,
        embedding_gradient_bytes=head.embedding_gradient_bytes,
        step_peak_bytes=head.step_peak_bytes,
        step_s=head.step_s,
    )
