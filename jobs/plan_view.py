"""A memory plan as a person reads it, and as a program does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from farspan.errors import DoesNotFit, JobError
from farspan.jobs.calibrate import device_name, known_calibration, measure_here, measured_calibration, not_measured
from farspan.jobs.facts import hardware_of, machine_beside, model_facts
from farspan.jobs.load import Loaded
from farspan.jobs.mesh import by_prediction
from farspan.jobs.plan import MLP_TILE, Planned, longest_context, plan, size
from farspan.jobs.resolve import batch_chain, mesh_reason, resolve
from farspan.memory.plan import TIERS, LayerPlan, Placement
from farspan.memory.problem import PlanProblem

if TYPE_CHECKING:
    from rich.console import Console

    from farspan.jobs.measured import Comparison

PLACES = ("keep", *TIERS, "recompute")
ErrorField: TypeAlias = Literal["gradient_error", "tier_error", "exchange_error"]
"""Where a row can be: with autograd, on a tier of the plan, or nowhere."""


def plan_beside(loaded: Loaded, *, longest: bool, measure: bool = False) -> tuple[Planned, int | None]:
    """Plan a job without starting anything; with `longest`, also the longest context that fits.

    Args:
        measure: first measure a layer of each kind of the model on this machine.
    """
    job = loaded.trainer
    facts, machine = model_facts(job.model), machine_beside(job)
    resolved = resolve(job, facts, machine, loaded.origins, by_prediction(job, facts, machine))
    hardware = hardware_of(job, machine, ranks=resolved.gang.world_size, use_gpu=resolved.gang.use_gpu)
    device = device_name(machine)
    calibration = None
    if measure:
        if job.memory.hardware != "auto":
            raise JobError(
                "only the machine at hand can be measured",
                at="memory.hardware",
                why=f"the job plans for {job.memory.hardware}",
                try_="--set memory.hardware=auto, or leave --measure out",
            )
        threads = max(1, int(resolved.gang.cluster.cpus_per_actor))
        here = partial(measure_here, threads=threads)
        calibration = measured_calibration(job, resolved.train, facts, device, here)
    elif job.memory.profile != "analytic" and job.memory.hardware == "auto":
        calibration = known_calibration(facts, resolved.train, device)
        if calibration is None and job.memory.profile == "measured":
            raise not_measured(device)
    tokens = longest_context(job, resolved.train, facts, hardware, calibration) if longest else None
    try:
        planned = plan(job, resolved.train, facts, hardware, calibration)
    except DoesNotFit as problem:
        if tokens is None:
            raise
        raise DoesNotFit(
            problem.what, at=problem.at, why=problem.why, try_=f"{problem.try_}; the longest context is {tokens}"
        ) from None
    tokens_per_step = resolved.train.optim.tokens_per_step
    assert isinstance(tokens_per_step, int)
    batch = "\n".join([batch_chain(resolved), *mesh_reason(resolved)])
    return replace(planned, batch=batch, tokens_per_step=tokens_per_step), tokens


def show(planned: Planned, *, console: Console, longest_tokens: int | None = None) -> None:
    """The tables of `farspan plan`."""
    from rich import box
    from rich.table import Table

    prediction = planned.prediction
    verdict = "fits" if prediction.fits else "does not fit"
    kind = planned.solution.kind if planned.solution is not None else planned.policy
    console.print(f"[bold]{verdict}[/] on {planned.hardware.title}: {kind}", highlight=False)
    console.print(planned.batch, highlight=False)

    tiers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tier", "need", "have", "margin"):
        tiers.add_column(name, justify="left" if name == "tier" else "right")
    for tier, need, have in tier_rows(planned):
        tiers.add_row(
            tier, size(need), size(have), size(have - need) if have >= need else f"[red]{size(have - need)}[/]"
        )
    console.print(tiers)
    console.print(f"device peak at: {prediction.device_peak_at}", highlight=False)

    times = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    times.add_column("part of a step")
    times.add_column("seconds", justify="right")
    times.add_column("share", justify="right")
    for name, seconds in part_rows(planned):
        if seconds > 0:
            times.add_row(name, f"{seconds:.3g}", f"{seconds / prediction.step_s:.1%}")
    times.add_row("[bold]step[/]", f"[bold]{prediction.step_s:.4g}[/]", "")
    console.print(times)

    placed = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    placed.add_column("stored, share of all layers' rows")
    for place in PLACES:
        placed.add_column(place, justify="right")
    for name, share in placed_shares(planned).items():
        texts = [f"{amount:.0%}" if amount else "" for amount in share.values()]
        placed.add_row(stored_name(name, planned.problem), *texts)
    console.print(placed)

    if (line := kept_line(planned)) is not None:
        console.print(line, highlight=False)
    for line in error_lines(planned):
        console.print(line, highlight=False)
    if planned.solution is not None:
        console.print(f"bottleneck: {planned.solution.bottleneck}", highlight=False)
    if planned.next_best is not None:
        more = planned.next_best.step_s / prediction.step_s - 1
        console.print(
            f"next best: {planned.next_best.kind}, {planned.next_best.step_s:.4g} s ({more:+.1%})", highlight=False
        )
    if planned.tiled_s is not None:
        less = planned.tiled_s / prediction.step_s - 1
        console.print(f"quicker: memory.mlp_tile={MLP_TILE}, {planned.tiled_s:.4g} s ({less:+.1%})", highlight=False)
    if longest_tokens is not None:
        console.print(f"longest context that fits: {longest_tokens:,} tokens", highlight=False)
    for how in ("measured", "assumed"):
        names = [name for name, source in planned.sources.items() if source.how == how]
        if names:
            console.print(f"{how}: {', '.join(names)}", highlight=False)


def kept_tensors(planned: Planned) -> dict[str, list[dict[str, Any]]]:
    """By kind of layer, what autograd keeps of a layer that is kept: each tensor with the operators that need it."""
    return {
        kind.name: [tensor.model_dump(mode="json") for tensor in kind.saved]
        for kind in planned.problem.kinds
        if kind.saved
    }


def kept_line(planned: Planned) -> str | None:
    """The same in a line, by operator, for the kind that most layers have."""
    names = planned.problem.layers
    kind = planned.problem.kind(names.index(max(set(names), key=names.count)))
    if not kind.saved:
        return None
    kib: dict[str, float] = {}
    for tensor in kind.saved:
        group = " + ".join(dict.fromkeys(map(_kind_of, tensor.kept_by)))
        kib[group] = kib.get(group, 0.0) + tensor.bytes_per_row / 1024
    whole = sum(kib.values())
    shown = {group: size for group, size in sorted(kib.items(), key=lambda item: -item[1]) if size >= 0.005 * whole}
    parts = [f"{group} {size:.3g}" for group, size in shown.items()]
    if len(shown) < len(kib):
        parts.append(f"others {whole - sum(shown.values()):.2g}")
    line = f"autograd keeps {whole:.1f} KiB a token and layer: {', '.join(parts)}"
    if kind.side_bytes is not None:
        stored = sum(planned.problem.kind(layer).stored_x_bytes for layer in range(len(names))) / len(names)
        side, x = (size_bytes / planned.problem.rows / 1024 for size_bytes in (stored, kind.x_bytes))
        line += f"; of a reversible layer {side:.3g} KiB are stored, its input is {x:.3g}"
    return line


def errors_by_kind(planned: Planned, what: ErrorField) -> dict[str, dict[str, float | None]]:
    """By kind of layer, how far codes turn its gradients, where it was measured."""
    found = {kind.name: getattr(kind, what) for kind in planned.problem.kinds}
    return {name: error.model_dump(mode="json") for name, error in found.items() if error is not None}


def error_line(planned: Planned) -> str | None:
    """What activations in codes cost in accuracy of gradients."""
    if planned.activations in ("autograd", "fused"):
        return None
    return _error_line(planned, "gradient_error", f"activations in {planned.activations}", "a layer's trained weights")


def tier_error_line(planned: Planned) -> str | None:
    """What rows in codes cost in accuracy of gradients."""
    codec = planned.problem.tier_codec
    if codec == "exact":
        return None
    what = f"rows on host and disk in {codec}"
    if not any(layer.leaves for layer in planned.placement.layers):
        return f"{what}: this plan has none there, its gradients are exact"
    whose = "the trained weights of a layer that has all its rows there"
    return _error_line(planned, "tier_error", what, whose)


def exchange_line(planned: Planned) -> str | None:
    """What codes between ranks cost in accuracy of gradients."""
    if planned.exchange_bits is None:
        return None
    what = f"attention's exchange in {planned.exchange_bits:g} bits"
    return _error_line(planned, "exchange_error", what, "a layer's trained weights")


def error_lines(planned: Planned) -> list[str]:
    """What codes cost in accuracy of gradients, a line for each place that has them."""
    lines = error_line(planned), tier_error_line(planned), exchange_line(planned)
    return [line for line in lines if line is not None]


def _error_line(planned: Planned, field: ErrorField, what: str, whose: str) -> str:
    found = errors_by_kind(planned, field).values()
    if not found:
        return f"{what}: gradients are off by what was not measured here (farspan plan JOB --measure)"
    weights, inputs = (max(error[part] or 0.0 for error in found) for part in ("weights", "input"))
    return (
        f"{what}: gradients of {whose} are off by {weights:.1%}, of its input by {inputs:.1%}; measured on random "
        "weights, every run measures its own at start"
    )


def stored_name(name: str, problem: PlanProblem) -> str:
    """What a tensor class of a placement is called."""
    return problem.input_stored_as if name == "x" and problem.reversible else name


def _kind_of(operator: str) -> str:
    """What an operator of a counted layer is; those of a measured one are autograd's and go by their own names."""
    last = operator.rsplit(" ", 1)[-1]
    if last in ("adapter", "dropout"):
        return "adapters" if last == "adapter" else last
    if operator.startswith(("norm", "q_norm", "k_norm")):
        return "norms"
    if operator.endswith("_proj"):
        return "linear layers"
    return "activation" if operator in ("silu", "gate x up") else operator


def show_measured(found: Comparison, *, console: Console) -> None:
    """The plan's table after a run: planned, measured, and how far off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("planned", "measured", "off by"):
        table.add_column(name, justify="right")
    for title, unit, rows in found.tables:
        table.add_row(f"[dim]{title}{', ' if unit else ''}{unit}[/]")
        for row in rows:
            table.add_row(f"  {row.what}", row.planned_text, row.measured_text, row.off_text)
        table.add_section()
    console.print(table)


def part_rows(planned: Planned) -> list[tuple[str, float]]:
    """(part of a step, seconds); they sum to the step."""
    parts = planned.prediction.parts
    return [
        ("forward, linear", parts.forward_s),
        ("forward, attention", parts.attention_forward_s),
        ("backward, linear", parts.backward_s),
        ("backward, attention", parts.attention_backward_s),
        ("rebuild, linear", parts.rebuild_linear_s),
        ("rebuild, attention", parts.rebuild_attention_s),
        ("inner forwards", parts.inner_forward_s),
        ("copying saved tensors", parts.forward_copies_s + parts.backward_copies_s),
        ("codes of rows on host and disk", parts.forward_codes_s + parts.backward_codes_s),
        ("loss head", parts.head_s),
        ("optimizer", parts.optimizer_s),
        *((f"waiting for {lane.replace('_', ' ')}", seconds) for lane, seconds in parts.stall_s.items()),
    ]


def to_json(planned: Planned, *, longest_tokens: int | None = None) -> dict[str, Any]:
    """What `farspan plan --json` prints."""
    prediction, solution = planned.prediction, planned.solution
    found: dict[str, Any] = {
        "fits": prediction.fits,
        "over_bytes": prediction.over_bytes,
        "policy": planned.policy,
        "kind": solution.kind if solution else planned.policy,
        "hardware": planned.hardware.name,
        "rows": planned.problem.rows,
        "step_s": prediction.step_s,
        "parts": prediction.parts.model_dump(mode="json"),
        "device_peak_bytes": prediction.device_peak_bytes,
        "device_peak_at": prediction.device_peak_at,
        "host_bytes": prediction.host_bytes,
        "disk_bytes": prediction.disk_bytes,
        "moved_bytes": prediction.moved_bytes,
        "budgets": planned.problem.budgets.model_dump(mode="json"),
        "bottleneck": solution.bottleneck if solution else None,
        "gap": solution.gap if solution else None,
        "solve_s": solution.solve_s if solution else 0.0,
        "segments": [[unit.start, unit.stop] for unit in planned.placement.units()[::-1]],
        "next_best": None,
        "tiled_s": planned.tiled_s,
        "kept_tensors": kept_tensors(planned),
        "tier_codec": planned.problem.tier_codec,
        "gradient_errors": errors_by_kind(planned, "gradient_error"),
        "tier_errors": errors_by_kind(planned, "tier_error"),
        "exchange_errors": errors_by_kind(planned, "exchange_error"),
        "assumed": [f"{name}: {s.what}" for name, s in planned.sources.items() if s.how == "assumed"],
    }
    if planned.next_best is not None:
        found["next_best"] = {"kind": planned.next_best.kind, "step_s": planned.next_best.step_s}
    if longest_tokens is not None:
        found["longest_context_tokens"] = longest_tokens
    return found


def tier_rows(planned: Planned) -> list[tuple[str, int, int]]:
    """(tier, need, have) in bytes."""
    prediction, budgets = planned.prediction, planned.problem.budgets
    need = (prediction.device_peak_bytes, prediction.host_bytes, prediction.disk_bytes)
    return list(zip(TIERS, need, (budgets.device_bytes, budgets.host_bytes, budgets.disk_bytes)))


def placed_shares(planned: Planned) -> dict[str, dict[str, float]]:
    """By tensor class the share of all layers' rows on each tier, `keep` (autograd) or computed again."""
    placement, shares = planned.placement, dict[str, dict[str, float]]()
    layers = placement.layers[placement.frozen_below :]
    names = ["x", "O", *dict.fromkeys(name for layer in layers for name in layer.linear)]
    for name in names:
        each = [layer_shares(placement, layer, name) for layer in layers]
        share = {place: sum(one[place] for one in each) for place in PLACES}
        shares[name] = {place: amount / len(layers) for place, amount in share.items()}
    return shares


def layer_shares(placement: Placement, layer: LayerPlan, name: str) -> dict[str, float]:
    """Of one layer's tensor class the share of rows in each place."""
    share = dict.fromkeys(PLACES, 0.0)
    if layer.keep:
        return share | {"keep" if placement.saved == "device" else "host": 1.0}
    rows = layer.x if name == "x" else layer.o if name == "O" else layer.linear.get(name)
    whole = placement.attention_rows if name == "O" else placement.rows
    for tier in TIERS:
        share[tier] = rows.on(tier) / whole if rows else 0.0
    return share | {"recompute": 1 - sum(share.values())}
