"""Codes of activations, and the operators that keep them: errors, sizes, means, and the bits of the forward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from executor_models import Model, differing, on_rank, segments
from hypothesis import given, settings
from hypothesis import strategies as st
from sp_ranks import on_ranks
from torch import Tensor

from farspan.errors import JobError
from farspan.kernels.activation_codecs import CHUNK_ELEMENTS, derivative_bytes, values_bytes
from farspan.kernels.activation_codecs.codes import Codec, Encoder, Groups4, Groups8, Range4
from farspan.memory.needed import kept_tensors
from farspan.memory.operators import Settings, gradient_error, keep_less, stored
from farspan.memory.operators.gated import GatedUnit
from farspan.memory.operators.settings import OF_GELU, OF_SILU
from farspan.memory.single_layers import hooked
from farspan.trainer.config import LoRA, PaCA

pytestmark = pytest.mark.timeout(300)

CODECS: dict[str, Codec] = {
    "4 bits": Groups4(),
    "4 bits, groups of 16": Groups4(16),
    "8 bits": Groups8(),
    "derivative": Range4(*OF_SILU),
}


def there_and_back(codec: Codec, x_RC: Tensor, key: int | None) -> Tensor:
    encoder = Encoder(codec, x_RC, key)
    encoder.put(slice(0, x_RC.shape[0]), x_RC)
    assert sum(part.nbytes for part in encoder.parts) == x_RC.shape[0] * codec.bytes(x_RC.shape[1])
    return codec.decode(*encoder.parts)


def rows(seed: int, scale: float, outliers: bool) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 128, generator=draw) * scale
    if outliers:
        x[:, ::37] *= 100
    return x


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 3e4]),
    outliers=st.booleans(),
    shift=st.sampled_from([0.0, 1.0, -50.0]),
    key=st.none() | st.integers(0, 2**62 - 1),
)
def test_what_comes_back_is_a_step_away_at_most(
    seed: int, scale: float, outliers: bool, shift: float, key: int | None
) -> None:
    """Half a step when rounding to the nearest; of E4M3, 3 bits of mantissa; the ends of a group are bf16."""
    x = rows(seed, scale, outliers) + shift * scale
    for group in (64, 16):
        groups = x.view(3, -1, group)
        span = (groups.amax(-1) - groups.amin(-1))[..., None]
        least = groups.amin(-1).abs()[..., None]
        allowed = (span / 15 * (1 if key is not None else 0.5)) * 1.03 + least * 2**-7
        off = (there_and_back(Groups4(group), x, key) - x).abs().view(groups.shape)
        assert bool((off <= allowed).all())
    groups = x.view(3, -1, 16)
    largest = groups.abs().amax(-1, keepdim=True)
    off = (there_and_back(Groups8(), x, None) - x).abs().view(groups.shape)
    assert bool((off <= torch.maximum(groups.abs() * 2**-4, largest * 1.01 / 448 * 2**-10)).all())


@pytest.mark.parametrize("name", ["4 bits", "4 bits, groups of 16", "derivative"])
def test_rounding_at_random_has_the_right_mean_and_little_variance(name: str) -> None:
    """E = x, within four standard errors, and a variance of a quarter of a step squared at most."""
    codec, draws = CODECS[name], 4000
    x = rows(1, 0.2, outliers=False).clamp(-0.09, 1.09)
    found = torch.stack([there_and_back(codec, x, key) for key in range(draws)]).double()
    step = torch.full_like(x, codec.step) if isinstance(codec, Range4) else steps_of(codec, x)  # type: ignore[arg-type]
    error = (found.mean(0) - x).abs() / (step / 2 / math.sqrt(draws))
    assert float(error.max()) < 4.5
    assert bool((found.var(0) <= step.square() / 4 * 1.1 + 1e-12).all())
    assert float(found.var(0).max()) > float(step.min()) ** 2 / 8, "something was drawn"


def steps_of(codec: Groups4, x: Tensor) -> Tensor:
    encoder = Encoder(codec, x, None)
    encoder.put(slice(0, x.shape[0]), x)
    step = encoder.parts[1].float().view(x.shape[0], -1, 2)[..., 1:]
    return step.expand(-1, -1, codec.group).reshape(x.shape)


def test_groups_of_zeros_of_one_number_and_of_none() -> None:
    x = torch.zeros(2, 128)
    x[1, :64] = 3.14159
    for codec in (Groups4(), Groups8()):
        back = there_and_back(codec, x, None)
        assert torch.equal(back[0], x[0])
        assert float((back[1] - x[1]).abs().max()) < 3.14159 * 2**-4 + 1e-6
    x[0, 5] = float("nan")
    for codec in (Groups4(), Groups8()):
        assert bool(there_and_back(codec, x, 3)[0, 5].isnan()), "a loss of nothing must not look like one"


def test_sizes_are_those_the_planner_is_told() -> None:
    for width in (16, 48, 64, 160, 1024, 14336):
        for kind in ("fp8", "int4"):
            codec = Settings(kind).of_values(width, torch.bfloat16)  # type: ignore[arg-type]
            assert tuple(n * d.itemsize for n, d in codec.parts(width)) == values_bytes(kind, width)
        assert Range4(*OF_SILU).bytes(width) == sum(derivative_bytes(width))
    assert Groups4().bytes(1024) == 1024 * 0.5625


@pytest.mark.parametrize(("activation", "ends"), [("silu", OF_SILU), ("gelu", OF_GELU), ("gelu_tanh", OF_GELU)])
def test_derivatives_lie_in_their_ranges(activation: str, ends: tuple[float, float]) -> None:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    unit = GatedUnit(Settings("int4"), activation)
    slope = unit.act_backward(torch.ones_like(x), x)
    assert ends[0] <= float(slope.min()) < ends[0] + 1e-3
    assert ends[1] >= float(slope.max()) > ends[1] - 1e-3


def unit_gradients(kind: Any, gate: Tensor, up: Tensor, d: Tensor, key: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(key)
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = GatedUnit(Settings(kind), "silu")(gate, up, training=True)
    return torch.autograd.grad(product, (gate, up), d)


def test_the_derivative_is_the_better_thing_to_store() -> None:
    """With outlying channels: a fixed range against codes of the argument, at no more bytes."""
    draw = torch.Generator().manual_seed(0)
    gate = torch.randn(256, 512, generator=draw)
    gate[:, ::50] *= 20
    d = torch.randn(256, 512, generator=draw)
    exact = torch.ops.aten.silu_backward(d, gate)
    by_argument = torch.ops.aten.silu_backward(d, there_and_back(Groups4(), gate, 1))
    slope = torch.ops.aten.silu_backward(torch.ones_like(gate), gate)
    by_derivative = d * there_and_back(Range4(*OF_SILU), slope, 1)
    off = [float((found - exact).norm() / exact.norm()) for found in (by_derivative, by_argument)]
    assert off[0] < 0.07 < off[1] / 2, off


def test_gradients_of_a_gated_unit_are_right_on_average() -> None:
    """What is multiplied was rounded with noise of its own: the product's mean is the product of the means."""
    draw = torch.Generator().manual_seed(0)
    gate, up, d = torch.randn(3, 2, 64, generator=draw)
    want = unit_gradients("fused", gate, up, d)
    found = [unit_gradients("int4", gate, up, d, key) for key in range(1500)]
    for index, exact in enumerate(want):
        each = torch.stack([gradients[index] for gradients in found]).double()
        error = (each.mean(0) - exact).abs() / (each.std(0) / math.sqrt(len(found)) + 1e-9)
        assert float(error.max()) < 5
        assert float(each.std(0).mean()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_units_have_the_bits_of_autograd(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    gate, up, d = (torch.randn(7, 512, generator=draw).to(dtype).requires_grad_() for _ in range(3))
    want = torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), d)
    product = GatedUnit(Settings("fused"), "silu")(gate, up, training=True)
    assert all(map(torch.equal, torch.autograd.grad(product, (gate, up), d.detach()), want))
    made = stored(product)
    assert torch.equal(made.back(made.tensors), product.view(7, -1))


FAMILIES = ["llama", "qwen3", "olmo2", "phi3", "granite", "smollm3"]
ALLOWED = {
    "fused": {"fp32": 1e-6, "bf16": 0.01},
    "fp8": {"fp32": 0.04, "bf16": 0.04},
    "int4": {"fp32": 0.15, "bf16": 0.15},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_keeps_its_bits_and_gradients_stay_near(
    family: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1 << 13)  # several chunks to a tensor
    for adapter in (None, LoRA(rank=4), PaCA(rank=4)):
        want = Model(family, precision=precision, adapter=adapter).gradients([130, 170])
        for kind, allowed in ALLOWED.items():
            made = Model(family, precision=precision, adapter=adapter, activations=kind)  # type: ignore[arg-type]
            got = made.gradients([130, 170])
            assert got.keys() == want.keys()
            assert [n for n in differing(got, want) if n.startswith("loss")] == []
            assert 0 < distance(got, want) < allowed[precision], (kind, adapter)


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    names = [name for name in want if not name.startswith("loss")]
    off = sum(float((got[n].double() - want[n].double()).square().sum()) for n in names)
    return math.sqrt(off / sum(float(want[n].double().square().sum()) for n in names))


def kept_bytes(made: Model) -> float:
    found: list[Any] = []

    def hook(call: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            found.extend(kept_tensors(made.layers[1], call, x.detach()))
        return x

    with torch.no_grad(), hooked(made.layers, {1: hook}):
        made.forward([256], 0)
    return sum(tensor.bytes_per_row for tensor in found)


def test_bytes_are_those_of_the_formulas() -> None:
    """LoRA, bf16, no dropout: two norm outputs, q, k, v, O, gate and up; or codes of all but attention's."""
    d, kv, f, r, heads = 64, 32, 160, 4, 4
    attention = 2 * (2 * d + 2 * kv) + 4 * heads
    beside = 2 * 7 * r + 2 * 4
    kept = {
        kind: kept_bytes(Model(precision="bf16", adapter=LoRA(rank=r), activations=kind))  # type: ignore[arg-type]
        for kind in ("autograd", "fused", "fp8", "int4")
    }
    assert kept["fused"] == attention + beside + 2 * 2 * d + 2 * 2 * f
    assert kept["fp8"] == attention + beside + 1.125 * (2 * d + 2 * f)
    assert kept["int4"] == attention + beside + 0.5625 * 2 * d + (2 * 0.625 + 0.5) * f  # groups of 32 in f
    assert kept["fused"] < 0.55 * kept["autograd"]


def test_a_norm_that_cannot_be_taken_back_keeps_its_input() -> None:
    want, got = (Model(activations=kind) for kind in ("autograd", "fused"))  # type: ignore[arg-type]
    for made in (want, got):
        for layer in made.layers:
            layer.input_layernorm.weight.data[3] = 0.0
    assert distance(got.gradients([200]), want.gradients([200])) < 1e-6
    made = Model(activations="fused")
    before = kept_bytes(made)
    made.layers[1].input_layernorm.weight.data[3] = 0.0
    assert kept_bytes(made) == before + 4 * 64


def test_on_ranks_and_in_tiles_rebuilding_is_keeping() -> None:
    placements = [segments(2, 0.5, 150, attention_rows=300)]
    shared = {"mesh": (1, 2), "lengths": [130, 170], "placements": placements, "precision": "fp32"}
    cases = [
        {
            "family": "llama",
            "adapter": LoRA(rank=4, dropout=0.1),
            "zero": 0,
            "tile": 64,
            "activations": "int4",
            **shared,
        },
        {"family": "qwen3", "adapter": None, "zero": 3, "activations": "fused", **shared},
    ]
    for found in on_ranks(on_rank, 2, cases):
        assert found == [[]] * len(cases)


@pytest.mark.parametrize(("kind", "dropout"), [("fp8", 0.1), ("int4", 0.0), ("int4", 0.1)])
def test_the_error_of_gradients_is_told_as_it_is(kind: Any, dropout: float) -> None:
    def gradients(made: Model) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def hook(call: Any, x: Tensor) -> Tensor:
            torch.manual_seed(5)
            dy, leaf = torch.randn_like(x), x.detach().requires_grad_()
            with torch.enable_grad():
                call(leaf).backward(dy)
            found.update({name: p.grad for name, p in made.layers[1].named_parameters() if p.grad is not None})
            made.model.zero_grad()
            return x

        with torch.no_grad(), hooked(made.layers, {1: hook}):
            made.forward([256], 0)
        return found

    adapter = LoRA(rank=4, dropout=dropout)
    coded, plain = (Model(adapter=adapter, activations=name) for name in (kind, "fused"))
    told: list[Any] = []

    def ask(call: Any, x: Tensor) -> Tensor:
        generator = torch.get_rng_state()
        told.append(gradient_error(coded.layers[1], call, x, seed=5))
        assert torch.equal(torch.get_rng_state(), generator)
        return x

    with torch.no_grad(), hooked(coded.layers, {1: ask}):
        coded.forward([256], 0)
    assert all(p.grad is None for p in coded.model.parameters())
    off = distance(gradients(coded), gradients(plain))
    if kind == "fp8" or not dropout:  # else the plain model, which draws no keys to round with, draws other masks
        assert told[0].weights == pytest.approx(off, rel=1e-4)
    assert 0.005 < told[0].weights < 0.15
    assert 0.001 < told[0].input < 0.15
    assert gradient_error(plain.layers[1], lambda x: x, torch.zeros(1, 8, 64)) is None


def test_layers_of_another_make_are_refused() -> None:
    made = Model()
    with pytest.raises(JobError, match="activation relu is none of"):
        keep_less(made.layers, "fused", hidden_act="relu")
    with pytest.raises(JobError, match="no RMSNorm"):
        keep_less([torch.nn.Linear(4, 4)], "int4", hidden_act="silu")
    made = Model(activations="autograd")
    made.layers[0].mlp.__class__ = type("Scaled", (type(made.layers[0].mlp),), {"forward": _scaled})
    with pytest.raises(JobError, match="its forward uses factor"):
        keep_less(made.layers, "fused", hidden_act="silu")


def _scaled(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor
    return out
