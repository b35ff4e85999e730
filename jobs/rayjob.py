"""A KubeRay `RayJob` manifest for a job: `kubectl apply -f -` makes a cluster of the right size, runs, and removes it.

Two documents: a ConfigMap with the resolved job, mounted into the head pod where the driver runs, and the RayJob. The
head offers no CPUs to Ray, so ranks land on workers only; a worker pod holds as many ranks as it has GPUs, so that
sequence-parallel groups stay on one node as long as they fit. Nothing here talks to Kubernetes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from farspan.errors import JobError
from farspan.jobs.config import SFTJob

MOUNT = "/etc/farspan"
STORAGE = "/storage"
LABEL_LENGTH = 47
"""KubeRay derives names of pods and services from the RayJob's, and Kubernetes cuts at 63."""


def rayjob_manifest(
    job: SFTJob,
    *,
    image: str = "farspan:latest",
    gpus_per_node: int = 8,
    storage_claim: str = "farspan",
) -> str:
    """YAML of the ConfigMap and the RayJob for `job`.

    Args:
        image: container image with farspan installed.
        gpus_per_node: ranks of one worker pod at most.
        storage_claim: ReadWriteMany PersistentVolumeClaim; mounted at `/storage`, where the run folder goes.

    Raises:
        JobError: `parallel.sp` or `parallel.dp` is "auto": the cluster must be sized before it exists.
    """
    sp, dp = job.parallel.sp, job.parallel.dp
    if sp == "auto" or dp == "auto":
        raise JobError(
            "the size of the gang is not known",
            at=f"parallel.sp = {sp}, parallel.dp = {dp}",
            why="the manifest says how many worker pods to start, before there is a machine to derive it from",
            try_="--set parallel.sp=8 --set parallel.dp=1",
        )
    use_gpu = job.cluster.use_gpu is not False
    per_pod = min(gpus_per_node, sp * dp)
    pods = math.ceil(sp * dp / per_pod)
    cluster = job.cluster.model_copy(update={"use_gpu": use_gpu})
    job = job.model_copy(update={"output_dir": f"{STORAGE}/outputs", "cluster": cluster})
    name = kubernetes_name(job.name)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-job"},
        "data": {"job.yaml": yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)},
    }
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"farspan run {MOUNT}/job.yaml --address auto",
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 0,
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"PYTHONUNBUFFERED": "1"}}),
            "rayClusterSpec": {
                "rayVersion": _ray_version(),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                    "template": _pod("ray-head", image, {"cpu": 2, "memory": "8Gi"}, storage_claim, job_of=name),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "trainer",
                        "replicas": pods,
                        "minReplicas": pods,
                        "maxReplicas": pods,
                        "rayStartParams": {},
                        "template": _pod("ray-worker", image, _worker(job, per_pod, use_gpu), storage_claim),
                    }
                ],
            },
        },
    }
    return yaml.safe_dump_all([config_map, ray_job], sort_keys=False)


def kubernetes_name(name: str) -> str:
    """A run's name as Kubernetes takes it: lower case, digits and dashes, starting with a letter, not too long."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:LABEL_LENGTH].rstrip("-")


def _worker(job: SFTJob, ranks: int, use_gpu: bool) -> dict[str, Any]:
    """Resources of a worker pod: its ranks, a core for Ray itself, and memory in proportion."""
    cores = math.ceil(ranks * job.cluster.cpus_per_actor) + 1
    resources: dict[str, Any] = {"cpu": cores, "memory": f"{(64 if use_gpu else 8) * ranks}Gi"}
    if use_gpu:
        resources["nvidia.com/gpu"] = ranks
    return resources


def _pod(
    container: str, image: str, resources: dict[str, Any], claim: str, *, job_of: str | None = None
) -> dict[str, Any]:
    mounts = [{"name": "storage", "mountPath": STORAGE}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL and gloo pass tensors between processes in it
    ]
    if job_of is not None:
        mounts.append({"name": "job", "mountPath": MOUNT})
        volumes.append({"name": "job", "configMap": {"name": f"{job_of}-job"}})
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "resources": {"requests": dict(resources), "limits": dict(resources)},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        }
    }


def _ray_version() -> str:
    from importlib.metadata import version

    return version("ray")
