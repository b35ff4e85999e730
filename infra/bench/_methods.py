"""Methods of fine-tuning that `farspan bench adapters` sets side by side, and the learning rates each is tried at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from farspan.trainer.bases.config import LQ, NF4, Base, Int8, Unquantized
from farspan.trainer.config import (
    COAT,
    L4Q,
    LAMB,
    PEQA,
    PV,
    S2A,
    AdamW8bit,
    Adapter,
    DCTAdamW,
    FullFineTune,
    GaLore,
    LoRA,
    Muon,
    Optim,
    Optimizer,
    PaCA,
    Reversible,
    UniPT,
)

LORA = LoRA(rank=8, alpha=16.0)
LORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FULL_RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
FULL_RATES_OF_MATRICES = (4e-4, 8e-4, 1.6e-3, 3.2e-3)
PACA_RATES = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
STARTED_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
"""Of LoRA that starts large, not at zero."""
SCALE_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
S2A_RATES = (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)


PLAIN, ADAMW = Unquantized(), Optim()


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    adapter: Adapter
    base: Base = PLAIN
    rates: tuple[float, ...] = LORA_RATES
    optim: Optimizer = ADAMW
    how: str = ""
    """`peft`: peft's own forward and fp32 adapters; `checkpoint`: torch's checkpointing of every layer."""
    activations: Literal["autograd", "fused", "fp8", "int4"] = "autograd"

    @property
    def rebuilt(self) -> bool:
        return isinstance(self.adapter, Reversible)


def full(optim: Optimizer, rates: tuple[float, ...] = FULL_RATES) -> Method:
    """Every weight trained, by another optimizer than AdamW."""
    return Method(FullFineTune(), rates=rates, optim=optim)


METHODS = {
    "full fine-tuning": Method(FullFineTune(), rates=FULL_RATES),
    "full, AdamW in backward": full(Optim(in_backward=True)),
    "full, adamw8bit": full(AdamW8bit()),
    "full, coat": full(COAT()),
    "full, dct_adamw of 32": full(DCTAdamW(rank=32, every=20), FULL_RATES_OF_MATRICES),
    "full, galore of 32": full(GaLore(rank=32, every=20, scale=1.0), FULL_RATES_OF_MATRICES),
    "full, lamb": full(LAMB(), (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "full, muon": full(Muon(), FULL_RATES_OF_MATRICES),
    "LoRA, peft's default": Method(LORA, how="peft"),
    "LoRA": Method(LORA),
    "LoRA, dropout 0.05": Method(LORA.model_copy(update={"dropout": 0.05})),
    "LoRA, every layer checkpointed": Method(LORA, how="checkpoint"),
    "reversible 1, 3 bits, LoRA": Method(Reversible(wiring=1, bits=3, inside=LORA)),
    "reversible 2, 3 bits, width 16, LoRA": Method(Reversible(wiring=2, bits=3, width=16, inside=LORA)),
    "reversible 3, 3 bits, LoRA": Method(Reversible(wiring=3, bits=3, inside=LORA)),
    "PaCA": Method(PaCA(rank=16), rates=PACA_RATES),
    "reversible 1, float, anchors of 2, LoRA": Method(
        Reversible(form="float", wiring=1, anchor_every=2, tolerance=1e-2, inside=LORA)
    ),
    "LoRA from pissa": Method(LORA.model_copy(update={"init": "pissa"}), rates=STARTED_RATES),
    "LoRA from lora_ga": Method(LORA.model_copy(update={"init": "lora_ga"}), rates=STARTED_RATES),
    "LoRA, 30 % of the rows": Method(LORA.model_copy(update={"keep_rows": 0.3})),
    "LoRA, activations fused": Method(LORA, activations="fused"),
    "LoRA, activations in fp8": Method(LORA, activations="fp8"),
    "LoRA, activations in 4 bits": Method(LORA, activations="int4"),
    "DoRA": Method(LORA.model_copy(update={"dora": True})),
    "LoRA on int8": Method(LORA, Int8()),
    "LoRA on nf4": Method(LORA, NF4()),
    "LoRA at what nf4 lost (LoRC)": Method(LORA.model_copy(update={"init": "lorc"}), NF4()),
    "LoRA on lq, 2.75 bits": Method(LORA, LQ(bits=2.75), STARTED_RATES),
    "S2A, biases, prompt of 8, side 32": Method(S2A(prompt=8, side=32), rates=S2A_RATES),
    "UniPT": Method(UniPT(reduction=4)),
    "PEQA, 4 bits": Method(PEQA(bits=4), rates=SCALE_RATES),
    "PV-Tuning, 4 bits": Method(PV(bits=4), rates=SCALE_RATES),
    "L4Q, 4 bits": Method(L4Q(rank=8, bits=4)),
    # the same with others
    "full, dct_adamw of 32, 4 bits left out": full(
        DCTAdamW(rank=32, every=1, feedback="4bit"), (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
    ),
    "reversible 1, 2 bits, width 16, LoRA": Method(Reversible(wiring=1, bits=2, width=16, inside=LORA)),
    "reversible 1, 3 bits, PaCA": Method(Reversible(wiring=1, bits=3, inside=PaCA(rank=16)), rates=PACA_RATES),
    "full, activations in 4 bits": Method(FullFineTune(), rates=FULL_RATES, activations="int4"),
    "PaCA, activations in 4 bits": Method(PaCA(rank=16), rates=PACA_RATES, activations="int4"),
    "LoRA on lq, 4.1 bits": Method(LORA, LQ(bits=4.127), STARTED_RATES),
    "PaCA on nf4": Method(PaCA(rank=16), NF4(), rates=PACA_RATES),
    "reversible 1, 3 bits, LoRA on nf4": Method(Reversible(wiring=1, bits=3, inside=LORA), NF4()),
    "S2A, biases": Method(S2A(), rates=S2A_RATES),
    "UniPT on nf4": Method(UniPT(reduction=4), NF4()),
    "PEQA, 3 bits": Method(PEQA(bits=3), rates=SCALE_RATES),
    "PV-Tuning, 3 bits": Method(PV(bits=3), rates=SCALE_RATES),
    "L4Q, 3 bits": Method(L4Q(rank=8, bits=3)),
}
