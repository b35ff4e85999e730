"""Quantized bases: the format against bitsandbytes, layers against plain ones with the weights they stand for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, differing
from torch import Tensor, nn

from farspan.errors import JobError
from farspan.kernels.quantized.integers import quantize_int8
from farspan.kernels.quantized.normal_float import normal_float_table, quantile_table, quantize_nf4
from farspan.memory.allocations import footprint
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.shape import AdapterShape, ModelShape, StoredAs, Training
from farspan.memory.states import weights_of
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.config import NF4, Base, Int8
from farspan.trainer.bases.linear import QuantizedLinear, quantized
from farspan.trainer.bases.load import dequantize, quantize
from farspan.trainer.config import FullFineTune, LoRA, PaCA, RandomModel, Reversible
from farspan.trainer.models import DTYPES, load_model, write_random_model

S = 96
ORACLES = Path(sys.prefix) / "oracles"
BASES: list[Base] = [NF4(), NF4(double=False), Int8()]
CPU = torch.device("cpu")


def beside_bitsandbytes(code: str, *arguments: str) -> dict[str, Any]:
    """In a process that finds it: peft and transformers would import it everywhere else too."""
    assert (ORACLES / "bitsandbytes").is_dir(), "make install puts it there"
    path = os.pathsep.join([str(ORACLES), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


FORMAT = """
import json, torch
import bitsandbytes.functional as F
from farspan.kernels.quantized.normal_float import NormalFloat4, dynamic_table, normal_float_table, quantize_nf4
torch.manual_seed(0)
found = {
    "table": torch.equal(F.get_4bit_type("nf4", device="cpu"), normal_float_table(4)),
    "dynamic": torch.equal(F.create_dynamic_map(), dynamic_table()),
}
w = torch.randn(512, 256)
for double in (False, True):
    packed, state = F.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type="nf4")
    ours = quantize_nf4(w, double=double)
    found[f"codes {double}"] = int((packed.view(-1) != ours.packed).sum())
    found[f"scales {double}"] = int((state.absmax != ours.scales).sum())
    if double:
        found["mean"] = float((state.offset - ours.mean).abs())
        found["scale of scales"] = float((state.state2.absmax - ours.scales_scale).abs().max())
    theirs = NormalFloat4(packed.view(-1), state.absmax, state.state2.absmax if double else None,
                          state.offset if double else None, 64)
    same = theirs.values((512, 256), torch.float32)
    found[f"ours by them {double}"] = float(
        (ours.by_bitsandbytes((512, 256), torch.float32) - ours.values((512, 256), torch.float32)).abs().max()
    )
    found[f"read {double}"] = float((same - F.dequantize_4bit(packed, state)).abs().max())
print(json.dumps(found))
"""


def test_the_format_is_that_of_bitsandbytes() -> None:
    """Tables and codes byte for byte; of the scales' 8-bit codes a few, where theirs is not the nearest."""
    found = beside_bitsandbytes(FORMAT)
    assert found.pop("table") and found.pop("dynamic")
    assert found.pop("scales True") <= 8, "of 2,048"
    assert found.pop("ours by them True") < 1e-6 and found.pop("ours by them False") < 1e-6
    assert found.pop("read True") < 1e-6 and found.pop("read False") < 1e-6
    assert found == {"codes False": 0, "codes True": 0, "scales False": 0, "mean": 0.0, "scale of scales": 0.0}


def test_the_table_is_the_formula() -> None:
    assert float((quantile_table(4) - normal_float_table(4)).abs().max()) < 2e-7
    for bits in (2, 3, 4):
        table = quantile_table(bits)
        assert table.numel() == 2**bits and table.min() == -1 and table.max() == 1 and 0.0 in table.tolist()


def test_rounding() -> None:
    """The error on a normal distribution, idempotence, zero blocks, the nearest of all codes."""
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    once = quantize_nf4(w, double=False)
    back = once.values((1024, 1024), torch.float32)
    assert float((back - w).norm() / w.norm()) == pytest.approx(0.0919, abs=0.0005)
    twice = quantize_nf4(back, double=False)
    assert torch.equal(twice.packed, once.packed) and torch.equal(twice.scales, once.scales)
    assert not quantize_nf4(torch.zeros(4, 64)).values((4, 64), torch.float32).any()
    few = w[:8, :64]
    scale = few.abs().amax(1, keepdim=True)
    every = (few[..., None] - normal_float_table(4) * scale[..., None]).abs().amin(-1)
    stored = quantize_nf4(few, double=False).values((8, 64), torch.float32)
    torch.testing.assert_close((stored - few).abs(), every, rtol=0, atol=1e-6)
    integers, steps = quantize_int8(few)
    grid = torch.arange(-127, 128) * steps[:, None, None]
    nearest = (few[..., None] - grid).abs().amin(-1)
    torch.testing.assert_close((integers * steps[:, None] - few).abs(), nearest, rtol=0, atol=1e-7)


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_a_layer_is_the_plain_one_with_the_weights_it_stands_for(base: Base) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 48)
    layer = quantized(plain.weight, base, plain.bias)
    plain.weight.data = layer.weight
    assert not [name for name, _ in layer.named_parameters() if name != "bias"]
    x = torch.randn(2, 5, 128)
    gradients = []
    for each in (plain, layer):
        read = x.clone().requires_grad_()
        y = each(read)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        gradients.append((y.detach(), read.grad))
    assert all(map(torch.equal, *gradients))  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    assert layer.stored_bytes == StoredAs.model_validate(base.model_dump()).bytes(128, 48)


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("adapter", [LoRA(rank=4), PaCA(rank=4)], ids=["lora", "paca"])
def test_an_adapter_trains_as_on_the_plain_weights(base: Base, adapter: Any) -> None:
    """Losses and gradients of an adapter on the same weights in plain layers, bit for bit."""
    found = []
    for plain in (False, True):
        model = Model(adapter=FullFineTune(), precision="bf16")
        quantize(model.causal, base)
        if plain:
            dequantize(model.causal)
        found.append(adapted(model, adapter).gradients([S]))
    assert differing(*found) == []


def adapted(model: Model, adapter: Any) -> Model:
    from farspan.trainer.models import CausalLMLoss, add_adapter

    model.causal.requires_grad_(False)
    model.model = add_adapter(model.causal, adapter, seed=1)
    draw = torch.Generator().manual_seed(5)
    for name, p in sorted(model.model.named_parameters()):
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) * 0.05)
    model.loss = CausalLMLoss(model.model, model.causal, loss_tile=512)
    model.loss.train()
    return model


PLANS = [
    LayerPlan(x=Rows(device=S)),
    LayerPlan(x=Rows(device=S), o=Rows(device=S), linear={"q_proj": Rows(device=S), "down_proj": Rows(device=S)}),
]


@pytest.mark.parametrize("adapter", [LoRA(rank=4, dropout=0.1), PaCA(rank=4)], ids=["lora", "paca"])
@pytest.mark.parametrize("base", [NF4(), Int8()], ids=repr)
def test_every_placement_is_bit_equal(base: Base, adapter: Any) -> None:
    want = Model(adapter=adapter, base=base, precision="bf16").gradients([S])
    for plan in PLANS:
        made = Model(adapter=adapter, base=base, precision="bf16")
        Executor(made.layers, Placement(rows=S, attention_rows=S, layers=(plan,) * LAYERS), hollow=True)
        assert differing(made.gradients([S]), want) == []


def test_reversible_layers_on_a_quantized_base() -> None:
    plan = Placement(rows=S, attention_rows=S, layers=(LayerPlan(x=Rows(device=S)),) * LAYERS)
    found = []
    for store in ("bits", "inputs"):
        model = Model(adapter=Reversible(bits=2, inside=LoRA(rank=4), store=store), base=NF4(), precision="bf16")  # type: ignore[arg-type]
        Executor(model.layers, plan, coupling=model.coupling)
        found.append(model.gradients([S]))
    assert differing(*found) == []


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """qwen2 has biases, which bitsandbytes adds in place, where autograd forbids it."""
    family = "llama" if "bitsandbytes" in request.node.name else "qwen2"
    shape = RandomModel(family=family, hidden=128, layers=3, heads=4, kv_heads=2, ffn=320, vocab=300)
    write_random_model(shape, tmp_path / "model", precision="fp32", context=256, eos_id=0, pad_id=1)
    return tmp_path / "model"


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_loading_rounds_matrix_by_matrix(folder: Path, base: Base) -> None:
    """What rounding the whole model gives, biases included, and never the whole model in memory."""

    def load(how: Base | None = None) -> Any:
        return load_model(str(folder), revision=None, dtype=torch.float32, device=CPU, **({"base": how} if how else {}))

    whole = load()
    matrices = [m.weight for layer in decoder_layers(whole) for m in layer.modules() if isinstance(m, nn.Linear)]
    matrix_bytes, largest = sum(m.nbytes for m in matrices), max(m.nbytes for m in matrices)
    quantize(whole, base)
    load(base)  # the first use of the profiler and of the quantizer
    took = footprint(lambda: load(base), CPU)
    found = [m for layer in decoder_layers(took.result) for m in layer.modules() if isinstance(m, QuantizedLinear)]
    assert len(found) == len(matrices) == 3 * 7
    ids = torch.arange(40)[None]
    with torch.no_grad():
        pack = {"packed_sequence": PackedSequence((40,))}
        assert torch.equal(took.result(ids, **pack).logits, whole(ids, **pack).logits)
    stored = sum(layer.stored_bytes for layer in found)
    # the file is mapped, not read, but counted; embedding and head are views of it
    mapped = (folder / "model.safetensors").stat().st_size
    assert took.peak_bytes - mapped < stored + 4 * largest < matrix_bytes, (took.peak_bytes, stored, largest)


CHECKPOINT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import LoraConfig, get_peft_model
from farspan.trainer.adapters.lora.apply import install
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.config import NF4
from farspan.trainer.bases.linear import NF4Linear
from farspan.trainer.models import load_model
folder, out = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.float32)
theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config,
                                              device_map={"": "cpu"}, attn_implementation="eager")
theirs.save_pretrained(out)
theirs.train()  # in evaluation it repacks weights for a product in bf16 on CPU, and has no gradient
ours = load_model(out, revision=None, dtype=torch.float32, device=torch.device("cpu"), base=NF4())
fresh = load_model(folder, revision=None, dtype=torch.float32, device=torch.device("cpu"), base=NF4())
ids = torch.arange(60)[None] % 300
import bitsandbytes.functional as F
found = {"layers": sum(isinstance(m, NF4Linear) for m in ours.modules())}
found["weights"] = max(
    float((m.weight - F.dequantize_4bit(t.weight.data, t.weight.quant_state)).abs().max())
    for m, t in zip((m for m in ours.modules() if isinstance(m, NF4Linear)),
                    (m for m in theirs.modules() if type(m).__name__ == "Linear4bit"))
)
with torch.no_grad():
    want = theirs(ids).logits
    found["logits"] = float((ours(ids, packed_sequence=PackedSequence((60,))).logits - want).norm() / want.norm())
    found["fresh"] = float((fresh(ids, packed_sequence=PackedSequence((60,))).logits - want).norm() / want.norm())
runs = []
pack = {"packed_sequence": PackedSequence((60,))}
for model, more in ((theirs, {}), (ours, pack), (fresh, pack)):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)
    torch.manual_seed(2)
    for name, p in sorted(adapted.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.05
    if model is not theirs:
        found["one node"] = install(adapted)
    loss = adapted(input_ids=ids, labels=ids, **more).loss
    loss.backward()
    runs.append((loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}))
for index, name in ((1, "taken over"), (2, "rounded here")):
    found[f"loss, {name}"] = float((runs[index][0] - runs[0][0]).abs() / runs[0][0])
    off = [float((runs[index][1][n] - g).norm() / g.norm()) for n, g in runs[0][1].items()]
    found[f"gradients, {name}"] = max(off)
found["gradients"] = len(runs[0][1])
print(json.dumps(found))
"""


def test_beside_peft_on_bitsandbytes(folder: Path, tmp_path: Path) -> None:
    """A checkpoint that bitsandbytes wrote opens as it is; LoRA on it has peft's loss and gradients."""
    found = beside_bitsandbytes(CHECKPOINT, str(folder), str(tmp_path / "bnb"))
    assert found["layers"] == 3 * 7 and found["gradients"] == 3 * 7 * 2 and found["one node"] == 3 * 7
    assert found["weights"] < 1e-7
    assert found["logits"] < 1e-5 and found["loss, taken over"] < 1e-6 and found["gradients, taken over"] < 1e-4
    # of a thousand scales one differs in its last code, while rounding to nf4 moves the logits by a tenth
    assert found["fresh"] < 2e-3 and found["loss, rounded here"] < 1e-4 and found["gradients, rounded here"] < 2e-2


def test_a_quantized_checkpoint_without_bitsandbytes_says_what_to_install(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JobError, match=r"farspan\[bnb\]"):
        load_model(str(folder), revision=None, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_planned_weights_are_the_model_s(base: Base) -> None:
    model = Model(adapter=LoRA(rank=4), base=base, precision="bf16")
    tensors: list[Tensor] = [*model.model.parameters()]
    tensors += [b for layer in model.model.modules() if isinstance(layer, QuantizedLinear) for b in layer.buffers()]
    shape = ModelShape(hidden=64, layers=LAYERS, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=300)
    training = Training(precision="bf16", adapter=AdapterShape(rank=4), base=StoredAs.model_validate(base.model_dump()))
    assert weights_of(shape, training).bytes == sum(t.nbytes for t in tensors)
    assert DTYPES["bf16"] == torch.bfloat16
