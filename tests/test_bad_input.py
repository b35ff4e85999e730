"""Everything a user can get wrong, in one table: four lines, the documented exit code, nothing lost.

Each case runs the command line in this process, as `farspan` would. "Nothing lost" means: whatever stood in the run
folder before is still there, byte for byte, and a refused job leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from farspan.jobs.cli import main

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
]

JOB = """
name: bad
model: {family: llama, hidden: 32, layers: 1, heads: 4, kv_heads: 2, ffn: 64, vocab: 300}
data: {source: data.jsonl, context: 256}
precision: fp32
parallel: {sp: 1, dp: 1}
optim: {steps: 2}
checkpoint: {export: false}
track: {tensorboard: false}
"""


def replace(old: str, new: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        text = (place / "job.yaml").read_text()
        assert old in text, old
        (place / "job.yaml").write_text(text.replace(old, new))

    return change


def documents(*rows: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return change


def chat_without_assistant(place: Path) -> None:
    documents({"messages": [{"role": "user", "content": "is anyone there?"}]})(place)
    replace("data: {source", "data: {type: chat, source")(place)


def model_folder(place: Path, *, vocab: int = 300, poison: bool = False) -> None:
    """A saved model in place of the one made on the spot, with its tokenizer."""
    from farspan.trainer.config import Evaluate, RandomModel, TextData
    from farspan.trainer.data.prepare import prepare
    from farspan.trainer.models import write_random_model

    shape = {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "ffn": 64}
    store = prepare(
        TextData(str(place / "data.jsonl")), RandomModel(vocab=300, **shape), Evaluate(), cache_root=place / "made"
    )
    folder = place / "model"
    write_random_model(
        RandomModel(vocab=vocab, **shape), folder, precision="fp32", context=256, eos_id=None, pad_id=None
    )
    for file in (store / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if poison:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = "model: {family: llama, hidden: 32, layers: 1, heads: 4, kv_heads: 2, ffn: 64, vocab: 300}"
    replace(model, "model: ./model")(place)


def folder_in_use(place: Path) -> None:
    (place / "outputs/bad").mkdir(parents=True)
    (place / "outputs/bad/job.json").write_text("{}")
    (place / "outputs/bad/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


def nothing(place: Path) -> None:
    del place


CASES: dict[str, tuple[Callable[[Path], None], list[str], int, tuple[str, ...]]] = {
    "unknown key": (replace("hidden: 32", "hiden: 32"), [], 2, ("hiden", "hidden", "job.yaml:3")),
    "wrong type": (replace("steps: 2", "steps: many"), [], 2, ("optim.steps", "many", "job.yaml:7")),
    "missing file": (lambda place: (place / "data.jsonl").unlink(), [], 2, ("data.jsonl",)),
    "missing job": (lambda place: (place / "job.yaml").unlink(), [], 2, ("job.yaml",)),
    "empty data set": (documents(), [], 2, ("data.jsonl", "no document")),
    "document longer than context": (
        documents({"text": "word " * 4000}, {"text": "short"}), [], 2, ("longer than the context", "on_too_long"),
    ),
    "vocabulary mismatch": (lambda place: model_folder(place, vocab=260), [], 2, ("the model has 260", "too few")),
    "chat without assistant turn": (chat_without_assistant, [], 2, ("data.jsonl:1", "assistant")),
    "NaN in data": (documents({"text": "good"}, {"text": float("nan")}), [], 2, ("data.jsonl:2", "text")),
    "NaN in loss": (lambda place: model_folder(place, poison=True), [], 1, ("loss is nan", "step 1")),
    "output folder in use": (folder_in_use, [], 2, ("outputs/bad", "--resume", "--clean")),
    "SP degree no layout allows": (nothing, ["--set", "parallel.sp=8"], 2, ("8", "4 attention heads")),
    "tokens per step": (nothing, ["--set", "optim.tokens_per_step=300"], 2, ("300", "256", "512")),
    "--address nobody answers": (nothing, ["--address", "127.0.0.1:9"], 4, ("127.0.0.1:9",)),
    "more ranks than cores": (nothing, ["--set", "parallel.dp=64"], 4, ("64",)),
    "unknown flag value": (nothing, ["--set", "optim.schedule=linear"], 2, ("optim.schedule", "cosine")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    prepare, flags, code, words = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "job.yaml").write_text(JOB)
    documents(*({"text": f"document {index} " * 9} for index in range(20)))(tmp_path)
    prepare(tmp_path)
    before = contents(tmp_path / "outputs")
    capfd.readouterr()
    assert main(["run", "job.yaml", *flags]) == code
    lines = error_lines("".join(capfd.readouterr()))
    for word in words:
        assert word in " ".join(lines), (word, lines)
    after = contents(tmp_path / "outputs")
    assert all(after.get(path) == content for path, content in before.items()), "something was lost"
    if case != "NaN in loss":  # the only one that may start
        assert after == before, sorted(after.keys() - before.keys())


def test_full_disk_while_saving(tmp_path: Path) -> None:
    """The operating system refuses to let files grow (RLIMIT_FSIZE): the earlier checkpoint stays complete."""
    from farspan import Checkpoint, Evaluate, MemoryBudget, Optim, RandomModel, TextData, Track
    from farspan.trainer.config import FullFineTune, Mesh, TrainSpec
    from farspan.trainer.data.prepare import prepare

    documents(*({"text": f"document {index} " * 9} for index in range(20)))(tmp_path)
    model = RandomModel(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=300)
    data = TextData(str(tmp_path / "data.jsonl"), context=256)
    spec = TrainSpec(
        run_dir=str(tmp_path / "run"),
        tokens_dir=str(prepare(data, model, Evaluate(), cache_root=tmp_path / "cache")),
        model=model,
        data=data,
        adapter=FullFineTune(),
        precision="fp32",
        mesh=Mesh(),
        zero=0,
        cpu_offload=False,
        accumulation=1,
        warmup_steps=1,
        optim=Optim(steps=2),
        memory=MemoryBudget(),
        checkpoint=Checkpoint(export=False),
        evaluate=Evaluate(),
        track=Track(tensorboard=False),
    )
    done = core(spec, tmp_path, limit_bytes=resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    before = contents(tmp_path / "run/checkpoints")
    assert before
    done = core(spec.model_copy(update={"optim": Optim(steps=4)}), tmp_path, limit_bytes=400_000)
    assert done.returncode == 1, (done.stdout, done.stderr)
    lines = error_lines(done.stderr)
    assert "step 4" in lines[0], lines
    assert contents(tmp_path / "run/checkpoints") == before
    done = core(spec.model_copy(update={"optim": Optim(steps=4)}), tmp_path, limit_bytes=resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    assert "step 2 " not in done.stdout


def core(spec: Any, place: Path, *, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """`python -m farspan.trainer` on one rank, whose files may not grow beyond a limit."""
    (place / "spec.json").write_text(spec.model_dump_json())
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "infra/py")
    return subprocess.run(
        [sys.executable, "-m", "farspan.trainer", str(place / "spec.json")],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY)),
    )


def error_lines(output: str) -> list[str]:
    """The four lines, and that there are exactly four."""
    lines = output.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, output
    four = lines[starts[0] : starts[0] + 4]
    assert [line[:7] for line in four] == ["error: ", "   at: ", "  why: ", "  try: "], output
    assert all(line[7:].strip() for line in four), output
    assert "Traceback" not in output
    return four


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
