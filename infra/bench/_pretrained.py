"""A small language model trained here on real text: bytes of the standard library's source, some tens of
minutes of one core.

Kept in the user's cache by what it is made of, so that benchmarks share it. Held out are the last files by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from farspan.trainer.run_folder import default_cache_root

SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
TOY_SHAPE = {**SHAPE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
ROWS, BATCH, STEPS, LR = 256, 8, 1500, 2e-3
TOY_STEPS = 3


@lru_cache(maxsize=1)
def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held-out ones: a tenth, whole files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    first = files[: len(files) * 9 // 10]
    train, held = (b"".join(path.read_bytes() for path in part) for part in (first, files[len(first) :]))
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, held))  # type: ignore[return-value]


def batch(data: Tensor, size: int, generator: torch.Generator, rows: int = ROWS) -> Tensor:
    starts = torch.randint(0, len(data) - rows, (size,), generator=generator)
    return torch.stack([data[start : start + rows] for start in starts.tolist()])


def pretrained(*, toy: bool, layers: int = SHAPE["num_hidden_layers"], steps: int = STEPS) -> Path:
    """Folder of the trained model in HF form; trains it if it is not there."""
    shape, steps = (TOY_SHAPE, TOY_STEPS) if toy else ({**SHAPE, "num_hidden_layers": layers}, steps)
    text = hashlib.sha256(corpus()[0].numpy().tobytes()).hexdigest()
    made_of = json.dumps([shape, steps, ROWS, BATCH, LR, text, torch.__version__])
    folder = default_cache_root() / "bench" / f"pretrained-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    if (folder / "config.json").exists():
        return folder
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    draw, started = torch.Generator().manual_seed(1), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                LR * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            )
        ids = batch(corpus()[0], BATCH, draw)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            took_s = time.monotonic() - started
            print(f"pretraining {step}/{steps}, loss {float(loss.detach()):.3f}, {took_s:.0f} s", flush=True)
    model.save_pretrained(folder)
    return folder


def held_out_loss(model: Any, *, toy: bool) -> float:
    """Mean loss in nats a byte on the same held-out windows."""
    ids = batch(corpus()[1], 2 if toy else 32, torch.Generator().manual_seed(2))
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) for part in ids.split(8)]
    return sum(losses) / len(losses)
