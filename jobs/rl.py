"""`farspan run` of an RL job: from the job to a finished run folder.

The trainer is planned, resolved and checked as that of supervised training on packs of the same size; only its data are
rollouts. Then come the rollout workers, one bundle each beside the ranks, and the loop in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.errors import DataError, JobError
from farspan.jobs.claim import Claim
from farspan.jobs.config import RLJob
from farspan.jobs.facts import Machine, machine, model_facts
from farspan.jobs.origins import origins_in_python
from farspan.jobs.resolve import Resolved, resolve
from farspan.jobs.run import RunResult, check_resume, check_room, report_of, say, with_plan
from farspan.jobs.warm_start import policy_of
from farspan.trainer.config import Model, Rollouts
from farspan.trainer.rl.config import RLRunSpec, RLSpec
from farspan.trainer.rl.tasks.base import Problem
from farspan.trainer.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from farspan.jobs.load import Loaded
    from farspan.jobs.plan import Planned

SHOWN_PROBLEMS = 256
"""Problems whose prompts are measured before anything starts."""


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
        check_room(resolved, session)
        tokens = _Tokens(model)
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
    if job.loss.kl_weight:
        raise JobError(
            "a penalty on the distance from the first policy is not computed yet",
            at="loss.kl_weight",
            why="it needs log-probabilities of the policy that RL began with",
            try_="--set loss.kl_weight=0",
        )
    if job.optim.in_backward:
        raise JobError(
            "an optimizer in backward knows no step of several packs",
            at="optim.in_backward",
            why="samples of a step fill as many packs as they need",
            try_="--set optim.in_backward=false",
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


class _Tokens:
    """Between texts and token ids: the policy's own tokenizer and its chat template, where it has one."""

    def __init__(self, model: Model) -> None:
        from farspan.trainer.data.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(str(Path(model.tokenizer or model.id)))
        self.chat = self.tokenizer.chat_template is not None
        self.vocab = len(self.tokenizer)
        self.eos_ids = (int(self.tokenizer.eos_token_id),)
        self._of: dict[str, list[int]] = {}

    def encode(self, problem: Problem) -> Sequence[int]:
        if problem.prompt not in self._of:
            if self.chat:
                turns = [{"role": "user", "content": problem.prompt}]
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                self._of[problem.prompt] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                self._of[problem.prompt] = self.tokenizer(problem.prompt)["input_ids"]
        return self._of[problem.prompt]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def check(self, job: RLJob) -> None:
        """Prompts with the longest response must fit into a pack."""
        lengths = [len(self.encode(job.task.problem(number))) for number in range(SHOWN_PROBLEMS)]
        needed = max(lengths) + job.rollout.cap
        if needed > job.context:
            raise DataError(
                "a prompt with its response does not fit into a pack",
                at=f"context = {job.context}",
                why=f"the longest of {SHOWN_PROBLEMS} prompts has {max(lengths)} tokens, a response up to "
                f"{job.rollout.cap}: {needed} in all",
                try_=f"--set context={needed}, or a smaller rollout.cap",
            )


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
    job: RLJob, folder: RunFolder, resolved: Resolved, tokens: _Tokens, session: Any, console: Console
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
