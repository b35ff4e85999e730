"""On a CUDA device: what is simulated elsewhere, for real. Deselected where there is none.

Gradients are compared bit for bit in deterministic mode; outside it, within the spread of keeping against keeping.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from executor_models import LAYERS, Model, differing
from test_tiers import MIB, content
from torch import Tensor

from farspan.memory.allocations import footprint
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.tiers import OffTier, Store
from farspan.trainer.attention import PackedSequence

pytestmark = pytest.mark.gpu
S = 1024
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, tier: OffTier) -> None:
    with Store(host_bytes=64 * MIB, disk_dir=tmp_path, disk_bytes=64 * MIB, device=CUDA, test_seed=0) as store:
        kept = [content(3 * MIB + 7, seed) for seed in range(8)]
        held = []
        for turn, values in enumerate(kept):
            made = values.to(CUDA, non_blocking=True)
            torch.cuda._sleep(2_000_000)  # the caller is ahead of the device
            made = made ^ 0
            held.append(store.put(tier, made, label=str(turn)))
            del made
            store.admit()
        for stored, values in zip(held, kept):
            assert torch.equal(store.get(stored).cpu(), values)
            store.free(stored)


def gradients(placement: Placement | None, tmp_path: Path, precision: str) -> dict[str, Tensor]:
    model = Model(precision=precision)
    model.loss.to(CUDA)
    tiers = {"host_bytes": 64 * MIB, "disk_dir": tmp_path, "disk_bytes": 64 * MIB}
    with Store(device=CUDA, test_seed=1, **tiers) as store:  # type: ignore[arg-type]
        if placement is not None:
            Executor(model.layers, placement, store, hollow=True)
        found: dict[str, Tensor] = {}
        for micro in range(2):
            torch.manual_seed(100 + micro)
            ids = torch.randint(2, 300, (1, S)).to(CUDA)
            positions = torch.arange(S, device=CUDA)[None]
            loss = model.loss(ids, ids.roll(-1, 1), positions, PackedSequence((S,)))
            loss.backward()
            found[f"loss {micro}"] = loss.detach()
        return found | {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


PLACEMENTS = {
    "recompute": [LayerPlan(x=Rows(device=S))] * LAYERS,
    "offload inputs": [LayerPlan(x=Rows(host=S))] * LAYERS,
    "three tiers": [LayerPlan(x=Rows(device=256, host=512, disk=256), o=Rows(host=512, disk=256))] * LAYERS,
    "segments": [LayerPlan(x=Rows(host=S) if i % 2 == 0 else None, o=Rows(device=512)) for i in range(LAYERS)],
}


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
@pytest.mark.parametrize("saved", ["device", "host"])
def test_gradients_are_those_of_keeping(tmp_path: Path, name: str, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: the kernel for fp32 has no deterministic backward."""
    placement = Placement(rows=S, attention_rows=S, layers=tuple(PLACEMENTS[name]), saved=saved)  # type: ignore[arg-type]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        kept = gradients(None, tmp_path, "bf16")
        assert differing(gradients(placement, tmp_path, "bf16"), kept) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_events_of_the_allocator() -> None:
    def work() -> Tensor:
        held = torch.empty(1000, dtype=torch.uint8, device=CUDA)
        torch.empty(5000, dtype=torch.uint8, device=CUDA)
        return held

    took = footprint(work, CUDA)
    assert [size for _, size in took.events] == [1000, 5000, -5000]
    assert (took.peak_bytes, took.kept_bytes) == (6000, 1000)


def test_planned_addresses_in_a_process_of_their_own(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from farspan.memory.arena import Arena, build
        from farspan.trainer.addresses import PlannedAddresses
        arena = Arena(build(Path(sys.argv[1])), cuda=True)
        layer = torch.nn.Linear(512, 512, device="cuda")
        told = []
        steps = PlannedAddresses(arena, [layer], told.append)
        losses = []
        for _ in range(5):
            with steps.step():
                torch.manual_seed(0)
                x = torch.randn(4096, 512, device="cuda")
                loss = layer(layer(x).relu()).square().mean()
                loss.backward()
                losses.append(float(loss.detach()))
                layer.zero_grad()
                del x, loss
        seen = arena.statistics()
        assert len(set(losses)) == 1, losses
        assert told and seen.on_plan > 0 and seen.off_plan + seen.occupied == 0, seen
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
