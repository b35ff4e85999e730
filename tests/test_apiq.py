"""Rounded matrices fitted to what layers put out: the objective, its closed form, the walk, what it is worth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lq import lq_spec
from test_sft import tokens  # noqa: F401  a fixture
from torch import Tensor, nn

from farspan.kernels.quantized.formats import Format
from farspan.trainer.bases.config import LQ, NF4, Base, Grid, Int8
from farspan.trainer.bases.linear import quantized
from farspan.trainer.bases.prepared import calibrated, fisher
from farspan.trainer.bases.prepared.calibrated import Fit, Products, calibrate
from farspan.trainer.bases.prepared.decompose import Importance, LowRank, decompose
from farspan.trainer.bases.prepared.matrices import Source, matrices_of
from farspan.trainer.bases.prepared.prepare import prepare
from farspan.trainer.bases.prepared.store import PreparedBase, open_dequantized
from farspan.trainer.bases.prepared.walk import walk
from farspan.trainer.batch import rows_of
from farspan.trainer.config import LoRA
from farspan.trainer.models import CausalLMLoss, load_model
from farspan.trainer.run_folder import RunFolder

CPU = torch.device("cpu")
ROWS, INPUTS, RANK, SCALE = 64, 96, 4, 2.0
TWO = Format(2, 8, "bf16", 32, 256)


def inputs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows whose directions differ in size, and as rounded layers before would give them."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(9)))[0]
    x = torch.randn(count, INPUTS, generator=draw) * torch.logspace(0, -1.5, INPUTS) @ turn
    return x, x + 0.03 * torch.randn(count, INPUTS, generator=draw)


def weight() -> Tensor:
    return torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(3)) * 0.05


def products(x: Tensor, rounded: Tensor) -> Products:
    found = Products.zeros(INPUTS, CPU)
    for first in range(0, x.shape[0], 100):
        found.add(x[first : first + 100], rounded[first : first + 100])
    return found


def explicit(w: Tensor, v: Tensor, x: Tensor, rounded: Tensor, f: Tensor | None, saliency: float) -> Tensor:
    """The formula, on activations."""
    first = (x.double() @ w.double().t() - rounded.double() @ v.t()).square().sum()
    if f is None:
        return first
    h = rounded.double().square().sum() / INPUTS
    return first + saliency * h * (f.double() / f.double().mean() * (w.double() - v).square()).sum()


@pytest.mark.parametrize("kind", ["none", "whole", "factored"])
def test_the_objective_is_the_formula(kind: str) -> None:
    (x, rounded), w = inputs(300, 0), weight()
    torch.manual_seed(1)
    row, column = torch.rand(ROWS) + 0.1, torch.rand(INPUTS) + 0.1
    f = torch.outer(row, column) if kind != "none" else None
    importance = {"none": None, "whole": Importance.of(f) if f is not None else None}.get(
        kind, Importance.factored(row, column)
    )
    fit = Fit(w, products(x, rounded), saliency=0.7 if f is not None else 0.0, importance=importance)
    v = (w + 0.02 * torch.randn_like(w)).double()
    torch.testing.assert_close(fit.of_rows(v).sum(), explicit(w, v, x, rounded, f, 0.7), rtol=1e-6, atol=1e-9)
    one = v.clone()
    one[5] = 0
    differs = (fit.of_rows(one) - fit.of_rows(v)).abs() > 1e-12
    assert differs[5] and int(differs.sum()) == 1, "rows are problems of their own"


def test_the_low_rank_part_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worse than what LBFGS finds on the explicit formula, fp64; a row of the SVD in plain weights is."""
    monkeypatch.setattr(calibrated, "DAMPING", 1e-12)
    (x, rounded), w = inputs(400, 0), weight()
    q = quantized(w, TWO, None).weight.double()
    fit = Fit(w, products(x, rounded))
    ours = fit.low_rank(q, RANK, scale=SCALE, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return explicit(w, q + SCALE * b @ a, x, rounded, None, 0.0)

    least = float("inf")
    for seed in range(3):
        torch.manual_seed(seed)
        a, b = (torch.randn(s, dtype=torch.float64).mul(0.1).requires_grad_() for s in ((RANK, INPUTS), (ROWS, RANK)))
        optimizer = torch.optim.LBFGS([a, b], max_iter=300, line_search_fn="strong_wolfe")

        def closure(a: Tensor = a, b: Tensor = b, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(a, b)
            value.backward()
            return value

        optimizer.step(closure)
        least = min(least, float(loss(a, b).detach()))
    got = float(loss(ours.a, ours.b))
    assert got <= least * (1 + 1e-6), (got, least)
    u, s, vh = torch.linalg.svd(w.double() - q, full_matrices=False)
    assert got < 0.9 * float(loss(vh[:RANK] / SCALE, u[:, :RANK] * s[:RANK]))
    sizes = ours.a.norm(dim=1) / ours.b.norm(dim=0)
    torch.testing.assert_close(sizes, torch.ones(RANK, dtype=torch.float64), rtol=1e-6, atol=0)


BASES: list[Base | Format] = [TWO, Format(3, 8, "bf16", 32, 256), NF4(), Int8()]


@pytest.mark.parametrize("how", BASES, ids=str)
@pytest.mark.parametrize("saliency", [0.0, 0.5])
def test_the_best_pair_is_kept(how: Base | Format, saliency: float) -> None:
    """No worse than a LoRA from zero, LoftQ's pair, or anything tried; on other rows of the same kind better too."""
    (x, rounded), (x_new, rounded_new), w = inputs(800, 0), inputs(800, 1), weight()
    torch.manual_seed(1)
    f = torch.rand(ROWS, INPUTS).square() + 0.01
    fit = Fit(w, products(x, rounded), saliency=saliency, importance=Importance.of(f))
    loftq = decompose(w, how, RANK, order="loftq", scale=SCALE, dtype=torch.float32)
    made = calibrate(fit, how, RANK, scale=SCALE, dtype=torch.float32, starts=(loftq,))
    assert made.error == min(made.tried)

    def stands_for(layer: Any, low: LowRank | None) -> Tensor:
        whole: Tensor = layer.weight.double()
        return whole if low is None else whole + SCALE * low.b.double() @ low.a.double()

    pairs = {
        "zero": stands_for(quantized(w, how, None), None),
        "loftq": stands_for(loftq.layer, loftq.low_rank),
        "apiq": stands_for(made.layer, made.low_rank),
    }
    own = {name: float(explicit(w, v, x, rounded, f, saliency)) for name, v in pairs.items()}
    assert own["apiq"] == pytest.approx(made.error, rel=1e-4)
    assert own["apiq"] <= own["loftq"] * (1 + 1e-6) and own["apiq"] < own["zero"]
    if not isinstance(how, Int8):  # which loses next to nothing
        new = {name: float(explicit(w, v, x_new, rounded_new, None, 0.0)) for name, v in pairs.items()}
        assert new["apiq"] < new["loftq"] and new["apiq"] < new["zero"], new


def test_saliency_keeps_what_matters() -> None:
    (x, rounded), w = inputs(400, 0), weight()
    torch.manual_seed(1)
    f = torch.rand(ROWS, INPUTS).pow(4) + 1e-3
    moved = []
    for saliency in (0.0, 0.5, 5.0):
        fit = Fit(w, products(x, rounded), saliency=saliency, importance=Importance.of(f))
        made = calibrate(fit, TWO, RANK, scale=SCALE, dtype=torch.float32)
        assert made.low_rank is not None
        v = made.layer.weight + SCALE * made.low_rank.b @ made.low_rank.a
        moved.append(float((f * (w - v).square()).sum()))
    assert moved[0] > moved[1] > moved[2]


def test_scales_are_clipped_row_by_row() -> None:
    """The share that is chosen is the best of all for each row, with scales that are stored exactly."""
    (x, rounded), w = inputs(400, 0), weight()
    fit = Fit(w, products(x, rounded))
    clips = calibrated._clips(fit, Int8(), torch.float32, None, SCALE)
    for row in (0, 17, 63):
        errors = []
        for clip in calibrated.CLIPS:
            v = quantized(w[row : row + 1], Int8(), None, torch.tensor([clip])).weight.double()
            errors.append(float(explicit(w[row : row + 1], v, x, rounded, None, 0.0)))
        assert clips[row] == torch.tensor(calibrated.CLIPS[min(range(len(errors)), key=errors.__getitem__)])
    for how in (NF4(double=False), Format(8, 8, "fp32", 32, 256)):
        half = quantized(w, how, None, torch.full((ROWS,), 0.5)).weight
        assert float(half.abs().amax() / w.abs().amax()) == pytest.approx(0.5, rel=0.02)


def loaded(made: Any, dtype: torch.dtype = torch.float32) -> Any:
    source = str(RunFolder(Path(made.run_dir)).base_model)
    return load_model(source, revision=None, dtype=dtype, device=CPU).eval()


@pytest.fixture(scope="module")
def plain_run(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    """A run with its base model on disk, and LoftQ's base."""
    root = tmp_path_factory.mktemp("apiq")
    made = lq_spec(tokens, root / "run", base=NF4(), adapter=LoRA(rank=4, alpha=8.0, init="loftq"), precision="fp32")
    prepare(made, cache_root=root / "cache")
    return made


def test_the_walk_sees_what_layers_read(plain_run: Any) -> None:
    """Inputs of the pretrained model, and of the model with every matrix before it exchanged, at each linear layer."""
    causal = loaded(plain_run)
    names = [m.name for m in matrices_of(Source(str(RunFolder(Path(plain_run.run_dir)).base_model)), LoRA())]
    packs = fisher.sequences(Path(plain_run.tokens_dir), 2, 64, 0)
    seen: dict[str, Products] = {}
    exchanged: dict[str, Tensor] = {}

    def exchange(name: str, w: Tensor, found: Products) -> Tensor:
        seen[name] = found
        exchanged[name] = w + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(len(seen)))
        return exchanged[name]

    before = {name: p.detach().clone() for name, p in causal.named_parameters()}
    walk(causal, names, packs, exchange)
    assert list(seen) == names and all(torch.equal(p, before[name]) for name, p in causal.named_parameters())
    other = copy.deepcopy(causal)
    for name, w in exchanged.items():
        other.get_submodule(name).weight.data = w
    want = {name: Products.zeros(seen[name].plain.shape[0], CPU) for name in names}
    for pack in packs:
        read: list[dict[str, Tensor]] = []
        for model in (causal, other):
            caught: dict[str, Tensor] = {}
            hooks = [
                model.get_submodule(n).register_forward_pre_hook(lambda _, a, n=n, c=caught: c.__setitem__(n, a[0]))  # type: ignore[misc]
                for n in names
            ]
            rows = rows_of(pack, sp=1, sp_index=0, ulysses=None, device=CPU)
            with torch.no_grad():
                CausalLMLoss(model, model, loss_tile=64)(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
            for hook in hooks:
                hook.remove()
            read.append(caught)
        for name in names:
            want[name].add(*(each[name].flatten(0, 1) for each in read))
    for name in names:
        for part in ("plain", "rounded", "mixed"):
            got, expected = getattr(seen[name], part), getattr(want[name], part)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def outputs_off(whole: nn.Module, causal: Any, plain_run: Any) -> float:
    """How far the last hidden states of other text are from the pretrained model's."""
    total = 0.0
    for pack in fisher.sequences(Path(plain_run.tokens_dir), 8, 64, 5)[4:]:
        ids = torch.from_numpy(pack.input_ids.astype("int64"))[None]
        with torch.no_grad():
            want, got = (model.get_decoder()(ids).last_hidden_state for model in (causal, whole))  # type: ignore[operator]
        total += float((got - want).square().sum())
    return total


@pytest.mark.parametrize("base", [NF4(), LQ(bits=2.6, iterations=2, grid=Grid(bits=(2, 3)))], ids=["nf4", "lq"])
def test_a_calibrated_base(plain_run: Any, tmp_path: Path, base: Base) -> None:
    """Outputs are closer to the pretrained model's than those of the same base with LoRA from zero, or LoftQ's or
    LQ-LoRA's pair; stored in as many bytes; an attempt that stopped is gone on with."""
    adapter = LoRA(rank=4, alpha=8.0, init="apiq", init_packs=4, init_tokens=64, init_rounds=2)
    update = {"base": base, "adapter": adapter, "run_dir": str(tmp_path / "apiq")}
    made = plain_run.model_copy(update=update)
    folder = prepare(made, cache_root=tmp_path / "cache")
    rival = plain_run
    if isinstance(base, LQ):
        own = {"base": base, "adapter": adapter.model_copy(update={"init": "default"}), "run_dir": str(tmp_path / "lq")}
        rival = plain_run.model_copy(update=own)
        prepare(rival, cache_root=tmp_path / "cache")
    other = PreparedBase.open(RunFolder(Path(rival.run_dir)).prepared_base)
    mine = PreparedBase.open(folder)
    assert mine.stored_bytes == other.stored_bytes
    causal, off = loaded(plain_run), {}
    for name, prepared in (("zero", other), ("rival", other), ("apiq", mine)):
        source = RunFolder(Path(plain_run.run_dir)).base_model
        whole: Any = open_dequantized(prepared.folder, source=source, attn_implementation="eager")
        for each in prepared.matrices:
            plain = causal.get_submodule(each).weight.detach()
            start = prepared.start(each)
            assert start is not None
            if name == "zero":
                how = NF4() if isinstance(base, NF4) else prepared.layer(each, None, plain.dtype, CPU).format
                whole.get_submodule(each).weight.data = quantized(plain, how, None).weight  # type: ignore[arg-type]
            else:
                whole.get_submodule(each).weight.data += SCALE * start.b @ start.a
        plainly = causal.config._attn_implementation
        causal.config._attn_implementation = "eager"
        off[name] = outputs_off(whole, causal, plain_run)
        causal.config._attn_implementation = plainly
    assert off["apiq"] < off["rival"] and off["apiq"] < off["zero"], off
    kept = sorted(mine.matrices)[:9]
    again = made.model_copy(update={"run_dir": str(tmp_path / "again")})
    half = RunFolder(Path(again.run_dir)).prepared_base
    half.mkdir(parents=True)
    from farspan.trainer.bases.prepared.prepare import WORK, _made_for
    from farspan.trainer.run_folder import write_json

    write_json(half / WORK, _made_for(again))
    for each in kept:
        (half / f"{each}.safetensors").write_bytes((folder / f"{each}.safetensors").read_bytes())
    prepare(again, cache_root=tmp_path / "cache")
    for each in mine.matrices:
        want, got = (p.layer(each, None, torch.float32, CPU).weight for p in (mine, PreparedBase.open(half)))
        assert torch.equal(got, want), each


def test_with_saliency(plain_run: Any, tmp_path: Path) -> None:
    """From squared gradients on the same text."""
    adapter = LoRA(rank=4, alpha=8.0, init="apiq", init_packs=2, init_tokens=64, init_rounds=1)
    found = {}
    for saliency in (0.0, 1.0):
        own = adapter.model_copy(update={"saliency": saliency})
        made = plain_run.model_copy(update={"adapter": own, "run_dir": str(tmp_path / str(saliency))})
        found[saliency] = PreparedBase.open(prepare(made, cache_root=tmp_path / "cache"))
    causal = loaded(plain_run)
    packs = fisher.sequences(Path(plain_run.tokens_dir), 2, 64, 0)
    gathered = fisher.gather(causal, list(found[0.0].matrices), packs, factored=True)
    moved = {}
    for saliency, prepared in found.items():
        moved[saliency] = 0.0
        for name in prepared.matrices:
            start = prepared.start(name)
            assert start is not None
            v = prepared.layer(name, None, torch.float32, CPU).weight + SCALE * start.b @ start.a
            importance = Importance.factored(gathered[f"{name}.row"], gathered[f"{name}.column"])
            moved[saliency] += importance.squared(causal.get_submodule(name).weight.detach() - v)
    assert moved[1.0] < moved[0.0]
