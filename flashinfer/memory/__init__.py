"""The budget resolver: from a cap to a frozen plan of every byte. Pure."""

from flashinfer.memory.device import check_device_floor
from flashinfer.memory.floor import needs_all
from flashinfer.memory.plan import AdapterNeeds, DeviceMemory, DevicePlan, Mode, Plan, Request
from flashinfer.memory.resolve import conditions_of, resolve
from flashinfer.memory.wants import dense_area, slot_area

__all__ = [
    "AdapterNeeds", "DeviceMemory", "DevicePlan", "Mode", "Plan", "Request", "check_device_floor",
    "conditions_of", "dense_area", "needs_all", "resolve", "slot_area",
]  # fmt: skip
