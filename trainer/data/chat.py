"""Render conversations with the tokenizer's own template, and say which tokens the loss is taken on.

Only what the assistant says is trained on. Where the template marks it (`{% generation %}`), the marks are followed.
Where it does not, each assistant turn is what the rendering gains by it: from the rendering of all turns before it
plus the generation prompt, to the rendering that ends with it. That holds only if both are prefixes of the whole, which
is verified: templates that rewrite earlier turns (dropping old reasoning, say) are refused, not guessed at.

The template is rendered once to characters and tokenised once; a token is trained if it ends inside an assistant's
range. Cutting at the character level keeps the tokens those the model meets in use, whatever merges across a turn edge.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from farspan.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]


def encode_chat(tokenizer: Any, messages: Messages, where: object) -> tuple[list[int], np.ndarray]:
    """Ids of one conversation and its loss mask.

    Args:
        tokenizer: a fast `transformers` tokenizer with a chat template.
        messages: list of `{"role", "content", ...}`.
        where: names the sample in errors.

    Returns:
        ids [T], and uint8 [T]: 1 where the token is the assistant's.

    Raises:
        DataError: the template refuses the conversation or rewrites earlier turns; no token or every token is trained.
    """
    text, ranges = _assistant_ranges(tokenizer, messages, where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    ends = np.array([end for _, end in encoding["offset_mapping"]], dtype=np.int64)
    trained = np.zeros(len(ids), dtype=np.uint8)
    for start, stop in ranges:
        trained[(ends > start) & (ends <= stop)] = 1
    _refuse_constant(trained, messages, where)
    return ids, trained


def check_chat_tokenizer(tokenizer: Any, folder: str) -> None:
    """Refuse a tokenizer that cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer cannot map tokens to characters",
            at=folder,
            why=f"{type(tokenizer).__name__} is not backed by the tokenizers library, and the loss mask needs offsets",
            try_="set model.tokenizer to one that has a tokenizer.json",
        )


def _assistant_ranges(tokenizer: Any, messages: Messages, where: object) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and [start, stop) in characters of what the assistant says in it."""
    from jinja2 import TemplateError

    try:
        template = tokenizer.get_chat_template()
        if _GENERATION.search(template):
            return _marked_ranges(tokenizer, template, messages)
        return _prefix_ranges(tokenizer, messages, where)
    except (TemplateError, ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "the chat template refuses a conversation",
            at=str(where),
            why=f"{type(error).__name__}: {error} (roles: {_roles(messages)})",
            try_="bring the turns into the order the template asks for, or remove the sample",
        ) from error


def _marked_ranges(tokenizer: Any, template: str, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    # What apply_chat_template(return_assistant_tokens_mask=True) calls. Its own step from characters to tokens is not
    # used: it trains everything to the end where a range ends on a character no token starts at.
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, ranges = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], ranges[0]


def _prefix_ranges(tokenizer: Any, messages: Messages, where: object) -> tuple[str, list[tuple[int, int]]]:
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    whole = render(len(messages), False)
    ranges = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise _no_prefix(where, "the conversation begins with an assistant turn, so its header cannot be found", 0)
        before, after = render(turn, True), render(turn + 1, False)
        if not whole.startswith(before):
            raise _no_prefix(where, _difference(whole, before, "the turns before it plus generation prompt"), turn)
        if not whole.startswith(after):
            raise _no_prefix(where, _difference(whole, after, "the turns up to it"), turn)
        ranges.append((len(before), len(after)))
    return whole, ranges


def _difference(whole: str, part: str, name: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, part)) if a != b), min(len(whole), len(part)))
    return (
        f"{name} render as ...{part[max(at - 20, 0) : at + 30]!r}, "
        f"inside the whole they are ...{whole[max(at - 20, 0) : at + 30]!r}"
    )


def _no_prefix(where: object, why: str, turn: int) -> DataError:
    return DataError(
        "the chat template does not show where an assistant turn begins and ends",
        at=f"{where}, message {turn}",
        why=f"the template has no {{% generation %}} markers, and {why}",
        try_="add {% generation %}...{% endgeneration %} around the assistant's text in the chat_template of the "
        "tokenizer, or give one exchange per sample",
    )


def _refuse_constant(trained: np.ndarray, messages: Messages, where: object) -> None:
    count = int(trained.sum())
    if 0 < count < len(trained):
        return
    assistants = sum(message["role"] == "assistant" for message in messages)
    if count == 0:
        what = "a chat without assistant turn" if assistants == 0 else "a chat whose assistant says nothing"
        try_ = "give every sample an assistant turn with text, or remove the sample"
    else:
        what = "a chat in which every token would be trained on"
        try_ = "check that the markers of the chat template surround the assistant's text only"
    raise DataError(
        what,
        at=str(where),
        why=f"{count} of {len(trained)} tokens are the assistant's (roles: {_roles(messages)})",
        try_=try_,
    )


def _roles(messages: Messages) -> str:
    roles = [message["role"] for message in messages]
    return ", ".join(roles[:8]) + (f", ... {len(roles)} in all" if len(roles) > 8 else "")
