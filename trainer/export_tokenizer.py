"""The tokenizer that goes with an export: copied, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from farspan.trainer.config import Model, ModelSource

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def tokenizer_folder(model: ModelSource, base: Path, tokenizer_dir: Path | None) -> Path:
    if tokenizer_dir is not None:
        return tokenizer_dir
    if isinstance(model, Model) and model.tokenizer is not None:
        given = Path(model.tokenizer)
        return (
            given if given.is_dir() else Path(snapshot_download(model.tokenizer, allow_patterns=list(_TOKENIZER_FILES)))
        )
    return base


def copy_tokenizer(source: Path, out_dir: Path) -> None:
    """Copied, not loaded and saved: the files stay what the data was tokenised with, byte for byte."""
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out_dir / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, out_dir / path.name)
