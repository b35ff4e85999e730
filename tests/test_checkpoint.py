"""Checkpoints: any split is read by any other, bit for bit; nothing that goes wrong harms what was complete before."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint_gang
import pytest
import torch
from checkpoint_gang import Cut, Gang, Shapes, fragments, same_bits, spec, whole_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farspan.errors import CheckpointError
from farspan.trainer import checkpoint_format as layout
from farspan.trainer.checkpoint import Checkpointer, DamagedCheckpoint, latest
from farspan.trainer.checkpoint_state import Piece, StateReader, require_cover
from farspan.trainer.run_folder import RunFolder

SHAPES: Shapes = {"model.a.weight": (6, 7), "model.b.bias": (5,), "c": (3, 2, 4)}
WHOLE = [Cut(name, 0, torch.Size(shape).numel()) for name, shape in SHAPES.items()]
HALVES = [
    [Cut("model.a.weight", 0, 20), Cut("c", 0, 24)],
    [Cut("model.a.weight", 20, 42), Cut("model.b.bias", 0, 5)],
]


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    made = Gang(2)
    yield made
    made.close()


def alone(root: Path, **changes: int) -> Checkpointer:
    return Checkpointer(RunFolder(root), spec(root, **changes))


def saved(root: Path, *steps: int, keep: int = 9) -> list[Path]:
    checkpointer = alone(root, keep=keep)
    for step in steps:
        checkpointer.save(step, fragments(SHAPES, WHOLE, seed=step), {"step": step})
    checkpointer.close()
    return RunFolder(root).complete_checkpoints()


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def hidden(root: Path) -> list[str]:
    return [path.name for path in RunFolder(root).checkpoints.iterdir() if path.name.startswith(".")]


def four_lines(error: object) -> CheckpointError:
    assert isinstance(error, CheckpointError), error
    assert [line[:7] for line in str(error).splitlines()] == ["error: ", "   at: ", "  why: ", "  try: "]
    return error


# --- every split is read by every other ---------------------------------------------------------------------------


@st.composite
def shapes_and_splits(draw: st.DrawFn) -> tuple[Shapes, dict[int, list[list[Cut]]]]:
    sizes = draw(st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3), min_size=1, max_size=4))
    shapes: Shapes = {f"p{i}.weight": tuple(size) for i, size in enumerate(sizes)}
    splits = {}
    for ranks in (1, 2, 3, 4):
        owned: list[list[Cut]] = [[] for _ in range(ranks)]
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            inner = draw(st.lists(st.integers(0, numel), max_size=5))
            edges = [0, *sorted(inner), numel]
            for start, end in itertools.pairwise(edges):
                owned[draw(st.integers(0, ranks - 1))].append(Cut(name, start, end))
        splits[ranks] = owned
    return shapes, splits


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=shapes_and_splits(), seed=st.integers(0, 2**16), chunk_numel=st.integers(1, 40))
def test_any_split_is_read_by_any_other(
    gang: Gang,
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[Shapes, dict[int, list[list[Cut]]]],
    seed: int,
    chunk_numel: int,
) -> None:
    """Two ranks write random pieces; worlds of 1, 2, 3 and 4 read random others, and every bit is the writer's."""
    shapes, splits = drawn
    root = tmp_path_factory.mktemp("run")
    first, second = gang.call(checkpoint_gang.save, root, 7, shapes, splits[2], seed, chunk_numel)
    assert first.path == second.path == RunFolder(root).checkpoint(7), (first, second)
    whole = whole_state(shapes, seed)
    for ranks in (1, 3, 4):
        for cuts in splits[ranks]:
            mine = fragments(shapes, cuts, None)
            StateReader(first.path).read(mine)
            for f in mine:
                assert same_bits(f.tensor, whole[f.kind, f.name][f.offset : f.offset + f.tensor.numel()])
    mine = fragments(shapes, splits[1][0], None)
    assert alone(root).load(first.path, mine) == {"step": 7}
    for f in mine:
        assert same_bits(f.tensor, whole[f.kind, f.name][f.offset : f.offset + f.tensor.numel()])


def test_two_ranks_read_what_one_wrote(gang: Gang, tmp_path: Path) -> None:
    saved(tmp_path, 3)
    whole = whole_state(SHAPES, 3)
    for cuts, (name, skipped, tensors) in zip(HALVES, gang.call(checkpoint_gang.load, tmp_path, SHAPES, HALVES)):
        assert (name, skipped) == ("step_3", ())
        for f, tensor in zip(fragments(SHAPES, cuts, None), tensors):
            assert same_bits(tensor, whole[f.kind, f.name][f.offset : f.offset + f.tensor.numel()])


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 3)
    manifest = layout.verify(path)
    assert manifest.step == 3 and manifest.progress == {"step": 3} and manifest.format == 1
    assert {p.name: p.shape for p in manifest.parameters} == SHAPES
    assert manifest.kinds == ("master", "exp_avg", "exp_avg_sq")
    assert manifest.written_with["world_size"] == 1
    assert manifest.job == spec(tmp_path, keep=9).model_dump(mode="json")
    assert {entry.path for entry in manifest.files} | {"manifest.json"} == content(path).keys()


@pytest.mark.parametrize(
    ("second", "problem"),
    [((3, 3), "starts at 3, the one before it ends at 4"), ((5, 1), "starts at 5"), ((4, 1), "has 6 elements")],
)
def test_pieces_must_cover_every_tensor_once(second: tuple[int, int], problem: str) -> None:
    with pytest.raises(CheckpointError) as error:
        require_cover([Piece("w", "master", (2, 3), *second), Piece("w", "master", (2, 3), 0, 4)])
    assert problem in error.value.why


# --- in the background ---------------------------------------------------------------------------------------------


def test_the_state_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    checkpointer = alone(tmp_path)
    go_on = threading.Event()
    live = fragments(SHAPES, WHOLE, seed=1)
    checkpointer.save(1, live, {}, finalize=lambda folder: _held_until(go_on))
    for f in live:
        f.tensor.zero_()
    go_on.set()
    checkpointer.wait()
    whole, read = whole_state(SHAPES, 1), fragments(SHAPES, WHOLE, None)
    checkpointer.load_latest(read)
    assert all(same_bits(f.tensor, whole[f.kind, f.name]) for f in read)


def _held_until(event: threading.Event) -> None:
    assert event.wait(20)


def test_a_second_save_waits_for_the_first_and_readers_see_only_complete_ones(tmp_path: Path) -> None:
    checkpointer, go_on = alone(tmp_path), threading.Event()
    seen: list[Path | None] = []

    def finalize(folder: Path) -> None:
        (folder / "note.txt").write_text("mine")
        _held_until(go_on)
        seen.append(latest(RunFolder(tmp_path)))

    checkpointer.save(1, fragments(SHAPES, WHOLE, seed=1), {}, finalize)
    assert latest(RunFolder(tmp_path)) is None
    threading.Timer(0.3, go_on.set).start()
    started = time.monotonic()
    checkpointer.save(2, fragments(SHAPES, WHOLE, seed=2), {})
    assert time.monotonic() - started > 0.2
    assert seen == [None]
    last = checkpointer.close()
    assert last is not None and last.step == 2
    assert "note.txt" in {entry.path for entry in layout.read_manifest(RunFolder(tmp_path).checkpoint(1)).files}


def test_what_finalize_raises_reaches_the_training_thread(tmp_path: Path) -> None:
    def finalize(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    saved(tmp_path, 1)
    checkpointer = alone(tmp_path)
    checkpointer.save(2, fragments(SHAPES, WHOLE, seed=2), {}, finalize)
    with pytest.raises(CheckpointError) as error:
        checkpointer.save(3, fragments(SHAPES, WHOLE, seed=3), {})
    assert "step 2" in error.value.what and "No space left" in four_lines(error.value).why
    checkpointer.save(4, fragments(SHAPES, WHOLE, seed=4), {})
    checkpointer.close()
    assert [p.name for p in RunFolder(tmp_path).complete_checkpoints()] == ["step_1", "step_4"]
    assert hidden(tmp_path) == []


# --- retention and leftovers ---------------------------------------------------------------------------------------


def test_older_checkpoints_go_only_after_the_newer_one_is_complete(tmp_path: Path) -> None:
    during: list[list[str]] = []
    checkpointer = alone(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        checkpointer.save(
            step,
            fragments(SHAPES, WHOLE, seed=step),
            {},
            finalize=lambda folder: during.append([p.name for p in RunFolder(tmp_path).complete_checkpoints()]),
        )
    last = checkpointer.close()
    assert during == [[], ["step_5"], ["step_5", "step_10"], ["step_10", "step_15"]]
    assert [p.name for p in RunFolder(tmp_path).complete_checkpoints()] == ["step_15", "step_20"]
    assert last is not None and [p.name for p in last.removed] == ["step_10"]
    assert hidden(tmp_path) == []


def test_a_start_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    (complete,) = saved(tmp_path, 4)
    before = content(complete)
    leftover = complete.with_name(".step_9.tmp-abc") / "state"
    leftover.mkdir(parents=True)
    (leftover / "x").write_text("half")
    alone(tmp_path)
    assert hidden(tmp_path) == [] and content(complete) == before


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    checkpointer = alone(tmp_path)
    checkpointer.save(4, fragments(SHAPES, WHOLE, seed=40), {"again": True})
    checkpointer.close()
    read = fragments(SHAPES, WHOLE, None)
    assert checkpointer.load(RunFolder(tmp_path).checkpoint(4), read) == {"again": True}
    assert same_bits(read[0].tensor, whole_state(SHAPES, 40)["master", "model.a.weight"])
    assert hidden(tmp_path) == []


# --- failure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("doomed_rank", [0, 1])
def test_a_rank_killed_during_a_save_leaves_the_old_checkpoint(tmp_path: Path, doomed_rank: int) -> None:
    mortal = Gang(2)
    try:
        assert all(a.step == 1 for a in mortal.call(checkpoint_gang.save, tmp_path, 1, SHAPES, HALVES, 1))
        before = content(RunFolder(tmp_path).checkpoint(1))
        answers = mortal.call(checkpoint_gang.save_and_die, tmp_path, 2, SHAPES, HALVES, doomed_rank)
        assert isinstance(answers[doomed_rank], EOFError)
        four_lines(answers[1 - doomed_rank])
    finally:
        mortal.close()
    assert [p.name for p in RunFolder(tmp_path).complete_checkpoints()] == ["step_1"]
    restarted, read = alone(tmp_path), fragments(SHAPES, WHOLE, None)
    assert hidden(tmp_path) == []
    restored = restarted.load_latest(read)
    assert restored is not None and restored.progress == {"step": 1}
    assert content(restored.path) == before
    restarted.save(2, fragments(SHAPES, WHOLE, seed=2), {"step": 2})
    assert restarted.close() is not None


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_that_fills_up_fails_every_rank_alike(gang: Gang, tmp_path: Path, full_rank: int) -> None:
    shapes: Shapes = {"a": (64, 1024), "b": (32, 1024)}
    cuts = [[Cut("a", 0, 65536)], [Cut("b", 0, 32768)]]
    gang.call(checkpoint_gang.save, tmp_path, 1, shapes, cuts, 1, 1 << 20)
    before = content(RunFolder(tmp_path).checkpoint(1))
    answers = gang.call(checkpoint_gang.save_with_full_disk, tmp_path, 2, shapes, cuts, full_rank, 100_000)
    errors = [four_lines(answer) for answer in answers]
    assert errors[0].why == errors[1].why
    assert "File too large" in errors[0].why and "needs" in errors[0].why and "free now" in errors[0].why
    assert content(RunFolder(tmp_path).checkpoint(1)) == before and hidden(tmp_path) == []
    assert latest(RunFolder(tmp_path)) == RunFolder(tmp_path).checkpoint(1)
    assert all(a.step == 3 for a in gang.call(checkpoint_gang.save, tmp_path, 3, shapes, cuts, 3, 1 << 20))


def test_what_cannot_fit_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("farspan.trainer.checkpoint.shutil.disk_usage", lambda path: free)
    checkpointer = alone(tmp_path)
    with pytest.raises(CheckpointError) as error:
        checkpointer.save(2, fragments(SHAPES, WHOLE, seed=2), {})
    assert "needed 1.04 MiB = state 1.04 MiB; free 0.00 MiB; 1 older" in four_lines(error.value).why
    assert "output_dir" in error.value.try_
    assert [p.name for p in RunFolder(tmp_path).complete_checkpoints()] == ["step_1"] and hidden(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError) as error:
        alone(tmp_path).save(1, fragments(SHAPES, WHOLE, seed=1), {})
    assert "File exists" in four_lines(error.value).why


# --- damage --------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "flipped bit in the state": lambda folder: flip(folder / "state" / "__0_0.distcp"),
    "flipped bit in the index": lambda folder: flip(folder / "state" / ".metadata"),
    "cut short": lambda folder: (folder / "state" / "__0_0.distcp").write_bytes(b"PK"),
    "missing": lambda folder: (folder / "state" / "__0_0.distcp").unlink(),
    "broken manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest without its fields": lambda folder: (folder / "manifest.json").write_text('{"format": 1}'),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_reported_and_never_passed_over_in_silence(tmp_path: Path, kind: str) -> None:
    _, newest = saved(tmp_path, 1, 2)
    DAMAGES[kind](newest)
    checkpointer, read = alone(tmp_path), fragments(SHAPES, WHOLE, None)
    with pytest.raises(DamagedCheckpoint) as error:
        checkpointer.load_latest(read)
    four_lines(error.value)
    assert all(not f.tensor.any() for f in read), "nothing may be read from a damaged checkpoint"
    restored = checkpointer.load_latest(read, fall_back=True)
    assert restored is not None and restored.progress == {"step": 1}
    assert len(restored.skipped) == 1 and restored.skipped[0].startswith("step_2: ")
    assert [p.name for p in sorted(RunFolder(tmp_path).checkpoints.iterdir())] == ["damaged_step_2", "step_1"]
    assert same_bits(read[0].tensor, whole_state(SHAPES, 1)["master", "model.a.weight"])


def test_ranks_agree_on_damage(gang: Gang, tmp_path: Path) -> None:
    gang.call(checkpoint_gang.save, tmp_path, 1, SHAPES, HALVES, 1)
    gang.call(checkpoint_gang.save, tmp_path, 2, SHAPES, HALVES, 2)
    flip(RunFolder(tmp_path).checkpoint(2) / "state" / "__1_0.distcp")
    first, second = gang.call(checkpoint_gang.load, tmp_path, SHAPES, HALVES)
    assert isinstance(first, DamagedCheckpoint) and str(first) == str(second)
    assert "__1_0.distcp has CRC-32" in first.why
    answers = gang.call(checkpoint_gang.load, tmp_path, SHAPES, HALVES, True)
    assert [(name, len(skipped)) for name, skipped, _ in answers] == [("step_1", 1)] * 2


def test_another_model_is_refused_with_the_first_differences(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    other: Shapes = {"model.a.weight": (7, 6), "model.b.bias": (5,), "d": (4,)}
    cuts = [Cut(name, 0, torch.Size(shape).numel()) for name, shape in other.items()]
    with pytest.raises(CheckpointError) as error:
        alone(tmp_path).load(path, fragments(other, cuts, None))
    why = four_lines(error.value).why
    assert "9 of 9 states differ" in why
    assert "exp_avg/c is absent here, [3, 2, 4] in the checkpoint" in why


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError) as error:
        alone(tmp_path).load_latest(fragments(SHAPES, WHOLE, None), fall_back=True)
    assert not isinstance(error.value, DamagedCheckpoint)
    assert "format 2" in error.value.why
