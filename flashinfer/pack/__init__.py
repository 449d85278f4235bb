"""The compiler: checkpoint + layout -> weight store, in bounded memory."""

from flashinfer.pack.compile import PackReport, pack

__all__ = ["PackReport", "pack"]
