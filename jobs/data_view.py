"""What `farspan data JOB` shows: what will be trained on, before anything is paid for.

One table (documents, tokens, lengths, what is too long and what becomes of it, packing, share of trained tokens,
entropy), a histogram of lengths, and a real sample with the loss mask on its tokens. Everything is read from the token
store through the same packer the trainer uses, so that what is shown is what will be fed. Where there is no colour,
brackets mark what is trained.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from farspan.trainer.config import DataSource, OnTooLong
from farspan.trainer.data.packing import PackedStream, plan_pieces
from farspan.trainer.data.store import TokenStore
from farspan.trainer.data.tokenizer import Decoder, load_decoder

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
BAR_CELLS = 40
SAMPLE_TOKENS = 600
"""A longer sample is shown by its first and last half of this."""
_TRAINED, _UNTRAINED = "bold green", "bright_black"


def summary(store_path: str | Path, data: DataSource) -> dict[str, Any]:
    """Numbers of the view as plain JSON types.

    Returns:
        documents, tokens, splits, lengths (quantiles, mean), histogram (`[from, to, documents]`), context,
        on_too_long, too_long (documents of both splits, by what happens to them), packing (packs, efficiency,
        pieces), trained_share, unigram_entropy_nats, vocab_size, counts, store.
    """
    store = TokenStore(store_path)
    lengths = np.concatenate([store.train.lengths, store.validation.lengths])
    sizes = store.meta["splits"].values()
    return {
        "store": str(store_path),
        "kind": store.meta["kind"],
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "splits": store.meta["splits"],
        "vocab_size": store.meta["vocab_size"],
        "lengths": {
            **{name: int(np.quantile(lengths, at, method="lower")) for name, at in QUANTILES.items()},
            "mean": float(lengths.mean()),
        },
        "histogram": _histogram(lengths),
        "context": data.context,
        "on_too_long": data.on_too_long,
        "too_long": _too_long(lengths, data),
        "packing": _packing(store, data),
        "trained_share": sum(size["trained_tokens"] for size in sizes) / max(int(lengths.sum()), 1),
        "unigram_entropy_nats": store.meta["unigram_entropy_nats"],
        "counts": store.meta["counts"],
    }


def show(store_path: str | Path, data: DataSource, *, console: Console, samples: int = 1) -> None:
    """Print the table, the histogram and `samples` documents with their loss mask."""
    facts = summary(store_path, data)
    console.print(_table(facts))
    console.print(_bars(facts["histogram"], data.context))
    store = TokenStore(store_path)
    decode = load_decoder(store.tokenizer_dir)
    marked = not console.is_terminal or console.no_color
    for index in range(min(samples, len(store.train))):
        console.print(_sample(store, data, index, decode, marked=marked), soft_wrap=True)


def _packing(store: TokenStore, data: DataSource) -> dict[str, Any]:
    """Of the training split; where documents are too long and that is an error, of those that are not."""
    mode: OnTooLong = "drop" if data.on_too_long == "error" else data.on_too_long
    if len(plan_pieces(store.train.lengths, data.context, mode)) == 0:
        return {"packs": 0, "pieces": 0, "tokens": 0, "efficiency": 0.0}
    stream = PackedStream(store.train, data.context, mode, data.pack)
    return {
        "packs": stream.packs_in_epoch(0),
        "pieces": stream.counts["pieces"],
        "tokens": stream.counts["tokens"],
        "efficiency": stream.efficiency,
    }


def _too_long(lengths: np.ndarray, data: DataSource) -> dict[str, Any]:
    long = lengths[lengths > data.context]
    what = {
        "error": "the job stops; set data.context or data.on_too_long",
        "truncate": f"cut to {data.context} tokens, {int((long - data.context).sum())} tokens lost",
        "split": f"split into {int((-(-long // data.context)).sum())} pieces, nothing lost",
        "drop": f"left out, {int(long.sum())} tokens lost",
    }[data.on_too_long]
    return {"documents": len(long), "tokens": int(long.sum()), "what_happens": what if len(long) else "nothing is"}


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    """Documents by powers of two of their length."""
    exponents = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    return [
        [2**e, 2 ** (e + 1), int((exponents == e).sum())] for e in range(int(exponents.min()), int(exponents.max()) + 1)
    ]


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for split, sizes in facts["splits"].items():
        table.add_row(split, f"{sizes['documents']:,} documents, {sizes['tokens']:,} tokens")
    if facts["counts"]["empty_documents"]:
        table.add_row("left out", f"{facts['counts']['empty_documents']:,} empty documents")
    quantiles = [f"{name} {facts['lengths'][name]:,}" for name in QUANTILES]
    table.add_row("length", f"{', '.join(quantiles)}, mean {facts['lengths']['mean']:,.0f} tokens")
    long = facts["too_long"]
    table.add_row("too long", f"{long['documents']:,} over the context of {facts['context']:,}: {long['what_happens']}")
    packing = facts["packing"]
    table.add_row(
        "packing",
        f"{packing['pieces']:,} pieces in {packing['packs']:,} packs an epoch, {packing['efficiency']:.1%} full",
    )
    table.add_row("trained", f"{facts['trained_share']:.1%} of tokens")
    table.add_row(
        "unigram",
        f"{facts['unigram_entropy_nats']:.3f} nats: the loss of knowing token frequencies alone "
        f"({facts['vocab_size']:,} in the vocabulary)",
    )
    table.add_row("store", Text(facts["store"], overflow="fold"))
    return table


def _bars(histogram: list[list[int]], context: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("tokens", "documents"):
        table.add_column(name, justify="right")
    table.add_column("")
    most = max(count for _, _, count in histogram)
    for low, high, count in histogram:
        bar = "█" * -(-count * BAR_CELLS // most)
        over = low >= context
        table.add_row(f"{low:,}-{high - 1:,}", f"{count:,}", Text(bar, "red" if over else "cyan"))
    return table


def _sample(store: TokenStore, data: DataSource, index: int, decode: Decoder, *, marked: bool) -> Text:
    """One training document as its own pack, each token by whether the loss of predicting it is taken."""
    length = int(store.train.lengths[index])
    shown = length if data.on_too_long == "split" else min(length, data.context)
    ids = store.train.tokens(index, 0, shown)
    targets = store.train.trained(index, 0, shown) == 1
    targets[0] = False  # nothing comes before it that could predict it
    text = Text(f"document {index} of train, {length:,} tokens. ")
    text.append("trained" if not marked else "[[trained]]", _TRAINED)
    text.append(" ")
    text.append("not trained", _UNTRAINED)
    text.append("\n")
    half = SAMPLE_TOKENS // 2
    if len(ids) <= SAMPLE_TOKENS:
        return text + _tokens(ids, targets, decode, marked)
    text += _tokens(ids[:half], targets[:half], decode, marked)
    text.append(f"\n... {len(ids) - 2 * half:,} tokens, {targets[half:-half].mean():.0%} of them trained ...\n")
    return text + _tokens(ids[-half:], targets[-half:], decode, marked)


def _tokens(ids: np.ndarray, targets: np.ndarray, decode: Decoder, marked: bool) -> Text:
    """Runs of tokens in their colour; brackets around trained runs where there is none."""
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
    for start, stop in pairwise(edges):
        run = decode(ids[start:stop].tolist())
        trained = bool(targets[start])
        text.append(f"[[{run}]]" if trained and marked else run, _TRAINED if trained else _UNTRAINED)
    return text
