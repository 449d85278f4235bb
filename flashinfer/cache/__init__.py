"""What stays in the slots: a policy decides, somebody else moves the bytes."""

from flashinfer.cache.always_miss import AlwaysMiss
from flashinfer.cache.policy import Change, Policy
from flashinfer.cache.tiers import TieredCache, exchange
from flashinfer.cache.window import WindowCache
from flashinfer.config import Retention

__all__ = ["AlwaysMiss", "Change", "Policy", "TieredCache", "WindowCache", "exchange", "window_cache"]


def window_cache(records: int, slots: int, *, window: int, retention: Retention = "frequency") -> Policy:
    """The windowed cache in C++ where the native core is built, else in numpy: same decisions.

    Raises:
        ValueError: as `WindowCache`.
    """
    try:
        from flashinfer.cache.native_window import NativeWindowCache
    except ImportError:  # no compiler at installation
        return WindowCache(records, slots, window=window, retention=retention)
    return NativeWindowCache(records, slots, window=window, retention=retention)
