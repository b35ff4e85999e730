"""Connect to a Ray cluster, or start one on this machine; never wait for long without saying for what.

`ray.init` on an address where nothing (or something else) listens retries for minutes and then ends the process.
So an address is probed first: a TCP connection, then the HTTP/2 greeting every gRPC server sends, both within
`PROBE_S`. A local Ray is always started with `address="local"`: anything else reads the traces dead clusters leave
behind and tries to join them. Ray's token authentication stays as it is (on by default since 2.60).
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.cluster.package import package_root, stage_package
from farspan.errors import ClusterNotReady, JobError

PROBE_S = 5.0
"""Longest wait for a TCP connection, and again for the first answer."""
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
"""Trainers exchange tensors among themselves; only task results pass through the store, and it spills to disk."""


@dataclass(frozen=True)
class Session:
    """A connection to Ray; a context manager that ends it."""

    address: str
    """host:port of the cluster, for messages."""
    local: bool
    """True: a Ray of our own on this machine. Its resources cannot grow, and it ends with this process."""
    dashboard_url: str | None = None
    owned: bool = True
    """False: the process was connected already; closing leaves that connection alone."""

    def close(self) -> None:
        import ray

        if self.owned:
            ray.shutdown()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(address: str | None = None, *, dashboard: bool = False, num_cpus: int | None = None) -> Session:
    """Start a Ray on this machine (`None`), or join the one at `address`.

    Args:
        address: `None`, `"auto"` (the cluster this machine belongs to), `host:port`, or `ray://host:port`.
        dashboard: start the dashboard of a local Ray.
        num_cpus: CPU cores a local Ray offers; default: those of this machine.

    Raises:
        ClusterNotReady: nobody answers at the address, or the cluster refuses us. Within 15 seconds.
        JobError: `address` is not an address.
    """
    import ray

    if ray.is_initialized():
        address_now = ray.get_runtime_context().gcs_address
        return Session(address=address_now, local=address is None, owned=False)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would hide the GPUs from an actor that asked for none by setting CUDA_VISIBLE_DEVICES, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default workers of a local Ray run at niceness 15: beside anything else on this machine a rank would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address is None:
        return _start_local(dashboard=dashboard, num_cpus=num_cpus)
    host, port = _resolve(address)
    _probe(address, host, port)
    return _join(address)


def worker_python_path() -> str:
    """PYTHONPATH for workers on this machine: ours first, so that they import the same farspan as we do."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(package_root()), *(str(Path(path).absolute()) for path in inherited if path)]
    return os.pathsep.join(dict.fromkeys(paths))


def _start_local(*, dashboard: bool, num_cpus: int | None) -> Session:
    import ray

    try:
        context = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": worker_python_path()}},
        )
    except Exception as error:  # Ray raises a bare one when its own node is not up in time
        raise ClusterNotReady(
            "a local Ray did not start",
            at="this machine",
            why=_first_line(error),
            try_="look at the newest folder `session_*/logs` in Ray's temp folder; is the disk full?",
        ) from error
    url = context.address_info.get("webui_url") or None
    return Session(address=context.address_info["gcs_address"], local=True, dashboard_url=url and f"http://{url}")


def _resolve(address: str) -> tuple[str, int]:
    """Host and port behind an address as users write it."""
    target = address.removeprefix("ray://")
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        target = canonicalize_bootstrap_address("auto") or ""
        if not target:
            raise ClusterNotReady(
                "no Ray cluster on this machine",
                at="--address auto",
                why="RAY_ADDRESS is not set, and no `ray start` left the address of its cluster here",
                try_="give host:port, or leave --address out to start a local Ray",
            )
    host, _, port = target.rpartition(":")
    if "://" in target or not host or not port.isdigit():
        raise JobError(
            f"{address!r} is not the address of a Ray cluster",
            at="--address",
            why="expected auto, host:port or ray://host:port; http://host:8265 is where `farspan submit` sends jobs",
            try_="--address host:6379",
        )
    return host.strip("[]"), int(port)


def _probe(address: str, host: str, port: int) -> None:
    """Return when a gRPC server answers at host:port; else raise ClusterNotReady."""
    began = time.monotonic()

    def refused(why: str) -> ClusterNotReady:
        return ClusterNotReady(
            f"no Ray answers at {address}",
            at=f"{host}:{port}",
            why=f"{why} (tried for {time.monotonic() - began:.1f} s)",
            try_="check with `ray status --address`; leave --address out to run on a local Ray",
        )

    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError as error:
        raise refused(f"no TCP connection: {_first_line(error)}") from error
    if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return  # a plain-text greeting would be refused there
    import grpc  # type: ignore[import-untyped]

    channel = grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=PROBE_S)
    except grpc.FutureTimeoutError as error:
        raise refused("something listens there, but it does not speak gRPC as Ray does") from error
    finally:
        channel.close()


def _join(address: str) -> Session:
    import ray
    from ray.exceptions import RayError

    arguments: dict[str, Any] = {"address": address, "logging_level": "ERROR", "log_to_driver": False}
    with tempfile.TemporaryDirectory(prefix="farspan-") as folder:
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # else: a submitted job, whose working_dir holds farspan
            arguments["runtime_env"] = {"py_modules": [str(stage_package(Path(folder)))]}
        try:
            ray.init(**arguments)
        except (RayError, RuntimeError, OSError, TimeoutError, ValueError) as error:
            raise ClusterNotReady(
                f"the Ray at {address} did not let us in",
                at=address,
                why=_first_line(error),
                try_="use its Ray and Python version; put its token into RAY_AUTH_TOKEN or ~/.ray/auth_token",
            ) from error
    return Session(address=address, local=False)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
