"""The RL loop in one process: real model, real engine, real verifiers; resumed bit for bit, in segments too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sp_ranks import on_ranks, rl_updates
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.memory.config import Tiles
from farspan.trainer.config import (
    Checkpoint,
    Evaluate,
    FullFineTune,
    LoRA,
    Mesh,
    Model,
    Optim,
    Rollouts,
    Track,
    TrainSpec,
)
from farspan.trainer.rl.batch import TrainedSample, pack_samples, unpack
from farspan.trainer.rl.config import Mastered, PolicyLoss, Reward, RLEvaluate, RLRunSpec, RLSpec, Rollout
from farspan.trainer.rl.local import LocalTrainer, LocalWorkers
from farspan.trainer.rl.loop import RLLoop
from farspan.trainer.rl.losses import policy_loss
from farspan.trainer.rl.policy import PolicyRank
from farspan.trainer.rl.shapers import LaserD, Plain
from farspan.trainer.rl.state import from_bytes, to_bytes
from farspan.trainer.rl.tasks.arithmetic import Arithmetic
from farspan.trainer.rl.tasks.base import Problem, Verdict
from farspan.trainer.world import World

VOCAB, EOS, CONTEXT, CAP = 130, 1, 256, 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small model that says digits and ends now and then."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=VOCAB, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer, draw = torch.optim.AdamW(made.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.randint(48, 58, (32, 24), generator=draw)
        ids[torch.rand(32, 24, generator=draw) < 0.15] = EOS
        ids[:, 0] = 61  # the last of each prompt
        optimizer.zero_grad()
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("base")
    made.save_pretrained(folder)
    return str(folder)


def train_spec(base: str, run_dir: Path, **more: Any) -> TrainSpec:
    return TrainSpec(
        **{
            "run_dir": str(run_dir), "tokens_dir": "", "model": Model(base), "data": Rollouts(context=CONTEXT),
            "adapter": FullFineTune(), "precision": "fp32", "mesh": Mesh(), "zero": 0, "cpu_offload": False,
            "accumulation": 1, "warmup_steps": 0, "optim": Optim(lr=3e-3, steps=50, schedule="constant"),
            "memory": Tiles(loss_tile=16), "checkpoint": Checkpoint(export=False), "evaluate": Evaluate(),
            "track": Track(tensorboard=False), **more,
        }
    )  # fmt: skip


def rank(base: str, run_dir: Path, loss: PolicyLoss | None = None, **more: Any) -> PolicyRank:
    spec = RLSpec(train=train_spec(base, run_dir, **more), loss=loss or PolicyLoss(), temperature=1.0, vocab=VOCAB)
    return PolicyRank(spec, World())


class Digit(Arithmetic):
    """Right is a response whose first character is a 7: learnable in a few steps."""

    def verify(self, problem: Problem, response: str) -> Verdict:
        return Verdict(float(response[:1] == "7"), response[:1] == "7")


class Judges:
    kills = crashes = 0

    def judge(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [Digit().verify(problem, response) for problem, response in items]


def loop(base: str, made: PolicyRank, *, steps: int, records: list[Any], kept: list[Any], **more: Any) -> RLLoop:
    spec = RLRunSpec(
        task=Digit(), steps=steps, seed=3, loss=more.pop("loss", PolicyLoss()),
        rollout=Rollout(cap=CAP, group_size=4, prompts_per_step=6, segment_tokens=more.pop("segment", None)),
        reward=Reward(shaper=more.pop("shaper", Plain()), monitor_every=2, monitor_prompts=4),
        evaluate=RLEvaluate(prompts=8), checkpoint_every=more.pop("checkpoint_every", None),
    )  # fmt: skip
    found = RLLoop(
        spec, trainer=LocalTrainer(made), judges=Judges(),
        workers=LocalWorkers(base, eos_ids=[EOS], adapter=more.pop("adapter", None), batch=64),
        encode=lambda problem: list(problem.prompt.encode()),
        decode=lambda ids: "".join(chr(token) for token in ids if token > 1),
        record=records.append, recorded=kept.extend,
    )  # fmt: skip
    begun = made.begin()
    assert begun is not None
    if begun["driver"] is not None:
        found.load_state(from_bytes(begun["driver"]))
    return found


def test_it_learns(base: str, tmp_path: Path) -> None:
    records: list[Any] = []
    made = rank(base, tmp_path)
    loop(base, made, steps=25, records=records, kept=[]).run()
    made.close()
    first, last = (np.mean([record["accuracy"] for record in part]) for part in (records[:3], records[-3:]))
    assert first < 0.4 and last > first + 0.3, (first, last)
    assert records[-1]["eval_prompts"] == 8 and records[-1]["version"] == 25
    assert records[0]["ratio_mean"] == pytest.approx(1.0) and records[0]["clipped_share"] == 0.0
    # what workers said of their tokens is what the trainer finds
    assert max(record["log_prob_gap_mean"] for record in records) < 1e-5


@pytest.mark.parametrize("segment", [None, 7])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_the_run(base: str, tmp_path: Path, segment: int | None, kind: str) -> None:
    """Weights, samples and targets, to the last bit; in segments with samples that are half done."""
    adapter = LoRA(rank=4, target_modules="all-linear") if kind == "lora" else FullFineTune()
    shaper = LaserD(lower=2, step=2)

    def run(folder: Path, steps: int, every: int | None = None) -> tuple[dict[str, torch.Tensor], list[Any], Any]:
        records: list[Any] = []
        kept: list[Any] = []
        made = rank(base, folder, adapter=adapter)
        one = loop(
            base, made, steps=steps, records=records, kept=kept,
            segment=segment, shaper=shaper, adapter=adapter, checkpoint_every=every,
        )  # fmt: skip
        one.run()
        weights = made.weights()
        assert weights is not None
        state = one.state()
        made.close()
        return weights, kept, state

    whole, samples, state = run(tmp_path / "whole", 6)
    _, before, _ = run(tmp_path / "parts", 3)
    again, after, state_again = run(tmp_path / "parts", 6)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [*before, *after] == samples and json.dumps(samples[0])
    assert to_bytes(state) == to_bytes(state_again)
    spans = {len(sample["spans"]) for sample in samples}
    assert spans == {1} if segment is None else max(spans) > 1


def test_segments_leave_stale_samples_and_say_so(base: str, tmp_path: Path) -> None:
    records: list[Any] = []
    made = rank(base, tmp_path, PolicyLoss(importance="decoupled"))
    loop(base, made, steps=8, records=records, kept=[], segment=5, loss=PolicyLoss(importance="decoupled")).run()
    made.close()
    assert max(record["staleness_max"] for record in records) >= 1
    assert max(record["segments_mean"] or 0 for record in records) > 1
    assert max(record["carried_over"] for record in records) > 0
    assert all(record["loss"] is None or np.isfinite(record["loss"]) for record in records)


def made_samples(count: int = 9) -> list[TrainedSample]:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 30, count)
    return [
        TrainedSample(
            prompt_ids=draw.integers(2, VOCAB, draw.integers(1, 9)).tolist(),
            ids=draw.integers(2, VOCAB, length).tolist(),
            first=0,
            advantages=np.full(length, draw.normal(), np.float32),
            weight=1.0 / lengths.sum(),
            behaviour_log_probs=-np.abs(draw.normal(size=length)).astype(np.float32),
            rewarded=bool(index % 2),
        )
        for index, length in enumerate(lengths)
    ]


def test_packs_hold_every_token_once() -> None:
    samples = made_samples(40)
    packs = pack_samples(samples, context=64)
    assert len(packs) > 1 and all(pack.pack.tokens <= 64 for pack in packs)
    found = unpack(packs, [pack.pack.labels[pack.samples >= 0] for pack in packs], len(samples))
    assert [ids.tolist() for ids in found] == [list(sample.ids) for sample in samples]
    for pack in packs:
        trained = pack.samples >= 0
        assert ((pack.pack.labels != -100) == trained).all() and pack.pack.trained_tokens == trained.sum()
        assert (pack.values["weights"][~trained] == 0).all()


@pytest.mark.parametrize(
    "loss", [PolicyLoss(importance="sais"), PolicyLoss(mastered=Mastered(threshold=0.01, entropy_target=9.0))]
)
def test_packed_loss_is_the_padded_one(base: str, tmp_path: Path, loss: PolicyLoss) -> None:
    """The loss of a packed step against `policy_loss` on padded samples, one forward each."""
    samples = made_samples()
    made = rank(base, tmp_path, loss)
    scored = made.score(samples)
    assert scored is not None
    found = made.update(samples)
    assert found is not None
    made.close()
    longest = max(len(sample.ids) for sample in samples)

    def padded(rows: Sequence[np.ndarray], fill: float) -> torch.Tensor:
        return torch.stack(
            [torch.from_numpy(np.pad(row, (0, longest - len(row)), constant_values=fill)) for row in rows]
        )

    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for sample, logs in zip(samples, scored["log_probs"]):
        ids = torch.tensor([[*sample.prompt_ids, *sample.ids]])
        with torch.no_grad():
            logits = causal(input_ids=ids, use_cache=False).logits[0, -len(sample.ids) - 1 : -1]
        fresh = torch.log_softmax(logits, 1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        np.testing.assert_allclose(logs, fresh.numpy(), atol=1e-5)
    current = padded(scored["log_probs"], 0.0)
    mask = padded([np.ones(len(sample.ids), np.float32) for sample in samples], 0.0)
    old = padded([sample.behaviour_log_probs for sample in samples], 0.0) if loss.importance == "sais" else current
    left_out = None
    if loss.mastered is not None:
        rewarded = torch.tensor([sample.rewarded for sample in samples])
        left_out = (current >= np.log(0.01)) & rewarded[:, None]
        assert 0 < int((left_out * mask).sum()) < int(mask.sum())
    advantages = torch.tensor([float(sample.advantages[0]) for sample in samples])
    expected = policy_loss(current, old, advantages, mask, left_out_NT=left_out)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "zero"), [(Mesh(sp=2), 0), (Mesh(dp=2), 0), (Mesh(dp=2), 3)], ids=str)
def test_ranks_agree_with_one(base: str, tmp_path: Path, mesh: Mesh, zero: int) -> None:
    """An odd number of packs, so that with dp 2 a group has one that counts nothing."""
    samples, loss = (
        made_samples(7),
        PolicyLoss(importance="sais", mastered=Mastered(threshold=0.01, entropy_target=9.0)),
    )
    assert len(pack_samples(samples, context=64)) % 2 == 1

    def spec(name: str, mesh: Mesh, zero: int) -> RLSpec:
        train = train_spec(base, tmp_path / name, mesh=mesh, zero=zero, data=Rollouts(context=64))
        return RLSpec(train=train, loss=loss, temperature=0.8, vocab=VOCAB)

    (alone,) = on_ranks(rl_updates, 1, spec("one", Mesh(), 0), samples, 2)
    together, _ = on_ranks(rl_updates, 2, spec("two", mesh, zero), samples, 2)
    for ours, theirs in zip(together[0]["log_probs"], alone[0]["log_probs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert together[1] == pytest.approx(alone[1], rel=1e-4, abs=1e-6)
    for name, weights in alone[2].items():
        np.testing.assert_allclose(together[2][name], weights, atol=2e-4, err_msg=name)


def test_a_penalty_holds_the_policy_near_its_beginning(base: str, tmp_path: Path) -> None:
    """Responses that it gives with the penalty are likelier under the first policy than those it learns without."""
    likely: dict[float, float] = {}
    for weight in (0.0, 2.0):
        loss = PolicyLoss(kl_weight=weight)
        kept: list[Any] = []
        made = rank(base, tmp_path / f"{weight}", loss)
        first = rank(base, tmp_path / f"{weight} beside", PolicyLoss(kl_weight=1.0))
        before = first.score(made_samples(), reference=True), first.score(made_samples())
        for ours, theirs in zip(*(found["log_probs"] for found in before if found is not None), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        loop(base, made, steps=20, records=[], kept=kept, loss=loss).run()
        last = [sample for sample in kept if sample["step"] > 15]
        trained = [
            TrainedSample(
                list(sample["prompt"].encode()), sample["ids"], 0, np.zeros(sample["tokens"], np.float32), 0.0,
                np.array(sample["log_probs"], np.float32),
            )
            for sample in last
        ]  # fmt: skip
        scored = first.score(trained, reference=True)
        assert scored is not None
        likely[weight] = float(
            np.mean([np.sum(np.array(s["log_probs"]) - r) for s, r in zip(last, scored["log_probs"])])
        )
        made.close()
        first.close()
    assert 0 <= likely[2.0] < 0.5 * likely[0.0], likely
