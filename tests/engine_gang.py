"""Processes that stay up while tests run engine cases on them, and the small model they train.

Not a test module: the ranks import it. `Gang.call` runs one of the functions below on every rank and returns their
results in rank order. The model has what engines get wrong: a tied matrix, a bias and a norm (which do not decay),
sizes that no world divides, and a parameter the loss of every other step does not touch.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import cpuinfo
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from farspan.trainer.config import Optim, Optimizer
from farspan.trainer.engine import Engine

VOCAB, HIDDEN, ROWS = 29, 9, 24
OPTIM = Optim(lr=3e-3, steps=10, weight_decay=0.1, clip_norm=0.5, beta2=0.95)


class Toy(nn.Module):
    """Embedding, norm, linear with bias, output tied to the embedding; forward sums the token losses.

    `recompute`: the middle runs under reentrant checkpointing, so its gradients come from a backward inside backward.
    """

    def __init__(self, *, recompute: bool = False, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.recompute = recompute
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCAB, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.idle = nn.Parameter(torch.empty(5, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                # Exact in bf16, so that every precision starts from the same weights.
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.4).bfloat16())

    def forward(self, tokens: torch.Tensor, step: int = 0) -> torch.Tensor:
        hidden = self.embed(tokens[:, 0])
        if self.recompute and torch.is_grad_enabled():
            hidden = checkpoint(self.middle, hidden, use_reentrant=True)
        else:
            hidden = self.middle(hidden)
        logits = self.head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = functional.cross_entropy(logits, tokens[:, 1], reduction="sum")
        return loss + len(tokens) * (self.idle**2).mean() if step % 2 else loss

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + functional.gelu(self.mix(self.norm(hidden)))


def trainable_of(module: nn.Module, only: str | None) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; `only` freezes those whose name lacks it."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(only is None or only in name)
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def batch(step: int, micro: int) -> torch.Tensor:
    """int64 [ROWS, 2]: token and target of every row of one global micro-batch."""
    return torch.randint(VOCAB, (ROWS, 2), generator=torch.Generator().manual_seed(100 * step + micro))


def build(
    stage: int,
    precision: str,
    *,
    offload: bool = False,
    only: str | None = None,
    recompute: bool = False,
    sharded: bool = False,
    optim: Optimizer = OPTIM,
    hidden: int = HIDDEN,
) -> Engine:
    from farspan.trainer.engine_deepspeed import DeepSpeedEngine, import_deepspeed
    from farspan.trainer.engine_in_backward import InBackwardEngine
    from farspan.trainer.engine_plain import PlainEngine

    module = Toy(recompute=recompute, hidden=hidden).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if sharded:  # as a model built under `zero.Init` arrives
        config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
        import_deepspeed(torch.device("cpu")).zero.Init(
            module=module, config_dict_or_path=config, dtype=next(module.parameters()).dtype
        )
    trainable = trainable_of(module, only)
    if stage == 0:
        return (InBackwardEngine if optim.in_backward else PlainEngine)(module, trainable, optim, "cpu")
    return DeepSpeedEngine(
        module,
        trainable,
        OPTIM,
        "cpu",
        stage=stage,
        precision=precision,
        cpu_offload=offload,  # type: ignore[arg-type]
    )


def accumulate(engine: Engine, step: int, accumulation: int, *, poison: bool = False) -> None:
    """Forward and backward of one step: this rank takes every world-th row of each micro-batch."""
    for micro in range(accumulation):
        rows = batch(step, micro)[dist.get_rank() :: dist.get_world_size()]
        loss = engine.module(rows, step) / (ROWS * accumulation)
        if poison and micro == 0 and dist.get_rank() == 0:
            loss = loss * float("nan")
        engine.backward(loss, last=micro == accumulation - 1)


def pieces(engine: Engine) -> list[tuple[str, str, tuple[int, ...], int, torch.Tensor]]:
    return [(f.name, f.kind, f.shape, f.offset, f.tensor.clone()) for f in engine.fragments()]


def held_out(engine: Engine) -> float:
    with torch.no_grad():
        return float(engine.module(batch(999, 0)))


def train(
    stage: int,
    precision: str,
    accumulation: int,
    steps: int = 3,
    offload: bool = False,
    only: str | None = None,
    load: tuple[int, dict[tuple[str, str], torch.Tensor]] | None = None,
    poison_step: int | None = None,
    clip_norm: float | None = 0.5,
    recompute: bool = False,
    sharded: bool = False,
    optim: Optimizer = OPTIM,
    hidden: int = HIDDEN,
) -> dict[str, Any]:
    """Train from scratch or from whole state `load = (step, {(name, kind): tensor})`; report what tests compare."""
    engine = build(
        stage, precision, offload=offload, only=only, recompute=recompute, sharded=sharded, optim=optim, hidden=hidden
    )
    assert optim.type != "adamw" or all(
        float(f.tensor.abs().sum()) == 0 for f in engine.fragments() if f.kind != "master"
    )
    first = 1
    if load is not None:
        step, whole = load
        for fragment in engine.fragments():
            source = whole[fragment.name, fragment.kind].reshape(-1)
            fragment.tensor.copy_(source[fragment.offset : fragment.offset + fragment.tensor.numel()])
        engine.restored(step=step)
        first = step + 1
    start_loss = held_out(engine)
    gradients, norms = {}, []
    for step in range(first, first + steps):
        engine.begin(lr=optim.lr / step)
        accumulate(engine, step, accumulation, poison=step == poison_step)
        if step == first and poison_step is None and not optim.in_backward:
            gradients = engine.full_gradients()
        before = pieces(engine)
        norms.append(engine.step(lr=optim.lr / step, clip_norm=clip_norm))
        if step == poison_step:
            assert all(torch.equal(x[-1], y[-1]) for x, y in zip(before, pieces(engine)))
    result = {
        "gradients": gradients if dist.get_rank() == 0 else {},
        "norms": norms,
        "pieces": pieces(engine),
        "start_loss": start_loss,
        "loss": held_out(engine),
    }
    engine.close()
    return result


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    # Starting DeepSpeed collects garbage over all modules and asks the CPU for its name, a second each time.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        name, arguments = job
        gc.freeze()
        try:
            pipe.send((True, globals()[name](**arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Gang:
    """`world_size` processes joined over gloo."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "cpuinfo"])
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, str(rendezvous), there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, function: str, **arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(280):
                self.close(kill=True)
                raise TimeoutError(f"{function}{arguments}: no answer")
            answers.append(pipe.recv())
        for ok, answer in answers:
            assert ok, answer
        return [answer for _, answer in answers]

    def close(self, *, kill: bool = False) -> None:
        for pipe, process in zip(self._pipes, self._processes):
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process in self._processes:
            process.join(20)
