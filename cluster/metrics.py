"""Live metrics of a run for Prometheus, through `ray.util.metrics`: no port of our own, no agent to deploy.

Ray collects them on every node and serves them under `ray_<name>` with the tags below; `infra/prometheus` scrapes
that and `infra/grafana` draws it. They are for watching a cluster: a process that lives less than about ten seconds
may never be seen, and the record of a run is its `metrics.jsonl`.

| name | kind | tags | meaning |
|---|---|---|---|
| `farspan_step` | gauge | run | last finished optimizer step |
| `farspan_loss` | gauge | run | mean loss over the trained tokens of the step |
| `farspan_grad_norm` | gauge | run | gradient norm before clipping |
| `farspan_step_seconds` | gauge | run | wall-clock seconds of the step |
| `farspan_tokens_per_second` | gauge | run | tokens of the step by its seconds, all ranks together |
| `farspan_tokens` | counter | run | tokens seen since the trainer process started |
| `farspan_resident_bytes` | gauge | run, rank | resident memory of the rank's process |
| `farspan_phase_seconds` | counter | run, rank, phase | time spent in each phase |

Tags called `job` or `instance` would collide with Prometheus' own and come out as `exported_job`, so there are none.
"""

from __future__ import annotations

import math
from typing import Any

GAUGES = {
    "step": ("farspan_step", "Last finished optimizer step"),
    "loss": ("farspan_loss", "Mean loss over the trained tokens of the step"),
    "grad_norm": ("farspan_grad_norm", "Gradient norm before clipping"),
    "step_s": ("farspan_step_seconds", "Wall-clock seconds of the step"),
    "tokens_per_s": ("farspan_tokens_per_second", "Tokens of the step by its seconds, all ranks together"),
}
"""Key of a step record -> metric name and description."""
NAMES = (*(name for name, _ in GAUGES.values()), "farspan_tokens", "farspan_resident_bytes", "farspan_phase_seconds")


class RankMetrics:
    """The metrics one rank owns. Setting one is a dictionary update; Ray exports them from a thread of its own."""

    def __init__(self, *, run: str, rank: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self._run, self._rank = {"run": run}, {"run": run, "rank": str(rank)}
        self._gauges = {key: Gauge(name, text, tag_keys=("run",)) for key, (name, text) in GAUGES.items()}
        self._tokens = Counter("farspan_tokens", "Tokens seen since the trainer process started", tag_keys=("run",))
        self._resident = Gauge("farspan_resident_bytes", "Resident memory of the rank", tag_keys=("run", "rank"))
        self._phase = Counter("farspan_phase_seconds", "Seconds in each phase", tag_keys=("run", "rank", "phase"))

    def step_finished(self, record: dict[str, Any]) -> None:
        """Take what a step record holds; call on rank 0."""
        for key, gauge in self._gauges.items():
            value = record.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                gauge.set(float(value), tags=self._run)
        if record.get("tokens", 0) > 0:
            self._tokens.inc(record["tokens"], tags=self._run)

    def resident(self, rss_bytes: int) -> None:
        self._resident.set(rss_bytes, tags=self._rank)

    def phase_left(self, phase: str, lasted_s: float) -> None:
        if lasted_s > 0:
            self._phase.inc(lasted_s, tags={**self._rank, "phase": phase})
