"""`farspan run` of an RL job on a local Ray, with what may go wrong with those that generate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.errors import DataError, JobError
from farspan.jobs.config import RLJob, WarmStart
from farspan.jobs.load import load
from farspan.trainer.config import Model, Optim, RandomModel
from farspan.trainer.data.tokenizer import _as_transformers, train_bpe
from farspan.trainer.rl.config import Reward, RLEvaluate, Rollout
from farspan.trainer.rl.shapers import LaserD
from farspan.trainer.rl.tasks.arithmetic import Arithmetic

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small model that answers with digits, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = _as_transformers(train_bpe(iter(["0123456789+-*=# "]), 260), eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=260, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer, draw = torch.optim.AdamW(made.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    header = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], add_generation_prompt=True)[
        "input_ids"
    ]
    hash_, digits = tokenizer("#")["input_ids"][0], tokenizer("0123456789")["input_ids"]
    for _ in range(60):
        last = torch.tensor(digits)[torch.randint(0, 10, (32, 1), generator=draw)]
        ids = torch.cat(
            [torch.tensor(header).expand(32, -1), torch.full((32, 1), hash_), last,
             torch.full((32, 1), tokenizer.eos_token_id)], 1,
        )  # fmt: skip
        optimizer.zero_grad()
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    made.save_pretrained(folder)
    return str(folder)


def job(base: str, folder: Path, **more: Any) -> RLJob:
    return RLJob(
        **{
            "name": "rl", "model": Model(base), "task": Arithmetic(steps=(1, 2)), "precision": "fp32",
            "rollout": Rollout(cap=12, group_size=4, prompts_per_step=8, deadline_s=60.0),
            "reward": Reward(shaper=LaserD(lower=2, step=2), monitor_every=2, monitor_prompts=4), "context": 256,
            "optim": Optim(lr=1e-3, steps=4, schedule="constant", warmup_steps=1),
            "evaluate": RLEvaluate(prompts=16), "output_dir": str(folder), **more,
        }
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_its_record_and_its_end_resumed(base: str, tmp_path: Path) -> None:
    done = job(base, tmp_path).run()
    assert done.status == "done" and done.checkpoint is not None and (done.checkpoint / "export/config.json").exists()
    records = lines(done.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["samples"] == 32 and 0 <= record["accuracy"] <= 1 for record in records)
    assert records[-1]["eval_prompts"] == 16 and records[-1]["waited_s"].keys() >= {"rollout", "verify"}
    assert any(record["trained_tokens"] for record in records)
    samples = lines(done.run_dir / "samples.jsonl")
    assert len(samples) == 4 * 32 and {len(one["ids"]) == one["tokens"] for one in samples} == {True}
    assert (done.run_dir / "report.html").exists() and (done.run_dir / "plan.json").exists()
    whole = job(base, tmp_path, name="whole", optim=Optim(lr=1e-3, steps=6, schedule="constant", warmup_steps=1)).run()
    resumed = job(base, tmp_path, optim=Optim(lr=1e-3, steps=6, schedule="constant", warmup_steps=1)).run(resume=True)
    assert lines(resumed.run_dir / "samples.jsonl") == lines(whole.run_dir / "samples.jsonl")


def test_a_worker_that_is_killed_costs_no_sample(base: str, tmp_path: Path) -> None:
    """The run goes on with a new one, and says so; what it trains on is what it would have trained on."""
    file = tmp_path / "job.py"
    made = job(base, tmp_path, name="killed", optim=Optim(lr=1e-3, steps=30, schedule="constant", warmup_steps=1))
    file.write_text(f"from farspan import RLJob\njob = RLJob.model_validate({made.model_dump(mode='json')!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py")}
    process = subprocess.Popen(
        [sys.executable, "-m", "farspan.jobs", "run", str(file)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    samples = made.run_dir / "samples.jsonl"
    while process.poll() is None and not (samples.exists() and samples.stat().st_size):
        time.sleep(0.1)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True)
        if "RolloutActor" in " ".join(child.cmdline())
    ]  # fmt: skip
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert workers and "rollout worker 0 failed" in said and "its samples are sent again" in said
    undisturbed = job(base, tmp_path, name="calm", optim=made.optim).run()
    assert lines(undisturbed.run_dir / "samples.jsonl") == lines(samples)


def test_what_cannot_run_is_said_before_anything_starts(base: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not fit into a pack"):
        job(base, tmp_path, context=16).run()
    with pytest.raises(JobError, match="random weights have nothing to say"):
        job(base, tmp_path, model=RandomModel()).run()
    with pytest.raises(JobError, match="longer than a response"):
        job(base, tmp_path, rollout=Rollout(cap=8, segment_tokens=9)).run()
    assert not (tmp_path / "rl").exists()


def test_job_files_in_both_languages(base: str, tmp_path: Path) -> None:
    yaml = tmp_path / "job.yaml"
    yaml.write_text(
        f"name: a\nmodel: {base}\ntask: {{steps: [2, 3]}}\nreward: {{shaper: kimi}}\n"
        "rollout: {cap: 1k}\ncontext: 2k\n"
    )
    loaded = load(str(yaml), ["reward.shaper.type=laser_d", "reward.shaper.alpha=0.25", "warm_start.examples=100"])
    assert isinstance(loaded.job, RLJob) and loaded.job.rollout.cap == 1024
    assert loaded.job.reward.shaper == LaserD(alpha=0.25) and loaded.job.warm_start == WarmStart(examples=100)
    shipped = load(str(Path(__file__).parents[1] / "jobs/reason_rl.py"))
    assert isinstance(shipped.job, RLJob) and isinstance(shipped.job.reward.shaper, LaserD)
    with pytest.raises(JobError, match="unknown key"):
        load(str(yaml), ["rollout.capp=3"])
