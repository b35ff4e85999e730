"""`farspan run`: from a job to a finished run folder, in an order that wastes nothing.

What needs no machine is checked first: the values of the job against the model, the run folder, the rules of resuming.
Then Ray, then the tokens (Ray tasks, before any process group exists), and only then is the folder taken and the gang
placed. So a bad job costs a second and leaves no trace, and `--clean` deletes nothing for a job that cannot run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.cluster.failure import RankFailure, out_of_memory
from farspan.cluster.journal import Journal
from farspan.errors import FarspanError, JobError
from farspan.jobs.claim import Claim
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import Machine, ModelFacts, hardware_of, machine, model_facts
from farspan.jobs.load import Loaded
from farspan.jobs.origins import origins_in_python
from farspan.jobs.resolve import Resolved, batch_chain, mesh_reason, resolve
from farspan.jobs.submit import anchored
from farspan.memory.plan import checkpoint_every_layer, keep_everything
from farspan.trainer.config import Rollouts, UniPT
from farspan.trainer.run_folder import RunFolder, read_metrics, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from farspan.cluster.session import Session
    from farspan.jobs.plan import Planned
    from farspan.memory.calibration import Calibration
    from farspan.memory.hardware import Hardware
    from farspan.trainer.world import TrainResult

_ONE_RANK = Machine(nodes=({"CPU": 1.0},), cpu_memory_bytes=2**30)
"""Stands in before Ray is there: contradictions inside a job do not depend on the machine."""

MATRIX_S = 6 * 3600.0
"""A wide matrix in each of 432 formats, on one core."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: str
    """`done`; every other end is an exception."""
    run_dir: Path
    metrics: Mapping[str, Any]
    """The last line of `metrics.jsonl`."""
    checkpoint: Path | None
    """The last complete checkpoint."""


def run(
    job: SFTJob,
    *,
    address: str | None = None,
    resume: bool = False,
    clean: bool = False,
    loaded: Loaded | None = None,
    console: Console | None = None,
) -> RunResult:
    """Train `job` to its last step.

    Args:
        address: Ray cluster to join; None starts a Ray on this machine.
        resume: go on from the last complete checkpoint of the run.
        clean: delete the run's folder first.
        loaded: where the job was read, for the origins in `resolved.json`.
        console: where progress goes; None prints nothing.

    Raises:
        FarspanError: four lines; `JobError` and `DataError` before anything was written.
    """
    from rich.console import Console

    console = console or Console(quiet=True)
    origins = loaded.origins if loaded is not None else origins_in_python(job)
    folder = RunFolder(job.run_dir)
    job = anchored(job)
    facts = model_facts(job.model)
    resolve(job, facts, _ONE_RANK, origins)
    with Claim(folder, resume=resume, clean=clean) as claim:
        from farspan.cluster.session import connect
        from farspan.jobs.mesh import by_prediction
        from farspan.jobs.out_of_memory import Situation
        from farspan.jobs.out_of_memory import explain as explained

        with connect(address) as session:
            say(console, "ray", "on this machine" if session.local else session.address)
            here = machine(wait_s=job.cluster.wait_s)
            resolved = resolve(job, facts, here, origins, by_prediction(job, facts, here))
            resolved, planned = with_plan(resolved, job, facts, here, console)
            check_room(resolved, session)
            if resume:
                check_resume(folder, resolved, console)
            resolved = _with_tokens(resolved, console)
            claim.take()
            _prepare_base(resolved, console)
            _write_job(folder, job, resolved, planned)
            say(console, "run", str(folder.root))
            say(console, "batch", batch_chain(resolved))
            for why in mesh_reason(resolved):
                say(console, "mesh", why)
            explain: Callable[[RankFailure], FarspanError] = out_of_memory
            if planned is not None:
                free_bytes = shutil.disk_usage(folder.root).free
                explain = partial(explained, Situation(job, facts, here, origins, resolved, planned, free_bytes))
            return _train(folder, resolved, session, console, explain)


def with_plan(
    resolved: Resolved, job: SFTJob, facts: ModelFacts, here: Machine, console: Console
) -> tuple[Resolved, Planned | None]:
    """Plan the memory of a step, refuse what does not fit, and say what was decided; None: there is no prediction."""
    from farspan.jobs.plan import plan, require_fit, size

    gang = resolved.gang
    hardware = hardware_of(job, here, ranks=gang.world_size, use_gpu=gang.use_gpu)
    calibration = _calibration(resolved, job, facts, hardware, here, console)
    if calibration is None and facts.must_be_measured:
        return _unpredicted(resolved, job, facts, console), None
    planned = plan(job, resolved.train, facts, hardware, calibration)
    require_fit(planned)
    kind = planned.solution.kind if planned.solution is not None else planned.policy
    need, have = planned.prediction.device_peak_bytes, planned.problem.budgets.device_bytes
    why = f"{kind}: needs {size(need)} of {size(have)} on the device"
    say(console, "plan", why)
    told = resolved.with_plan(
        planned.placement,
        planned.tiers(job),
        why,
        step_s=planned.prediction.step_s,
        device_peak_bytes=need,
    )
    return told, planned


def _calibration(
    resolved: Resolved, job: SFTJob, facts: ModelFacts, hardware: Hardware, here: Machine, console: Console
) -> Calibration | None:
    """What was measured for this job on this machine, or is now, where it can change the plan."""
    from farspan.cluster.measure import measure_on_cluster
    from farspan.jobs.calibrate import device_name, known_calibration, measured_calibration
    from farspan.jobs.plan import is_scarce

    train, gang, device = resolved.train, resolved.gang, device_name(here)
    if isinstance(train.adapter, UniPT):
        return None  # counted, and no layer of it runs as a measurement would run it
    wanted = job.memory.profile == "measured"
    if job.memory.profile == "analytic" or job.memory.hardware != "auto":
        return None
    found = known_calibration(facts, train, device)
    if found is not None or not (wanted or is_scarce(job, train, facts, hardware)):
        return found
    why = "asked for" if wanted else "not counted otherwise" if facts.must_be_measured else "memory is scarce"
    say(console, "profile", f"measuring a layer of each kind: {why}")
    measure = partial(measure_on_cluster, cpus=gang.cluster.cpus_per_actor, gpus=int(gang.use_gpu))
    return measured_calibration(job, train, facts, device, measure)


def _unpredicted(resolved: Resolved, job: SFTJob, facts: ModelFacts, console: Console) -> Resolved:
    """Layers that are not counted, and were not to be measured: only policies that need no prediction."""
    policy, layers = job.memory.plan, facts.layers
    make = {"keep": keep_everything, "recompute": checkpoint_every_layer}.get(policy)
    if make is None:
        raise JobError(
            f"memory.plan={policy} needs a prediction, and layers of this model have none that is analytic",
            at="memory.plan",
            why="what experts and recurrences keep depends on their kernels, so it has to be measured",
            try_="--set memory.plan=keep, --set memory.plan=recompute, or --set memory.profile=auto",
        )
    rows = -(-resolved.train.data.context // resolved.train.mesh.sp)
    say(console, "plan", f"{policy}, not predicted: layers that were not measured")
    placement = make(layers, rows=rows, attention_rows=rows * resolved.train.mesh.sp)
    return resolved.with_plan(placement, None, policy)


def check_resume(folder: RunFolder, resolved: Resolved, console: Console) -> None:
    """Refuse a job that contradicts its newest checkpoint; say what else changed."""
    from farspan.trainer.checkpoint_format import read_manifest
    from farspan.trainer.resume_rules import check_resume

    complete = folder.complete_checkpoints()
    if len(complete) == 0:
        say(console, "resume", "no complete checkpoint: starting from step 0")
        return
    manifest = read_manifest(complete[-1])
    changes = check_resume(manifest.job, resolved.train, at=str(complete[-1]))
    say(console, "resume", f"from step {manifest.step}")
    for change in changes:
        say(console, "changed", str(change))


def check_room(resolved: Resolved, session: Session) -> None:
    """A local Ray cannot grow: refuse a gang it cannot hold before anything is tokenised or deleted."""
    if session.local:
        from farspan.cluster.placement import place
        from farspan.cluster.supervisor import remove_group

        remove_group(place(resolved.gang, can_grow=False, on_wait=lambda text: None))


def _with_tokens(resolved: Resolved, console: Console) -> Resolved:
    """Tokenise, or find the tokens of an earlier run."""
    from farspan.cluster.tokenise import map_tasks
    from farspan.trainer.data.packing import check_lengths
    from farspan.trainer.data.prepare import prepare
    from farspan.trainer.data.store import TokenStore

    train = resolved.train
    assert not isinstance(train.data, Rollouts)
    tokens_dir = prepare(
        train.data,
        train.model,
        train.evaluate,
        map_tasks=map_tasks,
        progress=lambda line: say(console, "data", line),
    )
    check_lengths(TokenStore(tokens_dir), train.data)
    return resolved.with_tokens(str(tokens_dir))


def _prepare_base(resolved: Resolved, console: Console) -> None:
    """Round the base's matrices, where the job wants that done with care, or find that it was done."""
    from farspan.cluster.tokenise import map_tasks
    from farspan.trainer.config import is_prepared

    train, gang = resolved.train, resolved.gang
    if not is_prepared(train.base, train.adapter):
        return
    from farspan.trainer.bases.prepared.prepare import prepare

    def on_cluster(function: Callable[[Any], Any], items: Sequence[Any], *, on_device: bool = False) -> list[Any]:
        """One core a matrix; what needs the whole model, where a rank would be."""
        gpus, cpus = float(on_device and gang.use_gpu), gang.cluster.cpus_per_actor if on_device else 1.0
        return map_tasks(function, items, cpus_per_task=cpus, gpus_per_task=gpus, quiet_s=MATRIX_S, what="rounding")

    prepare(train, map_tasks=on_cluster, progress=lambda line: say(console, "base", line))


def _write_job(folder: RunFolder, job: SFTJob, resolved: Resolved, planned: Planned | None) -> None:
    from farspan.jobs.plan_file import write_plan, write_plan_trace

    write_json(folder.job, job.model_dump(mode="json"))
    write_json(folder.resolved, resolved.to_json())
    write_json(folder.root / "train_spec.json", resolved.train.model_dump(mode="json"))
    if planned is None:
        folder.plan.unlink(missing_ok=True)  # of the run that is resumed
    else:
        write_plan(folder.plan, planned)
        write_plan_trace(folder.trace, planned)


def _train(
    folder: RunFolder,
    resolved: Resolved,
    session: Session,
    console: Console,
    explain: Callable[[RankFailure], FarspanError],
) -> RunResult:
    from farspan.cluster.supervisor import supervise
    from farspan.jobs.progress import StepPrinter

    printer = StepPrinter(console, resolved.train.optim.steps, title=resolved.gang.name)

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] != "failed":  # the caller shows the error it ends with
            printer.event(event["text"])

    try:
        result = supervise(
            resolved.gang,
            session=session,
            on_record=printer.record,
            on_event=on_event,
            on_out_of_memory=explain,
        )
    finally:
        printer.close()
        _compare(folder, console)
        report_of(folder, console)
    say(console, "done:", _summary(result))
    return RunResult(
        status=result.status,
        run_dir=folder.root,
        metrics=result.last_record,
        checkpoint=Path(result.checkpoint) if result.checkpoint else None,
    )


def _compare(folder: RunFolder, console: Console) -> None:
    """The plan's table with what was measured, and as an event what the plan got wrong."""
    from farspan.jobs.measured import compare, findings
    from farspan.jobs.plan_file import read_plan
    from farspan.jobs.plan_view import show_measured

    records = read_metrics(folder.metrics)
    if not records or not folder.plan.exists():
        return
    show_measured(compare(read_plan(folder.plan), records), console=console)
    journal = Journal(folder, on_event=lambda event: say(console, "finding", event["text"]))
    journal.attempt = records[-1].get("attempt", 0)
    for found in findings(records):
        more = {"quantity": found.quantity, "planned": found.planned, "measured": found.measured}
        journal.event("finding", found.text, **more)


def report_of(folder: RunFolder, console: Console) -> None:
    """A run that failed has a report too, if it got as far as one step."""
    from farspan.jobs.report.build import write_report

    if read_metrics(folder.metrics):
        say(console, "report", str(write_report(folder.root)))


def _summary(result: TrainResult) -> str:
    record = result.last_record
    shown = {"loss": record.get("loss"), "held-out": record.get("eval_loss")}
    parts = [f"{result.steps} steps", *(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)]
    if result.checkpoint:
        parts.append(f"checkpoint {result.checkpoint}")
    return ", ".join(parts)


def say(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<8} {text}", highlight=False, markup=False, soft_wrap=True)
