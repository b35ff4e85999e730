"""Planning problems and placements to draw from, and the 8B shape on an H200 whose figures are known.

Importing this needs neither torch nor ray. Drawn bytes and seconds are small whole or binary fractions, so that
sums are exact and two implementations of the same story agree to the last digit wherever they agree at all.

`python tests/plan_cases.py` solves the saved problems anew and writes what is better than before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hypothesis import strategies as st

from farspan.memory.plan import TIERS, LayerPlan, Placement, Rows
from farspan.memory.policies import KEEP, grid_parts, grid_rows
from farspan.memory.problem import Budgets, Head, LayerKind, LinearClass, Links, OnHost, PlanProblem, State, TierCodes
from farspan.schema import Schema

PROBLEMS = Path(__file__).parent / "plan_problems"
KIB, GIB = 1024, 2**30
SECONDS = st.integers(0, 32).map(lambda n: n / 8)
BANDWIDTHS = st.sampled_from([0.5, 1.0, 2.0, 8.0, 64.0])


@st.composite
def linear_classes(draw: st.DrawFn, name: str, inner_only: bool, rows: int, tiles: int) -> LinearClass:
    return LinearClass(
        name=name,
        bytes=draw(st.integers(1, 6)) * 4 * tiles,
        matmul_s=draw(SECONDS),
        tile_rows=None if tiles == 1 else rows // tiles,
        inner_only=inner_only,
    )


@st.composite
def layer_kinds(
    draw: st.DrawFn, name: str, shape: tuple[int, int, int, int], classes: int, gradients: bool
) -> LayerKind:
    rows, x_bytes, o_blocks, o_block_rows = shape
    names = [("o_proj", False), ("down_proj", True), ("gate_proj", False)]
    tiles = draw(st.sampled_from([t for t in (1, 2, 4) if rows % t == 0]))
    linear = tuple(draw(linear_classes(name, inner, rows, tiles)) for name, inner in names[:classes])
    elementwise_s = draw(SECONDS)
    has_attention = draw(st.integers(0, 4)) > 0
    o_bytes = draw(st.integers(1, 6)) * 4 * o_blocks if has_attention else 0
    return LayerKind(
        name=name,
        x_bytes=x_bytes,
        o_bytes=o_bytes,
        o_block_rows=o_block_rows if has_attention else 1,
        linear=linear,
        keep_bytes=draw(st.integers(1, 30)) * 4,
        forward_s=elementwise_s + sum(c.matmul_s for c in linear),
        attention_forward_s=draw(SECONDS) if has_attention else 0.0,
        attention_growth=draw(st.sampled_from([1.0, 1.5, 2.0])),
        backward_s=draw(SECONDS),
        attention_backward_s=draw(SECONDS) if has_attention else 0.0,
        elementwise_s=elementwise_s,
        exchange_s=draw(st.sampled_from([0.0, 0.125])),
        forward_peak_bytes=x_bytes + o_bytes + draw(st.integers(0, 10)) * 4,
        keep_forward_peak_bytes=x_bytes + draw(st.integers(0, 5)) * 4,
        # what is given of it and the gradient of the output are there at once
        rebuild_peak_bytes=2 * x_bytes + sum(c.bytes for c in linear) + draw(st.integers(0, 20)) * 4,
        keep_backward_peak_bytes=2 * x_bytes + draw(st.integers(0, 10)) * 4,
        gradient_bytes=draw(st.integers(0, 5)) * 4 if gradients else 0,
        on_host=draw(on_hosts(x_bytes)),
    )


@st.composite
def on_hosts(draw: st.DrawFn, x_bytes: int) -> OnHost:
    return OnHost(
        keep_bytes=draw(st.integers(0, 1)) * 4,
        keep_forward_peak_bytes=x_bytes + draw(st.integers(0, 3)) * 4,
        keep_backward_peak_bytes=2 * x_bytes + draw(st.integers(0, 5)) * 4,
        rebuild_peak_bytes=2 * x_bytes + draw(st.integers(0, 5)) * 4,
        keep_host_bytes=draw(st.integers(0, 10)) * 4,
        keep_fetched_bytes=draw(st.integers(0, 12)) * 4,
        rebuild_host_bytes=draw(st.integers(0, 10)) * 4,
        rebuild_fetched_bytes=draw(st.integers(0, 12)) * 4,
    )


@st.composite
def problems(draw: st.DrawFn, layers: int = 6, kinds: int = 2, classes: int = 3, blocks: int = 8) -> PlanProblem:
    """A problem of at most so many layers, kinds, linear classes and blocks of O, that may or may not be feasible."""
    rows = draw(st.sampled_from([1, 2, 4, 8]))
    x_bytes = draw(st.integers(1, 4)) * 4 * rows  # of all kinds: the output of one is the input of another
    o_blocks = draw(st.sampled_from([b for b in (1, 2, 4, 8) if b <= blocks]))
    o_block_rows = draw(st.sampled_from([1, 2]))
    gradients = draw(st.booleans())
    shape = (rows, x_bytes, o_blocks, o_block_rows)
    drawn = tuple(
        draw(layer_kinds(f"kind{index}", shape, draw(st.integers(0, classes)), gradients))
        for index in range(draw(st.integers(1, kinds)))
    )
    names = draw(st.lists(st.sampled_from([kind.name for kind in drawn]), min_size=1, max_size=layers))
    by_name = {kind.name: kind for kind in drawn}
    stack = [by_name[name] for name in names]
    everything = sum(kind.keep_bytes + kind.x_bytes + kind.o_bytes for kind in stack)
    working = max(max(kind.rebuild_peak_bytes, kind.forward_peak_bytes) + kind.x_bytes for kind in stack)
    return PlanProblem(
        rows=rows,
        attention_rows=o_blocks * o_block_rows,
        kinds=drawn,
        layers=tuple(names),
        head=Head(
            held_bytes=draw(st.integers(0, 3)) * 4,
            forward_s=draw(SECONDS),
            peak_bytes=stack[-1].x_bytes + draw(st.integers(0, 10)) * 4,
            gradient_bytes=draw(st.integers(0, 3)) * 4,
            embedding_gradient_bytes=draw(st.integers(0, 3)) * 4,
            step_peak_bytes=draw(st.integers(0, 10)) * 4,
            step_s=draw(SECONDS),
        ),
        states=tuple(State(name=f"state on {tier}", tier=tier, bytes=draw(st.integers(0, 5)) * 4) for tier in TIERS),
        budgets=Budgets(
            device_bytes=working + int(draw(st.floats(0, 1.2)) * everything) + 40,
            host_bytes=int(draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.5])) * everything) + 20,
            disk_bytes=int(draw(st.sampled_from([0.0, 0.1, 0.3, 1.5])) * everything) + 20,
            disk_write_bytes=draw(st.sampled_from([None, None, everything // 4])),
        ),
        links=Links(
            copy_out_bytes_per_s=16 * draw(BANDWIDTHS),
            copy_in_bytes_per_s=16 * draw(BANDWIDTHS),
            disk_write_bytes_per_s=4 * draw(BANDWIDTHS),
            disk_read_bytes_per_s=4 * draw(BANDWIDTHS),
        ),
        micro_batches=draw(st.sampled_from([1, 1, 3])),
        frozen_below=draw(st.sampled_from([0, 0, 0, 1])) if len(names) > 1 else 0,
    )


def coupled(problem: PlanProblem) -> PlanProblem:
    """The same with reversible layers, which store half as much as their x, less for the second kind."""
    kinds = tuple(
        kind.model_copy(update={"side_bytes": kind.x_bytes // (2 + 2 * index)})
        for index, kind in enumerate(problem.kinds)
    )
    return problem.model_copy(update={"kinds": kinds, "reversible": True, "frozen_below": 0})


def anchored(problem: PlanProblem) -> PlanProblem:
    """Coupled in floating point: layers of the second kind store both streams, the others nothing."""
    kinds = tuple(
        kind.model_copy(update={"side_bytes": 2 * kind.x_bytes * (index == 1)})
        for index, kind in enumerate(problem.kinds)
    )
    return problem.model_copy(update={"kinds": kinds, "reversible": True, "frozen_below": 0})


def in_codes(problem: PlanProblem) -> PlanProblem:
    """The same with rows on host and disk in half of their bytes, a quarter of those of linear layers."""
    codes = TierCodes(kind="fp8", encode_bytes_per_s=32.0, decode_bytes_per_s=64.0)
    kinds = tuple(
        kind.model_copy(
            update={
                "coded_x_bytes": kind.x_bytes // 2,
                "coded_o_bytes": kind.o_bytes // 2,
                "linear": tuple(c.model_copy(update={"coded_bytes": c.bytes // 4}) for c in kind.linear),
            }
        )
        for kind in problem.kinds
    )
    return problem.model_copy(update={"kinds": kinds, "codes": codes})


@st.composite
def drawn_rows(draw: st.DrawFn, rows: int, part_rows: int | None, *, whole: bool = False) -> Rows:
    """Rows on the tiers, cut every `part_rows`; `whole`: none is left to be recomputed."""
    parts = grid_parts(rows, part_rows)
    cuts = sorted(draw(st.lists(st.integers(0, parts), min_size=3, max_size=3)))
    cuts[2] = parts if whole else cuts[2]
    device, host, disk = (grid_rows(rows, part_rows, cut) for cut in cuts)
    return Rows(device=device, host=host - device, disk=disk - host)


@st.composite
def placements(draw: st.DrawFn, problem: PlanProblem) -> Placement:
    """Any placement the contract allows for a problem, whether it fits or not."""
    layers: list[LayerPlan] = []
    saved = draw(st.sampled_from(["device", "host"] if problem.can_save_on_host else ["device"]))
    for index in range(len(problem.layers)):
        kind = problem.kind(index)
        if draw(st.integers(0, 3)) == 0 and not problem.reversible:
            layers.append(KEEP)
            continue
        head = problem.reversible or index == problem.frozen_below or layers[-1:] == [KEEP] or draw(st.booleans())
        layers.append(
            LayerPlan(
                x=draw(drawn_rows(problem.rows, 1, whole=True)) if head else None,
                o=draw(drawn_rows(problem.attention_rows, kind.o_block_rows)) if kind.o_bytes else Rows(),
                linear={
                    c.name: draw(drawn_rows(problem.rows, c.tile_rows))
                    for c in kind.linear
                    if (saved == "device" or c.inner_only) and draw(st.booleans())
                },
            )
        )
    return Placement(
        rows=problem.rows,
        attention_rows=problem.attention_rows,
        layers=tuple(layers),
        between=draw(st.sampled_from(["xo", "o"])),
        prefetch=draw(st.integers(0, 3)),
        slots=draw(st.integers(1, 3)),
        frozen_below=problem.frozen_below,
        saved=saved,
        tier_codec=problem.tier_codec,
    )


@st.composite
def apart(draw: st.DrawFn, problem: PlanProblem) -> Placement:
    """Each layer kept or rebuilt by itself, at most one of its tensors off the device, whole, on one tier.

    Then there is one way to tell the story: no order of transfers, no waiting for part of a unit.
    """
    drawn, layers = draw(placements(problem)), []
    for plan in drawn.layers:
        linear = {name: Rows(device=rows.stored) for name, rows in plan.linear.items()}
        tensors = {"x": Rows(device=problem.rows), "o": Rows(device=plan.o.stored)} | linear
        away = draw(st.sampled_from(sorted(tensors)))
        tensors[away] = Rows(**{draw(st.sampled_from(TIERS)): tensors[away].stored})
        x, o = tensors.pop("x"), tensors.pop("o")
        layers.append(KEEP if plan.keep else LayerPlan(x=x, o=o, linear=tensors))
    return drawn.model_copy(update={"layers": tuple(layers)})


@st.composite
def on_the_device(draw: st.DrawFn, problem: PlanProblem) -> Placement:
    """Any placement whose stored rows all lie on the device."""

    def here(plan: LayerPlan) -> LayerPlan:
        linear = {name: Rows(device=rows.stored) for name, rows in plan.linear.items()}
        x = None if plan.x is None else Rows(device=problem.rows)
        return KEEP if plan.keep else LayerPlan(x=x, o=Rows(device=plan.o.stored), linear=linear)

    drawn = draw(placements(problem))
    return drawn.model_copy(update={"layers": tuple(here(plan) for plan in drawn.layers)})


def llama_8b(tokens: int, kernels: Literal["today", "tiled"], layers: int = 32) -> PlanProblem:
    """LoRA on the 8B Llama shape, one H200 with 128 GiB of host memory: assumed rates, stated bytes.

    Rates: matmul 727, attention forward 640 and backward 540 TFLOP/s. Bytes per token and layer: `today` is what
    unmodified layers were measured to store (196 KiB) and use (235 KiB, O among it), `tiled` what fused and tiled
    kernels would (92, and 40 with x and O among it).
    """
    matmul, attention_forward, attention_backward = 727e12, 640e12, 540e12
    widths = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096, "gate_proj": 14336, "up_proj": 14336}
    widths["down_proj"] = 4096
    keep_kib, rebuild_kib, forward_kib, backward_kib = (196, 227, 110, 60) if kernels == "today" else (92, 24, 25, 40)
    inputs = {name: 14336 if name == "down_proj" else 4096 for name in widths}
    matmul_s = {name: 2 * inputs[name] * width * tokens / matmul for name, width in widths.items()}
    attention_flop = 8192 * tokens * tokens
    tile_rows = min(tokens // 8, 16384)
    kind = LayerKind(
        name="full",
        x_bytes=8 * KIB * tokens,
        o_bytes=8 * KIB * tokens + KIB * tokens // 8,
        o_block_rows=256,
        linear=tuple(
            LinearClass(
                name=name,
                bytes=2 * width * tokens,
                matmul_s=matmul_s[name],
                tile_rows=tile_rows,
                inner_only=name == "down_proj",
            )
            for name, width in widths.items()
        ),
        keep_bytes=keep_kib * KIB * tokens,
        forward_s=sum(matmul_s.values()),
        attention_forward_s=attention_flop / attention_forward,
        backward_s=sum(matmul_s.values()),
        attention_backward_s=2.5 * attention_flop / attention_backward,
        elementwise_s=0.0,
        forward_peak_bytes=forward_kib * KIB * tokens,
        keep_forward_peak_bytes=16 * KIB * tokens,
        rebuild_peak_bytes=rebuild_kib * KIB * tokens,
        keep_backward_peak_bytes=backward_kib * KIB * tokens,
        gradient_bytes=2_621_440,
    )
    return PlanProblem(
        rows=tokens,
        attention_rows=tokens,
        kinds=(kind,),
        layers=("full",) * layers,
        head=Head(
            held_bytes=KIB * tokens // 2,
            forward_s=4 * 0.525e9 * tokens / matmul,
            peak_bytes=16 * KIB * tokens + GIB,
            step_peak_bytes=GIB // 2,
            step_s=0.01,
        ),
        states=(State(name="weights", tier="device", bytes=layers * GIB // 2),),
        budgets=Budgets(device_bytes=135 * 10**9, host_bytes=115 * 10**9, disk_bytes=60 * 10**9),
        links=Links(
            copy_out_bytes_per_s=50e9,
            copy_in_bytes_per_s=50e9,
            disk_write_bytes_per_s=3e9,
            disk_read_bytes_per_s=3e9,
        ),
    )


def deep(tokens: int) -> PlanProblem:
    """80 layers of the 8B width, tiled kernels."""
    return llama_8b(tokens, "tiled", layers=80)


def windows_and_full(tokens: int) -> PlanProblem:
    """Full fine-tuning, two ranks of a sequence, five layers with a window of 4096 to each that sees everything."""
    problem = llama_8b(tokens, "tiled", layers=30)
    full = problem.kinds[0].model_copy(update={"gradient_bytes": 436_207_616, "exchange_s": tokens * 6e-8})
    share = min(1.0, 8192 / tokens)
    window = full.model_copy(
        update={
            "name": "window",
            "attention_forward_s": full.attention_forward_s * share,
            "attention_backward_s": full.attention_backward_s * share,
            "attention_growth": 1.0,
        }
    )
    return problem.model_copy(
        update={
            "attention_rows": 2 * tokens,
            "kinds": (full, window),
            "layers": ("window", "window", "window", "window", "window", "full") * 5,
            "states": (*problem.states, State(name="master and moments", tier="host", bytes=48 * GIB)),
            "micro_batches": 2,
        }
    )


class SavedProblem(Schema):
    """A problem and the best that was ever found for it."""

    problem: PlanProblem
    step_s: float | None
    """None: it does not fit."""
    smallest_device_bytes: int


def saved_problems() -> dict[str, PlanProblem]:
    lengths = {"32k": 2**15, "128k": 2**17, "512k": 2**19, "1m": 2**20, "2m": 2**21}
    cases = {
        f"llama-8b-{name}-{kernels}": llama_8b(tokens, kernels)
        for name, tokens in lengths.items()
        for kernels in ("today", "tiled")
    }
    cases |= {f"deep-{name}": deep(lengths[name]) for name in ("128k", "512k")}
    return cases | {f"windows-{name}": windows_and_full(lengths[name]) for name in ("32k", "128k")}


if __name__ == "__main__":
    from farspan.memory.evaluate import evaluate
    from farspan.memory.solve import smallest_device, solve

    for name, problem in saved_problems().items():
        smallest = smallest_device(problem)
        least = evaluate(problem, smallest).device_peak_bytes
        step_s = solve(problem).prediction.step_s if least <= problem.budgets.device_bytes else None
        path = PROBLEMS / f"{name}.json"
        known = SavedProblem.model_validate_json(path.read_text()) if path.exists() else None
        if known is not None and known.problem == problem:
            least = min(least, known.smallest_device_bytes)
            step_s = min((s for s in (step_s, known.step_s) if s is not None), default=None)
        saved = SavedProblem(problem=problem, step_s=step_s, smallest_device_bytes=least)
        path.write_text(saved.model_dump_json(indent=1) + "\n")
        print(name, step_s, least)
