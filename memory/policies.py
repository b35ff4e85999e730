"""The fixed policies that others ship, as placements: baselines that run through the same executor.

None of them looks at whether it fits: `memory.evaluate` says so, and by how much it does not. `memo` and `ssdtrain`
follow the papers' rules for how much to move, with this problem's measured times in the place of their estimates.
"""

from __future__ import annotations

from typing import Literal

from farspan.memory.plan import LayerPlan, Placement, Rows, Tier
from farspan.memory.problem import LayerKind, PlanProblem

FixedPolicy = Literal["keep", "recompute", "offload-inputs", "memo", "ssdtrain"]
FIXED_POLICIES: tuple[FixedPolicy, ...] = ("keep", "recompute", "offload-inputs", "memo", "ssdtrain")
KEEP = LayerPlan(keep=True)


def fixed_policies(problem: PlanProblem) -> tuple[FixedPolicy, ...]:
    """Those that can be carried out: reversible layers are not kept."""
    return FIXED_POLICIES[1:] if problem.reversible else FIXED_POLICIES


def fixed_policy(problem: PlanProblem, policy: FixedPolicy) -> Placement:
    """A fixed policy's placement, feasible or not.

    `keep`: autograd stores all. `recompute`: x of every layer on the device, each layer run twice (plain
    checkpointing). `offload-inputs`: x of every layer in host memory, each layer run twice (ALST, Unsloth, Axolotl).
    `memo`: see `memo_layers`. `ssdtrain`: see `ssdtrain_layers`.
    """
    rows = problem.rows
    layers = {
        "keep": lambda: [KEEP] * len(problem.layers),
        "recompute": lambda: [LayerPlan(x=Rows(device=rows))] * len(problem.layers),
        "offload-inputs": lambda: [LayerPlan(x=Rows(host=rows))] * len(problem.layers),
        "memo": lambda: memo_layers(problem),
        "ssdtrain": lambda: ssdtrain_layers(problem),
    }[policy]()
    return Placement(
        rows=rows,
        attention_rows=problem.attention_rows,
        layers=tuple(layers),
        frozen_below=problem.frozen_below,
        saved=problem.saved,
        tier_codec=problem.tier_codec,
    )


def grid_parts(rows: int, part_rows: int | None) -> int:
    """Parts of a tensor cut every `part_rows` rows from its start; None: one."""
    return -(-rows // (part_rows or rows))


def grid_rows(rows: int, part_rows: int | None, stored_parts: int) -> int:
    """Rows of the last `stored_parts` of these parts, of which the very last may be cut short."""
    return max(0, rows - (part_rows or rows) * (grid_parts(rows, part_rows) - stored_parts))


def stored_whole(problem: PlanProblem, kind: LayerKind, tier: Tier) -> LayerPlan:
    """x, O and every linear output that backward needs, on one tier."""
    return LayerPlan(
        x=Rows(**{tier: problem.rows}),
        o=Rows(**{tier: problem.attention_rows}) if kind.o_bytes else Rows(),
        linear={c.name: Rows(**{tier: problem.rows}) for c in kind.linear if not c.inner_only},
    )


def memo_layers(problem: PlanProblem) -> list[LayerPlan]:
    """MEMO (Zhao et al., 2024): x and O of every layer whole to the host, a share alpha of the rest, the rest again.

    Alpha is the largest share with (x + o + alpha * rest) / bandwidth <= the layer's forward time, and with all
    layers' such bytes within the host's. The last two layers, whose backward comes at once, stay on the device whole.
    """
    kinds = [problem.kind(layer) for layer in range(len(problem.layers))]
    moved = kinds[problem.frozen_below : max(problem.frozen_below, len(kinds) - 2)]
    host_bytes = problem.budgets.host_bytes - sum(s.bytes for s in problem.states if s.tier == "host")
    rest = {k.name: sum(c.bytes_on("host") for c in k.linear if not c.inner_only) for k in problem.kinds}
    whole = {kind.name: kind.x_bytes_on("host") + kind.o_bytes_on("host") for kind in problem.kinds}
    room = host_bytes - sum(whole[kind.name] for kind in moved)
    share_of_host = room / max(1, sum(rest[kind.name] for kind in moved))

    def offloaded(kind: LayerKind) -> LayerPlan:
        forward_s = kind.forward_s + kind.attention_forward_s
        hidden = problem.links.copy_out_bytes_per_s * forward_s - whole[kind.name]
        alpha = min(1.0, max(0.0, min(share_of_host, hidden / max(1, rest[kind.name]))))
        all_rows = stored_whole(problem, kind, "host")
        parts = {c.name: int(alpha * grid_parts(problem.rows, c.tile_rows) + 1e-9) for c in kind.linear}
        stored = {c.name: grid_rows(problem.rows, c.tile_rows, parts[c.name]) for c in kind.linear}
        linear = {name: Rows(host=stored[name]) for name in all_rows.linear if stored[name]}
        return LayerPlan(x=all_rows.x, o=all_rows.o, linear=linear)

    plans = {kind.name: offloaded(kind) for kind in problem.kinds}
    return [
        plans[kind.name] if layer < len(kinds) - 2 else stored_whole(problem, kind, "device")
        for layer, kind in enumerate(kinds)
    ]


def ssdtrain_layers(problem: PlanProblem) -> list[LayerPlan]:
    """SSDTrain (Wu et al., 2024): nothing again but what is cheap; to disk what its bandwidth hides, the rest stays.

    The budget is bandwidth times compute time, forward for writing and backward for reading, taken per layer so that
    no layer waits. x, O and linear outputs go to disk in this order until it is spent, of the last one the first rows.
    The last layer stays on the device.
    """
    plans: dict[str, LayerPlan] = {}
    for kind in problem.kinds:
        write_bytes = problem.links.disk_write_bytes_per_s * (kind.forward_s + kind.attention_forward_s)
        read_bytes = problem.links.disk_read_bytes_per_s * (kind.backward_s + kind.attention_backward_s)
        left_bytes = min(write_bytes, read_bytes)

        def split(rows: int, part_rows: int | None, size: int) -> Rows:
            nonlocal left_bytes
            parts = grid_parts(rows, part_rows)
            to_disk = parts if size <= left_bytes else int(left_bytes * rows / size / (part_rows or rows))
            device = grid_rows(rows, part_rows, parts - to_disk)
            left_bytes -= size * (rows - device) / rows
            return Rows(device=device, disk=rows - device)

        plans[kind.name] = LayerPlan(
            x=split(problem.rows, 1, kind.x_bytes_on("disk")),
            o=split(problem.attention_rows, kind.o_block_rows, kind.o_bytes_on("disk")) if kind.o_bytes else Rows(),
            linear={
                c.name: split(problem.rows, c.tile_rows, c.bytes_on("disk")) for c in kind.linear if not c.inner_only
            },
        )
    kinds = [problem.kind(layer) for layer in range(len(problem.layers))]
    return [plans[kind.name] for kind in kinds[:-1]] + [stored_whole(problem, kinds[-1], "device")]
