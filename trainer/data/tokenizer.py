"""The tokenizer of a model: its own for `Model`, a byte-level BPE trained on the data for `RandomModel`.

Whichever it is, it ends as a transformers folder inside the token store, which every later step reads. Text is encoded
by the `tokenizers` library straight from that folder: the same ids as transformers gives, without the seconds and the
memory that importing torch costs each task. Training the BPE reads 1024 characters of the data per entry, spread
evenly over its shards, at most 32 Mi; the same data gives the same tokenizer.

Source of the BPE: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes, so that no text is outside of it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.errors import DataError
from farspan.trainer.config import ChatData, Model, RandomModel, TextData
from farspan.trainer.data.reading import read_shard
from farspan.trainer.data.sources import Shard
from farspan.trainer.data.store import writing

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
BPE_SAMPLE_CHARACTERS_PER_ENTRY, MAX_BPE_SAMPLE_CHARACTERS = 1024, 32 * 2**20
BPE_SAMPLE_SHARDS = 64

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)

Encoder = Callable[[list[str]], list[list[int]]]
Decoder = Callable[[list[int]], str]


@dataclass(frozen=True)
class TokenizerInfo:
    """Ids a store must know. `rows` are the embedding rows of the model; `vocab_size` is the largest id plus one."""

    vocab_size: int
    rows: int
    eos_id: int
    pad_id: int


def tokenizer_fingerprint(model: Model | RandomModel) -> str:
    """Digest of all that decides the ids besides the data: files and embedding rows, or the settings of the BPE."""
    import tokenizers

    digest = hashlib.sha256(f"tokenizers {tokenizers.__version__}".encode())
    if isinstance(model, RandomModel):
        settings = [model.vocab, _sample_characters(model.vocab), BPE_SAMPLE_SHARDS, CHATML]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()
    folder = _tokenizer_source(model)
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(str(_embedding_rows(model)).encode())
    return digest.hexdigest()


def write_tokenizer(
    model: Model | RandomModel, data: TextData | ChatData, shards: tuple[Shard, ...], folder: Path
) -> TokenizerInfo:
    """Write the tokenizer of `model` as a transformers folder, trained on `shards` where the model brings none.

    Raises:
        DataError: it cannot be loaded, it has no end-of-text token, a chat needs a template it has not, or it knows
            more tokens than the model has embedding rows.
    """
    if isinstance(model, RandomModel):
        end = END_OF_TEXT if isinstance(data, TextData) else TURN_END
        tokenizer = _as_transformers(train_bpe(_sample(shards, data, model.vocab), model.vocab), eos_token=end)
        rows, origin = model.vocab, "the tokenizer trained on the data"
    else:
        tokenizer, rows, origin = load_tokenizer(str(_tokenizer_source(model))), _embedding_rows(model), model.id
    if isinstance(data, ChatData) and tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template",
            at=f"model.tokenizer = {getattr(model, 'tokenizer', None) or origin!r}",
            why="ChatData renders `messages` with the template of the tokenizer",
            try_="set model.tokenizer to one with a template (an instruct model's), or use TextData",
        )
    with writing(folder):
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library raises bare Exceptions for what the disk refuses
            raise OSError(str(error)) from error
    return _checked_info(tokenizer, rows, origin)


def load_tokenizer(folder: str) -> Any:
    """The `transformers` tokenizer in `folder`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ... from here
        raise DataError(
            "the tokenizer cannot be loaded",
            at=folder,
            why=f"transformers says {type(error).__name__}: {str(error)[:400]}",
            try_="set model.tokenizer to a hub id or folder that AutoTokenizer opens",
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(
            "the tokenizer is empty",
            at=folder,
            why="without tokenizer files transformers makes one that knows no text and encodes all of it to nothing",
            try_="set model.tokenizer to a hub id or folder that has tokenizer.json",
        )
    return tokenizer


def load_encoder(folder: Path) -> Encoder:
    """Texts to ids, special tokens added as the tokenizer does by itself (a BOS where the model has one)."""
    if not (folder / "tokenizer.json").exists():
        slow = load_tokenizer(str(folder))
        return lambda texts: slow(texts)["input_ids"]
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    return lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts)]


def load_decoder(folder: Path) -> Decoder:
    """Ids to the text a reader sees for them, special tokens by name; torn characters show as U+FFFD."""
    if not (folder / "tokenizer.json").exists():
        slow = load_tokenizer(str(folder))
        return lambda ids: slow.decode(ids)
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda ids: fast.decode(ids, skip_special_tokens=False)


def train_bpe(texts: Iterator[str], vocab: int) -> Any:
    """A byte-level BPE of at most `vocab` entries: 4 special tokens, the 256 bytes, then merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _as_transformers(bpe: Any, eos_token: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos_token,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _sample(shards: tuple[Shard, ...], data: TextData | ChatData, vocab: int) -> Iterator[str]:
    """Texts to train on: the first documents of evenly spaced shards, an equal share of the budget each."""
    count = min(len(shards), BPE_SAMPLE_SHARDS)
    for index in range(count):
        left = _sample_characters(vocab) // count
        for _, document in read_shard(shards[index * len(shards) // count], data):
            for text in [document] if isinstance(document, str) else _contents(document):
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _sample_characters(vocab: int) -> int:
    return min(vocab * BPE_SAMPLE_CHARACTERS_PER_ENTRY, MAX_BPE_SAMPLE_CHARACTERS)


def _contents(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages if isinstance(message.get("content"), str)]


def _tokenizer_source(model: Model) -> Path:
    if model.tokenizer is not None:
        return _folder(model.tokenizer, None, [*_TOKENIZER_FILES, "config.json"])
    return _folder(model.id, model.revision, [*_TOKENIZER_FILES, "config.json"])


def _folder(name: str, revision: str | None, patterns: list[str]) -> Path:
    """A local folder as it is, or the small files of a hub repository in the hub's own cache."""
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # hub, network, cache and name errors share no base class
        raise DataError(
            f"{name!r} is neither a folder nor a hub id that can be read",
            at=f"model.id or model.tokenizer = {name!r}",
            why=f"{type(error).__name__}: {str(error)[:400]}",
            try_="check the spelling, the network and HF_TOKEN, or give a local folder",
        ) from error


def _embedding_rows(model: Model) -> int:
    path = _folder(model.id, model.revision, ["config.json"]) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError) as error:
        rows, why = None, f"{type(error).__name__}: {error}"
    else:
        why = "it has no vocab_size"
    if not isinstance(rows, int):
        raise DataError(
            "the embedding rows of the model are not known",
            at=str(path),
            why=why,
            try_="give a model folder in the transformers format, with config.json",
        )
    return rows


def _checked_info(tokenizer: Any, rows: int, origin: str) -> TokenizerInfo:
    vocabulary = tokenizer.get_vocab()
    added = set(tokenizer.get_added_vocab())
    # Added tokens may lie beyond the embedding in released models that never emit them; using one is refused later.
    largest = max((index for token, index in vocabulary.items() if token not in added), default=-1)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the tokenizer has no end-of-text token",
            at=f"eos_token of {origin}",
            why="every document ends with it, so that the model learns to stop",
            try_="set eos_token in its tokenizer_config.json, or set model.tokenizer to another one",
        )
    if max(largest, eos) >= rows:
        raise vocabulary_mismatch(max(largest, eos), rows, f"model.tokenizer against vocab_size of {origin}")
    pad = tokenizer.pad_token_id
    return TokenizerInfo(
        vocab_size=max(vocabulary.values()) + 1,
        rows=rows,
        eos_id=int(eos),
        pad_id=int(pad) if pad is not None and pad < rows else int(eos),
    )


def vocabulary_mismatch(token: int, rows: int, at: str) -> DataError:
    """The error for an id the model has no embedding row for."""
    return DataError(
        "the tokenizer does not fit the model",
        at=at,
        why=f"token id {token} needs {token + 1} embedding rows, the model has {rows}: {token + 1 - rows} too few",
        try_="set model.tokenizer to the tokenizer the model was trained with",
    )
