"""Sampling, stop conditions and streaming text on top of the engine: what `flashinfer.load` returns."""

from flashinfer.generate.loading import load
from flashinfer.generate.sampler import Sampler, check_sampling
from flashinfer.generate.session_file import load_conversation, store_id
from flashinfer.generate.stop import StopStrings
from flashinfer.generate.stream import FinishReason, Generation, Stream, Timings
from flashinfer.generate.text_model import TextModel

__all__ = [
    "FinishReason",
    "Generation",
    "Sampler",
    "StopStrings",
    "Stream",
    "TextModel",
    "Timings",
    "check_sampling",
    "load",
    "load_conversation",
    "store_id",
]
