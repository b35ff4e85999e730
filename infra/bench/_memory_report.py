"""The tables, the verdict and the picture of `farspan bench memory`, from its cells."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from farspan.memory.policies import FIXED_POLICIES

Done = dict[str, Any]
"""`machine` and `cells`, as the results file has them."""
TIMED = "full fp32"
"""The configuration that is timed."""
PEERS = ("checkpoint", "selective", "save_on_cpu")
ALLOWED_MISS, ALLOWED_RATIO = 0.03, 1.03
T_95 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132}
"""One-sided 95 % points of Student's t by number of repeats."""


def peers_of(done: Done, length: int) -> list[str]:
    """Torch's tools that were timed at a length."""
    return [peer for peer in PEERS if peer in timed_names(done, length)]


def step_s(done: Done, length: int, repeat: int, name: str) -> float:
    return min(done["cells"][f"time/{length}/{repeat}/{name}"]["step_s"])


def timed_names(done: Done, length: int) -> list[str]:
    prefix = f"time/{length}/0/"
    return [key.removeprefix(prefix) for key in done["cells"] if key.startswith(prefix)]


def lower_bound(ratios: list[float]) -> float:
    """Of the typical ratio, with 95 % confidence."""
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) < 2:
        return math.exp(logs[0])
    spread = statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(statistics.mean(logs) - T_95[len(logs)] * spread)


def verdicts(done: Done, lengths: list[int], repeats: dict[int, int]) -> list[dict[str, Any]]:
    """`solve` against each of torch's tools in the same memory."""
    found = []
    for length in lengths:
        for peer in peers_of(done, length):
            if f"solve at {peer}" not in timed_names(done, length):
                continue
            ratios = [
                step_s(done, length, r, f"solve at {peer}") / step_s(done, length, r, peer)
                for r in range(repeats[length])
            ]
            found.append(
                {"length": length, "peer": peer, "median": statistics.median(ratios), "lower": lower_bound(ratios)}
            )
    return found


def report(
    done: Done, found: list[dict[str, Any]], model: dict[str, Any], lengths: list[int], repeats: dict[int, int]
) -> tuple[str, bool]:
    mib = 2**20
    cells = done["cells"]
    where = ", ".join(f"{k} {v}" for k, v in done["machine"].items())
    shape = ", ".join(f"{k} {v}" for k, v in model.items())
    lines = ["# Memory policies, planned and measured", "", f"`farspan bench memory`. {shape}. Machine: {where}.", ""]
    lines += ["## Peaks: planned from layers measured at 2,048 rows at most", ""]
    lines += [
        "| configuration | rows | policy | planned MiB | measured MiB | miss | resident | host | disk | peak at |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in found:
        lines.append(
            f"| {row['config']} | {row['length']} | {row['policy']} | {row['planned'] / mib:.1f} "
            f"| {row['measured'] / mib:.1f} | {row['miss']:+.2%} | {row['resident'] / mib:.0f} "
            f"| {row['host'] / mib:.1f} | {row['disk'] / mib:.1f} | {row['at']} |"
        )
    worst = max((abs(row["miss"]) for row in found), default=0.0)
    lines += ["", f"Largest miss {worst:.2%} ({ALLOWED_MISS:.0%} allowed).", ""]
    lines += ["## Time and bytes moved", ""]
    lines += ["| rows | system | device MiB | host MiB | median step s | to keep | out MiB | in MiB | disk MiB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for length in lengths:
        for name in timed_names(done, length):
            every = [step_s(done, length, r, name) for r in range(repeats[length])]
            ratios = [step_s(done, length, r, name) / step_s(done, length, r, "keep") for r in range(repeats[length])]
            peak = cells[f"peak/{TIMED}/{length}/{name}"]
            moved = peak.get("moved_bytes", {})
            lines.append(
                f"| {length} | {name} | {peak['peak_bytes'] / mib:.1f} | {peak.get('host_bytes', 0) / mib:.1f} "
                f"| {statistics.median(every):.2f} | {statistics.median(ratios):.3f} "
                f"| {moved.get('copy_out', 0) / mib:.0f} | {moved.get('copy_in', 0) / mib:.0f} "
                f"| {moved.get('disk_write', 0) / mib:.0f} |"
            )
    compared = verdicts(done, lengths, repeats)
    lines += ["", "`solve` in the memory each of torch's tools was seen to take, time over theirs:", ""]
    lines += ["| rows | against | median ratio | lower 95 % bound |", "|---|---|---|---|"]
    lines += [f"| {v['length']} | {v['peer']} | {v['median']:.3f} | {v['lower']:.3f} |" for v in compared]
    missing = [
        f"{peer} at {n}"
        for n in lengths
        for peer in peers_of(done, n)
        if f"solve at {peer}" not in timed_names(done, n)
    ]
    if missing:
        lines += ["", f"No plan in as little device memory as {', '.join(missing)}."]
    good = worst <= ALLOWED_MISS and all(v["lower"] <= ALLOWED_RATIO for v in compared) and not missing
    return "\n".join(lines) + "\n", good


def plot(done: Done, lengths: list[int], repeats: dict[int, int], out: Path) -> None:
    """Step time over device peak: the frontier of `solve`, the fixed policies, torch's tools."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(lengths), figsize=(6.4 * len(lengths), 4.6), squeeze=False)
    for axis, length in zip(axes[0], lengths):
        points = {
            name: (
                done["cells"][f"peak/{TIMED}/{length}/{name}"]["peak_bytes"] / 2**20,
                statistics.median(step_s(done, length, r, name) for r in range(repeats[length])),
            )
            for name in timed_names(done, length)
        }
        alone = ("keep", "solve at checkpoint", "solve at selective")  # no host memory in these either
        with_host = [name for name in points if "with host" in name or name == "solve at save_on_cpu"]
        frontier = sorted(
            point for name, point in points.items() if (name not in with_host and name.endswith("%")) or name in alone
        )
        axis.plot(*zip(*frontier), "o-", color="#1f5fbf", label="solve, device memory alone", zorder=3)
        if with_host:
            frontier = sorted(points[name] for name in with_host)
            axis.plot(*zip(*frontier), "o--", color="#1f9f8f", label="solve, with host memory", zorder=3)
        for group, colour, marker, label, below in (
            (FIXED_POLICIES, "#555555", "^", "fixed policies of other trainers, same executor", -11),
            (PEERS, "#c2571a", "s", "torch's own tools", 6),
        ):
            shown = sorted((*points[name], name) for name in group if name in points)
            axis.plot([x for x, _, _ in shown], [y for _, y, _ in shown], marker, color=colour, label=label)
            for index, (x, y, name) in enumerate(shown):
                near = sum(
                    abs(other[0] - x) < 0.1 * x for other in shown[:index]
                )  # names of neighbours one below the other
                axis.annotate(
                    name, (x, y), textcoords="offset points", xytext=(7, below * (1 + near)), fontsize=8, color=colour
                )
        axis.set_title(f"{length:,} rows")
        axis.set_xlabel("device peak of a step, MiB")
        axis.set_ylabel("step, s (median)")
        axis.set_ylim(0, 1.15 * max(y for _, y in points.values()))
        axis.grid(alpha=0.25)
        axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
