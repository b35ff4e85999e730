"""Measure a job's layers where it will train: one Ray task with the resources of one rank."""

from __future__ import annotations

from farspan.errors import FarspanError, RunFailed
from farspan.trainer.config import CalibrationRequest

LIMIT_S = 600.0
"""Building a wide model's layer and running it some thirty times, on a slow core."""


def measure_on_cluster(request: CalibrationRequest, *, cpus: float, gpus: int = 0) -> str:
    """JSON of `memory.calibration.Measured`.

    Raises:
        RunFailed: the task failed, or took more than ten minutes.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1, runtime_env={"env_vars": environment})
    answer = task(_measure).remote(request.model_dump_json())
    try:
        return str(ray.get(answer, timeout=LIMIT_S))
    except RayTaskError as error:
        if isinstance(error.cause, FarspanError):
            raise error.cause from None
        why = f"{type(error.cause).__name__}: {error.cause}"
    except GetTimeoutError:
        ray.cancel(answer, force=True)
        why = f"no answer after {LIMIT_S:g} s"
    except RayError as error:
        why = " ".join(str(error).split())
    raise RunFailed(
        "measuring a layer of the model failed",
        at="memory.profile",
        why=why[:800],
        try_="--set memory.profile=analytic",
    )


def _measure(request: str) -> str:
    """In a worker."""
    from farspan.trainer.calibrate import calibrate

    return calibrate(CalibrationRequest.model_validate_json(request)).model_dump_json()
