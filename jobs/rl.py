"""`farspan run` of an RL job: from the job to a finished run folder.

The trainer is planned, resolved and checked as that of supervised training on packs of the same size; only its data are
rollouts. Then come the rollout workers, one bundle each beside the ranks, and the loop in this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.errors import JobError
from farspan.jobs.claim import Claim
from farspan.jobs.config import RLJob
from farspan.jobs.facts import Machine, machine, model_facts
from farspan.jobs.origins import origins_in_python
from farspan.jobs.policy_tokens import PolicyTokens
from farspan.jobs.resolve import Resolved, resolve
from farspan.jobs.run import RunResult, check_resume, check_room, report_of, say, with_plan
from farspan.jobs.warm_start import policy_of
from farspan.trainer.config import Rollouts
from farspan.trainer.rl.config import RLRunSpec, RLSpec
from farspan.trainer.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from farspan.jobs.load import Loaded
    from farspan.jobs.plan import Planned


def run_rl(
    job: RLJob,
    *,
    address: str | None = None,
    resume: bool = False,
    clean: bool = False,
    loaded: Loaded | None = None,
    console: Console | None = None,
) -> RunResult:
    """Train `job` to its last step; arguments and errors as for `jobs.run.run`."""
    from rich.console import Console

    from farspan.cluster.session import connect

    console = console or Console(quiet=True)
    told = partial(say, console)
    origins = loaded.origins if loaded is not None else origins_in_python(job)
    folder = RunFolder(job.run_dir)
    _check(job)
    with Claim(folder, resume=resume, clean=clean) as claim, connect(address) as session:
        told("ray", "on this machine" if session.local else session.address)
        model = policy_of(job, address=address, console=console, say=told)
        here = machine(wait_s=job.cluster.wait_s)
        trained = job.trainer(model)
        facts = model_facts(trained.model)
        resolved = resolve(trained, facts, _without_workers(job, here), origins)
        resolved, planned = with_plan(resolved, trained, facts, here, console)
        resolved = _on_rollouts(job, resolved)
        _check_reference(job, resolved)
        check_room(resolved, session)
        tokens = PolicyTokens(model)
        tokens.check(job)
        if resume:
            check_resume(folder, resolved, console)
        claim.take()
        _write_job(folder, job, resolved, planned)
        told("run", str(folder.root))
        told("rollouts", _describe(job))
        return _train(job, folder, resolved, tokens, session, console)


def _check(job: RLJob) -> None:
    """Values that contradict each other.

    Raises:
        JobError: with the flag that cures it.
    """
    rollout, cap = job.rollout, job.rollout.cap
    if rollout.segment_tokens is not None and rollout.segment_tokens > cap:
        raise JobError(
            "a segment is longer than a response may be",
            at="rollout.segment_tokens",
            why=f"{rollout.segment_tokens} tokens of a segment, {cap} of a response",
            try_=f"--set rollout.segment_tokens={cap}, or leave it out",
        )
    if job.optim.in_backward:
        raise JobError(
            "an optimizer in backward knows no step of several packs",
            at="optim.in_backward",
            why="samples of a step fill as many packs as they need",
            try_="--set optim.in_backward=false",
        )


def _check_reference(job: RLJob, resolved: Resolved) -> None:
    """A second model, where the loss needs one, must lie whole on every rank."""
    if job.loss.kl_weight and resolved.train.zero == 3:
        raise JobError(
            "a penalty on the distance from the first policy needs that policy whole on every rank",
            at="loss.kl_weight",
            why="ZeRO-3 leaves each rank a shard of a model, and a second one cannot be sharded beside it",
            try_="--set parallel.zero=2, or --set loss.kl_weight=0",
        )


def _without_workers(job: RLJob, machine_: Machine) -> Machine:
    """What the trainer's ranks may take of the cluster: not what rollout workers need."""
    left, nodes = job.rollout.workers, []
    for node in machine_.nodes:
        own = dict(node)
        while left and own.get("CPU", 0.0) >= 2 * job.cluster.cpus_per_actor:
            own["CPU"] -= job.cluster.cpus_per_actor
            if own.get("GPU", 0.0) >= 1:
                own["GPU"] -= 1
            left -= 1
        nodes.append(own)
    return replace(machine_, nodes=tuple(nodes))


def _on_rollouts(job: RLJob, resolved: Resolved) -> Resolved:
    train = resolved.train.model_copy(update={"data": Rollouts(context=job.context)})
    gang = resolved.gang.model_copy(update={"train": train, "rollout_workers": job.rollout.workers})
    return replace(resolved, gang=gang)


def _describe(job: RLJob) -> str:
    rollout = job.rollout
    segment = rollout.segment_tokens or rollout.cap
    parts = f"{rollout.prompts_per_step} prompts x {rollout.group_size} samples a step, up to {rollout.cap} tokens"
    carried = f", {segment} of them a step" if segment < rollout.cap else ""
    return f"{parts}{carried}; {rollout.workers} worker{'s' * (rollout.workers > 1)}; reward {job.reward.shaper.type}"


def _write_job(folder: RunFolder, job: RLJob, resolved: Resolved, planned: Planned | None) -> None:
    from farspan.jobs.plan_file import write_plan

    write_json(folder.job, job.model_dump(mode="json"))
    write_json(folder.resolved, resolved.to_json())
    write_json(folder.root / "train_spec.json", resolved.train.model_dump(mode="json"))
    if planned is None:
        folder.plan.unlink(missing_ok=True)
    else:
        write_plan(folder.plan, planned)


def _train(
    job: RLJob, folder: RunFolder, resolved: Resolved, tokens: PolicyTokens, session: Any, console: Console
) -> RunResult:
    from farspan.cluster.rl import RLSupervisor
    from farspan.cluster.rollout import WorkerSpec
    from farspan.jobs.progress import StepPrinter

    train, rollout = resolved.train, job.rollout
    printer = StepPrinter(console, job.optim.steps, title=job.name)

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] != "failed":  # the caller shows the error it ends with
            printer.event(event["text"])

    supervisor = RLSupervisor(
        resolved.gang,
        session,
        rank=RLSpec(train=train, loss=job.loss, temperature=rollout.temperature, vocab=tokens.vocab),
        run=RLRunSpec(
            task=job.task,
            steps=job.optim.steps,
            seed=job.optim.seed,
            loss=job.loss,
            rollout=rollout,
            reward=job.reward,
            evaluate=job.evaluate,
            checkpoint_every=job.checkpoint.every,
        ),
        worker=WorkerSpec(
            model=train.model,
            adapter=train.adapter,
            base=train.base,
            precision=train.precision,
            seed=train.optim.seed,
            engine=rollout.engine,
            batch=rollout.batch,
            cache_tokens=rollout.cache_tokens,
            eos_ids=tokens.eos_ids,
            vocab=tokens.vocab,
            use_gpu=resolved.gang.use_gpu,
        ),
        encode=tokens.encode,
        decode=tokens.decode,
        on_record=printer.record,
        on_event=on_event,
    )
    try:
        result = supervisor.run()
    finally:
        printer.close()
        report_of(folder, console)
    say(console, "done:", _summary(result))
    return RunResult(
        status=result.status,
        run_dir=folder.root,
        metrics=result.last_record,
        checkpoint=Path(result.checkpoint) if result.checkpoint else None,
    )


def _summary(result: Any) -> str:
    record = result.last_record
    parts = [f"{result.steps} steps"]
    if record.get("eval_accuracy") is not None:
        parts.append(f"held-out {record['eval_accuracy']:.1%} right in {record['eval_response_tokens']:.1f} tokens")
    if result.checkpoint:
        parts.append(f"checkpoint {result.checkpoint}")
    return ", ".join(parts)
