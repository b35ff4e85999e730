"""What `farspan data` prints: true numbers, and a mask that can be read with and without colour."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from farspan.jobs.data_view import show, summary
from farspan.trainer.config import ChatData, Evaluate, RandomModel, TextData
from farspan.trainer.data.prepare import prepare

MODEL = RandomModel(vocab=280)


def printed(path: Path, data: TextData | ChatData, *, terminal: bool = False) -> str:
    out = io.StringIO()
    color = "standard" if terminal else None
    show(path, data, console=Console(file=out, width=120, force_terminal=terminal, color_system=color))
    return out.getvalue()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ChatData]:
    folder = tmp_path_factory.mktemp("chat")
    messages = [{"role": "user", "content": "2+2? [bold]"}, {"role": "assistant", "content": "four [/x]"}]
    (folder / "c.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    data = ChatData(str(folder / "c.jsonl"))
    return prepare(data, MODEL, Evaluate(share=0), cache_root=folder / "cache"), data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextData]:
    folder = tmp_path_factory.mktemp("text")
    for name, length in (("a", 50), ("b", 150), ("c", 700)):
        (folder / f"{name}.txt").write_text("".join(chr(0x4E00 + (i * 37 + ord(name)) % 20_000) for i in range(length)))
    data = TextData(f"{folder}/*.txt", context=100, on_too_long="split")
    return prepare(data, MODEL, Evaluate(share=0), cache_root=folder / "cache"), data


def test_chat_sample_without_colour_has_brackets_around_the_answer(chat: tuple[Path, ChatData]) -> None:
    out = printed(*chat)
    assert "<|im_start|>user\n2+2? [bold]<|im_end|>\n<|im_start|>assistant\n[[four [/x]<|im_end|>]]\n" in out
    assert "\x1b" not in out and "[[trained]]" in out


def test_chat_sample_on_a_terminal_has_colour_and_no_brackets(chat: tuple[Path, ChatData]) -> None:
    out = printed(*chat, terminal=True)
    assert "[[" not in out
    assert "\x1b[1;32mfour [/x]<|im_end|>\x1b[0m" in out


def test_numbers_are_those_of_the_data(text: tuple[Path, TextData]) -> None:
    path, data = text
    facts = summary(path, data)
    lengths = sorted(length for length in (facts["lengths"][name] for name in ("min", "p50", "max")))
    assert facts["documents"] == 3 and facts["tokens"] == sum(lengths) == round(facts["lengths"]["mean"] * 3)
    assert sum(count for _, _, count in facts["histogram"]) == 3
    assert all(low <= lengths[0] < high for low, high, count in facts["histogram"][:1])
    assert facts["too_long"]["documents"] == sum(length > 100 for length in lengths)
    pieces = sum(-(-length // 100) for length in lengths)
    assert facts["packing"]["pieces"] == pieces and facts["packing"]["tokens"] == sum(lengths)
    assert facts["packing"]["efficiency"] == pytest.approx(sum(lengths) / facts["packing"]["packs"] / 100)
    assert facts["trained_share"] == 1.0
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("mode", "says"),
    [("error", "the job stops"), ("truncate", "cut to 100 tokens"), ("split", "split into"), ("drop", "left out")],
)
def test_what_happens_to_long_documents_is_said(text: tuple[Path, TextData], mode: str, says: str) -> None:
    path, data = text
    assert says in printed(path, data.model_copy(update={"on_too_long": mode}))


def test_a_long_sample_is_cut_in_the_middle(text: tuple[Path, TextData], monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.jobs import data_view

    path, data = text
    monkeypatch.setattr(data_view, "SAMPLE_TOKENS", 40)
    out = printed(path, data)
    length = summary(path, data)["lengths"]["min"]
    assert f"... {length - 40:,} tokens, 100% of them trained ..." in out
    assert "<|endoftext|>]]" in out


def test_context_too_short_for_all_is_shown_not_raised(text: tuple[Path, TextData]) -> None:
    path, data = text
    short = data.model_copy(update={"context": 16, "on_too_long": "error"})
    assert summary(path, short)["packing"]["packs"] == 0
    assert "3 over the context of 16" in printed(path, short)
