"""Send a job to a Ray cluster through the Ray Jobs API, and follow it to its end.

What is uploaded is a staged folder and nothing else: the resolved job as YAML, the farspan package, and the data files
the job names by a relative path. So the cluster runs the very code and values of this side, whatever is installed
there, and no `.git`, outputs or checkpoints can slip in. Data named by an absolute path, and the run folder, must lie
on storage every node reaches. Ray's token authentication is on: the token is looked for where Ray looks for it.
"""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from farspan.cluster.package import file_sizes, stage_package
from farspan.errors import ClusterNotReady, JobError
from farspan.jobs.config import SFTJob
from farspan.trainer.config import Model

JOB_FILE = "job.yaml"
UPLOAD_LIMIT_BYTES = 100 * 2**20
ANSWER_S = 10.0
LOST_S = 60.0
"""How long a log stream that broke is tried again."""
ENTRYPOINT = f"python -m farspan.jobs run {JOB_FILE} --address auto"


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def submit(
    job: SFTJob,
    address: str,
    *,
    job_path: Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    clean: bool = False,
    tell: Callable[[str], None] = _to_stderr,
) -> str:
    """Upload `job` to the cluster whose dashboard is at `address` and start it there.

    Args:
        job: the job with its overrides applied.
        address: `http://host:8265`.
        job_path: the file it came from, kept in the submission's metadata with `overrides`.
        resume, clean: as for `farspan run`.
        tell: gets a line saying what is uploaded and how large it is.

    Returns:
        The submission id, as `ray job logs` takes it.

    Raises:
        ClusterNotReady: no dashboard answers there, or it refuses our token.
        JobError: not an address; more than 100 MiB to upload; a relative path that leaves this folder.
    """
    client = _client(address)
    metadata = {"farspan_run": job.name, "farspan_job": str(job_path or ""), "farspan_set": " ".join(overrides)}
    entrypoint = ENTRYPOINT + " --resume" * resume + " --clean" * clean
    with tempfile.TemporaryDirectory(prefix="farspan-") as folder:
        staged = stage(job, Path(folder))
        tell(f"uploading {_size(check_upload(staged))}: {JOB_FILE}, farspan and the data named by relative paths")
        tell(f"run folder on the cluster: {anchored(job).run_dir}")
        try:
            submission: str = client.submit_job(
                entrypoint=entrypoint, runtime_env={"working_dir": str(staged)}, metadata=metadata
            )
        except (RuntimeError, OSError) as error:
            raise _refused(address, error) from error
    return submission


def follow(address: str, submission: str, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Pass on the log of a submitted job until it ends.

    Returns:
        0 when it succeeded, else the exit code of `farspan run` on the cluster, or 1 when it left none.

    Raises:
        ClusterNotReady: the dashboard stopped answering and stayed away.
    """
    client = _client(address)
    asyncio.run(_tail(client, address, submission, write))
    info = client.get_job_info(submission)
    if str(info.status) == "SUCCEEDED":
        return 0
    write(f"{submission}: {info.status}: {' '.join((info.message or '').split())[:400]}\n")
    return int(info.driver_exit_code or 1)


def stage(job: SFTJob, folder: Path) -> Path:
    """Fill `folder` with what the cluster needs to run `job`, and return it."""
    stage_package(folder)
    job = anchored(job)
    (folder / JOB_FILE).write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    for source in _relative_sources(job):
        for name in glob.glob(source, recursive=True):  # noqa: PTH207  the same rule as reading data
            if ".." in Path(name).parts:
                raise JobError(
                    f"{name} lies outside the folder that is uploaded",
                    at="data.source",
                    why="a relative path is uploaded with the job, below the folder it starts at",
                    try_="run from a folder above the data, or give an absolute path on storage the cluster reaches",
                )
            if Path(name).is_file():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, target)
    return folder


def anchored(job: SFTJob) -> SFTJob:
    """The job with run folder and local model folders as absolute paths: on the cluster it runs in another folder."""
    update: dict[str, Any] = {"output_dir": str(job.run_dir.parent)}
    if isinstance(job.model, Model):
        folders = {
            name: str(path.absolute())
            for name in ("id", "tokenizer")
            if (value := getattr(job.model, name)) is not None and (path := Path(value).expanduser()).is_dir()
        }
        update["model"] = job.model.model_copy(update=folders)
    return job.model_copy(update=update)


def check_upload(folder: Path) -> int:
    """Bytes below `folder`; more than 100 MiB is refused with the largest files named."""
    sizes = file_sizes(folder)
    total = sum(sizes.values())
    if total > UPLOAD_LIMIT_BYTES:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
        raise JobError(
            f"{_size(total)} is too much to upload with a job",
            at="data.source",
            why=f"the limit is {_size(UPLOAD_LIMIT_BYTES)}; largest: "
            + ", ".join(f"{path} {_size(size)}" for path, size in largest),
            try_="put the data on storage every node reaches and name it by an absolute path",
        )
    return total


def _relative_sources(job: SFTJob) -> list[str]:
    sources = (job.data.source,) if isinstance(job.data.source, str) else job.data.source
    return [source for source in sources if not Path(source).expanduser().is_absolute()]


def _client(address: str) -> Any:
    """A client of the dashboard at `address`, after a bounded check that it answers and takes our token."""
    import requests

    if not address.startswith(("http://", "https://")):
        raise JobError(
            f"{address!r} is not the address of a Ray dashboard",
            at="--address",
            why="jobs are submitted over HTTP",
            try_="--address http://host:8265; `farspan run` takes host:6379",
        )
    address = address.rstrip("/")
    headers = _auth_headers()
    try:
        answer = requests.get(f"{address}/api/version", headers=headers, timeout=ANSWER_S)
    except requests.RequestException as error:
        raise _refused(address, error) from error
    if answer.status_code in (401, 403):
        found = "the token found here is not the cluster's" if headers else "no token was found here"
        raise ClusterNotReady(
            f"the Ray dashboard at {address} refuses us",
            at=address,
            why=f"token authentication is on there, and {found} (HTTP {answer.status_code})",
            try_="put the cluster's token into RAY_AUTH_TOKEN or into ~/.ray/auth_token",
        )
    if not answer.ok or "ray_version" not in answer.text:
        raise _refused(address, RuntimeError(f"HTTP {answer.status_code}, not a Ray dashboard"))
    with _without_environment("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would override the address given
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(address, headers=headers)
        except (RuntimeError, OSError) as error:
            raise _refused(address, error) from error


def _auth_headers() -> dict[str, str]:
    """The bearer token, from where Ray looks for it: variable, file named by a variable, file in the home folder."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


async def _tail(client: Any, address: str, submission: str, write: Callable[[str], object]) -> None:
    """Stream the log to its end, joining again where a connection broke."""
    import aiohttp

    passed_on = 0
    last_heard_s = time.monotonic()
    while True:
        try:
            seen = 0
            async for text in client.tail_job_logs(submission):
                new = text[max(0, passed_on - seen) :]
                seen += len(text)
                passed_on = max(passed_on, seen)
                last_heard_s = time.monotonic()
                write(new)
            if client.get_job_status(submission).is_terminal():
                return
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            if time.monotonic() - last_heard_s > LOST_S:
                raise _refused(address, error) from error
        await asyncio.sleep(1.0)


@contextmanager
def _without_environment(*names: str) -> Iterator[None]:
    kept: Mapping[str, str] = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _refused(address: str, error: Exception) -> ClusterNotReady:
    return ClusterNotReady(
        f"no Ray dashboard answers at {address}",
        at=address,
        why=" ".join(str(error).split())[:400] or type(error).__name__,
        try_="check the address (http://host:8265) and that Ray was started with its dashboard",
    )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
