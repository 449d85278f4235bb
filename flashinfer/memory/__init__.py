"""The budget resolver: from a cap to a frozen plan of every byte. Pure."""

from flashinfer.memory.floor import needs_all
from flashinfer.memory.plan import AdapterNeeds, Mode, Plan, Request
from flashinfer.memory.resolve import conditions_of, resolve

__all__ = ["AdapterNeeds", "Mode", "Plan", "Request", "conditions_of", "needs_all", "resolve"]
