"""GGUF files (llama.cpp): one file with the weights, what config.json would say, and the tokenizer."""

from flashinfer.checkpoint.gguf.checkpoint import GgufCheckpoint

__all__ = ["GgufCheckpoint"]
