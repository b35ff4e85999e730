"""Small models that run one step under a placement and hand back every bit. Not a test module: ranks import it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from farspan.memory.coupling import Coupling, Streams
from farspan.memory.density import Density, add_density
from farspan.memory.executor import Executor
from farspan.memory.operators import Activations, keep_less
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.tiers import Store
from farspan.trainer.adapters.config import Adapter
from farspan.trainer.adapters.reversible.apply import CHILD
from farspan.trainer.attention import NAME, PackedSequence
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.load import quantize
from farspan.trainer.config import DensityLoss, FullFineTune, Mesh, Optim, RandomModel, Reversible
from farspan.trainer.engine import make_engine
from farspan.trainer.models import DTYPES, UNQUANTIZED, CausalLMLoss, add_adapter, hollow_layers, random_config, zero3
from farspan.trainer.parallel.mesh import RankGrid, form_groups
from farspan.trainer.parallel.ulysses import Ulysses
from farspan.trainer.self_test import check_rebuilding
from farspan.trainer.tiling import tile_mlp

LAYERS, VOCAB = 4, 300
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Model:
    """A random causal model with an adapter, and its loss."""

    def __init__(
        self,
        family: str = "llama",
        *,
        precision: str = "fp32",
        adapter: Adapter | None = None,
        kv_heads: int = 2,
        attention: str = NAME,
        layers: int = LAYERS,
        base: Base = UNQUANTIZED,
        activations: Activations = "autograd",
        density: DensityLoss | None = None,
        **changed: Any,
    ) -> None:
        adapter = adapter or FullFineTune()
        shape = RandomModel(family=family, hidden=64, layers=layers, heads=4, kv_heads=kv_heads, ffn=160, vocab=VOCAB)  # type: ignore[arg-type]
        config = random_config(shape, context=4096, eos_id=0, pad_id=1)
        config.update(changed)
        dtype = DTYPES[precision]  # type: ignore[index]
        torch.manual_seed(0)
        self.causal = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        quantize(self.causal, base)
        streams: list[Coupling] = []
        self.model = add_adapter(self.causal, adapter, seed=1, streams=streams)
        self.coupling = streams[0] if streams else None
        penalty = Density(density.weight, density.eps, density.threshold) if density is not None else None
        if penalty is not None:
            add_density(self.layers, penalty)
        self.operators = keep_less(self.layers, activations, hidden_act=config.hidden_act)
        for index, (name, parameter) in enumerate(sorted(self.model.named_parameters())):
            if ("lora_B" in name or f"{CHILD}.up" in name or name == "unipt.up") and parameter.numel():
                # starts at zero, which would make the other factor's gradient zero too
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.data.copy_(drawn * 0.05)
        self.loss = CausalLMLoss(self.model, self.causal, loss_tile=512)
        self.loss.density = penalty
        self.loss.train()

    @property
    def layers(self) -> list[Any]:
        return list(self.causal.get_decoder().layers)

    def trainable(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self, lengths: list[int], *, micro_batches: int = 2) -> dict[str, Tensor]:
        """Losses and accumulated gradients by name."""
        for p in self.model.parameters():
            p.grad = None
        found = {}
        for micro in range(micro_batches):
            loss = self.forward(lengths, micro)
            loss.backward()
            found[f"loss {micro}"] = loss.detach()
        return found | {name: p.grad.clone() for name, p in self.trainable().items() if p.grad is not None}

    def forward(self, lengths: list[int], micro: int) -> Tensor:
        torch.manual_seed(100 + micro)
        ids, positions = tokens(lengths)
        return self.loss(ids, ids.roll(-1, 1), positions, PackedSequence(tuple(lengths)))


def watch(model: Model, wrong: list[str]) -> None:
    """Notes streams that backward does not find as forward left them."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    assert model.coupling is not None

    def observe(index: int, streams: Streams) -> None:
        before = seen.pop(index, None)
        if before is None:
            seen[index] = streams.main.clone(), streams.other.clone()
        elif not (torch.equal(before[0], streams.main) and torch.equal(before[1], streams.other)):
            wrong.append(f"streams before layer {index}")

    model.coupling.observer = observe


def tokens(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCAB, (1, sum(lengths)))
    return ids, torch.cat([torch.arange(n) for n in lengths])[None]


def differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Names whose bits are not the same in both."""
    return [n for n in {*got, *want} if n not in got or n not in want or not torch.equal(got[n], want[n])]


def segments(k: int, o_share: float, rows: int, *, attention_rows: int | None = None, **rest: Any) -> Placement:
    """Inputs every k layers and the last `o_share` of O, all on the device."""
    S = attention_rows or rows
    plans = (
        LayerPlan(x=Rows(device=rows) if index % k == 0 else None, o=Rows(device=round(o_share * S)))
        for index in range(LAYERS)
    )
    return Placement(rows=rows, attention_rows=S, layers=tuple(plans), **rest)


def step_on_rank(rank: int, mesh: tuple[int, int], cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """What `_step` gives in each case; on the first rank alone, since all have the same."""
    grid = form_groups(Mesh(dp=mesh[0], sp=mesh[1]), torch.device("cpu"))
    runs = [_step(grid, "llama", "fp32", zero=0, lengths=[130, 170], **case) for case in cases]
    losses = [{name: t for name, t in run.items() if name.startswith("loss")} for run in runs]
    for loss in losses:
        for t in loss.values():
            dist.all_reduce(t)
    return [{**run, **loss} for run, loss in zip(runs, losses)]


def engines_on_rank(rank: int, mesh: tuple[int, int], zeros: list[int], **case: Any) -> list[dict[str, Tensor]]:
    """Losses, gradients and weights of the same step by several engines."""
    grid = form_groups(Mesh(dp=mesh[0], sp=mesh[1]), torch.device("cpu"))
    return [_step(grid, "llama", "fp32", zero=zero, placement=None, lengths=[130, 170], **case) for zero in zeros]


def codes_on_rank(rank: int, mesh: tuple[int, int], adapter: Adapter, zero: int = 0) -> dict[str, Tensor]:
    """Four optimizer steps of two micro-batches, every layer rebuilt: losses, scales and integers afterwards."""
    grid = form_groups(Mesh(dp=mesh[0], sp=mesh[1]), torch.device("cpu"))
    made, (dp, sp) = Model(adapter=adapter), mesh
    layers = (LayerPlan(x=Rows(device=300 // sp)),) * LAYERS
    placement = Placement(rows=300 // sp, attention_rows=300, layers=layers)
    Executor(made.layers, placement, None, hollow=hollow_layers(made.causal))
    ulysses = Ulysses(grid.sp_group) if grid.sp_group is not None else None
    optim = Optim(lr=1e-3, schedule="constant", warmup_steps=0)
    engine = make_engine(made.loss, made.trainable(), optim, grid, zero=zero, precision="fp32")  # type: ignore[arg-type]
    found = {}
    for step in range(4):
        for micro in range(2 // dp):
            torch.manual_seed(10 * step + micro * dp + grid.dp_index)
            ids, positions = tokens([130, 170])
            mine = [x.chunk(sp, 1)[grid.sp_index] for x in (ids, ids.roll(-1, 1), positions)]
            loss = engine.module(*mine, PackedSequence((130, 170), ulysses))
            found[f"loss {step} {micro * dp + grid.dp_index}"] = loss.detach().clone()
            engine.backward(loss / 600, last=micro + 1 == 2 // dp)
        found[f"norm {step}"] = torch.tensor(engine.step(lr=1e-3, clip_norm=1.0))
    for name, loss in found.items():
        if sp > 1 and name.startswith("loss"):
            dist.all_reduce(loss)
    found |= {name: p.detach().clone() for name, p in made.trainable().items()}
    found |= {f"{name} codes": b.clone() for name, b in made.model.named_buffers() if name.endswith(".packed")}
    engine.close()
    return found


def coupled_on_rank(rank: int, cases: list[dict[str, Any]]) -> list[list[str]]:
    """For each case what differs between storing inputs and the placements, streams that do not come back included."""
    return [_compare_coupled(rank, **case) for case in cases]


def _compare_coupled(
    rank: int,
    *,
    adapter: Reversible,
    mesh: tuple[int, int],
    lengths: list[int],
    placements: list[Placement],
    **how: Any,
) -> list[str]:
    grid = form_groups(Mesh(dp=mesh[0], sp=mesh[1]), torch.device("cpu"))
    how = {"zero": 0, "family": "llama", "precision": "fp32"} | how
    wrong: list[str] = []
    inputs = adapter.model_copy(update={"store": "inputs"})
    want = _step(grid, lengths=lengths, placement=placements[0], adapter=inputs, **how)
    for index, placement in enumerate(placements):
        got = _step(grid, lengths=lengths, placement=placement, adapter=adapter, wrong=wrong, **how)
        wrong += [f"{index}: {name}" for name in differing(got, want)]
    return wrong


def on_rank(rank: int, cases: list[dict[str, Any]]) -> list[list[str]]:
    """For each case the names that differ between `keep` and the placements, on this rank of a gloo world."""
    return [_compare(rank, **case) for case in cases]


def _compare(
    rank: int,
    *,
    family: str,
    precision: str,
    adapter: Adapter | None,
    mesh: tuple[int, int],
    zero: int,
    lengths: list[int],
    placements: list[Placement],
    **more: Any,
) -> list[str]:
    grid = form_groups(Mesh(dp=mesh[0], sp=mesh[1]), torch.device("cpu"))
    runs = [_step(grid, family, precision, adapter, zero, lengths, p, **more) for p in (None, *placements)]
    return [f"{index}: {name}" for index, run in enumerate(runs[1:]) for name in differing(run, runs[0])]


def _step(
    grid: RankGrid,
    family: str,
    precision: str,
    adapter: Adapter | None,
    zero: int,
    lengths: list[int],
    placement: Placement | None,
    *,
    tile: int | None = None,
    self_test: bool = False,
    base: Base = UNQUANTIZED,
    activations: Activations = "autograd",
    density: DensityLoss | None = None,
    wrong: list[str] | None = None,
) -> dict[str, Tensor]:
    """Two micro-batches through an engine: losses, whole gradients, and the weights after the update."""
    with zero3(zero == 3, grid.device) if zero == 3 else contextlib.nullcontext():
        made = Model(family, precision=precision, adapter=adapter, base=base, activations=activations, density=density)
    if tile is not None:
        tile_mlp(made.model, tile)
    away = placement is not None and (placement.saved == "host" or any(plan.leaves for plan in placement.layers))
    store = Store(host_bytes=64 << 20) if away else None
    executor = None
    if placement is not None:
        executor = Executor(made.layers, placement, store, hollow=True, coupling=made.coupling)
    ulysses = Ulysses(grid.sp_group) if grid.sp_group is not None else None
    if self_test:
        made.loss.executor = executor
        tested = check_rebuilding(made.loss, grid, ulysses, zero=zero, seed=5)
        assert (tested is None) == (executor is None)
        assert tested is None or (tested.units >= 1 and tested.gradients > 9 * tested.units)
    if wrong is not None:
        watch(made, wrong)
    engine = make_engine(made.loss, made.trainable(), Optim(lr=1e-2), grid, zero=zero, precision=precision)  # type: ignore[arg-type]
    sp, found = grid.mesh.sp, {}
    for micro in range(2):
        torch.manual_seed(100 + 10 * micro + grid.dp_index)
        ids, positions = tokens(lengths)
        labels = ids.roll(-1, 1)
        mine = [x.chunk(sp, 1)[grid.sp_index] for x in (ids, labels, positions)]
        loss = engine.module(*mine, PackedSequence(tuple(lengths), ulysses))
        found[f"loss {micro}"] = loss.detach().clone()
        engine.backward(loss / 1000, last=micro == 1)
    if made.loss.density is not None:
        found["loss of density"] = made.loss.density.take(grid.device)
    found |= {name: gradient.clone() for name, gradient in engine.full_gradients().items()}
    engine.step(lr=1e-2, clip_norm=1.0)
    found |= {f"{f.name} {f.kind}": f.tensor.clone() for f in engine.fragments()}
    engine.close()
    assert executor is None or executor.ledger.bytes == 0, "the tape is empty after backward"
    if store is not None:
        assert not store.statistics().held_bytes["host"], "nothing is left on the host"
        store.close()
    dist.barrier()
    return found
