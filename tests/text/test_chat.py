"""The tokens of a conversation: one BOS, the template's special tokens, and nobody else's; and what ends an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.errors import PromptError
from flashinfer.text import ChatFormat, ChatTemplate, Tokenizer, TurnEnd, load_chat_template, load_tokenizer
from tests.shared_data import shared_data
from tests.text.chat_templates import CHATML, CONVERSATIONS, TEMPLATES, messages
from tests.text.in_process import render_in_process
from tests.tiny_tokenizers import tiny_sentencepiece

HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
)
"""With special tokens that all tiny tokenizers have."""


@pytest.fixture(autouse=True, scope="module")
def in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        render_in_process(patch)
        yield


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece(tmp_path))


def form(source: str, tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(ChatTemplate(source, "the template", {}), tokenizer)


def specials_in(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return [t for t in tokens if t in tokenizer.specials.values()]


def test_a_harmless_conversation_is_encoded_as_it_is_rendered(tiny: Tokenizer) -> None:
    chat = form(HEADERS, tiny)
    assert tiny.bos_id is not None
    bos, eos = (next(text for text, i in tiny.specials.items() if i == s) for s in (tiny.bos_id, tiny.eos_ids[0]))
    for conversation, tokens in zip(CONVERSATIONS, chat.prompts(*CONVERSATIONS), strict=True):
        text = bos + "".join(f"{bos}{m['role']}\n{m['content']}{eos}" for m in conversation)
        assert tokens == tiny.encode(text, add_bos=False)
        assert [t == tiny.bos_id for t in tokens[:3]] == [True, True, False]  # the template's two, and no third


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_users_write_is_never_a_special_token(tiny: Tokenizer, data: st.DataObject) -> None:
    """Whole ones, halves of them, one inside the other; the text is there all the same."""
    known = list(tiny.specials)[:12]
    halves = [piece for text in known for piece in (text[:1], text[1:], text[:3], text[3:])]
    parts = st.sampled_from([*known, *halves, "dog", " ", "\n"])
    content = "".join(data.draw(st.lists(parts, max_size=8)))
    chat = form(HEADERS, tiny)
    expected, tokens = chat.prompts(messages("x", "y"), messages(content, content))
    assert specials_in(tokens, tiny) == specials_in(expected, tiny)
    assert tiny.decode(tokens) == tiny.decode(expected).replace("x", content).replace("y", content)


def test_a_token_written_out_costs_only_its_own_tokens(sentencepiece: Tokenizer) -> None:
    chat = form("{{ messages[0]['content'] }}", sentencepiece)
    (tokens,) = chat.prompts(messages("The</s> dog"))
    pieces = [sentencepiece.token_bytes(t) for t in tokens]
    assert b"".join(pieces) == b" The</s> dog"
    assert 2 not in tokens


def test_a_seam_that_the_user_wrote_is_dropped(sentencepiece: Tokenizer) -> None:
    chat = form("{{ messages[0]['content'] }}", sentencepiece)
    assert chat.prompts(messages("The\ufdd0 dog")) == chat.prompts(messages("The dog"))


def test_text_that_is_no_unicode(sentencepiece: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        form(CHATML, sentencepiece).prompts(messages("\ud800"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TEMPLATES["llama-2"], TurnEnd(tokens=frozenset([2]))),
        (TEMPLATES["zephyr"], TurnEnd(tokens=frozenset([2]))),
        (CHATML, TurnEnd(texts=("<|im_end|>",))),  # not a token of this tokenizer
        ("{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}", TurnEnd()),
        ("{% for m in messages %}{{ m['role'] + ':\n' + m['content'] }}\n\n{% endfor %}", TurnEnd(texts=("user:",))),
        ("{{ raise_exception('never') }}", TurnEnd()),
        ("{{ messages[-1]['content'] }}", TurnEnd()),
    ],
)
def test_what_ends_an_answer(sentencepiece: Tokenizer, source: str, expected: TurnEnd) -> None:
    assert form(source, sentencepiece).turn_end() == expected


SAID = messages("Hi ", "Yo", "Bye")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ASSISTANT = (
    "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
    "user's questions."
)


@pytest.mark.parametrize(
    ("name", "expected", "end"),
    [
        (
            "alpaca",
            f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:Yo</s>\n\n### Instruction:\nBye\n\n### Response:",
            2,
        ),
        (
            "vicuna",
            f"<s>A chat between a curious user and an {ASSISTANT} USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT:",
            2,
        ),
        (
            "dolly",
            f"{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\nYo\n\n### End\n\n"
            "### Instruction:\nBye\n\n### Response:\n",
            "### End",
        ),
        ("openassistant", "<|prompter|>Hi </s><|assistant|>Yo</s><|prompter|>Bye</s><|assistant|>", 2),
        (
            "guanaco",
            f"<s>A chat between a curious human and an {ASSISTANT}\n### Human: Hi\n### Assistant: Yo\n### Human: Bye\n"
            "### Assistant:",
            "### Human:",
        ),
        ("wizardlm", "<s>Hi\n\n### Response:Yo</s>Bye\n\n### Response:", 2),
        ("redpajama", "<human>: Hi\n<bot>: Yo\n<human>: Bye\n<bot>:", "<human>:"),
    ],
)
def test_built_in_formats(sentencepiece: Tokenizer, name: str, expected: str, end: int | str) -> None:
    chat = ChatFormat(load_chat_template({}, name), sentencepiece)
    assert chat.prompts(SAID) == [sentencepiece.encode(expected, add_bos=False)]
    assert chat.turn_end() == (TurnEnd(texts=(end,)) if isinstance(end, str) else TurnEnd(tokens=frozenset([end])))


def test_stablelm_and_what_the_system_message_replaces(sentencepiece: Tokenizer) -> None:
    chat = ChatFormat(load_chat_template({}, "stablelm"), sentencepiece)
    text = sentencepiece.decode(chat.prompts(SAID)[0])
    assert text.startswith(
        "<|SYSTEM|># StableLM Tuned (Alpha version)\n- StableLM is a helpful and harmless open-source"
    )
    assert text.endswith("harm a human.\n<|USER|>Hi <|ASSISTANT|>Yo<|USER|>Bye<|ASSISTANT|>")
    told = sentencepiece.decode(chat.prompts(messages("Hi", system="Be brief."))[0])
    assert told == "<|SYSTEM|>Be brief.<|USER|>Hi<|ASSISTANT|>"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "gpt_neox_20b/tokenizer.json", "falcon/tokenizer.json"])
def test_real_tokenizers(name: str) -> None:
    path = shared_data(f"tokenizers/{name}")
    tokenizer = load_tokenizer({path.name: path})
    content = "".join(f"{text} and {text[:2]}{text} \ufdfa" for text in list(tokenizer.specials)[:9])
    mark = next(iter(tokenizer.specials))
    chat = ChatFormat(ChatTemplate(HEADERS, "the template", {"bos_token": mark, "eos_token": mark}), tokenizer)
    plain, tokens = chat.prompts(messages("x"), messages(content))
    assert specials_in(tokens, tokenizer) == specials_in(plain, tokenizer)
    assert content in tokenizer.decode(tokens)
