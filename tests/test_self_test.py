"""The start-up self-test passes where rebuilding is right, leaves nothing behind, and fails where it is wrong."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, differing, on_rank, segments
from hypothesis import given
from hypothesis import strategies as st
from sp_ranks import on_ranks

from farspan.errors import JobError, RunFailed
from farspan.kernels.attention_backends import per_document as kernel
from farspan.memory import executor as executor_module
from farspan.memory import self_test as self_test_module
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows, keep_everything
from farspan.memory.self_test import RebuildDiffers, SelfTest, _scaled_rows, scaled
from farspan.memory.tiered import TieredRows
from farspan.memory.tiers import Store
from farspan.trainer.config import LoRA, Mesh
from farspan.trainer.models import hollow_layers
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.self_test import check_rebuilding
from farspan.trainer.tiling import tile_mlp

pytestmark = pytest.mark.timeout(400)

ALONE = RankGrid(Mesh(), 0, torch.device("cpu"), None)
R = 8192
KEEP = LayerPlan(keep=True)
SPREAD = Rows(device=3000, host=2000, disk=1192)
WHOLE = Rows(device=R // 2, host=R // 4, disk=R // 4)
UPPER = LoRA(rank=4, target_modules=tuple(f"layers.{i}.self_attn.q_proj" for i in (2, 3)))


def plan(*layers: LayerPlan, **rest: Any) -> Placement:
    return Placement(rows=R, attention_rows=R, layers=layers, **rest)


PLANS = {
    "recompute": segments(1, 0.0, R),
    "inner": segments(4, 0.3, R, between="xo"),
    "tiers": plan(
        KEEP,
        LayerPlan(x=WHOLE, o=SPREAD),
        LayerPlan(linear={"o_proj": WHOLE, "q_proj": Rows(host=R)}),
        LayerPlan(x=Rows(host=R)),
    ),
    "mlp": plan(LayerPlan(x=Rows(device=R), linear={"mlp": WHOLE}), LayerPlan(), *[LayerPlan(x=Rows(device=R))] * 2),
    "short": segments(2, 0.5, 150),
    "host": plan(LayerPlan(x=WHOLE, o=SPREAD), KEEP, LayerPlan(x=Rows(host=R)), LayerPlan(), saved="host"),
}
ADAPTERS = {"full": None, "lora": LoRA(rank=4), "dropout": LoRA(rank=4, dropout=0.2), "upper": UPPER}
FACTORS: dict[str, list[Any]] = {
    "family": ["llama", "qwen3", "olmo2"],
    "precision": ["fp32", "bf16"],
    "adapter": [*ADAPTERS],
    "tile": [None, 256],
    "placement": [*PLANS],
}


def pairwise() -> list[dict[str, Any]]:
    """Few cases in which every two values of two factors meet."""

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(combinations(case.items(), 2))

    draw, cases = random.Random(0), []
    missing = {((a, x), (b, y)) for a, b in combinations(FACTORS, 2) for x in FACTORS[a] for y in FACTORS[b]}
    while missing:
        candidates = [{name: draw.choice(values) for name, values in FACTORS.items()} for _ in range(40)]
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("disk")
    with Store(host_bytes=64 << 20, disk_dir=folder, disk_bytes=64 << 20, checksum=True, test_seed=0) as made:
        yield made


def made(
    family: str = "llama",
    precision: str = "fp32",
    adapter: str = "full",
    tile: int | None = None,
    placement: str | Placement = "tiers",
    store: Store | None = None,
    hollow: bool | None = None,
) -> Model:
    model = Model(family, precision=precision, adapter=ADAPTERS[adapter])
    if tile is not None:
        tile_mlp(model.model, tile)
    placement = PLANS[placement] if isinstance(placement, str) else placement
    hollow = hollow_layers(model.causal) if hollow is None else hollow
    model.loss.executor = Executor(model.layers, placement, store, hollow=hollow)
    return model


def check(model: Model) -> SelfTest | None:
    return check_rebuilding(model.loss, ALONE, None, zero=0, seed=7)


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case.values())))
def test_it_passes_and_leaves_everything_as_it_was(case: dict[str, Any], store: Store) -> None:
    model = made(**case, store=store)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    random_state, deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    result = check(model)
    assert result is not None and result.exact
    assert result.rows == (150 if case["placement"] == "short" else 1024)
    assert differing(dict(model.model.named_parameters()), before) == []
    assert all(p.grad is None for p in model.model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    executor = model.loss.executor
    assert executor is not None and executor.placement == PLANS[case["placement"]]
    assert (executor.ledger.bytes, executor.ledger.peak_bytes) == (0, 0)
    counted = store.statistics()
    assert not any([*counted.held_bytes.values(), *counted.peak_bytes.values(), *counted.moved_bytes.values()])


def test_distinct_units_are_run_once_and_kept_ones_not_at_all() -> None:
    per_layer = 9
    result = check(made(placement="recompute"))
    assert result is not None and (result.units, result.gradients) == (1, per_layer + 1)
    assert str(result).startswith("self-test 1 unit, 10 gradients bit-equal to keep, ")
    two = plan(KEEP, LayerPlan(x=Rows(device=R)), LayerPlan(x=Rows(device=R), o=Rows(device=R)), LayerPlan())
    result = check(made(placement=two))
    assert result is not None and (result.units, result.gradients) == (2, 3 * per_layer + 2)
    assert check(made(placement=keep_everything(LAYERS, rows=R, attention_rows=R))) is None
    model = Model()
    assert model.loss.executor is None and check(model) is None


def refused(model: Model) -> RebuildDiffers:
    with pytest.raises(RebuildDiffers) as caught:
        check(model)
    assert all(p.grad is None for p in model.model.parameters())
    assert isinstance(caught.value, RunFailed), "other failures of a run end the same way"
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), RebuildDiffers)
    assert caught.value.exit_code == 1 and len(str(caught.value).splitlines()) == 4
    assert "memory.plan=keep" in caught.value.try_
    return caught.value


def test_a_norm_after_a_hollow_mlp_is_found() -> None:
    """Nobody knows of all models whether something reads what a rebuild leaves out."""
    error = refused(made("olmo2", placement="recompute", hollow=True))
    assert "rebuilding decoder layer 3" in error.what and "not a number" in error.why


def test_a_prefix_off_the_blocks_of_the_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose bits hang on how many rows a block has; of torch's that is so on some processors only."""
    monkeypatch.setattr(kernel, "prefix_rows", lambda wanted, rows: wanted)
    dense = kernel.CpuFlash.dense

    def cut_short(self: kernel.CpuFlash, q: Any, k: Any, v: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = dense(self, q, k, v, scale)
        rows = q.shape[2]
        if rows < k.shape[2] and rows % 32:
            out[:, :, rows // 32 * 32 :] *= 1 + 1e-6
        return out, lse

    monkeypatch.setattr(kernel.CpuFlash, "dense", cut_short)
    error = refused(made(placement=segments(1, 0.4, R)))
    assert "of layer 3, rebuilt with layer 3; stored of it: x, O" in error.at


@pytest.mark.parametrize("name", ["x", "O", "o_proj"])
def test_a_stored_row_that_comes_back_wrong_is_found(name: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TieredRows.take

    def off(self: TieredRows) -> torch.Tensor:
        whole = original(self)
        if self.label.startswith(f"{name} of"):
            whole = whole.clone()
            whole[0, -1].view(-1)[0] += 1e-3
        return whole

    original_init = TieredRows.__init__

    def labelled(self: TieredRows, *args: Any) -> None:
        original_init(self, *args)
        self.label = args[4]

    monkeypatch.setattr(TieredRows, "__init__", labelled)
    monkeypatch.setattr(TieredRows, "take", off)
    refused(made(placement="tiers", store=store))
    assert not any(store.statistics().held_bytes.values())


def test_where_keeping_twice_differs_that_much_is_allowed_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA outside deterministic mode: a layer whose sums come out a little different every time."""
    model, noise = made(placement="recompute"), torch.Generator().manual_seed(1)

    def inexact(_: Any, __: Any, y: torch.Tensor) -> torch.Tensor:
        return y * (1 + 1e-6 * torch.randn(y.shape, generator=noise))

    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_hook(inexact)
    refused(model)
    monkeypatch.setattr(self_test_module, "_repeatable", lambda device: False)
    result = check(model)
    assert result is not None and not result.exact and "as near to keep as keep to itself" in str(result)
    original = TieredRows.take
    monkeypatch.setattr(TieredRows, "take", lambda rows: original(rows) * 1.01)
    refused(model)


def test_a_layer_that_writes_into_its_input_is_refused_by_the_executor() -> None:
    model = made(placement="recompute")
    model.layers[3].input_layernorm.register_forward_pre_hook(lambda _, inputs: inputs[0].mul_(2))
    with pytest.raises(JobError, match="writes into its input"):
        check(model)


def test_dropout_that_draws_anew_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "random_state", lambda layer, device: None)
    refused(made(adapter="dropout", placement="recompute"))
    check(made(adapter="lora", placement="recompute"))


def test_an_adapter_that_starts_at_zero_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With B = 0 the gradient of A is zero, right or wrong."""
    model = made(adapter="lora", placement="recompute")
    for name, p in model.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    seen = []
    for layer in model.layers:
        for name, p in layer.named_parameters():
            if "lora_A" in name:
                p.register_hook(lambda gradient: seen.append(bool(gradient.any())))
    assert check(model) is not None
    assert len(seen) == 14 and all(seen)
    assert not any(p.any() for name, p in model.model.named_parameters() if "lora_B" in name)


@given(data=st.data(), whole=st.integers(1, 5000), block=st.sampled_from([1, 64, 256]))
def test_scaling_keeps_every_share(data: st.DataObject, whole: int, block: int) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, whole), min_size=3, max_size=3)))
    planned = Rows(device=cuts[0], host=cuts[1] - cuts[0], disk=cuts[2] - cuts[1])
    rows = data.draw(st.integers(1, whole))
    got = _scaled_rows(planned, whole, rows, block=block)
    shares = [planned.device, planned.host, planned.disk, whole - planned.stored]
    found = [got.device, got.host, got.disk, rows - got.stored]
    assert min(found) >= 0 and sum(found) == rows
    assert not any(got and not share for got, share in zip(found, shares)) or rows < 4
    if rows >= sum(share > 0 for share in shares):
        assert [share > 0 for share in shares] == [count > 0 for count in found]


def test_scaled_placements_keep_their_segments() -> None:
    for placement in PLANS.values():
        small = scaled(placement, 100)
        assert small.units() == placement.units() and (small.rows, small.attention_rows) == (100, 100)
    sp = scaled(segments(2, 0.5, 4096, attention_rows=8192), 512)
    assert (sp.rows, sp.attention_rows, sp.layers[0].o) == (512, 1024, Rows(device=512))
    tiled = plan(LayerPlan(x=Rows(host=R), linear={"mlp": Rows(disk=R // 2), "q_proj": Rows(host=1)}))
    small = scaled(tiled, 1024, mlp_tile=300)
    assert small.layers[0].linear == {"mlp": Rows(disk=1024 - 600), "q_proj": Rows(host=64)}


def _case(family: str, precision: str, lora: bool, mesh: tuple[int, int], zero: int, tile: int | None) -> Any:
    rows, S = 900 // mesh[1], 900
    made = [segments(2, 0.5, rows, attention_rows=S, between="xo" if lora else "o")]
    case = {
        "family": family,
        "precision": precision,
        "adapter": LoRA(rank=4) if lora else None,
        "mesh": mesh,
        "zero": zero,
    }
    return {**case, "tile": tile, "placements": made, "lengths": [500, 400], "self_test": True}


CASES = [
    _case("llama", "fp32", False, (1, 2), 0, 128),
    _case("qwen3", "bf16", True, (1, 2), 3, None),
    _case("llama", "bf16", True, (2, 1), 1, 256),
    _case("qwen3", "fp32", True, (2, 1), 2, None),
    _case("llama", "bf16", False, (2, 1), 3, 256),
]


def test_on_two_ranks_at_every_zero_stage() -> None:
    """It passes, and the steps after it are those of keeping everything without it."""
    for rank, differences in enumerate(on_ranks(on_rank, 2, CASES)):
        assert differences == [[] for _ in CASES], rank
