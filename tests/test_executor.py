"""Rebuilding layers changes no bit: every placement against `keep`, and `keep` against plain transformers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from executor_models import LAYERS, LINEAR, Model, differing, on_rank, segments
from hypothesis import given, settings
from hypothesis import strategies as st
from sp_ranks import on_ranks

from farspan.errors import JobError
from farspan.memory import executor as executor_module
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.tiers import Store
from farspan.trainer.config import (
    L4Q,
    PEQA,
    S2A,
    FullFineTune,
    LoRA,
    PaCA,
)
from farspan.trainer.models import hollow_layers
from farspan.trainer.tiling import tile_mlp

pytestmark = pytest.mark.timeout(400)

S = 900
ADAPTERS = {
    "full": FullFineTune(),
    "lora": LoRA(rank=4),
    "dropout": LoRA(rank=4, dropout=0.2),
    "dora": LoRA(rank=4, dora=True),
    "some rows": LoRA(rank=4, keep_rows=0.3, dropout=0.1),
    "paca": PaCA(rank=4),
    "peqa": PEQA(bits=3),
    "s2a": S2A(prompt=3, side=8),
    "peqa, groups": PEQA(bits=4, group=16),
    "l4q": L4Q(rank=4, bits=4, group=16),
}
_kept: dict[Any, dict[str, torch.Tensor]] = {}


def kept(
    family: str, precision: str, adapter: str, lengths: tuple[int, ...], activations: Any = "autograd"
) -> dict[str, torch.Tensor]:
    """Losses and gradients of keeping everything, once per setting."""
    key = (family, precision, adapter, lengths, activations)
    if key not in _kept:
        made = Model(family, precision=precision, adapter=ADAPTERS[adapter], activations=activations)
        _kept[key] = made.gradients([*lengths])
    return _kept[key]


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    def spread(rows: int) -> Rows:
        first, second = sorted(draw(st.sampled_from([0, 1, 130, rows // 2, rows])) for _ in range(2))
        return Rows(device=min(first, rows), host=min(second, rows) - min(first, rows), disk=rows - min(second, rows))

    def some(rows: int) -> Rows:
        return spread(draw(st.sampled_from([0, 0, 1, 130, rows // 2, rows - 1, rows])))

    layers, saved = [], draw(st.sampled_from(["device", "host"]))
    for _ in range(LAYERS):
        if draw(st.integers(0, 4)) == 0 or (saved == "host" and draw(st.booleans())):
            layers.append(LayerPlan(keep=True))
            continue
        head = not layers or layers[-1].keep or draw(st.booleans())
        whole = draw(st.sets(st.sampled_from(LINEAR))) if draw(st.booleans()) else set()
        layers.append(LayerPlan(x=spread(S) if head else None, o=some(S), linear={n: spread(S) for n in whole}))
    return Placement(
        rows=S,
        attention_rows=S,
        layers=tuple(layers),
        between=draw(st.sampled_from(["xo", "o"])),
        prefetch=draw(st.integers(0, 2)),
        slots=draw(st.integers(1, 3)),
        saved=saved,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Workers delayed at random, and memory that is given up filled with NaN."""
    folder = tmp_path_factory.mktemp("disk")
    with Store(host_bytes=64 << 20, disk_dir=folder, disk_bytes=64 << 20, checksum=True, test_seed=0) as made:
        yield made


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen3"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    adapter=st.sampled_from([*ADAPTERS]),
    lengths=st.sampled_from([(S,), (300, 450, 150), (1, 897, 2)]),
    placement=placements(),
    hollow=st.booleans(),
    activations=st.sampled_from(["autograd", "autograd", "fused", "fp8", "int4"]),
)
def test_any_placement_is_bit_equal_to_keep(
    store: Store,
    family: str,
    precision: str,
    adapter: str,
    lengths: tuple[int, ...],
    placement: Placement,
    hollow: bool,
    activations: Any,
) -> None:
    made = Model(family, precision=precision, adapter=ADAPTERS[adapter], activations=activations)
    executor = Executor(made.layers, placement, store, hollow=hollow)
    assert differing(made.gradients([*lengths]), kept(family, precision, adapter, lengths, activations)) == []
    assert executor.ledger.bytes == 0
    assert {place: held for place, held in store.statistics().held_bytes.items() if held} == {}


def test_it_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given rows that are off by one bit show in the gradients."""
    original = executor_module._complete

    def off(layer: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
        out = out.clone()
        out[0, 0, 7] += 1e-3
        original(layer, out, lse)

    monkeypatch.setattr(executor_module, "_complete", off)
    made = Model()
    Executor(made.layers, segments(2, 0.0, S))
    assert len(differing(made.gradients([S]), kept("llama", "fp32", "full", (S,)))) > 10


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_keep_agrees_with_stock_transformers(family: str) -> None:
    stock = Model(family, attention="sdpa")
    torch.manual_seed(100)
    ids = torch.randint(2, 300, (1, S))
    labels = ids.roll(-1, 1)
    logits = stock.causal(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0].float(), labels[0], reduction="sum")
    loss.backward()
    ours = Model(family).gradients([S], micro_batches=1)
    torch.testing.assert_close(ours["loss 0"], loss.detach(), rtol=1e-6, atol=0)
    for name, p in stock.trainable().items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "granite", "smollm3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """With NaN in every uninitialised tensor: what is left out of a rebuild is really read by nobody."""
    want = Model(family).gradients([S])
    made = Model(family)
    Executor(made.layers, segments(2, 0.5, S), hollow=hollow_layers(made.causal))
    torch.use_deterministic_algorithms(True)
    try:
        assert differing(made.gradients([S]), want) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_tiled_mlp() -> None:
    """The same tiles in `keep` and under the executor, whose rebuild leaves the tiles to backward."""
    runs = []
    stored = tuple(
        LayerPlan(x=Rows(device=S) if i == 0 else None, linear={"mlp": Rows(device=S)}) for i in range(LAYERS)
    )
    for placement in (None, segments(2, 0.5, S), Placement(rows=S, attention_rows=S, layers=stored)):
        made = Model(precision="bf16", adapter=ADAPTERS["dropout"])
        tile_mlp(made.model, 256)
        if placement is not None:
            Executor(made.layers, placement, hollow=True)
        runs.append(made.gradients([S]))
    assert [differing(run, runs[0]) for run in runs[1:]] == [[], []]


def test_a_sliding_window() -> None:
    window = {"sliding_window": 100, "layer_types": ["sliding_attention"] * LAYERS}
    want = Model("mistral", **window).gradients([600, 300])
    assert differing(want, Model("mistral").gradients([600, 300])), "the window has an effect"
    made = Model("mistral", **window)
    Executor(made.layers, segments(4, 0.4, S))
    assert differing(made.gradients([600, 300]), want) == []


def test_frozen_below_costs_nothing() -> None:
    """LoRA on the upper half: layers below have no node, store nothing, and gradients are equal."""
    upper = LoRA(rank=4, target_modules=tuple(f"layers.{i}.self_attn.q_proj" for i in (2, 3)))
    want = Model(adapter=upper).gradients([S])
    made = Model(adapter=upper)
    executor = Executor(made.layers, segments(4, 0.0, S))
    loss = made.forward([S], 0)
    assert executor.ledger.bytes == S * 64 * 4, "the input of layer 2 alone"
    loss.backward()
    assert differing(made.gradients([S]), want) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ledger_is_the_formula(precision: str) -> None:
    made, width = Model(precision=precision), 2 if precision == "bf16" else 4
    for k, share in ((1, 0.0), (2, 1.0), (4, 0.5)):
        executor = Executor(made.layers, segments(k, share, S))
        loss = made.forward([S], 0)
        x_bytes, o_bytes = S * 64 * width, S * (64 * width + 4 * 4)
        assert executor.ledger.bytes == LAYERS // k * x_bytes + LAYERS * share * o_bytes
        loss.backward()
        assert executor.ledger.bytes == 0


def test_two_forwards_before_two_backwards_and_one_that_never_comes() -> None:
    made = Model()
    want = made.gradients([S])
    for p in made.model.parameters():
        p.grad = None
    executor = Executor(made.layers, segments(2, 0.5, S))
    losses = [made.forward([S], micro) for micro in range(2)]
    dropped = made.forward([S], 2)
    assert executor.ledger.bytes > 0
    tape = executor._tape
    del dropped
    gc.collect()
    assert tape is not None and tape() is None
    with torch.no_grad():
        made.forward([S], 3)
    for loss in losses:
        loss.backward()
    got = {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}
    got |= {name: p.grad for name, p in made.trainable().items()}
    assert differing(got, want) == []
    assert executor.ledger.bytes == 0


def test_autocast() -> None:
    def run(made: Model) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = made.forward([S], 0)
        loss.backward()
        return {name: p.grad for name, p in made.trainable().items()}

    made = Model()
    Executor(made.layers, segments(2, 0.5, S))
    assert differing(run(made), run(Model())) == []


def test_an_exception_in_backward_releases_the_tape() -> None:
    made = Model()
    executor = Executor(made.layers, segments(2, 0.5, S))
    loss = made.forward([S], 0)
    tape = weakref.ref(executor._tape()) if executor._tape is not None else None

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("broken on purpose")

    handle = made.layers[1].mlp.up_proj.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        loss.backward()
    handle.remove()
    del loss
    gc.collect()
    assert executor.ledger.bytes == 0 and tape is not None and tape() is None


def test_what_would_be_silently_wrong_is_refused() -> None:
    made = Model()
    Executor(made.layers, segments(2, 0.5, S))
    with pytest.raises(JobError, match=r"torch\.autograd\.grad"):
        torch.autograd.grad(made.forward([S], 0), list(made.trainable().values())[:1])
    layer = made.layers[1]
    rotary = made.causal.get_decoder().rotary_emb
    original = rotary.forward
    rotary.forward = lambda *a, **k: tuple(x.requires_grad_() for x in original(*a, **k))
    with pytest.raises(JobError, match="position_embeddings"):
        made.forward([S], 0)
    rotary.forward = original
    mlp = layer.mlp.forward
    layer.mlp.forward = lambda x: mlp(x)
    layer.input_layernorm.register_forward_pre_hook(lambda _, inputs: inputs[0].mul_(2))
    with pytest.raises(JobError, match="writes into its input"):
        made.forward([S], 0)


CASES = [
    {"family": family, "precision": precision, "adapter": adapter, "mesh": (1, 2), "zero": zero, "lengths": lengths}
    for family, precision, adapter, zero, lengths in [
        ("llama", "fp32", None, 0, [900]),
        ("qwen3", "bf16", LoRA(rank=4), 0, [500, 200, 200]),
        ("llama", "bf16", None, 3, [500, 200, 200]),
        ("qwen3", "fp32", LoRA(rank=4), 3, [900]),
        ("llama", "bf16", PaCA(rank=4), 3, [500, 400]),
        ("qwen3", "bf16", PEQA(bits=4), 0, [500, 400]),
        ("llama", "bf16", S2A(), 3, [500, 400]),
        ("qwen3", "bf16", S2A(prompt=4, side=8), 0, [500, 200, 200]),
        ("llama", "bf16", L4Q(rank=4, bits=4), 0, [500, 400]),
    ]
] + [{"family": "llama", "precision": "bf16", "adapter": LoRA(rank=4), "mesh": (2, 1), "zero": 2, "lengths": [450]}]


@pytest.mark.parametrize("half", [0, 1])
def test_ranks_and_zero_stages(half: int) -> None:
    """sp=2 and ZeRO 0, 2, 3, accumulation 2: losses, gradients and updated state, bit for bit."""
    cases = []
    for case in CASES[half::2]:
        rows = sum(case["lengths"]) // case["mesh"][1]  # type: ignore[index]
        S = sum(case["lengths"])  # type: ignore[arg-type]
        made = [
            segments(k, o, rows, attention_rows=S, between=b, saved=saved)
            for k, o, b, saved in ((1, 0, "o", "device"), (2, 0.5, "xo", "host"), (4, 1, "o", "device"))
        ]
        if case["zero"] in (0, 3):  # a kept layer between rebuilt ones
            layers = (made[0].layers[0], LayerPlan(keep=True), *made[0].layers[2:])
            made[0] = made[0].model_copy(update={"layers": layers, "saved": "host"})
        cases.append({**case, "placements": made})
    for rank, differences in enumerate(on_ranks(on_rank, 2, cases)):
        assert differences == [[] for _ in cases], rank
