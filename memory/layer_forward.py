"""The forward of a decoder layer of transformers, operator by operator: which tensors live when.

The order of allocations is that of torch 2.13 on transformers 5.23, read from the allocator's events; tests hold the
counts against unmodified layers. Counted are tensors with a row per token, and weight gradients; the workspace of a
matmul library is not. `layer_backward` has the other half.

Names: d hidden, q and kv width of all query and of all KV heads, f width of the MLP.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from farspan.errors import JobError
from farspan.kernels.quantized import CHUNK_ELEMENTS
from farspan.memory import layer_operators
from farspan.memory.liveness import Ledger
from farspan.memory.shape import ModelShape, Training

Device = Literal["cuda", "cpu"]
FP32, HALF = 4, 2
FINAL_NORM = "final norm"
"""The norm outside the layers, which stays as it is."""
MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Names of the linear layers inside an MLP."""


class HeadSplit(NamedTuple):
    """Heads after the all-to-all, as `trainer.parallel.ulysses` gives them out."""

    query: int
    """Query heads of the rank that has most."""
    kv: int
    """KV heads of the rank that needs most."""
    kv_sent: int
    """KV heads sent by a rank in all: one that several ranks need counts for each."""


def head_split(shape: ModelShape, ranks: int) -> HeadSplit:
    """Rank p attends with query heads [H*p/P, H*(p+1)/P) and the KV heads these use.

    Raises:
        JobError: there are more ranks than query heads.
    """
    if ranks > shape.heads:
        raise JobError(
            f"SP degree {ranks} is more than the model's {shape.heads} attention heads",
            at="parallel.sp",
            why=f"every rank attends with at least one whole head: {shape.heads} heads / {ranks} ranks < 1",
            try_=f"--set parallel.sp={shape.heads} or less",
        )
    group = shape.heads // shape.kv_heads
    query = [range(shape.heads * p // ranks, shape.heads * (p + 1) // ranks) for p in range(ranks)]
    kv = [(heads.stop - 1) // group - heads.start // group + 1 for heads in query]
    return HeadSplit(max(len(heads) for heads in query), max(kv), sum(kv))


class LayerForward(Ledger):
    """Books the forward of one decoder layer.

    Args:
        grad: autograd records; False: nothing is saved, and O with its log-sum-exp is held to the end, as by a tape.
        lone_gradients: a weight's gradient is handed on as soon as it exists (to a flat buffer or a bucket) and then
            freed; False: it stays.
        rebuild: values that only the layer's output needs are left out (the last matmul; the whole MLP when tiled).
        saves_on_host: what autograd saves waits on the host; in a rebuild O is then held by whoever gave it to the end.
    """

    def __init__(
        self,
        shape: ModelShape,
        training: Training,
        device: Device,
        *,
        grad: bool,
        lone_gradients: bool = True,
        rebuild: bool = False,
        saves_on_host: bool = False,
    ) -> None:
        super().__init__(saves_on_host=saves_on_host)
        self.shape, self.training, self.device = shape, training, device
        self.grad, self.lone_gradients, self.rebuild = grad, lone_gradients, rebuild
        self.drops_o = grad and not (rebuild and saves_on_host)
        self.e = training.width_bytes
        self.casts = self.e != FP32
        self.trains_base = training.trains("layers")
        self.d, self.f, self.q, self.kv = shape.hidden, shape.ffn, shape.q_width, shape.kv_width
        split = head_split(shape, training.sp)
        # per row of this rank, of which the whole sequence has sp times as many
        self.q_here = training.sp * split.query * shape.head_dim
        self.kv_here = training.sp * split.kv * shape.head_dim
        self.kv_sent = split.kv_sent * shape.head_dim
        self.linears = shape.linears()
        self.wide: dict[str, str] = {}
        """By norm: its input as fp32."""
        self.normal: dict[str, str] = {}
        """By norm: what its weight multiplies."""
        self.stands_for: dict[str, tuple[str, ...]] = {}
        """By tensor: what is kept in its place."""
        self.kept_by: dict[str, list[str]] = {}
        """By tensor: the operators whose backward needs it."""

    def forward(self) -> None:
        """Leaves `y`, held by the code, beside what is saved."""
        e, d = self.e, self.d
        self.given("x")
        after = self.shape.norm_after
        self.doing = "attention forward"
        mixed = self.attention("x" if after else self.norm("norm1", "x", d, 1))
        mixed = self.norm_of_output("norm1", mixed)
        self.make("h", e * d, reads=2 * e * d)
        self.drop(mixed)
        self.doing = "MLP forward"
        mlp = self.mlp("h" if after else self.norm("norm2", "h", d, 1))
        mlp = self.norm_of_output("norm2", mlp)
        self.make("y", e * d, reads=2 * e * d)
        self.drop(mlp, "h")

    def norm_of_output(self, name: str, source: str) -> str:
        if not self.shape.norm_after:
            return source
        out = self.norm(name, source, self.d, 1)
        self.drop(source)
        return out

    def norm(self, name: str, source: str, n: int, groups: int) -> str:
        """RMSNorm of transformers over n elements in `groups`: computed in fp32, each step a tensor of its own."""
        if self.one_node(name):
            return layer_operators.norm(self, name, n, groups)
        e, wide = self.e, FP32 * n
        source_fp32 = self.make(f"{name} in fp32", wide, reads=e * n) if self.casts else source
        self.drop(self.make(f"{name} squares", wide, reads=wide))
        self.traffic += wide  # their mean
        self.make(f"{name} 1/rms", FP32 * groups)
        normal = self.make(f"{name} normalised", wide, reads=wide)
        self.wide[name] = source_fp32
        self.keep_for_backward(name, source_fp32, source_fp32, f"{name} 1/rms")
        self.drop(f"{name} 1/rms")
        if self.casts:
            self.drop(source_fp32)
        if self.shape.norm_scale_fp32:
            self.normal[name] = normal
            self.keep_for_backward(name, *[normal] * self.trains_base)
            out = self.make(f"{name} out in fp32" if self.casts else f"{name} out", wide, reads=wide)
            if self.casts:
                out = self.make(f"{name} out", e * n, reads=wide)
                self.drop(f"{name} out in fp32")
        else:
            scaled = self.normal[name] = self.make(f"{name} rounded", e * n, reads=wide) if self.casts else normal
            self.keep_for_backward(name, *[scaled] * self.trains_base)
            out = self.make(f"{name} out", e * n, reads=e * n)
            self.drop(*{scaled, normal} - {normal})
        self.drop(normal)
        return out

    def one_node(self, norm: str) -> bool:
        """Whether this norm keeps less (`memory.operators`)."""
        return self.training.activations != "autograd" and norm != FINAL_NORM

    def kept_of(self, source: str) -> tuple[str, ...]:
        """What is kept of a linear layer's input."""
        return self.stands_for.get(source, (source,))

    def keep_for_backward(self, operator: str, *names: str) -> None:
        """An operator needs these in its backward."""
        if self.grad:
            self.save(*names)
            for name in names:
                keepers = self.kept_by.setdefault(name, [])
                keepers += [operator] * (operator not in keepers)

    def linear(self, name: str, source: str) -> str:
        """A linear layer with its adapter, if any, on top."""
        inputs, outputs = self.linears[name]
        e, a = self.e, self.training.adapter_width_bytes
        whole = self.whole(name)
        self.make(name, e * outputs)
        self.drop(*whole)
        self.keep_for_backward(name, *self.kept_of(source) * self.trains_base)
        if not self.training.adapts(name):
            return name
        adapter = self.training.adapter
        assert adapter is not None
        if adapter.kind in ("learned", "codes"):
            self.keep_for_backward(f"{name} adapter", *self.kept_of(source))
            return name
        if adapter.kind == "scales":
            self.keep_for_backward(f"{name} adapter", *((name,) if adapter.group is None else self.kept_of(source)))
            return name
        if adapter.kind == "biases":
            self.traffic += 2 * e * outputs
            return name
        if adapter.kind == "columns":
            if self.grad:
                columns = f"{source} columns"
                if columns not in self.sizes:
                    self.make(columns, e * adapter.rank, reads=e * adapter.rank)
                self.keep_for_backward(f"{name} adapter", columns)
                self.drop(columns)
            return name
        if self.training.one_node_adapters:
            return self.adapted(name, source)
        if a > e:
            source = self.make(f"{name} input in fp32", a * inputs, reads=e * inputs)
        low = source
        if adapter.dropout:
            mask = self.make(f"{name} mask", inputs if self.device == "cuda" else a * inputs, reads=0.0)
            low = self.make(f"{name} input with dropout", a * inputs, reads=2 * a * inputs)
            self.keep_for_backward(f"{name} dropout", mask)
            self.drop(mask)
        self.traffic += a * (inputs + outputs)  # these matmuls are so thin that reading and writing is their time
        self.make(f"{name} A", a * adapter.rank)
        self.make(f"{name} B", a * outputs)
        self.keep_for_backward(f"{name} adapter", low, f"{name} A")
        self.make(f"{name} scaled", a * outputs, reads=a * outputs)
        self.drop(f"{name} A", f"{name} B", *[low] * adapter.dropout)
        if a > e and self.device == "cpu":  # there an operator on two dtypes first makes them one
            self.make(f"{name} in fp32", a * outputs, reads=e * outputs)
        out = self.make(f"{name} adapted", max(a, e) * outputs, reads=(a + e) * outputs)
        if a > e and self.device == "cpu":
            self.drop(f"{name} in fp32")
        self.drop(f"{name} scaled", name)
        if a > e:
            out = self.make(f"{name} adapted and rounded", e * outputs, reads=a * outputs)
            self.drop(f"{name} adapted", source)
        return out

    def whole(self, name: str) -> list[str]:
        """A quantized layer's matrix, made for one use."""
        base, adapter = self.training.base, self.training.adapter
        if adapter is not None and adapter.kind == "learned" and self.training.adapts(name):
            return [self.learned(name, FP32 * (1 + self.casts))]  # the sum, and W0 as fp32
        if base is None or (base.type == "integers" and not self.training.adapts(name)):
            return []
        inputs, outputs = self.linears[name]
        weight = self.make(f"{name} weight", 0.0, constant=self.e * inputs * outputs)
        # a chunk in fp32 at a time; of nf4 the codes as indices beside it, and the scales
        chunk = min(inputs * outputs, CHUNK_ELEMENTS[self.device])
        beside = FP32 * chunk
        if base.type == "integers":
            beside += 3 * chunk  # unpacked, bit by bit
        if base.type == "lq":
            beside += 3 * chunk + FP32 * inputs * outputs // 16  # at most: 3 bits unpacked, scales of blocks of 16
        if base.type == "nf4":
            beside += 2 * chunk + FP32 * inputs * outputs // 64
        self.drop(self.make(f"{name} chunk", 0.0, constant=beside))
        return [weight]

    def learned(self, name: str, chunk_bytes: int, beside: int = 0) -> str:
        """The matrix as it is rounded with learned steps; of some rows so many bytes an element beside it, and steps
        and offsets."""
        inputs, outputs = self.linears[name]
        count = inputs * outputs
        weight = self.make(f"{name} weight", 0.0, constant=self.e * count)
        groups = outputs * self.groups_of(name)
        beside += 2 * FP32 * groups + chunk_bytes * min(count, CHUNK_ELEMENTS[self.device])
        self.drop(self.make(f"{name} chunk", 0.0, constant=beside))
        return weight

    def groups_of(self, name: str) -> int:
        """Of a row."""
        adapter = self.training.adapter
        return 1 if adapter is None or adapter.group is None else self.linears[name][0] // adapter.group

    def adapted(self, name: str, source: str) -> str:
        """The adapter's part, added where the base's output is (`trainer.adapters.lora`)."""
        inputs, outputs = self.linears[name]
        e, adapter = self.e, self.training.adapter
        assert adapter is not None
        self.traffic += e * (inputs + 2 * outputs)
        if adapter.dropout:
            self.make(f"{name} mask", e * inputs, reads=0.0)
            self.make(f"{name} input with dropout", e * inputs, reads=2 * e * inputs)
            self.drop(f"{name} mask")
        self.make(f"{name} A", e * adapter.rank)
        if adapter.dropout:
            self.drop(f"{name} input with dropout")
        if adapter.start:
            self.drop(self.make(f"{name} start", e * adapter.rank))
            self.traffic += e * (inputs + 2 * outputs)
        kept = self.stored_input(source, inputs)
        self.keep_for_backward(f"{name} adapter", *kept, f"{name} A")
        rows = adapter.keep_rows < 1
        self.drop(f"{name} A", *kept * (self.grad and rows))
        return name

    def stored_input(self, source: str, inputs: int) -> tuple[str, ...]:
        """What an adapter stores of its input: all, or some rows with indices and weights, once for all readers."""
        adapter = self.training.adapter
        assert adapter is not None
        if adapter.keep_rows == 1:
            return self.kept_of(source)
        rows = f"{source}, some rows"
        if self.grad and rows not in self.sizes:
            self.make(rows, adapter.keep_rows * (self.e * inputs + 8 + FP32), reads=self.e * inputs)
        return (rows,)

    def attention(self, source: str) -> str:
        """q, k, v with their norms and rotary embedding, attention, out-projection; lets `source` go."""
        shape, q, kv = self.shape, self.q, self.kv
        groups = {"none": (0, 0), "head": (shape.heads, shape.kv_heads), "whole": (1, 1)}[shape.qk_norm]
        if shape.fused:
            raw = v = self.linear("qkv_proj", source)
            heads = {"q": raw, "k": raw}
        else:
            heads = {}
            for name, width, count in (("q", q, groups[0]), ("k", kv, groups[1])):
                raw = heads[name] = self.linear(f"{name}_proj", source)
                if count:
                    heads[name] = self.norm(f"{name}_norm", raw, width, count)
                    self.drop(raw)
            v = self.linear("v_proj", source)
        for name, width in (("q", q), ("k", kv)):
            self.rotate(name, width)
        self.drop(*{heads["q"], heads["k"]} - {v})
        self.v = v
        out = self.attend()
        projected = self.linear("o_proj", out)
        self.drop(*[out] * (out != "o" or self.drops_o), *["q", "k", v] * (self.training.sp == 1), source)
        return projected

    def rotate(self, name: str, n: int) -> None:
        """x * cos + rotate_half(x) * sin."""
        size = self.e * n
        self.make(f"{name} cos", size, reads=size)
        self.make("half", size / 2, reads=size / 2)
        self.make("rotated", size, reads=size)
        self.drop("half")
        self.make(f"{name} sin", size, reads=size)
        self.drop("rotated")
        self.make(name, size, reads=2 * size)
        self.drop(f"{name} cos", f"{name} sin")

    def attend(self) -> str:
        """The kernel, between its all-to-alls if the sequence is spread; returns what the out-projection reads."""
        e, q, kv = self.e, self.q_here, self.kv_here
        spread = self.training.sp > 1
        keys, values = "k", self.v
        if spread:
            sent, received = e * (self.q + 2 * self.kv_sent), e * (q + 2 * kv)
            self.make("sent", sent, reads=sent)
            self.make("received", received, reads=sent)
            self.drop("sent")
            self.make("q, k and v of some heads", received, reads=received)
            self.drop("received", "q", "k", self.v)
            keys = values = "q, k and v of some heads"
        repeated = 2 * e * q if self.device == "cuda" and e != HALF and kv != q else 0  # as fp32 kernels want it
        if repeated:
            self.make("k and v for each query head", repeated, reads=2 * e * kv)
        self.make("o", e * q)
        self.make("lse", FP32 * q / self.shape.head_dim)
        if repeated:
            self.drop("k and v for each query head")
        self.keep_for_backward("attention", *(["q"] if not spread else []), keys, values, "o", "lse")
        if self.drops_o:
            self.drop("lse")
        if not spread:
            if self.shape.fused:  # its rotary embedding leaves q head by head, and O comes as q does
                self.make("o by row", e * q, reads=e * q)
                self.drop(*["o"] * self.drops_o)
                return "o by row"
            return "o" if self.grad else self.given("o by row")  # a tape holds O itself
        self.drop(keys)
        self.make("o sent", e * q, reads=e * q)
        self.make("o received", e * self.q, reads=e * q)
        self.drop("o sent", *["o"] * self.drops_o)
        self.make("o of all heads", e * self.q, reads=e * self.q)
        self.drop("o received")
        return "o of all heads"

    def mlp(self, source: str) -> str:
        """SwiGLU; lets `source` go where autograd does not keep it."""
        if self.training.mlp_tile is None:
            out = self.gated(source)
        else:
            out = self.tiled(source)
        self.drop(*[source] * (source != "h"))
        return out

    def gated(self, source: str) -> str:
        e, f = self.e, self.f
        if self.training.activations != "autograd":
            return layer_operators.gated(self, source)
        if self.shape.fused:
            gate = up = self.linear("gate_up_proj", source)
        else:
            gate = self.linear("gate_proj", source)
        self.make("silu", e * f, reads=e * f)
        self.keep_for_backward("silu", gate)
        self.keep_for_backward("density", *["silu"] * self.training.density)
        self.drop(*[gate] * (not self.shape.fused))
        if not self.shape.fused:
            up = self.linear("up_proj", source)
        self.make("product", e * f, reads=2 * e * f)
        self.keep_for_backward("gate x up", "silu", up)
        self.gate, self.up = gate, up
        self.drop("silu", up)
        out = self.linear("down_proj", "product")
        self.drop("product")
        return out

    def tiled(self, source: str) -> str:
        """Row tiles without autograd; its node keeps the input alone."""
        self.keep_for_backward("MLP in tiles", source)
        if self.rebuild and not self.shape.norm_after:
            return self.make("mlp", self.e * self.d)
        grad, self.grad = self.grad, False
        self.make("mlp tiles", self.e * self.d)
        self.in_tile = True
        self.drop(self.gated(source))
        self.in_tile, self.grad = False, grad
        self.make("mlp", self.e * self.d, reads=self.e * self.d)
        self.drop("mlp tiles")
        return "mlp"
