"""Generate text from language models larger than memory (distribution `flashinfer-offload`).

The public door: `pack` a checkpoint into a weight store, `load` the store under a memory cap.
Names are imported on first use, so that `import flashinfer` costs nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__distribution__ = "flashinfer-offload"

if TYPE_CHECKING:
    from flashinfer.errors import FlashInferError
    from flashinfer.generate import TextModel, load
    from flashinfer.memory import Plan
    from flashinfer.pack import pack

_HOME = {
    "FlashInferError": "flashinfer.errors",
    "Plan": "flashinfer.memory",
    "TextModel": "flashinfer.generate",
    "load": "flashinfer.generate",
    "pack": "flashinfer.pack",
}
__all__ = ["FlashInferError", "Plan", "TextModel", "load", "pack"]


class _Door(ModuleType):
    """Keeps `flashinfer.pack` the function: importing the subpackage of that name would put itself in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flashinfer' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
