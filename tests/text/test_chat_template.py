"""Rendering is transformers' rendering; where templates are found; a hostile one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest

from flashinfer.errors import ChatTemplateError, StoreError
from flashinfer.text import ChatTemplate, Message, built_in, chat_template, load_chat_template
from flashinfer.text.render import render
from tests.text.chat_templates import CHATML, CONVERSATIONS, EVERYTHING, TEMPLATES, messages
from tests.tiny_tokenizers import tiny_json

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "the template", TOKENS)


def rendered(source: str, conversation: list[Message], prompt: bool) -> str:
    variables = {"messages": conversation, "add_generation_prompt": prompt, "tools": None, "documents": None}
    return render(source, [TOKENS | variables])[0]


@pytest.mark.parametrize("name", [*TEMPLATES, *built_in(), "everything"])
def test_it_is_the_rendering_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tiny_json(tmp_path)["tokenizer.json"]), **TOKENS)
    source = {**TEMPLATES, "everything": EVERYTHING}.get(name) or load_chat_template({}, name).source
    for conversation in CONVERSATIONS:
        for prompt in (False, True):
            try:
                expected = theirs.apply_chat_template(
                    conversation, chat_template=source, tokenize=False, add_generation_prompt=prompt
                )
            except jinja2.TemplateError as e:
                with pytest.raises(jinja2.TemplateError, match=str(e)):
                    rendered(source, conversation, prompt)
            else:
                assert rendered(source, conversation, prompt) == expected


def test_a_process_of_its_own_gives_the_same() -> None:
    conversations = [messages("Hi \u4f60\u597d"), messages("a", "b", "c")]
    for prompt in (False, True):
        texts = template(CHATML).render(*conversations, next_answer=prompt)
        assert texts == [rendered(CHATML, c, prompt) for c in conversations]


def test_where_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    def written(name: str, text: str) -> dict[str, Path]:
        (tmp_path / name).write_text(text)
        return {name: tmp_path / name}

    files = written("tokenizer_config.json", json.dumps({"chat_template": "config", **TOKENS, "pad_token": None}))
    found = load_chat_template(files)
    assert (found.source, found.tokens) == ("config", TOKENS)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    files |= written("tokenizer_config.json", json.dumps({"chat_template": named}))
    assert load_chat_template(files).source == "named"
    files |= written("chat_template.json", json.dumps({"chat_template": "json"}))
    assert load_chat_template(files).source == "json"
    files |= written("chat_template.jinja", "jinja")
    assert load_chat_template(files).source == "jinja"
    assert load_chat_template(files, str(tmp_path / "chat_template.jinja")).source == "jinja"
    assert "USER:" in load_chat_template(files, "vicuna").source


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match=r"no chat template.*alpaca, dolly.*wizardlm, or a file"):
        load_chat_template({})
    with pytest.raises(ChatTemplateError, match=r"neither built in.*No such file"):
        load_chat_template({}, "alpacca")
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"chat_template": [{"name": "rag", "template": "x"}]}')
    with pytest.raises(ChatTemplateError, match="are rag, none of them is called default"):
        load_chat_template({path.name: path})
    path.write_text('{"chat_template": 7}')
    with pytest.raises(StoreError, match="tokenizer_config"):
        load_chat_template({path.name: path})
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ChatTemplateError, match=r"not UTF-8 \(byte 3\)"):
        load_chat_template({}, str(path))


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("{{ raise_exception('System role not supported') }}", "cannot be used: System role not supported;"),
        ("{% for x in %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ (messages | map('attr', '__class__') | list)[0].mro() }}", "Error"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10 ** 10 }}", "too much memory"),
        ("{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "memory"),
        ("{{ 'x' * 17000000 }}", "it writes 17000000 characters"),
    ],
)
def test_a_hostile_template_is_one_line(source: str, part: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        template(source).render(messages("Hi"))
    assert part in str(caught.value)
    assert str(caught.value).startswith("the template cannot be used: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 3 ** (10 ** 9) }}",  # one step, and at compile time
    ],
)
def test_one_without_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chat_template._LIMITS, "seconds", 1)  # type: ignore[arg-type]
    with pytest.raises(ChatTemplateError, match="more than 1 s of processor time"):
        template(source).render(messages("Hi"))


def test_one_that_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_PATIENCE", 0.01)  # less than starting a process takes
    with pytest.raises(ChatTemplateError, match="took longer than"):
        template(CHATML).render(messages("Hi"))
