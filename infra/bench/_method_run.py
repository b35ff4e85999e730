"""One method of fine-tuning on the small model: its engine, its data, a step, held-out loss and bytes of state."""

from __future__ import annotations

import pydoc_data.topics as topics
import statistics
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from _methods import Method
from _pretrained import ROWS, batch, pretrained
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.memory.config import Tiles
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.lora import start as lora_start
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.prepared.prepare import prepare
from farspan.trainer.bases.prepared.store import PreparedBase, start_adapters
from farspan.trainer.config import (
    Checkpoint,
    Evaluate,
    LoRA,
    Mesh,
    Model,
    Optim,
    TextData,
    Track,
    TrainSpec,
    is_prepared,
)
from farspan.trainer.engine_codes import with_codes
from farspan.trainer.engine_in_backward import InBackwardEngine
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.models import load_model, prepare_model
from farspan.trainer.optimizer import lr_at

LAYERS, PRETRAINING_STEPS = 8, 600
SEQUENCES = 2
CPU = torch.device("cpu")


@lru_cache(maxsize=1)
def domain() -> tuple[Tensor, Tensor]:
    """Bytes of the reference's topics: to train on, and a tenth held out, whole topics."""
    texts = [text.encode() for _, text in sorted(topics.topics.items())]
    first = len(texts) * 9 // 10
    train, held = b"\n".join(texts[:first]), b"\n".join(texts[first:])
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, held))  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _prepared(method: Method, source: str) -> PreparedBase:
    """Its base, decomposed here."""
    root = Path(tempfile.mkdtemp(prefix="farspan-bench-"))
    spec = TrainSpec(
        run_dir=str(root / "run"),
        tokens_dir="",
        model=Model(source),
        data=TextData("stdlib"),
        adapter=method.adapter,
        base=method.base,
        precision="bf16",
        mesh=Mesh(),
        zero=0,
        cpu_offload=False,
        accumulation=1,
        warmup_steps=0,
        optim=Optim(),
        memory=Tiles(),
        checkpoint=Checkpoint(),
        evaluate=Evaluate(),
        track=Track(),
    )
    return PreparedBase.open(prepare(spec, cache_root=root / "cache"))


def source_model(toy: bool) -> str:
    return str(pretrained(toy=toy, layers=LAYERS, steps=PRETRAINING_STEPS))


class Run:
    """One method's model, engine and data."""

    def __init__(self, method: Method, seed: int, lr: float, steps: int, toy: bool, dtype: torch.dtype) -> None:
        self.method, self.steps, self.rows = method, steps, SEQUENCES * ROWS
        source, prepared = source_model(toy), None
        if is_prepared(method.base, method.adapter):
            prepared = _prepared(method, source)
        causal = load_model(source, revision=None, dtype=dtype, device=CPU, base=method.base, prepared=prepared)
        layers = decoder_layers(causal)
        plan = LayerPlan(x=Rows(device=self.rows))
        placement = Placement(rows=self.rows, attention_rows=self.rows, layers=(plan,) * len(layers))
        if method.how == "peft":
            self.module, trainable = _by_peft(causal, seed)
        else:
            self.module, trainable = prepare_model(
                causal,
                adapter=method.adapter,
                memory=Tiles(loss_tile=512, activations=method.activations),
                seed=seed,
                placement=placement if method.rebuilt else None,
            )
        if prepared is not None:
            start_adapters(self.module.model, prepared)
        adapter = method.adapter
        if isinstance(adapter, LoRA) and adapter.init == "pissa":
            for layer in lora_start.lora_layers(self.module.model).values():
                lora_start.begin(layer, *lora_start.from_weights(layer, adapter))
        if isinstance(adapter, LoRA) and adapter.init == "lora_ga":
            probe = batch(domain()[0], 2 * SEQUENCES, torch.Generator().manual_seed(100 + seed))
            lora_start.from_gradients(self.module.model, adapter, lambda: self.loss(probe).backward(), seed=seed)
        if method.how == "checkpoint":
            for layer in layers:
                layer.gradient_checkpointing = True  # type: ignore[assignment]
                layer._gradient_checkpointing_func = lambda call, x: checkpoint(call, x, use_reentrant=False)  # type: ignore[assignment]
        self.trained = sum(p.numel() for p in trainable.values())
        self.weight_bytes = sum(t.nbytes for t in (*causal.parameters(), *causal.buffers()))
        self.optim = method.optim.model_copy(update={"lr": lr, "steps": steps, "beta2": 0.95})
        engine = InBackwardEngine if self.optim.in_backward else PlainEngine
        self.plain = engine(self.module, trainable, self.optim, "cpu")
        self.engine = with_codes(self.plain, self.module, self.optim)
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

    def batch(self) -> Tensor:
        return batch(domain()[0], SEQUENCES, self.draw)

    def loss(self, ids: Tensor) -> Tensor:
        """Sum over all trained bytes of some sequences, packed into one."""
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        positions = torch.arange(ids.shape[1]).repeat(ids.shape[0])[None]
        pack = PackedSequence((ids.shape[1],) * ids.shape[0])
        return self.module(ids.flatten()[None], labels.flatten()[None], positions, pack)  # type: ignore[no-any-return]

    def step(self, step: int = 1, ids: Tensor | None = None) -> float:
        ids = self.batch() if ids is None else ids
        trained, lr = ids.numel() - ids.shape[0], lr_at(step, self.optim, max(1, self.steps // 20))
        self.engine.begin(lr=lr)
        loss = self.loss(ids)
        self.engine.backward(loss / trained, last=True)
        self.engine.step(lr=lr, clip_norm=None if self.optim.in_backward else 1.0)
        return float(loss.detach()) / trained

    def held_out(self, toy: bool) -> float:
        ids = batch(domain()[1], 4 if toy else 48, torch.Generator().manual_seed(3))
        self.module.eval()
        with torch.no_grad():
            losses = [float(self.loss(part)) / (part.numel() - part.shape[0]) for part in ids.split(SEQUENCES)]
        self.module.train()
        return statistics.mean(losses)

    def state_bytes(self) -> int:
        """Masters, moments and the buffer that gradients are added up in."""
        states = {f.tensor.data_ptr(): f.tensor.nbytes for f in self.plain.fragments()}
        weights = {p.data_ptr() for p in self.module.parameters()}
        flat = self.plain._flat
        return sum(size for at, size in states.items() if at not in weights) + (flat.nbytes if flat is not None else 0)


def _by_peft(causal: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    from farspan.trainer.models import CausalLMLoss

    torch.manual_seed(seed)
    adapted = get_peft_model(causal, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    module = CausalLMLoss(adapted, causal, loss_tile=512)
    module.train()
    return module, {name: p for name, p in adapted.named_parameters() if p.requires_grad}
