"""The start-up self-test of a training rank: the model as a step calls it, on random rows of three documents.

`farspan.memory.self_test` has what is compared; here is what it cannot know: how the model is called, the exchange of
the sp group, and how ZeRO-3 makes weights whole. It runs before the engine takes the model over.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from farspan.errors import JobError
from farspan.memory.amplification import amplification, most_layers
from farspan.memory.anchors import anchor_errors
from farspan.memory.coupling import fraction_for
from farspan.memory.operators import gradient_error
from farspan.memory.problem import GradientError
from farspan.memory.self_test import RebuildDiffers, SelfTest, scaled, self_test
from farspan.memory.single_layers import Hook, hooked
from farspan.memory.tier_error import unit_errors
from farspan.trainer import attention
from farspan.trainer.attention import PackedSequence
from farspan.trainer.batch import Rows
from farspan.trainer.models import CausalLMLoss
from farspan.trainer.parallel.mesh import RankGrid
from farspan.trainer.parallel.ulysses import Ulysses

_log = logging.getLogger(__name__)


def check_rebuilding(
    module: CausalLMLoss, grid: RankGrid, ulysses: Ulysses | None, *, zero: int, seed: int
) -> SelfTest | None:
    """Prove that the placement of `module` changes no gradient; None where it rebuilds nothing. Collective.

    Reversible layers that do not come back bit for bit on some rank store their inputs from then on, on all.

    Raises:
        RebuildDiffers: it does.
    """
    executor = module.executor
    if executor is None:
        return None
    gathered = _gathering(zero)
    decoder = module.decoder
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    inside = {id(p) for part in (*executor.layers, embedding) for p in part.parameters()}
    outside = [p for p in decoder.parameters() if id(p) not in inside]

    def run(rows: int) -> None:
        lengths = documents(rows * grid.mesh.sp)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        mine = positions[:, grid.sp_index * rows : (grid.sp_index + 1) * rows]
        # in the place of ids, so that no embedding has to be gathered
        hidden = torch.zeros(1, rows, embedding.embedding_dim, dtype=embedding.weight.dtype, device=grid.device)
        with gathered(outside):
            decoder(
                inputs_embeds=hidden,
                position_ids=mine.to(grid.device),
                use_cache=False,
                **{attention.KEYWORD: PackedSequence(lengths, ulysses)},
            )

    key = (seed << 16 ^ grid.rank) & (2**63 - 1)
    coupling = executor.coupling
    try:
        result, problem = self_test(executor, run, seed=key, gathered=gathered), None
    except RebuildDiffers as differs:
        if coupling is None or coupling.store == "inputs":
            raise
        result, problem = None, differs
    if coupling is not None and coupling.store == "bits" and _any(problem is not None, grid):
        if any(plan.x is not None and plan.x.host + plan.x.disk for plan in executor.placement.layers):
            raise RebuildDiffers(
                "reversible layers do not give the same bits twice here",
                at="adapter.store",
                why=f"{problem.why if problem else 'another rank found it'}; inputs take more room than the host and "
                "disk tiers were planned with",
                try_="--set adapter.store=inputs, which is planned so",
            )
        coupling.store = "inputs"
        _log.warning("%s", problem or "another rank's layers do not give the same bits twice")
        result = self_test(executor, run, seed=key, gathered=gathered)
    if result is not None:
        _log.info("%s", result)
    return result


def gradient_errors(
    module: CausalLMLoss,
    input_ids: torch.Tensor,
    grid: RankGrid,
    ulysses: Ulysses | None,
    *,
    zero: int,
    seed: int,
    without: Callable[[], AbstractContextManager[None]] | None = None,
) -> list[GradientError]:
    """What codes do to each layer's gradients, of this model on real tokens; empty without codes. Collective, before
    the engine takes the model over.

    Args:
        input_ids: int64 [1, s], some rows of this rank.
        without: inside, the codes in question are left out. Default: those of saved activations.
    """
    layers, found, gathered = module.layers, list[GradientError](), _gathering(zero)

    def look(layer: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with gathered(layer.parameters()):
            error = gradient_error(layer, call, x.detach(), seed=seed, without=without)
            if error is not None:
                found.append(error)
            return call(x)

    hooks = {index: partial(look, layer) for index, layer in enumerate(layers)}
    if module.coupling is not None:
        module.coupling.on = False
    try:
        _run_hooked(module, input_ids, grid, ulysses, hooks, gathered)
    finally:
        if module.coupling is not None:
            module.coupling.on = True
    return found


def tier_errors(
    module: CausalLMLoss, input_ids: torch.Tensor, grid: RankGrid, ulysses: Ulysses | None, *, zero: int, seed: int
) -> dict[range, GradientError]:
    """What codes of rows on host and disk do to the gradients of each segment that has some there, of this model on
    real tokens; empty without codes. Collective, before the engine takes the model over.

    Args:
        input_ids: int64 [1, s], some rows of this rank.
    """
    executor, found = module.executor, dict[range, GradientError]()
    if executor is None or executor.placement.tier_codec == "exact":
        return found
    gathered = _gathering(zero)
    placement = scaled(executor.placement, input_ids.shape[1])
    hooks = unit_errors(executor, placement, found.__setitem__, seed=seed, gathered=gathered)
    with executor.with_rows_of(placement):
        _run_hooked(module, input_ids, grid, ulysses, hooks, gathered)
    if executor.store is not None:
        executor.store.statistics(restart=True)
    return found


def _run_hooked(
    module: CausalLMLoss,
    input_ids: torch.Tensor,
    grid: RankGrid,
    ulysses: Ulysses | None,
    hooks: Mapping[int, Hook],
    gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]],
) -> None:
    """The decoder on the tokens of one document, hooks in the place of its layers."""
    layers, decoder, rows = module.layers, module.decoder, input_ids.shape[1]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in decoder.parameters() if id(p) not in inside]
    positions = torch.arange(grid.sp_index * rows, (grid.sp_index + 1) * rows, device=grid.device)[None]
    sequence = PackedSequence((rows * grid.mesh.sp,), ulysses)
    with gathered(outside), torch.no_grad(), hooked(layers, hooks):
        decoder(input_ids=input_ids, position_ids=positions, use_cache=False, **{attention.KEYWORD: sequence})


def _any(true: bool, grid: RankGrid) -> bool:
    """Whether it is so on any rank. Collective."""
    told = torch.tensor(int(true), device=grid.device)
    if grid.world_size > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def reversible_range(whole: nn.Module, module: CausalLMLoss, rows: Rows, grid: RankGrid) -> int:
    """Bits behind the point for reversible streams, from the model's hidden states on some rows, uncoupled. Collective.

    Args:
        whole: the engine's module, which makes weights whole where they are sharded.
    """
    coupling = module.coupling
    assert coupling is not None
    largest = torch.zeros((), device=grid.device)

    def look(_layer: nn.Module, _inputs: object, y: torch.Tensor) -> None:
        largest.copy_(torch.maximum(largest, y.detach().abs().amax().float()))

    hooks = [layer.register_forward_hook(look) for layer in coupling.layers]
    coupling.on = False
    try:
        _evaluate(whole, rows)
    finally:
        coupling.on = True
        for hook in hooks:
            hook.remove()
    if grid.world_size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return fraction_for(float(largest))


def _evaluate(whole: nn.Module, rows: Rows) -> None:
    whole.eval()
    try:
        with torch.no_grad():
            whole(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
    finally:
        whole.train()


def reversible_anchors(
    whole: nn.Module, module: CausalLMLoss, rows: Rows, grid: RankGrid, asked: int | None = None
) -> tuple[int, float]:
    """The most layers between anchors of floating-point streams that come back within the tolerance, on some rows of
    all ranks, and the error they then have. Collective; about four forwards for each number that is tried.

    With every layer an anchor, all that layers read again is stored: 1 is good enough for any model, without a trial.

    Where streams wait on the host or a disk, these were planned with a number of layers: it is kept, and must do.

    Args:
        whole: the engine's module, which makes weights whole where they are sharded.
        asked: by the job: the only number that is tried.

    Raises:
        JobError: none does.
    """
    coupling, executor = module.coupling, module.executor
    assert coupling is not None and coupling.form == "float"
    planned = coupling.anchors_planned
    if executor is not None:
        away = (plan.x for index, plan in enumerate(executor.placement.layers) if index % planned == 0)
        if any(x is not None and x.host + x.disk for x in away):
            asked = planned
    kappa = amplification(coupling.wiring, coupling.factors)
    most = max(1, min(len(coupling.layers), most_layers(kappa, coupling.tolerance))) if asked is None else asked
    every, error = 1, 0.0
    for every in range(most, 1 if asked is None else max(1, most - 1), -1):
        sums = anchor_errors(coupling, lambda: _evaluate(whole, rows), every)
        if grid.world_size > 1:
            dist.all_reduce(sums)
        error = float((sums[..., 0] / sums[..., 1]).sqrt().max())
        if error <= coupling.tolerance:
            return every, error
    if asked is None or asked == 1:
        return 1, 0.0
    raise JobError(
        f"streams stored whole every {every} layers come back off by {error:.2g}",
        at="adapter.anchor_every",
        why=f"the job allows {coupling.tolerance:g}, measured on its first rows; rounding alone makes it "
        f"{kappa:.3g} times as much a layer",
        try_=f"--set adapter.anchor_every={every - 1}, or --set adapter.form=exact, which has no such error",
    )


def documents(rows: int) -> tuple[int, ...]:
    """A short document, a long one, a short one, so that rows of O are cut inside the long one.

    Blocks of O begin 2 rows past a multiple of 32 in it: there CPU kernels were seen to give other bits when they are
    not run on whole blocks.
    """
    if rows < 3:
        return (rows,)
    first, last = min(rows // 10 // 32 * 32 + 30, rows // 3), max(1, rows // 18)
    return first, rows - first - last, last


def _gathering(zero: int) -> Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]]:
    if zero < 3:
        return lambda _: contextlib.nullcontext()
    from farspan.trainer.engine_deepspeed import gathered

    return gathered
