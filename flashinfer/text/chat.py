"""From a conversation to the tokens of its prompt, and to what ends an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from flashinfer.errors import ChatTemplateError, PromptError
from flashinfer.text.chat_template import ChatTemplate, Message
from flashinfer.text.tokenizer import Tokenizer

_SEAM = "\ufdd0"
"""A noncharacter: Unicode keeps it out of texts, for a program's own use."""
_ANSWER, _NEXT = "flashinfer-answer", "flashinfer-next"


@dataclass(frozen=True)
class TurnEnd:
    """What ends an answer beside the ids that end every text: tokens, or else texts to stop before."""

    tokens: frozenset[int] = field(default_factory=frozenset)
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    """How a model wants conversations: its template, in tokens of its tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        """The template, with BOS and EOS of the tokenizer where the configuration files name none."""
        known, text_of = self.tokenizer, {i: text for text, i in self.tokenizer.specials.items()}
        begins = [] if known.bos_id is None else [known.bos_id]
        ids = {"bos_token": begins, "eos_token": [i for i in known.eos_ids if i in text_of]}
        texts = {name: text_of[of[0]] for name, of in ids.items() if of and of[0] in text_of}
        return replace(self.template, tokens=texts | dict(self.template.tokens))

    def prompts(self, *conversations: Sequence[Message]) -> list[list[int]]:
        """Tokens of each conversation, with the beginning of the next answer.

        The template writes BOS where the model wants one, so none is added. Special tokens that stand in a message
        are its text, and no special tokens: only the template speaks for the program.

        Raises:
            ChatTemplateError: as `ChatTemplate.render`. PromptError: a message is not valid Unicode.
        """
        texts = self._template.render(*([self._guarded(m) for m in c] for c in conversations))
        return [self._without_seams(self.tokenizer.encode(text, add_bos=False)) for text in texts]

    def turn_end(self) -> TurnEnd:
        """What the template writes between an answer and the next message, up to what ends the answer.

        Its first special token; where there is none, its first line that is not blank. Nothing where the template
        refuses the conversation that shows it.
        """
        asked: list[Message] = [{"role": "user", "content": "flashinfer-first"}]
        asked += [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
        try:
            text = self._template.render(asked, next_answer=False)[0]
        except ChatTemplateError:
            return TurnEnd()
        _, _, rest = text.partition(_ANSWER)
        between = rest.partition(_NEXT)[0]
        specials = self.tokenizer.specials
        if found := _any_of(specials).search(between):
            return TurnEnd(tokens=frozenset([specials[found[0]]]))
        return TurnEnd(texts=tuple(between.strip().splitlines()[:1]))

    def _guarded(self, message: Message) -> Message:
        """The message with a seam in every special token that is written out in it."""
        text = message["content"]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise PromptError(f"the message is not valid Unicode text ({e.reason} at {e.start})") from e
        text = text.replace(_SEAM, "")
        inside = {at.start() + 1 for at in re.finditer(f"(?={_any_of(self.tokenizer.specials).pattern})", text)}
        cut = "".join(_SEAM + c if i in inside else c for i, c in enumerate(text)) if inside else text
        return {"role": message["role"], "content": cut}

    def _without_seams(self, tokens: list[int]) -> list[int]:
        """The tokens, but for those that spell a seam."""
        seam, spelt = _SEAM.encode(), b""
        kept: list[int] = []
        held: list[int] = []
        for token in tokens:
            held.append(token)
            spelt += self.tokenizer.token_bytes(token)
            if spelt and seam.startswith(spelt) and spelt != seam:
                continue
            if spelt != seam:
                kept += held
            held, spelt = [], b""
        return kept + held


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of them; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
