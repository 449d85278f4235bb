"""Text in, text out: tokenizers, chat templates, streaming detokenisation and the checkpoint's generation defaults."""

from flashinfer.text.chat import ChatFormat, TurnEnd
from flashinfer.text.chat_template import ChatTemplate, Message, built_in, load_chat_template, opening
from flashinfer.text.defaults import GenerationDefaults, load_generation_defaults
from flashinfer.text.detokenizer import Detokenizer
from flashinfer.text.fit import check_files, check_fit
from flashinfer.text.load import load_tokenizer
from flashinfer.text.tokenizer import Tokenizer

__all__ = [
    "ChatFormat",
    "ChatTemplate",
    "Detokenizer",
    "GenerationDefaults",
    "Message",
    "Tokenizer",
    "TurnEnd",
    "built_in",
    "check_files",
    "check_fit",
    "load_chat_template",
    "load_generation_defaults",
    "load_tokenizer",
    "opening",
]
