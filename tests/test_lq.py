"""Bases that are decomposed before training: the search, what it is worth, the run folder, training, export."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_sft import run, spec, tokens  # noqa: F401  a fixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from farspan.errors import CheckpointError, JobError
from farspan.kernels.quantized.formats import SMALL, Format
from farspan.memory.shape import AdapterShape, ModelShape, StoredAs, Training
from farspan.memory.states import weights_of
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.lora.start import lora_layers
from farspan.trainer.bases.config import LQ, NF4, Base, Grid, Int8
from farspan.trainer.bases.linear import QuantizedLinear, quantized
from farspan.trainer.bases.prepared import decompose as module
from farspan.trainer.bases.prepared import fisher, tasks
from farspan.trainer.bases.prepared.decompose import Importance, decompose, truncated_svd
from farspan.trainer.bases.prepared.matrices import Source, matrices_of
from farspan.trainer.bases.prepared.prepare import prepare
from farspan.trainer.bases.prepared.store import PREPARED, PreparedBase, open_dequantized
from farspan.trainer.config import LoRA, Mesh, Model, RandomModel, Reversible, TrainSpec
from farspan.trainer.export import export_checkpoint
from farspan.trainer.models import build, load_model
from farspan.trainer.run_folder import RunFolder

CPU = torch.device("cpu")
THREE = Format(3, 8, "bf16", 64, 256)


def matrix(rows: int = 96, columns: int = 128, seed: int = 0) -> Tensor:
    """A flat spectrum with some directions that stand out, as trained matrices have."""
    draw = torch.Generator().manual_seed(seed)
    strong = torch.randn(rows, 6, generator=draw) @ torch.randn(6, columns, generator=draw)
    return 0.02 * torch.randn(rows, columns, generator=draw) + 0.01 * strong


def product(made: module.Decomposition, scale: float) -> Tensor:
    """In fp64, what the pair stands for."""
    whole = made.layer.weight.double()
    if made.low_rank is None:
        return whole
    return whole + scale * made.low_rank.b.double() @ made.low_rank.a.double()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_pair_is_kept(bits: int, dtype: torch.dtype) -> None:
    """Its error is what it says, no more than plain rounding's, LoRC's, or the truncated SVD's."""
    w, scale, rank, form = matrix(), 2.0, 8, Format(bits, 8, "bf16", 64, 256)
    errors = {}
    for order in ("plain", "lorc", "loftq", "lq"):
        made = decompose(w, form, rank, order=order, scale=scale, dtype=dtype)  # type: ignore[arg-type]
        errors[order] = float((w.double() - product(made, scale)).square().sum())
        assert made.error == pytest.approx(errors[order], rel=1e-4) and made.error == min(made.tried)
    plain = float((w - quantized(w, form, None).weight).square().sum())
    assert errors["plain"] == pytest.approx(plain, rel=0.01 if dtype == torch.bfloat16 else 1e-5)
    assert errors["lorc"] < errors["plain"] and errors["lq"] < errors["lorc"] and errors["loftq"] <= errors["lorc"]
    _, s, _ = torch.linalg.svd(w)
    assert errors["lq"] < float(s[rank:].square().sum())
    # rounds add pairs: the best so far never rises
    by_rounds = [
        decompose(w, form, rank, order="lq", scale=scale, dtype=dtype, iterations=n).error for n in (1, 2, 4, 8)
    ]
    assert all(later <= earlier for earlier, later in itertools.pairwise(by_rounds))


def test_low_rank_parts_are_the_truncated_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the whole decomposition and by subspace iteration, on a spectrum as flat as rounding leaves it."""
    torch.manual_seed(0)
    left = torch.randn(200, 300)
    u, s, vh = torch.linalg.svd(left, full_matrices=False)
    best = float((left - (u[:, :8] * s[:8]) @ vh[:8]).norm())
    for whole in (512, 0):
        monkeypatch.setattr(module, "WHOLE_SVD", whole)
        parts = truncated_svd(left, 8, seed=0)
        off = float((left - (parts[0] * parts[1]) @ parts[2]).norm())
        assert best * (1 - 1e-5) <= off <= best * 1.002
        assert all(map(torch.equal, parts, truncated_svd(left, 8, seed=0)))


def test_importance() -> None:
    """F = 1 is data-free, bit for bit; a random F lowers what it weighs; factored is exact where F is of rank one."""
    w, options = matrix(), {"order": "lq", "scale": 2.0, "dtype": torch.float32}
    free = decompose(w, THREE, 8, **options)  # type: ignore[arg-type]
    ones = decompose(w, THREE, 8, importance=Importance.of(torch.ones_like(w)), **options)  # type: ignore[arg-type]
    assert torch.equal(product(free, 2.0), product(ones, 2.0)) and free.error == pytest.approx(ones.error)
    torch.manual_seed(1)
    row, column = torch.rand(96).square() + 0.01, torch.rand(128).square() + 0.01
    f = torch.outer(row, column)
    whole, factored = Importance.of(f), Importance.factored(row, column)
    torch.testing.assert_close(whole.row, factored.row)
    off = torch.randn_like(w)
    want = float((f.double() / f.double().mean() * off.double() ** 2).sum())
    assert whole.squared(off) == pytest.approx(want, rel=1e-5) == pytest.approx(factored.squared(off), rel=1e-5)
    weighted = decompose(w, THREE, 8, importance=whole, **options)  # type: ignore[arg-type]
    weigh = lambda made: whole.squared((w.double() - product(made, 2.0)).float())  # noqa: E731
    assert weigh(weighted) == pytest.approx(weighted.error, rel=1e-4)
    assert weigh(weighted) < weigh(free), "what matters is kept better"
    assert weighted.error <= weigh(decompose(w, THREE, 0, **options)), "never worse than plain rounding"  # type: ignore[arg-type]
    dead = Importance.of(torch.zeros_like(w))
    assert torch.isfinite(product(decompose(w, THREE, 8, importance=dead, **options), 2.0)).all()  # type: ignore[arg-type]


def lq_spec(tokens: Path, root: Path, **changes: Any) -> TrainSpec:  # noqa: F811
    fields = {"adapter": LoRA(rank=4, alpha=8.0), "base": LQ(bits=3.0, iterations=2), "precision": "bf16"}
    return spec(tokens, root, **{**fields, **changes})


@pytest.fixture(scope="module")
def prepared(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Path]:  # noqa: F811
    root = tmp_path_factory.mktemp("lq")
    made = lq_spec(tokens, root / "run")
    prepare(made, cache_root=root / "cache")
    return made, root / "cache"


def test_a_prepared_base(prepared: tuple[TrainSpec, Path]) -> None:
    """Formats within the budget; what layers hold and where adapters start is W to the error that is written."""
    made, _ = prepared
    base = PreparedBase.open(RunFolder(Path(made.run_dir)).prepared_base)
    assert base.stored_bytes <= base.told["budget_bytes"] and base.bits_per_weight <= 3.0
    assert base.told["squared_error_bound"] <= base.told["squared_error"] * (1 + 1e-9)
    loss, trainable = build(made, CPU)
    plain = AutoModelForCausalLM.from_pretrained(RunFolder(Path(made.run_dir)).base_model, dtype=torch.float32)
    plain.requires_grad_(False)
    assert len(trainable) == 2 * 14
    layers = {n.removeprefix("base_model.model."): layer for n, layer in lora_layers(loss.model).items()}
    assert layers.keys() == base.matrices.keys()
    total = 0.0
    for name, layer in layers.items():
        held = layer.get_base_layer()
        assert isinstance(held, QuantizedLinear) and held.stored_bytes == base.matrices[name]["bytes"]
        b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        off = plain.get_submodule(name).weight.detach().double() - held.weight.double() - 2.0 * b.double() @ a.double()
        assert float(off.square().sum()) == pytest.approx(base.matrices[name]["squared_error"], rel=1e-3)
        total += float(off.square().sum())
    assert total == pytest.approx(base.told["squared_error"], rel=1e-3)
    assert total < sum(
        float((m.weight - quantized(m.weight, LQ(bits=3.0).uniform, None).weight).square().sum())
        for layer in decoder_layers(plain)
        for m in layer.modules()
        if isinstance(m, nn.Linear)
    )
    tensors = [*loss.model.parameters()]
    tensors += [b for layer in loss.model.modules() if isinstance(layer, QuantizedLinear) for b in layer.buffers()]
    held_bytes = sum(t.nbytes for t in tensors)
    shape = ModelShape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab=300)
    for bits, slack in ((base.bits_per_weight, 14), (3.0, held_bytes // 50)):
        training = Training(adapter=AdapterShape(rank=4), base=StoredAs(type="lq", bits=bits))
        assert held_bytes <= weights_of(shape, training).bytes <= held_bytes + slack, "what is planned is the budget"


def test_nothing_is_found_twice(
    prepared: tuple[TrainSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is there is used; errors of the same matrices come from the cache; half a base is gone on with."""
    made, cache = prepared
    said: list[str] = []
    prepare(made, cache_root=cache, progress=said.append)
    assert len(said) == 1 and said[0].startswith("found in")
    again = made.model_copy(update={"run_dir": str(tmp_path / "again")})
    decomposed: list[str] = []
    fails_at = 5

    def counted(weight: Tensor, how: Any, *args: Any, **more: Any) -> Any:
        decomposed.append(how.name)
        if len(decomposed) == fails_at:
            raise RuntimeError("the node is gone")
        return decompose(weight, how, *args, **more)

    monkeypatch.setattr(tasks, "decompose", counted)
    with pytest.raises(RuntimeError, match="gone"):
        prepare(again, cache_root=cache)
    folder = RunFolder(Path(again.run_dir)).prepared_base
    with pytest.raises(CheckpointError, match="no prepared base"):
        PreparedBase.open(folder)
    prepare(again, cache_root=cache)
    assert len(decomposed) == 14 + 1, "only those that were chosen, each once"
    first = RunFolder(Path(made.run_dir)).prepared_base
    for name in PreparedBase.open(folder).matrices:
        one, two = (load_file(each / f"{name}.safetensors") for each in (folder, first))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    decomposed.clear()
    fails_at = -1
    wider = again.model_copy(update={"base": LQ(bits=3.0, iterations=2, grid=Grid(blocks=(64, 32), scale_bits=(8, 2)))})
    prepare(wider, cache_root=cache)
    new = {f.name for f in wider.base.formats} - {f.name for f in SMALL}  # type: ignore[union-attr]
    assert len(decomposed) == 14 * (len(new) + 1), "measured in what is new, and made anew"
    checkpoint = RunFolder(Path(again.run_dir)).checkpoint(1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "prepared_base.json").unlink()
    with pytest.raises(CheckpointError, match="another rounding"):
        prepare(again, cache_root=cache)


def test_too_few_bits(tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    narrow = lq_spec(tokens, tmp_path / "run", base=LQ(bits=2.05, grid=Grid(bits=(2,))))
    with pytest.raises(JobError, match=r"--set base.bits=2\.\d+"):
        prepare(narrow, cache_root=tmp_path / "cache")


def gradients(causal: Any, pack: Any) -> dict[str, Tensor]:
    """Of the plain model, by autograd."""
    from farspan.trainer.batch import rows_of
    from farspan.trainer.models import CausalLMLoss

    causal.requires_grad_(True)
    causal.zero_grad()
    rows = rows_of(pack, sp=1, sp_index=0, ulysses=None, device=CPU)
    loss = CausalLMLoss(causal, causal, loss_tile=512)
    (loss(rows.input_ids, rows.labels, rows.position_ids, rows.sequence) / pack.trained_tokens).backward()
    return {name: p.grad.clone() for name, p in causal.named_parameters()}


def test_squared_gradients_are_autograd_s(prepared: tuple[TrainSpec, Path]) -> None:
    made, _ = prepared
    source = Source(str(RunFolder(Path(made.run_dir)).base_model))
    names = [m.name for m in matrices_of(source, LoRA())]
    causal = load_model(source.id, revision=None, dtype=torch.float32, device=CPU)
    packs = fisher.sequences(Path(made.tokens_dir), 3, 64, 0)
    assert all(pack.tokens <= 64 for pack in packs)
    whole = fisher.gather(causal, names, packs, factored=False)
    factored = fisher.gather(causal, names, packs, factored=True)
    assert all(p.requires_grad and p.grad is None for p in causal.parameters())
    each = [gradients(causal, pack) for pack in packs]
    for name in names:
        want = torch.stack([g[f"{name}.weight"].square() for g in each]).mean(0)
        torch.testing.assert_close(whole[name], want, rtol=1e-3, atol=1e-3 * float(want.max()))
        torch.testing.assert_close(factored[f"{name}.row"], want.mean(1), rtol=1e-3, atol=1e-3 * float(want.max()))
        torch.testing.assert_close(factored[f"{name}.column"], want.mean(0), rtol=1e-3, atol=1e-3 * float(want.max()))


@pytest.mark.parametrize("kind", ["diagonal", "factored"])
def test_weighted_by_the_data(prepared: tuple[TrainSpec, Path], tmp_path: Path, kind: str) -> None:
    """Another base than the data-free one, of a smaller weighted error; gradients are not left on disk."""
    made, cache = prepared
    base = LQ(bits=3.0, iterations=2, fisher=kind, samples=2, sample_tokens=64)  # type: ignore[arg-type]
    weighted = made.model_copy(update={"run_dir": str(tmp_path / "run"), "base": base})
    folder = prepare(weighted, cache_root=cache)
    assert not list(folder.glob(".*"))
    plain, own = (PreparedBase.open(RunFolder(Path(s.run_dir)).prepared_base) for s in (made, weighted))
    source = Source(str(RunFolder(Path(made.run_dir)).base_model))
    causal = load_model(source.id, revision=None, dtype=torch.bfloat16, device=CPU)
    packs = fisher.sequences(Path(made.tokens_dir), 2, 64, 0)
    found = fisher.gather(causal, list(own.matrices), packs, factored=False)
    sums = {"plain": 0.0, "weighted": 0.0}
    for name in own.matrices:
        weight, importance = causal.get_submodule(name).weight.detach().double(), Importance.of(found[name])
        for label, each in (("plain", plain), ("weighted", own)):
            start, layer = each.start(name), each.layer(name, None, torch.bfloat16, CPU)
            assert start is not None
            off = weight - layer.weight.double() - 2.0 * start.b.double() @ start.a.double()
            sums[label] += importance.squared(off.float())
    assert sums["weighted"] < sums["plain"]


INITS: list[tuple[Base, str]] = [(NF4(), "lorc"), (Int8(), "lorc"), (NF4(), "loftq")]


@pytest.mark.parametrize(("base", "init"), INITS, ids=str)
def test_starts_on_other_bases(tokens: Path, tmp_path: Path, base: Base, init: str) -> None:  # noqa: F811
    """`lorc` leaves the base as plain rounding has it; both start closer to the weights than zero does."""
    adapter = LoRA(rank=4, alpha=8.0, init=init)  # type: ignore[arg-type]
    made = lq_spec(tokens, tmp_path / "run", base=base, adapter=adapter)
    folder = prepare(made, cache_root=tmp_path / "cache")
    found = PreparedBase.open(folder)
    source = Source(str(RunFolder(Path(made.run_dir)).base_model))
    for each in matrices_of(source, adapter):
        weight = each.read(source).float()
        plain = quantized(weight, base, None)
        plain.dtype = torch.bfloat16
        layer, start = found.layer(each.name, None, torch.bfloat16, CPU), found.start(each.name)
        assert start is not None and layer.stored_bytes == plain.stored_bytes
        lost = weight - plain.weight.float()
        off = weight - layer.weight.float() - 2.0 * start.b.float() @ start.a.float()
        assert float(off.norm()) < float(lost.norm())
        if init == "lorc":
            assert torch.equal(layer.weight, plain.weight)
            u, s, vh = torch.linalg.svd(lost)
            want = (u[:, :4] * s[:4]) @ vh[:4]
            torch.testing.assert_close(2.0 * start.b.float() @ start.a.float(), want, rtol=0, atol=0.02 * float(s[0]))


def test_training_resumes_and_exports(prepared: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    """Steps on one rank and on two agree; a resumed run is bit-equal; the export opens in peft over the rounded base
    with the logits of the model that was trained, and merged."""
    made, cache = prepared
    records = {}
    for name, mesh in (("one", Mesh(dp=1, sp=1)), ("two", Mesh(dp=1, sp=2))):
        own = made.model_copy(update={"run_dir": str(tmp_path / name), "mesh": mesh, "precision": "fp32"})
        prepare(own, cache_root=cache)
        records[name] = run(own)
    for one, two in zip(records["one"], records["two"]):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert records["one"][-1]["loss"] < records["one"][0]["loss"]
    root = tmp_path / "one"
    own = made.model_copy(update={"run_dir": str(root), "precision": "fp32"})
    newest = root / "checkpoints/step_12"
    (newest / "manifest.json").unlink()
    resumed = run(own)
    assert [r["loss"] for r in resumed if r["step"] > 6][-6:] == [r["loss"] for r in records["one"] if r["step"] > 6]
    check_export(own, root / "checkpoints/step_12", tmp_path / "export")


def check_export(own: TrainSpec, checkpoint: Path, out: Path) -> None:
    folder, ids = RunFolder(Path(own.run_dir)), torch.arange(40)[None] % 300
    options: dict[str, Any] = {
        "model": own.model,
        "adapter": own.adapter,
        "base_model_dir": folder.base_model,
        "dtype": own.precision,
        "stored": own.base,
        "prepared": folder.prepared_base,
    }
    report = export_checkpoint(checkpoint, out / "adapter", whole_base=True, **options)
    assert f"{PREPARED}/prepared_base.json" in report.files and "14 rounded matrices that open" in report.compared
    told = json.loads((out / "adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(out / "adapter/base")
    loss, _ = build(own, CPU)
    trained = dict(loss.model.named_parameters())
    from farspan.trainer.attention import PackedSequence
    from farspan.trainer.checkpoint_state import StateReader

    state = StateReader(checkpoint)
    for name in state.parameters():
        trained[name].data.copy_(state.tensor(name, tuple(trained[name].shape)))
    with torch.no_grad():
        want = loss._causal[0](ids, packed_sequence=PackedSequence((40,))).logits
        logits = {}
        for name, base in (
            ("shards", AutoModelForCausalLM.from_pretrained(out / "adapter/base", dtype=torch.float32)),
            ("ours", open_dequantized(out / "adapter" / PREPARED)),
        ):
            logits[name] = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
        export_checkpoint(checkpoint, out / "merged", merged=True, **options)
        logits["merged"] = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(ids).logits
    for name, found in logits.items():
        assert float((found - want).norm() / want.norm()) < 1e-5, name
    narrow = export_checkpoint(checkpoint, out / "without", **options)
    assert not any(file.startswith("base/") for file in narrow.files)
    told = json.loads((out / "without/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(folder.prepared_base), "the pretrained weights would be wrong"


def test_reversible_layers_on_a_prepared_base(tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    """Trains, exports and opens again."""
    from farspan.memory.plan import LayerPlan, Placement, Rows
    from farspan.trainer.adapters.reversible.files import load

    inside = LoRA(rank=4, alpha=8.0)
    plan = LayerPlan(x=Rows(device=256))
    made = lq_spec(
        tokens,
        tmp_path / "run",
        adapter=Reversible(bits=3, inside=inside),
        precision="fp32",
        placement=Placement(rows=256, attention_rows=256, layers=(plan,) * 2),
    )
    prepare(made, cache_root=tmp_path / "cache")
    record = run(made)[-1]
    folder = RunFolder(Path(made.run_dir))
    manifest = json.loads((folder.checkpoint(12) / "manifest.json").read_text())
    from farspan.trainer.checkpoint import with_range

    report = export_checkpoint(
        folder.checkpoint(12),
        tmp_path / "out",
        model=made.model,
        adapter=with_range(made.adapter, manifest["progress"]),
        base_model_dir=folder.base_model,
        dtype="fp32",
        stored=made.base,
        prepared=folder.prepared_base,
    )
    assert "reversible.json" in report.files and record["step"] == 12
    opened = load(tmp_path / "out", attn_implementation="eager")
    assert sum(isinstance(m, QuantizedLinear) for m in opened.modules()) == 14


def test_a_base_that_is_not_there(tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(CheckpointError, match="no prepared base"):
        build(lq_spec(tokens, tmp_path / "run", model=Model(str(tmp_path))), CPU)


def test_a_checkpoint_that_names_its_weights_otherwise(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from farspan.trainer.models import write_random_model

    folder = tmp_path / "model"
    shape = RandomModel(hidden=32, layers=1, heads=4, kv_heads=2, ffn=64, vocab=300)
    write_random_model(shape, folder, precision="bf16", context=64, eos_id=0, pad_id=1)
    weights = load_file(folder / "model.safetensors")
    inner = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(inner, folder / "model.safetensors", metadata={"format": "pt"})
    source = Source(str(folder))
    found = matrices_of(source, LoRA(rank=4, target_modules=("q_proj",)))
    assert [m.rank for m in found] == [4, 0, 0, 0, 0, 0, 0] and found[0].key == "layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[0].read(source), weights["model.layers.0.self_attn.q_proj.weight"])
    other = {name.replace("q_proj", "query"): tensor for name, tensor in weights.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobError, match="no weight called"):
        matrices_of(source, LoRA(rank=4))
    with pytest.raises(JobError, match="16 directions, fewer than the 20"):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        matrices_of(source, LoRA(rank=20))
    (folder / "model.safetensors").unlink()
    with pytest.raises(JobError, match="no safetensors"):
        matrices_of(source, LoRA(rank=4))
