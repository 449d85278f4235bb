"""Text in, text out: tokenizers, streaming detokenisation and the checkpoint's generation defaults."""

from flashinfer.text.defaults import GenerationDefaults, load_generation_defaults
from flashinfer.text.detokenizer import Detokenizer
from flashinfer.text.load import load_tokenizer
from flashinfer.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "GenerationDefaults", "Tokenizer", "load_generation_defaults", "load_tokenizer"]
