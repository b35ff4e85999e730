"""The backward of a decoder layer of transformers, operator by operator, after `layer_forward`.

Autograd runs the nodes in the reverse order of their creation, lets go of what a node saved when it has run, and adds
gradients that meet at one tensor: in place where the first one owns its memory, else into a new tensor.
"""

from __future__ import annotations

from farspan.kernels.quantized import CHUNK_ELEMENTS
from farspan.memory import layer_operators
from farspan.memory.layer_forward import FP32, HALF, MLP, LayerForward

CODES_CHUNK, CODES_CHOSEN = 13, 64
"""Bytes for each element of some rows, and for each of the largest gradients."""
LEAST_ROW_HEADS = 1 << 16
"""Rows times query heads of a call of attention's backward on a GPU, at least."""


class LayerRun(LayerForward):
    """Forward, then backward, of one decoder layer."""

    def backward(self) -> None:
        """From `dy`, which the caller made, to the gradient of `x`; both live at the end."""
        after = self.shape.norm_after
        self.gradient_of = {"h": "dy"}
        self.in_place = {"h": False}
        self.doing = "MLP backward"
        into_mlp = self.norm_backward("norm2", "dy", self.d, "mlp out", keep=True) if after else "dy"
        if self.training.mlp_tile is None:
            self.gated_backward(into_mlp, "h" if after else "norm2 out", keep=not after)
        else:
            self.tiled_backward(into_mlp, "h" if after else "norm2 out")
            self.drop(*[into_mlp] * after)
        if not after:
            self.doing = "norm backward"
            self.norm_backward("norm2", self.gradient_of["norm2 out"], self.d, "h")
        self.doing = "attention backward"
        dh = self.gradient_of["h"]
        self.gradient_of["x"], self.in_place["x"] = dh, True
        into_attention = self.norm_backward("norm1", dh, self.d, "mixed", keep=True) if after else dh
        self.attention_backward(into_attention, keep=not after)
        if not after:
            self.doing = "norm backward"
            self.norm_backward("norm1", self.gradient_of["norm1 out"], self.d, "x")

    def arrive(self, target: str, piece: str, size: float, *, owns: bool) -> None:
        """One more gradient of `target`. `owns`: the piece is a tensor of its own and not a view."""
        first = self.gradient_of.get(target)
        if first is None:
            self.gradient_of[target], self.in_place[target] = piece, owns
            return
        self.traffic += 3 * size
        if self.in_place[target]:
            self.drop(piece)
            return
        self.gradient_of[target] = self.make(f"sum of gradients of {target}", size)
        self.in_place[target] = True
        # whoever runs a rebuild holds dy to the end; to a kept layer autograd hands it over
        self.drop(piece, *[first] * (first != "dy" or not self.rebuild))

    def norm_backward(self, name: str, g: str, n: int, source: str, *, keep: bool = False) -> str:
        """RMSNorm, step by step; adds to the gradient of `source` and returns it. `keep`: `g` is needed elsewhere."""
        if self.one_node(name):
            return layer_operators.norm_backward(self, name, g, n, source, keep=keep)
        e, wide = self.e, FP32 * n
        self.need(*[self.normal[name]] * self.trains_base)
        if self.shape.norm_scale_fp32:
            if self.casts:
                cast = self.make(f"d {name} out in fp32", wide, reads=e * n)
                self.drop(*[g] * (not keep))
                g, keep = cast, False
            normal = self.make(f"d {name} normalised", wide, reads=wide)
            if self.trains_base:
                self.drop(self.make(f"d {name} weight, by row", wide, reads=2 * wide))
                self.used(self.normal[name])
            self.drop(*[g] * (not keep))
        else:
            normal = self.make(f"d {name} rounded", e * n, reads=e * n)
            if self.trains_base:
                self.drop(self.make(f"d {name} weight, by row", e * n, reads=2 * e * n))
            self.drop(*[g] * (not keep))
            if self.trains_base:
                self.used(self.normal[name])
            if self.casts:
                rounded, normal = normal, self.make(f"d {name} normalised", wide, reads=e * n)
                self.drop(rounded)
        target = f"{source} in fp32" if self.casts else source
        self.need(self.wide[name], f"{name} 1/rms")
        piece = self.make(f"d {name} in fp32, direct", wide, reads=2 * wide)
        self.drop(self.make(f"d {name} 1/rms, by row", wide, reads=2 * wide))
        self.drop(normal)
        self.used(self.wide[name], f"{name} 1/rms")
        self.arrive(target, piece, wide, owns=True)
        mean = self.make(f"d {name} squares", wide, reads=0.0)
        self.need(self.wide[name])
        power = self.make(f"{name} power", wide, reads=wide)
        twice = self.make(f"{name} power, twice", wide, reads=2 * wide)
        piece = self.make(f"d {name} in fp32, through the mean", wide, reads=2 * wide)
        self.drop(power, twice, mean)
        self.arrive(target, piece, wide, owns=True)
        self.used(self.wide[name])
        if self.casts:
            whole = self.gradient_of.pop(target)
            piece = self.make(f"d {name} in", e * n, reads=wide)
            self.drop(whole)
            self.arrive(source, piece, e * n, owns=True)
        return self.gradient_of[source]

    def linear_backward(self, name: str, g: str, source: str, *, keep: bool = False) -> None:
        """Adds to the gradient of `source`, for the adapter first. `keep`: `g` is needed elsewhere."""
        inputs, outputs = self.linears[name]
        e = self.e
        if self.training.adapts(name) and self.training.one_node_adapters:
            self.adapted_backward(name, g, source, keep=keep)
            return
        adapter = self.training.adapter
        if self.training.adapts(name) and adapter is not None and adapter.kind == "learned":
            self.learned_backward(name, g, source, keep=keep)
            return
        if self.training.adapts(name) and adapter is not None and adapter.kind == "codes":
            self.codes_backward(name, g, source, keep=keep)
            return
        if self.training.adapts(name) and adapter is not None and adapter.kind == "scales":
            known = (name,) if adapter.group is None else self.kept_of(source)
            self.need(*known)
            again = self.made_again(name, source, inputs) if adapter.group is not None else []
            self.drop(*again)
            whole = self.whole(name)
            dx = self.make(f"d {name} in", e * inputs)
            self.drop(*whole)
            self.drop(*[g] * (not keep))
            self.used(*known)
            self.arrive(source, dx, e * inputs, owns=False)
            return
        if self.training.adapts(name) and adapter is not None and adapter.kind in ("columns", "biases"):
            kept_columns = [f"{source} columns"] * (adapter.kind == "columns")
            self.need(*kept_columns)
            whole = self.whole(name)
            dx = self.make(f"d {name} in", e * inputs)
            self.drop(*whole)
            self.drop(*[g] * (not keep))
            self.used(*kept_columns)
            self.arrive(source, dx, e * inputs, owns=False)
            return
        if self.training.adapts(name):
            g = self.adapter_backward(name, g, source, keep=keep)
            keep = keep and not self.adapter_is_wider
        kept = self.kept_of(source) * self.trains_base
        self.need(*kept)
        if self.trains_base:
            remade = self.made_again(name, source, inputs)
            self.make(f"d {name} weight", 0.0, constant=e * inputs * outputs)
            self.drop(*remade)
        whole = self.whole(name)
        dx = self.make(f"d {name} in", e * inputs)
        self.drop(*whole)
        self.drop(*[g] * (not keep))
        self.used(*kept)
        self.arrive(source, dx, e * inputs, owns=False)
        if self.trains_base and self.lone_gradients:
            self.drop(f"d {name} weight")

    def learned_backward(self, name: str, g: str, source: str, *, keep: bool) -> None:
        """Of some rows: places, integers, what is clipped, and the matrix's gradient, made in the model's dtype."""
        inputs, outputs = self.linears[name]
        kept = self.kept_of(source)
        self.need(*kept)
        again = self.made_again(name, source, inputs)
        rank = self.training.adapter.rank if self.training.adapter is not None else 0
        gradients = FP32 * (rank * (inputs + outputs) + 2 * outputs * self.groups_of(name))
        weight = self.learned(name, 3 * FP32 + 2, gradients)
        self.drop(*again)
        dx = self.make(f"d {name} in", self.e * inputs)
        self.drop(weight, *[g] * (not keep))
        self.used(*kept)
        self.arrive(source, dx, self.e * inputs, owns=False)

    def codes_backward(self, name: str, g: str, source: str, *, keep: bool) -> None:
        """Of some rows the matrix's gradient beside its integers; the largest of all rows, found and merged."""
        inputs, outputs = self.linears[name]
        kept = self.kept_of(source)
        self.need(*kept)
        again = self.made_again(name, source, inputs)
        count = inputs * outputs
        chunk = min(count, CHUNK_ELEMENTS[self.device])
        share = self.training.adapter.share if self.training.adapter is not None else 0.0
        gradients = FP32 * outputs * self.groups_of(name)
        beside = CODES_CHUNK * chunk + CODES_CHOSEN * int(share * count) + gradients
        self.drop(self.make(f"{name} gradient, some rows", 0.0, constant=beside))
        self.drop(*again)
        whole = self.whole(name)
        dx = self.make(f"d {name} in", self.e * inputs)
        self.drop(*whole, *[g] * (not keep))
        self.used(*kept)
        self.arrive(source, dx, self.e * inputs, owns=False)

    def adapted_backward(self, name: str, g: str, source: str, *, keep: bool) -> None:
        """Base and adapter in one node."""
        inputs, outputs = self.linears[name]
        e, adapter = self.e, self.training.adapter
        assert adapter is not None
        kept = self.stored_input(source, inputs)
        self.need(*kept, f"{name} A")
        self.traffic += 2 * e * (inputs + outputs)
        self.make(f"d {name} A", e * adapter.rank)
        if adapter.dropout:
            self.make(f"{name} mask again", e * inputs, reads=0.0)
        again = self.made_again(name, source, inputs) if adapter.keep_rows == 1 else []
        if adapter.dropout:
            self.drop(self.make(f"{name} input with dropout again", e * inputs, reads=2 * e * inputs))
        self.drop(*again)
        whole = self.whole(name)
        dx = self.make(f"d {name} in", e * inputs)
        self.drop(*whole)
        if adapter.dropout:
            self.drop(self.make(f"d {name} undropped", e * inputs, reads=3 * e * inputs))
            self.drop(f"{name} mask again")
        if adapter.start:
            self.drop(self.make(f"d {name} start", e * adapter.rank))
            self.traffic += 2 * e * (inputs + outputs)
        self.drop(f"d {name} A")
        self.drop(*[g] * (not keep))
        self.used(*kept, f"{name} A")
        self.arrive(source, dx, e * inputs, owns=False)

    def made_again(self, name: str, source: str, inputs: int) -> list[str]:
        """A linear layer's input, where something else was kept in its place."""
        if source not in self.stands_for:
            return []
        again = self.make(f"{name} input again", self.e * inputs, reads=self.e * inputs)
        layer_operators.chunk(self, "again")
        return [again]

    def adapter_backward(self, name: str, g: str, source: str, *, keep: bool) -> str:
        """Returns the gradient of the base layer's output."""
        inputs, outputs = self.linears[name]
        e, a, adapter = self.e, self.training.adapter_width_bytes, self.training.adapter
        assert adapter is not None
        low = source
        base = g
        if self.adapter_is_wider:
            low = f"{name} input in fp32"
            wide = self.make(f"d {name} in fp32", a * outputs, reads=e * outputs)
            base = self.make(f"d {name} base", e * outputs, reads=a * outputs)
            self.drop(*[g] * (not keep))
            g = wide
        scaled = self.make(f"d {name} scaled", a * outputs, reads=a * outputs)
        if self.adapter_is_wider:
            self.drop(g)
        self.traffic += 2 * a * (inputs + outputs)
        self.need(f"{name} A")
        self.make(f"d {name} A", a * adapter.rank)
        self.drop(scaled)
        self.used(f"{name} A")
        self.need(*(f"{name} input with dropout", f"{name} mask") if adapter.dropout else (low,))
        dx = self.make(f"d {name} adapter in", a * inputs)
        self.drop(f"d {name} A")
        owns = False
        if adapter.dropout:
            self.used(f"{name} input with dropout", f"{name} mask")
            masked = self.make(f"d {name} undropped", a * inputs, reads=2 * a * inputs)
            self.drop(dx)
            dx, owns = masked, True
        else:
            self.used(low)
        if self.adapter_is_wider:
            narrow = self.make(f"d {name} adapter in, rounded", e * inputs, reads=a * inputs)
            self.drop(dx)
            dx, owns = narrow, True
        self.arrive(source, dx, e * inputs, owns=owns)
        return base

    def gated_backward(self, g: str, source: str, *, keep: bool) -> None:
        e, f = self.e, self.f
        if self.training.activations != "autograd":
            layer_operators.gated_backward(self, g, source, keep=keep)
            return
        self.linear_backward("down_proj", g, "product", keep=keep)
        self.need("silu", self.up)
        self.make("d silu", e * f, reads=2 * e * f)
        d_up = self.make("d up", e * f, reads=2 * e * f)
        self.drop(self.gradient_of.pop("product"))
        self.used("silu", self.up)
        if not self.shape.fused:
            self.linear_backward("up_proj", d_up, source)
        d_silu = self.penalised("d silu") if self.training.density else "d silu"
        self.need(self.gate)
        self.make("d gate", e * f, reads=2 * e * f)
        self.drop(d_silu)
        self.used(self.gate)
        if not self.shape.fused:
            self.linear_backward("gate_proj", "d gate", source)
            return
        both = self.make("d gate and up", 2 * e * f, reads=2 * e * f)
        self.drop("d gate", d_up)
        self.linear_backward("gate_up_proj", both, source)

    def penalised(self, g: str) -> str:
        """The node of `memory.density` on silu's output."""
        self.need("silu")
        out = self.make(f"{g}, penalised", self.e * self.f, reads=2 * self.e * self.f)
        layer_operators.density_chunk(self)
        self.drop(g)
        self.used("silu")
        return out

    def tiled_backward(self, g: str, source: str) -> None:
        """Tile by tile: the MLP with autograd, and its backward. The tile's source is a view."""
        e, d = self.e, self.d
        self.need(source)
        whole = self.make("d mlp in", e * d)
        lone, on_host = self.lone_gradients, self.saves_on_host
        self.saves_on_host = False  # nothing listens to what a tile saves
        if self.trains_base and not lone:  # the first tile's stay, those of the others are added to them
            for name, (inputs, outputs) in self.linears.items():
                if name in MLP:
                    self.make(f"d {name} weight, first tile", 0.0, constant=e * inputs * outputs)
        self.in_tile = self.lone_gradients = True
        tile = self.given("tile")
        out = self.gated(tile)
        self.gated_backward(g, tile, keep=True)
        self.drop(out, self.gradient_of.pop(tile), tile)
        self.in_tile, self.lone_gradients, self.saves_on_host = False, lone, on_host
        self.used(source)
        self.arrive(source, whole, e * d, owns=True)

    def attention_backward(self, g: str, *, keep: bool) -> None:
        e, q, kv, shape = self.e, self.q, self.kv, self.shape
        source = "x" if shape.norm_after else "norm1 out"
        out = "o of all heads" if self.training.sp > 1 else "o by row" if shape.fused else "o"
        self.linear_backward("o_proj", g, out, keep=keep)
        self.attend_backward(self.gradient_of.pop(out))
        for name, width in (("k", kv), ("q", q)):
            self.rotate_backward(name, width)
        if shape.fused:
            # each slice of q, k and v becomes a tensor of all three
            whole = self.make("d qkv", e * (q + 2 * kv), reads=e * kv)
            for piece in ("d v", "d k rotated", "d q rotated"):
                if piece != "d v":
                    self.drop(self.make("d qkv, one slice", e * (q + 2 * kv), reads=e * q))
                self.drop(piece)
            self.linear_backward("qkv_proj", whole, source)
            return
        self.linear_backward("v_proj", "d v", source)
        for name, width in (("k", kv), ("q", q)):
            piece = f"d {name} rotated"
            if shape.qk_norm == "none":
                straight = self.make(f"d {name} by row", e * width, reads=e * width)
                self.drop(piece)
            else:
                straight = self.norm_backward(f"{name}_norm", piece, width, f"{name}_proj out")
            self.linear_backward(f"{name}_proj", straight, source)

    def attend_backward(self, d_out: str) -> None:
        """The kernel's backward between its all-to-alls; leaves `d q`, `d k` and `d v` of this rank's rows."""
        e, q, kv = self.e, self.q_here, self.kv_here
        spread = self.training.sp > 1
        if spread:
            self.make("d o sent", e * self.q, reads=e * self.q)
            self.make("d o received", e * q, reads=e * self.q)
            self.drop("d o sent")
            self.make("d o", e * q, reads=e * q)
            self.drop("d o received", d_out)
            d_out = "d o"
        kept = ["q, k and v of some heads"] * 2 if spread else ["q", "k", self.v]
        self.need(*kept, "o", "lse")
        where = " of some heads" if spread else ""
        dq, dk, dv = (f"d {name}{where}" for name in "qkv")
        self.make(dq, e * q)
        if self.device == "cuda" and e == HALF:
            self.packed_backward(dk, dv)
        else:
            repeats = self.device == "cuda" and kv != q
            if repeats:  # these kernels take as many KV heads as query heads
                self.make("k and v for each query head", 2 * e * q, reads=2 * e * kv)
                self.make("d k and d v for each query head", 2 * e * q)
            self.make(dk, e * kv)
            self.make(dv, e * kv)
            if repeats:
                self.drop("k and v for each query head", "d k and d v for each query head")
        self.drop(d_out)
        self.used(*kept, "o", "lse")
        if not spread:
            return
        received, sent = e * (q + 2 * kv), e * (self.q + 2 * self.kv_sent)
        self.make("d qkv joined", received, reads=received)
        self.make("d qkv sent", received, reads=received)
        self.drop("d qkv joined")
        self.make("d qkv received", sent, reads=received)
        self.drop("d qkv sent")
        self.make("d q", e * self.q, reads=e * self.q)
        self.make("d k", e * self.kv, reads=2 * e * self.kv)
        self.make("d v", e * self.kv, reads=2 * e * self.kv)
        self.drop("d qkv received", dq, dk, dv)

    def packed_backward(self, dk: str, dv: str) -> None:
        """FlashAttention adds dq up in fp32, beside a sum per row and head, and makes dk and dv for every query head;
        all of it for some heads at a time, as `kernels.attention_backends` cuts it: into as many parts as there are KV
        heads, or fewer where few rows would not fill the device."""
        e, q, kv, size = self.e, self.q_here, self.kv_here, self.shape.head_dim
        self.make(dk, e * kv)
        self.make(dv, e * kv)
        whole = FP32 * q + FP32 * q / size + (2 * e * q if kv != q else 0)
        parts = kv / size
        if parts > 1:
            whole += e * (q + 2 * kv)  # a part's own result, before it goes where it belongs
        least_rows = LEAST_ROW_HEADS / (q / size) * (1 - 1 / parts)
        self.drop(self.make("a part of attention's backward", whole / parts, constant=whole * least_rows))

    def rotate_backward(self, name: str, n: int) -> None:
        size = self.e * n
        self.make("d rotated", size, reads=size)
        self.make("d half", size / 2, reads=size / 2)
        self.make(f"d {name} rotated", size, reads=size / 2)
        self.drop("d half")
        self.drop(self.make("d other half", size, reads=size / 2))
        self.traffic += 3 * size
        self.drop("d rotated")
        self.drop(self.make("d cos", size, reads=size), f"d {name}")
        self.traffic += 3 * size

    @property
    def adapter_is_wider(self) -> bool:
        return self.training.adapter_width_bytes > self.e
