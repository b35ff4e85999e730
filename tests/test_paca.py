"""PaCA: its gradient is the columns of the whole one, and what runs is the trained matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executor_models import Model, tokens
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from farspan.errors import JobError
from farspan.trainer.adapters.paca.apply import COLUMNS, INDICES, add_columns
from farspan.trainer.attention import PackedSequence
from farspan.trainer.config import FullFineTune, PaCA

S = 96


def double(model: Model) -> Model:
    model.causal.double()
    return model


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gradients_are_the_columns_of_the_whole_gradient(family: str) -> None:
    """Against autograd through the plain matrices, fp64."""
    whole = double(Model(family, adapter=FullFineTune()))
    want = whole.gradients([40, S - 40])
    ours = double(Model(family, adapter=PaCA(rank=5)))
    got = ours.gradients([40, S - 40])
    names = [name for name in got if not name.startswith("loss")]
    assert len(names) == 4 * (4 if family == "phi3" else 7)
    for name in names:
        layer: Any = ours.model.get_submodule(name.removesuffix(f".{COLUMNS}"))
        columns = want[name.replace(COLUMNS, "weight")][:, getattr(layer, INDICES)]
        torch.testing.assert_close(got[name], columns, rtol=1e-12, atol=1e-12 * float(columns.abs().max()))
    assert got["loss 0"] == want["loss 0"]


def test_what_runs_is_what_was_trained() -> None:
    """After every update, in evaluation, without gradients and with: the new columns, not those of the step before."""
    model = double(Model(adapter=PaCA(rank=3)))
    layer: Any = model.layers[0].mlp.gate_proj
    x = torch.randn(2, 7, 64).double()
    for update in range(3):
        getattr(layer, COLUMNS).data.add_(0.1 * (update + 1))
        expected = layer.weight.detach().clone()
        expected[:, getattr(layer, INDICES)] = getattr(layer, COLUMNS).detach()
        for training in (True, False):
            layer.train(training)
            assert torch.equal(layer(x), nn.functional.linear(x, expected))
            with torch.no_grad():
                assert torch.equal(layer(x), nn.functional.linear(x, expected))


def test_stored_is_one_slice_for_each_input() -> None:
    """r numbers a row for q, k and v together, for o, for gate and up together, for down."""
    stored = {}
    for name, adapter in (("frozen", None), ("paca", PaCA(rank=4))):
        model = Model(precision="bf16", adapter=adapter)
        if adapter is None:
            model.model.requires_grad_(False)
        ids, positions = tokens([S])
        hidden = model.causal.get_input_embeddings()(ids).detach().requires_grad_()
        beside = {p.untyped_storage().data_ptr() for p in (*model.model.parameters(), *model.model.buffers(), hidden)}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen, beside: set[int] = beside) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in beside:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.causal.get_decoder()(
                inputs_embeds=hidden,
                position_ids=positions,
                use_cache=False,
                packed_sequence=PackedSequence((S,)),
            ).last_hidden_state
        stored[name] = sum(seen.values())
        del y
    layers, slices, rank, width = 4, 4, 4, 2
    assert stored["paca"] - stored["frozen"] == layers * slices * rank * width * S


def test_every_rank_draws_the_same_columns_and_readers_of_one_input_share_them() -> None:
    first, second = (add_columns(Model().causal, PaCA(rank=6), seed=3) for _ in range(2))
    other = add_columns(Model().causal, PaCA(rank=6), seed=4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for index in range(4):
        block = f"model.layers.{index}"
        q, k, v = (first[f"{block}.self_attn.{name}_proj"] for name in "qkv")
        assert torch.equal(q, k) and torch.equal(k, v)
        assert torch.equal(first[f"{block}.mlp.gate_proj"], first[f"{block}.mlp.up_proj"])
        assert len(q.unique()) == 6
    assert not torch.equal(first["model.layers.0.mlp.up_proj"], first["model.layers.1.mlp.up_proj"])


def test_what_cannot_be_trained() -> None:
    with pytest.raises(JobError, match="fewer than the 100"):
        Model(adapter=PaCA(rank=100))
    with pytest.raises(JobError, match="output projection"):
        Model(adapter=PaCA(rank=4, target_modules=("q_proj", "lm_head")))
    with pytest.raises(JobError, match="no linear layer is called query"):
        Model(adapter=PaCA(target_modules=("query",)))
