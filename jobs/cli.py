"""The command line: one function a verb, each importing what it needs when it runs.

`farspan --help` and a bad job file answer without loading torch or ray. Exit codes: 0 done, 1 failed, 2 bad job or
usage, 3 does not fit, 4 cluster not ready, 130 interrupted. A `FarspanError` prints its four lines; anything else is
our bug and prints its traceback.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from json import dumps as to_json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import farspan
from farspan.errors import FarspanError, JobError

Job = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB", help="path.py, path.py:name or path.yaml.")]
Run = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="A run folder, or the name of a run in outputs/.")
]
Set = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(name="set", metavar="A.B=C", help="Change one value of the job; may be given again."),
]

Address = Annotated[
    str | None,
    tyro.conf.arg(metavar="HOST:PORT", help="Ray cluster to join, or auto. Left out: a Ray on this machine."),
]

DESCRIPTION = f"""Farspan {farspan.__version__}: fine-tune language models on sequences that do not fit, on Ray.

$ farspan plan job.py                       does it fit, how long does a step take
$ farspan run job.py                        train on this machine
$ farspan run job.py --set optim.lr=3e-5    with one value changed
$ farspan run job.yaml --address host:6379  on a Ray cluster
$ farspan report outputs/my-run             what happened, on one page
$ farspan --version

Exit codes: 0 done, 1 failed, 2 bad job or usage, 3 does not fit, 4 cluster not ready."""


def run(job: Job, overrides: Set = (), address: Address = None, resume: bool = False, clean: bool = False) -> int:
    """Train a job on a local Ray, or on the cluster at --address.

    Args:
        resume: Go on from the last complete checkpoint of the run.
        clean: Delete the run's folder first.
    """
    from rich.console import Console

    from farspan.jobs.config import SFTJob
    from farspan.jobs.load import load

    loaded = load(job, overrides)
    if isinstance(loaded.job, SFTJob):
        from farspan.jobs.run import run as train

        train(loaded.job, address=address, resume=resume, clean=clean, loaded=loaded, console=Console())
    else:
        from farspan.jobs.rl import run_rl

        run_rl(loaded.job, address=address, resume=resume, clean=clean, loaded=loaded, console=Console())
    return 0


def plan(
    job: Job,
    overrides: Set = (),
    json: bool = False,
    longest: bool = False,
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    measure: bool = False,
) -> int:
    """Will it fit, how long does a step take, what is stored where; starts nothing. Exit code 3: does not fit.

    Args:
        json: Print one JSON object instead.
        html: Write a page with the tables, the timeline of a micro-batch and memory over time, too.
        longest: Find the longest context that fits, too.
        measure: Measure a layer of each kind of the model and the lanes of this machine first; later plans use it.
    """
    from rich.console import Console

    from farspan.jobs.load import load
    from farspan.jobs.plan_view import plan_beside, show
    from farspan.jobs.plan_view import to_json as plan_json

    loaded = load(job, overrides)
    planned, tokens = plan_beside(loaded, longest=longest, measure=measure)
    if html is not None:
        from farspan.jobs.report.plan_page import write_plan_page

        write_plan_page(planned, html, name=loaded.job.name, longest_tokens=tokens)
    if json:
        print(to_json(plan_json(planned, longest_tokens=tokens), indent=2))
    else:
        show(planned, console=Console(), longest_tokens=tokens)
    return 0 if planned.prediction.fits else 3


def report(run: Run) -> int:
    """Write report.html of a run: loss, tokens/s, step time, memory."""
    from farspan.jobs.export import find_run
    from farspan.jobs.report.build import write_report

    print(write_report(find_run(run).root))
    return 0


def submit(
    job: Job,
    address: Annotated[str | None, tyro.conf.arg(metavar="URL", help="Dashboard, as http://host:8265.")] = None,
    overrides: Set = (),
    print_: Annotated[Literal["rayjob"] | None, tyro.conf.arg(name="print", metavar="rayjob")] = None,
    no_wait: bool = False,
    resume: bool = False,
    clean: bool = False,
) -> int:
    """Send a job to a Ray cluster and follow it to its end.

    Args:
        print_: Print a KubeRay RayJob manifest and send nothing.
        no_wait: Return as soon as the cluster has the job.
        resume: As for run.
        clean: As for run.
    """
    from farspan.jobs.load import load

    loaded = load(job, overrides)
    supervised = loaded.supervised("submit")
    if print_ is not None:
        from farspan.jobs.rayjob import rayjob_manifest

        sys.stdout.write(rayjob_manifest(supervised))
        return 0
    if address is None:
        raise JobError(
            "no cluster to submit to",
            at="--address",
            why="a job is sent to the dashboard of a Ray cluster",
            try_="--address http://host:8265, or --print rayjob, or `farspan run` for this machine",
        )
    from farspan.jobs.submit import follow
    from farspan.jobs.submit import submit as send

    submission = send(supervised, address, job_path=loaded.path, overrides=loaded.overrides, resume=resume, clean=clean)
    print(submission)
    return 0 if no_wait else follow(address, submission)


def data(job: Job, overrides: Set = (), json: bool = False, samples: int = 1) -> int:
    """Show what a job will train on: lengths, packing, loss mask.

    Args:
        json: Print one JSON object instead.
        samples: Documents to show with their loss mask.
    """
    from rich.console import Console

    from farspan.jobs.data_view import show, summary
    from farspan.jobs.load import load
    from farspan.trainer.data.prepare import prepare

    loaded = load(job, overrides).supervised("data")
    told = Console(stderr=True)
    store = prepare(
        loaded.data,
        loaded.model,
        loaded.evaluate,
        progress=lambda line: told.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    if json:
        print(to_json(summary(store, loaded.data), indent=2))
    else:
        show(store, loaded.data, console=Console(), samples=samples)
    return 0


def doctor(
    address: Address = None,
    output_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs"),
    json: bool = False,
) -> int:
    """Check this machine or a cluster: memory, disk, limits, Ray; exit code 0 ready, 4 not.

    Args:
        output_dir: Where run folders go: its disk is measured, and every node must be able to write there.
        json: Print the facts as one JSON object instead, and always exit 0.
    """
    from rich.console import Console

    from farspan.jobs.doctor import doctor as check
    from farspan.jobs.doctor import facts

    if json:
        print(to_json(facts(address, output_dir=output_dir), indent=2))
        return 0
    return check(address, console=Console(), output_dir=output_dir)


def export(
    run: Run,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    merged: bool = False,
    whole_base: bool = False,
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
) -> int:
    """Write a checkpoint as a HF or PEFT folder, reopened and compared before it counts.

    Args:
        out: Folder to write. Left out: export/step_N in the run folder.
        merged: Fold the adapter into the weights of the base.
        whole_base: Of a run on base=lq and the like, write the rounded base as a plain model too.
        step: Checkpoint to export. Left out: the newest.
    """
    from farspan.jobs.export import export as write
    from farspan.jobs.export import find_run

    done = write(find_run(run), step=step, out=out, merged=merged, whole_base=whole_base)
    for line in done.compared:
        print(f"checked  {line}")
    print(f"done: {done.kind}, {done.num_tensors} tensors, {done.size_bytes / 2**20:.1f} MiB in {done.out_dir}")
    return 0


def bench(
    name: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help="sft, memory, plan, invariance or disk.")
    ],
) -> int:
    """Run a benchmark of infra/bench; what follows its name goes to it."""
    return _bench(name, ())


VERBS: dict[str, Callable[..., Any]] = {
    "plan": plan,
    "run": run,
    "submit": submit,
    "data": data,
    "doctor": doctor,
    "report": report,
    "export": export,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(farspan.__version__)
        return 0
    try:
        if args[:1] == ["bench"] and len(args) > 1 and not args[1].startswith("-"):
            return _bench(args[1], args[2:])
        return tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="farspan",
            description=DESCRIPTION,
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except FarspanError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def _bench(name: str, args: Sequence[str]) -> int:
    """Benchmarks are scripts of a checkout, not part of the package: a wheel has none."""
    folder = Path(farspan.__file__).absolute().parents[2] / "bench"
    script = folder / f"{name}.py"
    if not script.is_file():
        found = (path for path in folder.rglob("*.py") if not path.stem.startswith("_"))
        known = sorted(str(path.relative_to(folder).with_suffix("")) for path in found)
        raise JobError(
            f"no benchmark {name}",
            at=str(script),
            why=f"there are {', '.join(known)}" if known else "farspan was installed without its benchmarks",
            try_=f"farspan bench {known[0]}" if known else "run it from a clone of the repository",
        )
    return subprocess.run([sys.executable, str(script), *args]).returncode
