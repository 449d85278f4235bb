"""Sampling, stop conditions and streaming text on top of the engine: what `flashinfer.load` returns."""

from flashinfer.generate.chat import Chat
from flashinfer.generate.live import LiveSession
from flashinfer.generate.loading import chat_template_of, load
from flashinfer.generate.sampler import Sampler, check_sampling
from flashinfer.generate.session_file import load_conversation, store_id
from flashinfer.generate.stop import StopStrings
from flashinfer.generate.stream import FinishReason, Generation, Stream, Timings
from flashinfer.generate.text_model import TextModel

__all__ = [
    "Chat",
    "FinishReason",
    "Generation",
    "LiveSession",
    "Sampler",
    "StopStrings",
    "Stream",
    "TextModel",
    "Timings",
    "chat_template_of",
    "check_sampling",
    "load",
    "load_conversation",
    "store_id",
]
