"""What stays in the slots: a policy decides, somebody else moves the bytes."""

from flashinfer.cache.always_miss import AlwaysMiss
from flashinfer.cache.device import Chosen, DeviceTieredCache, device_cache
from flashinfer.cache.policy import Change, Policy
from flashinfer.cache.tiers import TieredCache, exchange
from flashinfer.cache.window import WindowCache
from flashinfer.config import Retention

__all__ = [
    "AlwaysMiss", "Change", "Chosen", "DeviceTieredCache", "Policy", "TieredCache", "WindowCache", "device_cache",
    "exchange", "tiered_cache", "window_cache",
]  # fmt: skip


def tiered_cache(records: int, near: int, far: int, *, window: int, retention: Retention = "frequency") -> Policy:
    """The cache of two tiers in C++ where the native core is built, else in numpy: same decisions.

    Raises:
        ValueError: as `TieredCache`.
    """
    try:
        from flashinfer.cache.native import NativeTieredCache
    except ImportError:  # no compiler at installation
        return TieredCache(records, near, far, window=window, retention=retention)
    return NativeTieredCache(records, near, far, window=window, retention=retention)


def window_cache(records: int, slots: int, *, window: int, retention: Retention = "frequency") -> Policy:
    """The windowed cache in C++ where the native core is built, else in numpy: same decisions.

    Raises:
        ValueError: as `WindowCache`.
    """
    try:
        from flashinfer.cache.native import NativeWindowCache
    except ImportError:  # no compiler at installation
        return WindowCache(records, slots, window=window, retention=retention)
    return NativeWindowCache(records, slots, window=window, retention=retention)
