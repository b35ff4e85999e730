"""The shape of a model and of its training, as far as bytes and seconds of a step depend on them.

Plain numbers that `jobs` fills from a job and a model's `config.json`; an analytic profile and the model states are
computed from these alone. Widths are elements, sizes bytes.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from farspan.memory.plan import TierCodec
from farspan.schema import Count, Schema

Precision = Literal["bf16", "fp32"]
WIDTH_BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}


class LayerForm(Schema):
    """What sets one decoder layer of a model apart from the others."""

    mixer: Literal["attention", "linear"] = "attention"
    """Softmax attention, or a recurrence whose cost is linear in the rows (gated delta net, state space)."""
    window: Count | None = Field(default=None, ge=1)
    """Rows a query looks back on, itself included; None: all."""
    experts: int = Field(default=1, ge=1)
    """More than one: a mixture of experts in the place of the MLP."""

    @property
    def name(self) -> str:
        mixer = "linear" if self.mixer == "linear" else "full" if self.window is None else f"window {self.window}"
        return mixer if self.experts == 1 else f"{mixer}, {self.experts} experts"


class ModelShape(Schema):
    """A decoder-only transformer with a gated MLP, as transformers builds it."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    ffn: int = Field(ge=1)
    vocab: int = Field(ge=1)
    tied: bool = False
    """Embedding and output projection are one matrix."""
    forms: tuple[LayerForm, ...] = (LayerForm(),)
    """Of each layer, bottom first; a single one stands for all."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """RMSNorm on q and k: of each head (Qwen3), or over all heads at once (OLMo 2)."""
    norm_after: bool = False
    """Norms follow attention and MLP instead of preceding them (OLMo 2)."""
    norm_scale_fp32: bool = False
    """A norm multiplies by its weight before it rounds to the model's dtype (OLMo 2), not after."""
    fused: bool = False
    """q, k and v are one linear layer, and so are gate and up (Phi-3)."""

    def form(self, layer: int) -> LayerForm:
        return self.forms[layer % len(self.forms)]

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of k alone; v has as much."""
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a decoder layer, by the name transformers gives it, in order."""
        d, q, kv, f = self.hidden, self.q_width, self.kv_width, self.ffn
        if self.fused:
            first, gate_up = {"qkv_proj": (d, q + 2 * kv)}, {"gate_up_proj": (d, 2 * f)}
        else:
            first = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv)}
            gate_up = {"gate_proj": (d, f), "up_proj": (d, f)}
        return {**first, "o_proj": (q, d), **gate_up, "down_proj": (f, d)}

    @property
    def norm_widths(self) -> tuple[int, ...]:
        """Of one layer's norms."""
        of_qk = {"none": (), "head": (self.head_dim,) * 2, "whole": (self.q_width, self.kv_width)}[self.qk_norm]
        return (self.hidden, self.hidden, *of_qk)

    @property
    def norm_parameters(self) -> int:
        """Weights of one layer's norms."""
        return sum(self.norm_widths)

    @property
    def layer_parameters(self) -> int:
        return sum(i * o for i, o in self.linears().values()) + self.norm_parameters

    @property
    def parameters(self) -> int:
        """All weights; biases, where a family has them, are left out."""
        outside = self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + outside


class AdapterShape(Schema):
    """Low-rank adapters as peft builds them, columns trained in place (PaCA), scales of rows of integers (PEQA), biases
    with a prompt and side modules (S2A), a network beside a frozen model (UniPT), or adapters whose sum with the matrix
    is rounded with learned steps (L4Q); `codes`: scales whose integers are trained too (PV)."""

    kind: Literal["lora", "columns", "scales", "biases", "network", "learned", "codes"] = "lora"
    rank: int = Field(ge=1)
    """Of scales: groups of the narrowest row; of a network: its width."""
    group: int | None = None
    """Elements that share a scale, or a learned step; None: a row."""
    targets: tuple[str, ...] | None = None
    """Linear layers with an adapter, by the last part of their name; None: all of a decoder layer."""
    precision: Precision | None = None
    """Of the adapter's weights; None: the model's. (peft by itself makes them fp32 on a bf16 model.)"""
    share: float = Field(default=0.0, ge=0, le=1)
    """Of a matrix's integers, those that may change in a step."""
    dropout: bool = False
    keep_rows: float = Field(default=1.0, gt=0, le=1)
    """Share of the input's rows that are stored."""
    dora: bool = False
    """Lengths of rows trained apart; what peft's operators keep for it is not counted."""
    prompt: int = 0
    """Tokens of a prefix of keys and values in each layer."""
    side: int = 0
    """Width of a module beside each MLP."""
    stores_inputs: bool = False
    """A network keeps what layers give."""
    start: bool = False
    """A frozen second pair takes the start off."""
    whole: tuple[Literal["lm_head", "embed_tokens"], ...] = ()
    """Modules trained whole beside the adapters."""


class StoredAs(Schema):
    """How the matrices of decoder layers are stored; they are made whole, one by one, where they are used."""

    type: Literal["int8", "nf4", "integers", "lq"]
    bits: float = 4
    """`integers`: of each, packed; scales are trained and count there. `lq`: of a weight with all scales, what matrices
    may take together; which of them takes how much is found when the base is prepared."""
    group: int | None = None
    double: bool = True
    """nf4: the scales of blocks of 64 are in 8 bits, with a scale for each 256 of them."""

    def bytes(self, inputs: int, outputs: int) -> int:
        """Of one matrix."""
        count = inputs * outputs
        if self.type == "int8":
            return count + 4 * outputs
        if self.type == "lq":
            return math.ceil(count * self.bits / 8)
        if self.type == "integers":
            return count * int(self.bits) // 8 + outputs * (1 if self.group is None else inputs // self.group)
        blocks = -(-count // 64)
        scales = blocks + 4 * -(-blocks // 256) + 4 if self.double else 4 * blocks
        return count // 2 + scales


class CouplingShape(Schema):
    """Reversible streams around the layers (`memory.coupling`)."""

    wiring: Literal[1, 2, 3] = 1
    bits: int = Field(ge=1, le=8)
    form: Literal["exact", "float"] = "exact"
    anchor_every: int = Field(default=1, ge=1)
    """Of the float form: layers from one whose streams are stored whole to the next."""
    width: int = Field(default=0, ge=0)
    """Of the bottleneck adapters between the streams; 0: none."""
    store: Literal["bits", "inputs"] = "bits"


class TrainedTensor(Schema):
    """A trained parameter, as an optimizer sees it."""

    shape: tuple[int, ...]
    inside: bool = True
    """Not the embedding or the output projection, whose rows are tokens."""
    count: int = Field(default=1, ge=1)
    """How many like it there are."""

    @property
    def is_matrix(self) -> bool:
        """One that an optimizer of matrices takes."""
        return len(self.shape) == 2 and self.inside


class OptimizerShape(Schema):
    """What of an optimizer its bytes and seconds depend on."""

    type: Literal["adamw", "adamw8bit", "coat", "dct_adamw", "galore", "lamb", "muon"] = "adamw"
    rank: int = Field(default=0, ge=0)
    """Of the subspace of `dct_adamw` and `galore`."""
    every: int = Field(default=1, ge=1)
    """Steps between two choices of it."""
    feedback_bits: Literal[0, 4, 8] = 0
    """Of an element that the subspace left out."""
    iterations: int = Field(default=0, ge=0)
    """Of Newton and Schulz (`muon`)."""
    in_backward: bool = False
    """A weight is updated when backward has its gradient."""

    @property
    def owned(self) -> bool:
        """A parameter's state is on one rank."""
        return self.type != "adamw"

    def low_rank(self, tensor: TrainedTensor) -> bool:
        """Whether this tensor's moments are as wide as the subspace."""
        return self.type in ("dct_adamw", "galore") and tensor.is_matrix and min(tensor.shape) > self.rank


class Training(Schema):
    """How the model is trained."""

    precision: Precision = "bf16"
    adapter: AdapterShape | None = None
    """None: every weight is trained."""
    coupling: CouplingShape | None = None
    base: StoredAs | None = None
    """None: in the model's precision."""
    zero: Literal[0, 1, 2, 3] = 0
    cpu_offload: bool = False
    dp: int = Field(default=1, ge=1)
    sp: int = Field(default=1, ge=1)
    loss_tile: int = Field(default=2048, ge=1)
    """Rows of logits that exist at a time."""
    mlp_tile: int | None = Field(default=None, ge=1)
    """Rows of the MLP that exist at a time; None: all."""
    micro_batches: int = Field(default=1, ge=1)
    activations: Literal["autograd", "fused", "fp8", "int4"] = "autograd"
    """What norms, gated units and trained linear layers keep (`memory.operators`)."""
    tier_codec: TierCodec = "exact"
    """What rows on host and disk are in."""
    optimizer: OptimizerShape = OptimizerShape()
    exchange_bits: float | None = Field(default=None, gt=0)
    """Of a channel that crosses ranks in codes; None: everything crosses as it is."""
    density: bool = False
    """A penalty on the activated gate (`memory.density`)."""

    @property
    def world_size(self) -> int:
        return self.dp * self.sp

    @property
    def width_bytes(self) -> int:
        """Of an element of weights and activations."""
        return WIDTH_BYTES[self.precision]

    @property
    def adapter_precision(self) -> Precision:
        """DeepSpeed casts all weights to the model's."""
        own = self.adapter.precision if self.adapter is not None and self.zero == 0 else None
        return own or self.precision

    @property
    def adapter_width_bytes(self) -> int:
        return WIDTH_BYTES[self.adapter_precision]

    @property
    def one_node_adapters(self) -> bool:
        """Whether an adapted linear layer is one autograd node (`trainer.adapters.lora`): not under ZeRO-3, nor with
        adapters of another dtype, as peft by itself makes them."""
        if self.adapter is None or self.adapter.kind != "lora":
            return False
        return self.zero != 3 and self.adapter_precision == self.precision

    def adapts(self, linear: str) -> bool:
        """Whether the linear layer of this name has an adapter."""
        return self.adapter is not None and (self.adapter.targets is None or linear in self.adapter.targets)

    def trains(self, module: Literal["layers", "lm_head", "embed_tokens"]) -> bool:
        """Whether the base weights of a module are trained; those of decoder layers are under no adapter."""
        return self.adapter is None or module in self.adapter.whole

    def trained_in_layer(self, shape: ModelShape) -> int:
        """Trained weights of one decoder layer."""
        beside = 2 * shape.hidden * self.coupling.width if self.coupling is not None else 0
        if self.adapter is None:
            return shape.layer_parameters + beside
        adapted = [(i, o) for name, (i, o) in shape.linears().items() if self.adapts(name)]
        if self.adapter.kind == "network":
            return (shape.hidden + 2) * self.adapter.rank
        if self.adapter.kind in ("scales", "codes"):
            return sum(o * (1 if self.adapter.group is None else i // self.adapter.group) for i, o in adapted) + beside
        if self.adapter.kind == "biases":
            parts = 2 * shape.kv_width * self.adapter.prompt + self.adapter.side**2
            return sum(o for _, o in adapted) + parts + beside
        if self.adapter.kind == "learned":
            group = self.adapter.group
            beside += sum(2 * o * (1 if group is None else i // group) for i, o in adapted)
        inputs = 0 if self.adapter.kind == "columns" else sum(i for i, _ in adapted)
        beside += sum(o for _, o in adapted) * self.adapter.dora
        return self.adapter.rank * (inputs + sum(o for _, o in adapted)) + beside

    def tensors(self, shape: ModelShape) -> tuple[TrainedTensor, ...]:
        """Every trained parameter."""
        d, layers = shape.hidden, shape.layers
        found: list[TrainedTensor] = []

        def add(*sizes: int, count: int = layers, inside: bool = True) -> None:
            found.append(TrainedTensor(shape=sizes, count=count, inside=inside))

        for name, (inputs, outputs) in shape.linears().items():
            if self.adapter is None:
                add(outputs, inputs)
            elif self.adapts(name) and self.adapter.kind == "biases":
                add(outputs)
            elif self.adapts(name) and self.adapter.kind in ("scales", "codes"):
                add(outputs, 1 if self.adapter.group is None else inputs // self.adapter.group)
            elif self.adapts(name):
                if self.adapter.kind in ("lora", "learned"):
                    add(self.adapter.rank, inputs)
                add(outputs, self.adapter.rank)
                if self.adapter.kind == "learned":
                    groups = 1 if self.adapter.group is None else inputs // self.adapter.group
                    add(outputs * groups, count=2 * layers)
                if self.adapter.dora:
                    add(outputs)
        if self.adapter is None:
            for width in shape.norm_widths:
                add(width)
            add(d, count=1)
        if self.coupling is not None and self.coupling.width:
            add(self.coupling.width, d)
            add(d, self.coupling.width)
        if self.adapter is not None and self.adapter.kind == "biases":
            if self.adapter.prompt:
                add(self.adapter.prompt, shape.kv_width, count=2 * layers)
            if self.adapter.side:
                add(self.adapter.side, self.adapter.side)
        if self.adapter is not None and self.adapter.kind == "network":
            width = self.adapter.rank
            add(width, d)
            add(width, count=2 * layers)
            add(d, width, count=1)
            add(width, width, count=1)
            add(width, count=1)
            return tuple(found)
        embedding, head = self.trained_outside(shape)
        for _ in range((embedding > 0) + (head > d)):
            add(shape.vocab, d, count=1, inside=False)
        return tuple(found)

    def proposed_in_layer(self, shape: ModelShape) -> int:
        """Bytes of new integers, and of their places, that wait for the optimizer step; at most."""
        share = self.adapter.share if self.adapter is not None else 0.0
        return sum(9 * int(share * i * o) for name, (i, o) in shape.linears().items() if self.adapts(name))

    def trained_outside(self, shape: ModelShape) -> tuple[int, int]:
        """Trained weights of the embedding, and of final norm and output projection; a tied matrix counts once."""
        matrix = shape.vocab * shape.hidden
        head = matrix if self.trains("lm_head") else 0
        embedding = matrix if self.trains("embed_tokens") and not (shape.tied and head) else 0
        if self.adapter is not None and self.adapter.kind == "network":
            head += (self.adapter.rank + shape.hidden + 1) * self.adapter.rank
        return embedding, head + (shape.hidden if self.adapter is None else 0)

    def trained(self, shape: ModelShape) -> int:
        """All trained weights."""
        return shape.layers * self.trained_in_layer(shape) + sum(self.trained_outside(shape))


class Weights(Schema):
    """A model's weights as ranks hold and train them; counted from a shape, or measured."""

    bytes: int = Field(ge=0)
    """In their dtypes, adapters included."""
    parameters: int = Field(ge=0)
    trained: int = Field(ge=0)
    largest: int = Field(ge=0)
    """Elements of the largest trained tensor."""
    tensors: tuple[TrainedTensor, ...] = ()
    """The trained ones."""

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            bytes=self.bytes + other.bytes,
            parameters=self.parameters + other.parameters,
            trained=self.trained + other.trained,
            largest=max(self.largest, other.largest),
            tensors=self.tensors + other.tensors,
        )
