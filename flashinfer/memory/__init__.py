"""The budget resolver: from a cap to a frozen plan of every byte. Pure."""

from flashinfer.memory.floor import needs_all
from flashinfer.memory.plan import Mode, Plan, Request
from flashinfer.memory.resolve import conditions_of, resolve

__all__ = ["Mode", "Plan", "Request", "conditions_of", "needs_all", "resolve"]
