"""The exchange in learned bits: what arrives, what the gates' gradient is, what the budget does, and a run with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sp_ranks import coded_exchange, on_ranks
from torch import nn

from farspan.trainer.config import AMAQ
from farspan.trainer.parallel.learned_bits import LearnedBits, bits_of, whole_bits
from farspan.trainer.parallel.ulysses import LoneRank, head_layout

CPU = torch.device("cpu")
BITS = AMAQ(bits=4, start=5, settle=0.5, least=2, most=8, lr=0.3, gradients="exact")


def made(exchange: AMAQ = BITS, layers: int = 2, steps: int = 10) -> LearnedBits:
    attentions = [nn.Identity() for _ in range(layers)]
    return LearnedBits(exchange, attentions, heads=4, kv_heads=2, head_dim=8, device=CPU, steps=steps, seed=0)


@settings(deadline=None)
@given(st.lists(st.floats(1, 8), min_size=1, max_size=40))
def test_whole_bits_keep_the_sum(bits: list[float]) -> None:
    given_bits = torch.tensor(bits, dtype=torch.float64)
    found = whole_bits(given_bits)
    assert abs(float(found.sum() - given_bits.sum())) <= 0.5 + 1e-9
    assert float((found - given_bits).abs().max()) < 1


def test_bits_fall_to_the_budget_and_stay_there() -> None:
    bits = made()
    means = []
    for step in range(1, 11):
        bits.begin(step)
        means.append(float(bits.bits_LID.double().mean()))
        bits.gradient_LID.normal_(generator=torch.Generator().manual_seed(step))
        bits.update()
    assert means[0] == pytest.approx(5, abs=0.01) and means[5:] == pytest.approx([4] * 5, abs=0.01)
    assert means[:6] == sorted(means[:6], reverse=True)
    assert int(bits.bits_LID.min()) >= 2 and int(bits.bits_LID.max()) <= 8


def test_a_channel_whose_rounding_hurts_gets_more_bits() -> None:
    bits = made()
    for step in range(1, 11):
        bits.begin(step)
        bits.gradient_LID[0, 3, 5] = -10.0
        bits.gradient_LID[1, 0, 0] = 10.0
        bits.update()
    bits.begin(11)
    others = float(bits.bits_LID.double().mean())
    assert int(bits.bits_LID[0, 3, 5]) >= others + 2 and int(bits.bits_LID[1, 0, 0]) <= others - 1


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(4, 2, 2), (4, 1, 4), (6, 3, 4), (5, 5, 3)])
def test_what_arrives_is_rounded_but_for_a_ranks_own(heads: int, kv_heads: int, ranks: int) -> None:
    """Against rounding all channels of a rank's rows in float64 and then exchanging exactly."""
    for result in on_ranks(coded_exchange, ranks, heads, kv_heads):
        for name in ("heads", "rows"):
            torch.testing.assert_close(result[f"{name}, coded"], result[f"{name}, rounded before"], rtol=0, atol=1e-5)
            assert not torch.equal(result[f"{name}, coded"], result[f"{name}, exact"])
        padding = result["bytes"] - result["bytes by formula"]
        assert 0 <= padding < 8 * 2 * (ranks - 1), "a message is a multiple of 8 bytes"


def test_gradients_of_bits_are_those_of_autograd() -> None:
    """Against autograd through the formula with real bits and rounding passed by, on two ranks."""
    results = on_ranks(coded_exchange, 2, 4, 2)
    for result in results:
        torch.testing.assert_close(result["gate gradient"], result["gate gradient, autograd"], rtol=2e-3, atol=2e-4)
        assert float(result["gate gradient"].abs().max()) > 0.01
        for name in ("q", "k", "v"):
            torch.testing.assert_close(result[f"d{name}"], result[f"d{name}, exact"], rtol=1e-5, atol=1e-5)


def test_codes_are_for_training_alone() -> None:
    attention = nn.Identity()
    LearnedBits(BITS, [attention], heads=4, kv_heads=2, head_dim=8, device=CPU, steps=3, seed=0)
    found = bits_of(attention)
    assert found is not None
    with found.model.measured_against():
        assert bits_of(attention) is None
    assert bits_of(attention.eval()) is None and bits_of(nn.Identity()) is None


def test_a_lone_rank_rounds_what_it_would_send() -> None:
    """For measuring: shapes as with others, other ranks' parts in codes."""
    bits = made()
    bits.uniform(3)
    q, k, v = (torch.randn(1, n, 16, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    exact, coded = (LoneRank(2).to_heads(q, k, v, layer) for layer in (None, bits.layers[0]))
    assert [t.shape for t in coded] == [t.shape for t in exact]
    assert not torch.equal(coded[0], exact[0])
    assert len(head_layout(4, 2, 2).query[0]) == coded[0].shape[1]
