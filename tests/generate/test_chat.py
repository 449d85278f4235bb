"""A conversation: what is computed anew, what is kept, stopped, forgotten, saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashinfer
from flashinfer.errors import ChatTemplateError, PromptError, SessionError
from flashinfer.generate import Chat, LiveSession, TextModel, load
from flashinfer.generate.live import common_prefix
from flashinfer.text import ChatFormat, ChatTemplate, load_chat_template
from tests.generate.fake import EOS, FakeEngine, LetterTokenizer, fake_model
from tests.text.chat_templates import messages
from tests.text.in_process import render_in_process

LETTERS = "{% for m in messages %}{{ m['content'] + '.' }}{% endfor %}"
"""Of the alphabet that the fake tokenizer has; a full stop ends each message."""
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(autouse=True, scope="module")
def in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        render_in_process(patch)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "demo.flash"
    flashinfer.pack(Path(flashinfer.__file__).parent / "_demo", path)
    return path


def letters(model: TextModel, source: str = LETTERS, **options: Any) -> Chat:
    return Chat(model, ChatFormat(ChatTemplate(source, "the template", {}), model.tokenizer), **options)


def said(chat: Chat, text: str, **options: Any) -> str:
    return "".join(chat.reply(text, **GREEDY, **options))


def steps_of(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each step from now on."""
    seen: list[list[int]] = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda session, tokens: (seen.append(list(tokens)), step(session, tokens))[1])
    return seen


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_only_what_is_new_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = fake_model("yes.", context=64)
    seen = steps_of(engine, monkeypatch)
    encode = LetterTokenizer().encode
    with letters(model) as chat:
        assert said(chat, "ab", max_new_tokens=3) == "yes"
        assert seen[0] == encode("ab.", add_bos=False)
        seen.clear()
        said(chat, "cd", max_new_tokens=2)
        # of the answer the last token was drawn and never seen; the template adds a full stop
        assert seen[0] == encode("s.cd.", add_bos=False)
        assert chat.reused == len("ab.ye")
        assert chat.messages[:3] == messages("ab", "yes", "cd")
        assert engine.open_sessions == 1
    assert engine.open_sessions == 0


def test_a_conversation_is_that_of_fresh_sessions(store: Path) -> None:
    """The same tokens as when every turn is computed from its start; with the native core they are the same bits."""
    with load(store, context=256, weight_memory="5MiB") as model:
        form = ChatFormat(load_chat_template({}, "vicuna"), model.tokenizer)
        with Chat(model, form, system="Tell a story.") as chat:
            for text in ("There was a dog.", "And then?", "The end?"):
                stream = chat.reply(text, max_new_tokens=12, **GREEDY)
                list(stream)
                (prompt,) = form.prompts(chat.messages[:-1])
                assert stream.result.prompt_tokens == tuple(prompt)
                assert chat.reused > 0 or len(chat.messages) == 3
                fresh = model.stream(prompt, max_new_tokens=12, end_tokens=form.turn_end().tokens, **GREEDY)
                assert "".join(fresh) == stream.result.text


def test_the_same_prompt_again_takes_its_last_step_again() -> None:
    model, engine = fake_model("hello ")
    live = LiveSession()
    for drawn, reused in (("h", 0), ("e", 4), ("l", 4)):  # the fake goes on with its script
        stream = model.stream("abcd", max_new_tokens=1, live=live, **GREEDY)
        assert ("".join(stream), live.reused) == (drawn, reused)
    assert live.tokens == LetterTokenizer().encode("abcd")
    live.close()
    live.close()
    assert engine.open_sessions == 0


def test_what_ends_an_answer() -> None:
    model, _ = fake_model([*LetterTokenizer().encode("hi", add_bos=False), EOS])
    with letters(model) as chat:
        assert said(chat, "ab") == "hi"
    model, _ = fake_model("hi there.")  # what the template writes between messages
    with letters(model) as chat:
        assert said(chat, "ab") == "hi there"
        assert said(chat, "ab", stop=["th"]) == "hi "
    model, _ = fake_model([5, 7, 9])
    assert model.generate("ab", max_new_tokens=9).tokens == (5, 7, 9) * 3
    stream = model.stream("ab", max_new_tokens=9, end_tokens=[9])
    list(stream)
    assert (stream.result.tokens, stream.result.finish_reason) == ((5, 7, 9), "eos")


def test_an_answer_that_is_stopped_is_as_long_as_it_was_read() -> None:
    model, _ = fake_model("hello you.")
    with letters(model) as chat:
        stream = chat.reply("ab", **GREEDY)
        begun = next(stream) + next(stream)
        stream.close()
        assert chat.messages == messages("ab", begun)
        chat.reply("cd")  # never read
        assert chat.messages == messages("ab", begun)
        list(chat.reply("ef", **GREEDY))
        assert [m["content"] for m in chat.messages] == ["ab", "he", "ef", "llo you"]  # it goes on with its script


def test_an_interrupted_step_leaves_the_conversation_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = fake_model("hello you.")
    with letters(model) as chat:
        step, count = engine.step, iter(range(100))

        def struck(session: Any, tokens: list[int]) -> np.ndarray:
            if next(count) == 3:
                raise KeyboardInterrupt
            return step(session, tokens)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", struck)
            stream = chat.reply("ab", **GREEDY)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        assert chat.messages == messages("ab", "hel")
        said(chat, "cd", max_new_tokens=1)
        assert chat.reused == len("ab.he")


def test_a_context_that_is_full() -> None:
    model, _ = fake_model("hello ", context=12)
    with letters(model) as chat:
        stream = chat.reply("abcd", **GREEDY)
        assert ("".join(stream), stream.result.finish_reason) == ("hello h", "context")
        before = chat.messages
        with pytest.raises(PromptError, match=r"14 tokens.*context of 12.*--context-shift"):
            chat.reply("")
        assert chat.messages == before
        chat.reset()
        assert len(said(chat, "ab", max_new_tokens=2)) == 2


def test_the_oldest_turns_are_forgotten() -> None:
    model, engine = fake_model("ok.", context=24)
    with letters(model, system="be", context_shift=True) as chat:
        for text in ("aaa", "bbb", "ccc"):
            said(chat, text)
        assert [m["content"] for m in chat.messages] == ["be", "aaa", "ok", "bbb", "ok", "ccc", "ok"]
        said(chat, "ddd")  # 3 + 3 * 7 + 4 tokens: what leaves half of 24 free begins with the newest message
        assert [m["content"] for m in chat.messages] == ["be", "ddd", "ok"]
        said(chat, "e" * 15)  # more than half, but it fits
        assert len(chat.messages) == 3
        with pytest.raises(PromptError, match="28 tokens"):
            chat.reply("f" * 24)
    assert engine.open_sessions == 0


def test_an_answer_that_outgrows_the_context_goes_on_when_it_may() -> None:
    model, _ = fake_model("hello ", context=10)
    with letters(model, context_shift=True) as chat:
        stream = chat.reply("abc", max_new_tokens=30, **GREEDY)
        assert len("".join(stream)) == 30
        assert stream.result.context_shifts > 0
        assert said(chat, "abc", max_new_tokens=3)


def test_a_template_that_refuses_leaves_the_conversation_as_it_was() -> None:
    model, _ = fake_model("ok.")
    with letters(model, LETTERS + "{{ raise_exception('no bs') if 'b' in messages[-1]['content'] }}") as chat:
        said(chat, "a", max_new_tokens=2)
        with pytest.raises(ChatTemplateError, match="no bs"):
            chat.reply("b")
        assert chat.messages == messages("a", "ok")


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = fake_model("ok.")
    file = tmp_path / "talk.json"
    with letters(model, system="be") as chat:
        said(chat, "a \u4f60", max_new_tokens=2)
        chat.save(file)
        saved = chat.messages
        chat.reset()
        assert chat.messages == messages(system="be")
        chat.load(file)
        assert chat.messages == saved == messages("a \u4f60", "ok", system="be")
        assert json.loads(file.read_text())["schema_version"] == 1
        for content, part in (
            ("nonsense", "not a saved conversation"),
            ('{"schema_version": 1, "messages": [{"role": "king", "content": ""}]}', "not a saved conversation"),
            ('{"schema_version": 2, "messages": []}', "version 2"),
        ):
            file.write_text(content)
            with pytest.raises(SessionError, match=part):
                chat.load(file)
        with pytest.raises(SessionError, match="No such file"):
            chat.load(tmp_path / "none")
        with pytest.raises(SessionError, match="cannot be written"):
            chat.save(tmp_path / "no" / "folder")
        assert chat.messages == saved


def test_two_places_for_one_conversation(tmp_path: Path) -> None:
    model, _ = fake_model("ok.")
    with pytest.raises(ValueError, match="exclude each other"):
        model.stream("a", session=tmp_path / "file", live=LiveSession())
