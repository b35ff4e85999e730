"""The tokenizer of a model: trained where there is none, else the model's own, refused where it misfits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from farspan.errors import DataError
from farspan.trainer.config import ChatData, Model, RandomModel, TextData
from farspan.trainer.data.sources import enumerate_inputs
from farspan.trainer.data.tokenizer import (
    load_decoder,
    load_encoder,
    tokenizer_fingerprint,
    train_bpe,
    write_tokenizer,
)

TEXTS = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog\n", "naïve café 北京 🙂\n"]


def write(tmp_path: Path, vocab: int = 300) -> Path:
    (tmp_path / "data.txt").write_text("".join(TEXTS) * 5)
    data = TextData(str(tmp_path / "data.txt"))
    write_tokenizer(RandomModel(vocab=vocab), data, enumerate_inputs(data).shards, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def save_model(folder: Path, rows: int | None, **special: str) -> Path:
    """A model folder as a user may have it: config.json and a tokenizer with a BOS, as Llama's."""
    bpe = train_bpe(iter(TEXTS * 5), 320)
    bos = bpe.token_to_id("<|im_start|>")
    bpe.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", bos)]
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)
    if rows is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bpe"))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_every_text_survives_the_bpe(folder: Path, text: str) -> None:
    ids = load_encoder(folder)([text])[0]
    assert load_decoder(folder)(ids) == text
    assert all(0 <= index < 300 for index in ids)


def test_it_is_a_transformers_tokenizer_within_the_vocabulary(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300 and tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == load_encoder(folder)([text])[0]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(load_encoder(folder)(["the quick brown fox"])[0]) < 19, "merges were learnt"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_smallest_vocabulary_is_bytes_and_specials(tmp_path: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(write(tmp_path, vocab=260))) == 260


def test_training_is_the_same_in_another_process(tmp_path: Path) -> None:
    program = (
        "from farspan.trainer.data.tokenizer import train_bpe\n"
        f"print(train_bpe(iter({TEXTS * 5!r}), 320).to_str())\n"
        "import sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(__file__).parent.parent / "infra" / "py"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "3"))
    }
    assert outputs == {train_bpe(iter(TEXTS * 5), 320).to_str() + "\n"}


def test_a_models_own_tokenizer_gives_transformers_ids_with_bos(tmp_path: Path) -> None:
    model = Model(str(save_model(tmp_path / "model", 320, eos_token="<|endoftext|>", bos_token="<|im_start|>")))
    data = TextData(str(tmp_path / "unused.txt"))
    info = write_tokenizer(model, data, (), tmp_path / "store")
    assert (info.rows, info.vocab_size, info.pad_id) == (320, 320, info.eos_id)
    oracle = AutoTokenizer.from_pretrained(model.id)
    ids = load_encoder(tmp_path / "store")(TEXTS)
    assert ids == oracle(TEXTS)["input_ids"]
    assert all(each[0] == oracle.bos_token_id for each in ids)


def test_fingerprint_follows_files_template_and_rows(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", 320, eos_token="<|endoftext|>")
    model = Model(str(folder))
    seen = {tokenizer_fingerprint(model)}
    (folder / "model.safetensors").write_bytes(b"weights do not matter")
    assert tokenizer_fingerprint(model) in seen
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(tokenizer_fingerprint(model))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 400}))
    seen.add(tokenizer_fingerprint(model))
    seen.add(tokenizer_fingerprint(RandomModel(vocab=300)))
    seen.add(tokenizer_fingerprint(RandomModel(vocab=301)))
    assert len(seen) == 5
    assert tokenizer_fingerprint(RandomModel(vocab=301, layers=2)) in seen


def test_misfits_are_refused(tmp_path: Path) -> None:
    good = {"eos_token": "<|endoftext|>"}
    text, chat = TextData("unused.txt"), ChatData("unused.jsonl")
    cases = [
        (save_model(tmp_path / "few", 300, **good), text, "does not fit", "token id 319 needs 320 embedding rows"),
        (save_model(tmp_path / "noeos", 320), text, "no end-of-text token", "eos_token"),
        (save_model(tmp_path / "notemplate", 320, **good), chat, "no chat template", "instruct"),
        (save_model(tmp_path / "noconfig", None, **good), text, "embedding rows of the model are not known", "config"),
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"vocab_size": 320, "model_type": "nothing-known"}')
    cases.append((tmp_path / "empty", text, "cannot be loaded", "AutoTokenizer"))
    for folder, data, what, detail in cases:
        with pytest.raises(DataError, match=what) as caught:
            write_tokenizer(Model(str(folder)), data, (), tmp_path / "out")
        assert detail in str(caught.value) and len(str(caught.value).splitlines()) == 4


def test_an_id_that_is_no_folder_and_not_on_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **options: object) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="neither a folder nor a hub id"):
        tokenizer_fingerprint(Model("owner/name"))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2"])
def test_a_model_without_tokenizer_files_is_refused(tmp_path: Path, family: str) -> None:
    """transformers makes an empty tokenizer for some families; training on what it encodes ends with a loss of 0."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 300}))
    assert AutoTokenizer.from_pretrained(tmp_path)("some text")["input_ids"] == []
    (tmp_path / "data.txt").write_text(TEXTS[0])
    data = TextData(str(tmp_path / "data.txt"))
    with pytest.raises(DataError, match="the tokenizer is empty"):
        write_tokenizer(Model(str(tmp_path)), data, enumerate_inputs(data).shards, tmp_path / "tokenizer")
