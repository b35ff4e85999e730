"""The loss mask of a conversation, against masks written by hand and against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from farspan.errors import DataError
from farspan.trainer.data.chat import encode_chat
from farspan.trainer.data.tokenizer import CHATML, train_bpe

CHATML_UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DROPS_OLD_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPT_NOT_IN_WHOLE = CHATML_UNMARKED.replace("assistant\\n", "assistant\\n<think>")
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML_UNMARKED
)
ALL_MARKED = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sum?\n"},
    {"role": "assistant", "content": "  It is 4.\n\n"},
    {"role": "user", "content": "Thanks 🙂"},
    {"role": "assistant", "content": "北京"},
]


def make_tokenizer(template: str = CHATML, trim_offsets: bool = False) -> Any:
    bpe = train_bpe(iter(["It is 4.\nBe brief. assistant\nuser\n    Sum?"] * 9), 300)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    special = ["<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", additional_special_tokens=special, chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def trained_text(tokenizer: Any, ids: list[int], trained: Any) -> list[str]:
    """Text of the runs of trained tokens."""
    runs: list[list[int]] = []
    before = 0
    for index, flag in zip(ids, trained.tolist()):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(index)
        before = flag
    return [tokenizer.decode(run) for run in runs]


def test_marked_template_trains_what_it_marks(tokenizer: Any) -> None:
    ids, trained = encode_chat(tokenizer, CHAT, "sample")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSum?\n<|im_end|>\n"
        "<|im_start|>assistant\n  It is 4.\n\n<|im_end|>\n<|im_start|>user\nThanks 🙂<|im_end|>\n"
        "<|im_start|>assistant\n北京<|im_end|>\n"
    )
    assert trained_text(tokenizer, ids, trained) == ["  It is 4.\n\n<|im_end|>", "北京<|im_end|>"]


def test_unmarked_template_trains_what_a_turn_adds_to_its_prompt() -> None:
    tokenizer = make_tokenizer(CHATML_UNMARKED)
    ids, trained = encode_chat(tokenizer, CHAT, "sample")
    assert trained_text(tokenizer, ids, trained) == ["  It is 4.\n\n<|im_end|>\n", "北京<|im_end|>\n"]


def test_offsets_that_leave_out_spaces_leave_no_holes() -> None:
    """GPT-2 and RoBERTa trim offsets: a token of spaces has an empty range, and transformers' own mask drops it."""
    plain, trimmed = (encode_chat(make_tokenizer(trim_offsets=trim), CHAT, "sample") for trim in (False, True))
    assert plain[0] == trimmed[0]
    assert plain[1].tolist() == trimmed[1].tolist()


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=12)}
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES)
def test_mask_equals_transformers_own(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    if sum(out["assistant_masks"]) == 0:
        with pytest.raises(DataError, match="without assistant turn"):
            encode_chat(tokenizer, messages, "sample")
        return
    ids, trained = encode_chat(tokenizer, messages, "sample")
    assert ids == out["input_ids"] and trained.tolist() == out["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "messages", "what", "detail"),
    [
        (CHATML, CHAT[:2], "a chat without assistant turn", "0 of "),
        (CHATML_UNMARKED, CHAT[:2], "a chat without assistant turn", "roles: system, user"),
        (ALL_MARKED, CHAT, "every token would be trained", "markers"),
        (DROPS_OLD_REASONING, CHAT, "does not show where", "message 2"),
        (PROMPT_NOT_IN_WHOLE, CHAT, "does not show where", "{% generation %}"),
        (CHATML_UNMARKED, CHAT[2:], "does not show where", "begins with an assistant turn"),
        (REFUSES_SYSTEM, CHAT, "template refuses", "System role not supported"),
        (CHATML, [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "template refuses", "roles: user"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(
    template: str, messages: list[dict[str, Any]], what: str, detail: str
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        encode_chat(make_tokenizer(template), messages, "chats.jsonl:7")
    text = str(caught.value)
    assert "chats.jsonl:7" in text and detail in text and len(text.splitlines()) == 4


def test_a_template_that_drops_old_reasoning_is_fine_for_one_exchange() -> None:
    tokenizer = make_tokenizer(DROPS_OLD_REASONING)
    ids, trained = encode_chat(tokenizer, CHAT[:3], "sample")
    assert trained_text(tokenizer, ids, trained) == ["<think></think>  It is 4.\n\n<|im_end|>\n"]
