"""What stays in the slots: a policy decides, somebody else moves the bytes."""

from flashinfer.cache.always_miss import AlwaysMiss
from flashinfer.cache.policy import Change, Policy
from flashinfer.cache.window import WindowCache

__all__ = ["AlwaysMiss", "Change", "Policy", "WindowCache"]
