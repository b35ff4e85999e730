"""Each optimizer against what we did not write: torch.optim, bitsandbytes, formulas in float64, dense matrices."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farspan.kernels.optimizer_states import (
    GROUP,
    cosine,
    dynamic8,
    dynamic8_bytes,
    expanded8,
    expanded8_bytes,
    residual,
    residual_bytes,
)
from farspan.trainer.config import COAT, LAMB, AdamW8bit, DCTAdamW, GaLore, Muon, Optim
from farspan.trainer.optimizers.adam import AdamW as AdamWRule
from farspan.trainer.optimizers.adam import TrustRatio
from farspan.trainer.optimizers.eight_bit import AdamW8bit as AdamW8bitRule
from farspan.trainer.optimizers.eight_bit import ExpandedFP8
from farspan.trainer.optimizers.low_rank import Cosines, SingularVectors
from farspan.trainer.optimizers.muon import Orthogonal
from farspan.trainer.optimizers.rule import Rule
from farspan.trainer.optimizers.select import make_rule

ORACLES = Path(sys.prefix) / "oracles"
F64 = torch.float64
LR, DECAY, STEPS = 3e-3, 0.1, 12


@pytest.fixture(scope="module")
def bitsandbytes() -> Iterator[Any]:
    """bitsandbytes where it is installed, else from a folder beside: for this module's tests alone."""
    with pytest.MonkeyPatch.context() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside at import
        if ORACLES.is_dir():
            path.syspath_prepend(str(ORACLES))
        known = set(sys.modules)
        yield importlib.import_module("bitsandbytes")
        for name in set(sys.modules) - known:
            if name.startswith("bitsandbytes"):
                del sys.modules[name]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(*shape: int, dtype: torch.dtype = F64) -> Iterator[Tensor]:
    """Of `STEPS` steps, with a direction that stays and magnitudes that differ by rows."""
    rows = torch.logspace(-2, 1, shape[0], dtype=F64).view(-1, *[1] * (len(shape) - 1))
    for step in range(STEPS):
        yield ((draw(*shape, seed=step) + draw(*shape, seed=99)) * rows).to(dtype)


def trained(rule: Rule, found: Iterator[Tensor], name: str = "w") -> Tensor:
    for count, gradient in enumerate(found, 1):
        rule.step({name: gradient.clone()}, lr=LR / count, count=count)
    return rule.masters[name]


def by_torch(optimizer: Any, weight: Tensor, found: Iterator[Tensor]) -> Tensor:
    for count, gradient in enumerate(found, 1):
        weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = LR / count
        optimizer.step()
    return weight


def adamw_of(weight: Tensor, found: Iterator[Tensor], **changed: Any) -> Tensor:
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": DECAY, "foreach": False, **changed}
    return by_torch(torch.optim.AdamW([weight], **options), weight, found)


def apart(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """How far the ways from `start` are apart, of the expected one."""
    return float((found.double() - expected.double()).norm() / (expected.double() - start.double()).norm())


# the codes


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code_is_that_of_bitsandbytes(bitsandbytes: Any, signed: bool) -> None:
    table = bitsandbytes.functional.create_dynamic_map(signed=signed)
    ours, _ = dynamic8._table(signed, torch.device("cpu"))
    assert torch.equal(ours, table)
    x = draw(5000, dtype=torch.float32) * torch.logspace(-6, 3, 5000)
    x = x if signed else x.abs()
    codes, largest = dynamic8.encode(x, signed=signed)
    assert codes.numel() + 4 * largest.numel() == dynamic8_bytes(5000)
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, table, 256)
    assert torch.equal(largest, absmax)
    assert ((codes.int() - theirs.int()).abs() <= 1).all()
    assert (codes != theirs).float().mean() < 0.03, "theirs is not always the nearest on a CPU"
    back = dynamic8.decode(codes, largest, signed=signed)
    assert torch.equal(back, torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, table, 256, torch.float32))
    theirs_back = dynamic8.decode(theirs, absmax, signed=signed)
    assert ((back - x).abs() <= (theirs_back - x).abs() * (1 + 1e-5) + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 700), seed=st.integers(0, 99), power=st.floats(-30, 30), zeros=st.booleans())
def test_dynamic_code_is_the_nearest(numel: int, seed: int, power: float, zeros: bool) -> None:
    x = draw(numel, seed=seed, dtype=torch.float32) * 10.0 ** (power / 2)
    if zeros:
        x[::2] = 0
    for signed, given_ in ((True, x), (False, x.abs())):
        codes, largest = dynamic8.encode(given_, signed=signed)
        table, _ = dynamic8._table(signed, torch.device("cpu"))
        top = largest.repeat_interleave(256)[:numel]
        distance = (given_[:, None].double() - table.double() * top[:, None].double()).abs()
        back = dynamic8.decode(codes, largest, signed=signed)
        assert ((back.double() - given_.double()).abs() <= distance.amin(dim=1) * (1 + 1e-6) + 1e-7 * top).all()
        assert (back[given_ == 0] == 0).all(), "what is zero stays so"


@pytest.mark.parametrize("signed", [True, False])
def test_looking_codes_up_is_a_binary_search(signed: bool) -> None:
    """Over shares of every magnitude, and the limits themselves with their neighbours."""
    _, between = dynamic8._table(signed, torch.device("cpu"))
    around = [between, between.nextafter(torch.tensor(2.0)), between.nextafter(torch.tensor(-2.0))]
    spread = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    powers = 10.0 ** (-30 * torch.rand(200_000, generator=torch.Generator().manual_seed(1)))
    x = torch.cat([*around, spread, spread * powers, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45])])
    x = x if signed else x.abs()
    assert torch.equal(dynamic8._nearest(x, signed).long(), torch.bucketize(x, between))


def paper_power(group: Tensor) -> float:
    """k of COAT's equation, float64."""
    size = group.abs().double()
    largest, least = float(size.max()), float(size[size > 0].min())
    return math.floor(8 * math.log2(448**2 / 2) / math.log2(largest / least)) / 8


def test_expanded_range_is_the_papers() -> None:
    """Geometric mean, power, scale, E4M3, as the paper has them, in float64; ours leaves the mean out."""
    for seed in range(20):
        x = draw(GROUP, seed=seed).square().add(0.01).float() * draw(GROUP, seed=seed + 50).sign().float()
        codes, largest, eighths = expanded8.encode(x)
        assert codes.numel() + 4 * largest.numel() + eighths.numel() == expanded8_bytes(GROUP)
        k = paper_power(x)
        assert int(eighths) == 8 * k
        size = x.double().abs()
        mean = math.sqrt(float(size.max()) * float(size.min()))
        scale = (float(size.max()) / mean) ** k / 448
        q = (x.sign().double() * (size / mean) ** k / scale).to(torch.float8_e4m3fn)
        assert (codes.view(torch.float8_e4m3fn) == q).float().mean() > 0.98, "but for numbers half way between two"
        back = q.double().sign() * (q.double().abs() * scale) ** (1 / k) * mean
        close = (expanded8.decode(codes, largest, eighths).double() - back).abs() <= 1e-5 * back.abs()
        assert (close | (codes.view(torch.float8_e4m3fn) != q)).all()


def test_expanded_range_errs_less_than_plain_fp8() -> None:
    """Over groups of moments as they are: averages of gradients, and of their squares."""
    first = torch.stack([draw(1 << 14, seed=s) * torch.logspace(-3, 0, 1 << 14, dtype=F64) for s in range(10)])
    for x in (first.mean(0).float(), first.square().mean(0).float()):
        off = {}
        for expand in (True, False):
            back = expanded8.decode(*expanded8.encode(x, expand=expand))
            off[expand] = float((back - x).norm() / x.norm())
            assert off[expand] < 0.03
        assert off[True] < 0.75 * off[False], off


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 400), seed=st.integers(0, 99), least=st.floats(-38, 0), zeros=st.integers(0, 3))
def test_expanded_range_of_any_group(numel: int, seed: int, least: float, zeros: int) -> None:
    powers = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) * least
    x = 10.0**powers * draw(numel, seed=seed, dtype=torch.float32).sign()
    if zeros:
        x[::zeros] = 0  # 1: nothing but zeros
    codes, largest, eighths = expanded8.encode(x)
    back = expanded8.decode(codes, largest, eighths)
    assert (back[x == 0] == 0).all()
    assert torch.equal(back.sign(), x.sign()), "nothing small is lost: a second moment of zero would divide by eps"
    k = (eighths.float() / 8).repeat_interleave(GROUP)[:numel]
    # the least of a group becomes 2 / 448 of the largest or more, 2.3 of the steps that E4M3 has there
    assert ((back / x).log2().abs()[x != 0] <= math.log2(1 / (1 - 0.5 / 2.28)) / k[x != 0] + 1e-4).all()


def test_groups_without_a_range() -> None:
    for x in (torch.zeros(300), torch.full((130,), -3e-9), torch.tensor([2.0]), torch.tensor([0.0, 5e30, 0.0])):
        assert torch.equal(expanded8.decode(*expanded8.encode(x)), x)


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 700), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_what_is_left_out_comes_back_in_its_place(numel: int, bits: Any, seed: int) -> None:
    """Whole codes exactly, in the order they were in; anything else within half a step."""
    levels = (1 << bits) - 1
    exact = torch.randint(levels + 1, (numel,), generator=torch.Generator().manual_seed(seed)).float()
    for first in range(0, numel, GROUP):
        group = exact[first : first + GROUP]
        group[:1], group[-1:] = 0, levels  # one element: a group of one
    codes, scales = residual.encode(exact, bits)
    assert codes.numel() + 4 * scales.numel() == residual_bytes(numel, bits)
    whole = numel - numel % GROUP  # the last group is filled up with zeros
    assert torch.equal(residual.decode(codes, scales, numel, bits)[:whole], exact[:whole])
    x = draw(numel, seed=seed, dtype=torch.float32)
    codes, scales = residual.encode(x, bits)
    step = scales[:, 1].repeat_interleave(GROUP)[:numel]
    assert ((residual.decode(codes, scales, numel, bits) - x).abs() <= 0.5 * step + 1e-6).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 63, 64, 96, 257])
def test_fast_cosines_are_those_of_the_matrix(n: int) -> None:
    j, k = torch.arange(n, dtype=F64)[:, None], torch.arange(n, dtype=F64)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * k * (2 * j + 1) / (2 * n))
    matrix[:, 0] /= math.sqrt(2)
    assert (matrix.T @ matrix - torch.eye(n, dtype=F64)).abs().max() < 1e-13
    assert (cosine.vectors(n, torch.arange(n), F64) - matrix).abs().max() < 1e-12
    x = draw(7, n)
    assert (cosine.transform(x) - x @ matrix).abs().max() < 1e-12
    assert (cosine.transform(x.float()) - x @ matrix).abs().max() < 1e-5


# the rules


def test_lamb_is_the_explicit_formula() -> None:
    start, optim = draw(6, 5, seed=7), LAMB(trust_min=1.1, trust_max=1.35)
    rule = TrustRatio({"w": start.clone(), "v": start[0].clone()}, {"w": DECAY, "v": 0.0}, optim)
    w, m, v, ratios = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
    for t, g in enumerate(gradients(6, 5), 1):
        rule.step({"w": g.clone(), "v": g[0].clone()}, lr=LR / t, count=t)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        s = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + DECAY * w
        ratios.append(float(w.norm() / s.norm()))
        w = w - LR / t * min(max(ratios[-1], 1.1), 1.35) * s
    assert min(ratios) < 1.1 and max(ratios) > 1.35 and any(1.1 < ratio < 1.35 for ratio in ratios)
    assert apart(rule.masters["w"], w, start) < 1e-12
    vector = adamw_of(start[0].clone(), (g[0] for g in gradients(6, 5)), weight_decay=0.0)
    assert apart(rule.masters["v"], vector, start[0]) < 1e-12, "no ratio for vectors"


def test_lamb_of_a_matrix_at_zero() -> None:
    rule = TrustRatio({"w": torch.zeros(3, 2, dtype=F64)}, {"w": 0.0}, LAMB())
    rule.step({"w": draw(3, 2)}, lr=0.1, count=1)
    assert (rule.masters["w"].abs() - 0.1).abs().max() < 1e-6, "Adam's first step, with a ratio of one"


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(shape: tuple[int, int], nesterov: bool) -> None:
    start, optim = draw(*shape, dtype=torch.float32), Muon(nesterov=nesterov, momentum=0.9, ns_steps=4)
    bf16 = Orthogonal({"w": start.clone()}, {"w": DECAY}, optim, torch.bfloat16)
    weight = start.clone()
    torchs = torch.optim.Muon(
        [weight], momentum=0.9, nesterov=nesterov, weight_decay=DECAY, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    by_torch(torchs, weight, gradients(*shape, dtype=torch.float32))
    assert torch.equal(trained(bf16, gradients(*shape, dtype=torch.float32)), weight)
    fp32 = Orthogonal({"w": start.clone()}, {"w": DECAY}, optim, torch.float32)
    assert apart(trained(fp32, gradients(*shape, dtype=torch.float32)), weight, start) < 0.03


def test_muon_makes_a_matrix_orthogonal() -> None:
    from farspan.trainer.optimizers.muon import orthogonal

    x = draw(20, 12)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    found = orthogonal(x, 8, F64)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() < values.max() < 1.3
    assert (left.T @ found @ right.T).diagonal().min() > 0.6, "in the matrix' own directions"


def test_galore_is_the_explicit_formula() -> None:
    for shape in ((7, 11), (11, 7)):
        start, optim = draw(*shape, seed=3), GaLore(rank=3, every=5, scale=0.5)
        rule = SingularVectors({"w": start.clone()}, {"w": DECAY}, optim)
        w, m, v, projector = start.clone(), 0.0, 0.0, torch.empty(0)
        for t, g in enumerate(gradients(*shape), 1):
            rule.step({"w": g.clone()}, lr=LR / t, count=t)
            if t % 5 == 1:  # from the eigenvectors of G G^T or G^T G, not from an SVD
                gram = g @ g.T if shape[0] < shape[1] else g.T @ g
                vectors = torch.linalg.eigh(gram).eigenvectors[:, -3:].flip(1)
                signs = torch.stack([c[c.abs().argmax()].sign() for c in vectors.T])
                projector = vectors * signs
            r = projector.T @ g if shape[0] < shape[1] else g @ projector
            m, v = 0.9 * m + 0.1 * r, 0.95 * v + 0.05 * r**2
            n = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            back = projector @ n if shape[0] < shape[1] else n @ projector.T
            w = (1 - LR / t * DECAY) * w - LR / t * 0.5 * back
        assert apart(rule.masters["w"], w, start) < 1e-9


def test_cosines_of_the_whole_width_are_adamw() -> None:
    """In the basis: AdamW of the turned weight on turned gradients. Through a job such a matrix simply has AdamW."""
    start = draw(9, 6, seed=3)
    basis = cosine.vectors(6, torch.arange(6), F64)
    rule = Cosines({"w": start.clone()}, {"w": DECAY}, DCTAdamW(rank=6, every=4))
    expected = adamw_of(start @ basis, (g @ basis for g in gradients(9, 6)))
    assert apart(trained(rule, gradients(9, 6)), expected @ basis.T, start) < 1e-10
    whole = make_rule(DCTAdamW(rank=6), {"w": start.clone()}, {"w": DECAY}, outside=(), narrow=False)
    plain = adamw_of(start.clone(), gradients(9, 6))
    assert apart(trained(whole, gradients(9, 6)), plain, start) < 1e-12


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_cosines_are_the_explicit_formula(shape: tuple[int, int], norm: Any) -> None:
    """Dense Q, dense rotation Q_old^T Q_new of both moments, against indices, FFT and copies."""
    start, rank = draw(*shape, seed=3), 3
    rule = Cosines({"w": start.clone()}, {"w": DECAY}, DCTAdamW(rank=rank, every=2, norm=norm))
    n = min(shape)
    matrix = cosine.vectors(n, torch.arange(n), F64)
    w = start.clone() if shape[0] > shape[1] else start.T.clone()
    m, v, old, kept, chosen = torch.zeros(9, rank, dtype=F64), torch.zeros(9, rank, dtype=F64), None, 0, set()
    for t, given_ in enumerate(gradients(*shape), 1):
        rule.step({"w": given_.clone()}, lr=LR / t, count=t)
        g = given_ if shape[0] > shape[1] else given_.T
        if t % 2 == 1:
            strength = (g @ matrix).abs().pow(1 if norm == "l1" else 2).sum(0)
            index = strength.argsort(descending=True)[:rank].sort().values
            new = matrix[:, index]
            if old is not None:
                turn = old.T @ new
                assert (turn - turn.round()).abs().max() < 1e-12, "a matching"
                kept += int(turn.round().sum())
                m, v = m @ turn, v @ turn
            old = new
            chosen.add(tuple(index.tolist()))
        low = g @ old
        m, v = 0.9 * m + 0.1 * low, 0.95 * v + 0.05 * low**2
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        w = (1 - LR / t * DECAY) * w - LR / t * u @ old.T
    assert len(chosen) > 1 and 0 < kept < rank * (STEPS // 2), "some vectors stay, some go"
    assert apart(rule.masters["w"], w if shape[0] > shape[1] else w.T, start) < 1e-9


@pytest.mark.parametrize("feedback", ["8bit", "4bit"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_error_feedback(feedback: Any, shape: tuple[int, int]) -> None:
    """What was left out, as stored, is added to the next gradient; it is stored to half a step."""
    rule = Cosines({"w": draw(*shape, dtype=torch.float32)}, {"w": 0.0}, DCTAdamW(rank=4, every=1, feedback=feedback))
    state, bits = rule.state("w"), int(feedback[0])
    matrix, shares = cosine.vectors(24, torch.arange(24), F64), []
    for t, given_ in enumerate(gradients(*shape), 1):
        stored = residual.decode(state["left_out"], state["left_out.scale"], 40 * 24, bits).view(shape)
        assert bool(stored.any()) == (t > 1)
        rule.step({"w": given_.float()}, lr=LR, count=t)
        total = given_ + stored if shape[0] > shape[1] else (given_ + stored).T
        index = (total @ matrix).square().sum(0).topk(4).indices.sort().values
        assert torch.equal(state["index"].long(), index), t
        left_out = total - total @ matrix[:, index] @ matrix[:, index].T
        shares.append(float(left_out.norm() / total.norm()))
        now = residual.decode(state["left_out"], state["left_out.scale"], 40 * 24, bits)
        half_steps = 0.5 * state["left_out.scale"][:, 1].repeat_interleave(GROUP)[: 40 * 24]
        left_out = left_out if shape[0] > shape[1] else left_out.T
        assert ((now - left_out.reshape(-1)).abs() <= half_steps + 1e-4).all()
    assert min(shares) > 0.1


def test_adamw8bit_is_that_of_bitsandbytes(bitsandbytes: Any) -> None:
    shape = (96, 50)
    start = draw(*shape, dtype=torch.float32)
    rule = AdamW8bitRule({"w": start.clone()}, {"w": DECAY}, AdamW8bit())
    weight = torch.nn.Parameter(start.clone())
    theirs = bitsandbytes.optim.AdamW8bit([weight], betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    by_torch(theirs, weight, gradients(*shape, dtype=torch.float32))
    ours = trained(rule, gradients(*shape, dtype=torch.float32))
    plain = adamw_of(start.clone(), gradients(*shape, dtype=torch.float32))
    assert apart(ours, weight.detach(), start) < 0.01
    assert apart(ours, plain, start) < 1.05 * apart(weight.detach(), plain, start), "as near to AdamW as theirs"
    for kind, key in (("exp_avg.largest", "absmax1"), ("exp_avg_sq.largest", "absmax2")):
        assert (rule.state("w")[kind] - theirs.state[weight][key]).abs().max() < 0.02 * theirs.state[weight][key].max()


@pytest.mark.parametrize("kind", [AdamW8bitRule, ExpandedFP8])
def test_eight_bits_follow_adamw(kind: Any) -> None:
    """A hundred steps of logistic regression: the loss falls as AdamW's does, and all moments are in 8 bits."""
    x, labels = draw(400, 60, dtype=torch.float32), (draw(400, 8, seed=1) + draw(400, 8, seed=2)).argmax(1)
    x = x + torch.eye(60).repeat(8, 1)[labels][:, :60] * 2

    def losses(rule: Rule) -> list[float]:
        weight, found = rule.masters["w"], []
        for count in range(1, 101):
            leaf = weight.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(x @ leaf.view(60, 80)[:, :8], labels)
            (gradient,) = torch.autograd.grad(loss, leaf)
            rule.step({"w": gradient}, lr=1e-2, count=count)
            found.append(float(loss.detach()))
        return found

    def made(rule: Any, optim: Any) -> Rule:
        return rule({"w": torch.zeros(60 * 80)}, {"w": 0.01}, optim)

    coded, plain = losses(made(kind, COAT())), losses(made(AdamWRule, Optim()))
    assert plain[-1] < 0.7 * plain[0]
    assert all(abs(a - b) < 0.01 * plain[0] for a, b in zip(coded, plain)), list(zip(coded, plain))[::20]


def test_pieces_of_a_long_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some blocks at a time gives the bits of all at once."""
    from farspan.trainer.optimizers import eight_bit

    for kind in (AdamW8bitRule, ExpandedFP8):
        found = []
        for chunk in (1 << 20, 512):
            monkeypatch.setattr(eight_bit, "CHUNK_ELEMENTS", {"cpu": chunk, "cuda": chunk})
            rule = kind({"w": draw(43, 59, dtype=torch.float32)}, {"w": DECAY}, COAT())
            found.append((trained(rule, gradients(43, 59, dtype=torch.float32)), rule.state("w")))
        assert torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1].values(), found[1][1].values()))
