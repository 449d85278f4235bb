"""Whether torch can compute on a card, that it does so in full float32, and what it says when memory is used up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flashinfer.backend.base import Backend
from flashinfer.backend.bookkeeping import Bookkeeping
from flashinfer.backend.torch_copies import DeviceErrors
from flashinfer.backend.torch_tiers import TensorTiers
from flashinfer.errors import DeviceError

T = TypeVar("T")


def open_card(device: str) -> torch.device:
    """The card `cuda` or `cuda:N`. From now on products of float32 matrices are not rounded to TF32, in the process.

    Raises:
        DeviceError: torch has no CUDA, or sees no such card.
    """
    version, instead = torch.__version__, "or use --device cpu"
    if not (named := re.fullmatch(r"cuda(?::(\d+))?", device)):
        raise DeviceError(f"device {device!r} is not known; choose cuda or cuda:N, {instead}")
    if torch.version.cuda is None:
        raise DeviceError(f"torch {version} was built without CUDA; install a build that has it, {instead}")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"torch {version} finds no card it can use: `nvidia-smi` must list one, with a driver for CUDA "
            f"{torch.version.cuda} or newer; {instead}"
        )
    count = torch.cuda.device_count()
    if int(named[1] or 0) >= count:
        raise DeviceError(f"there is no {device}: torch sees {count} (the first is cuda:0); choose another, {instead}")
    torch.set_float32_matmul_precision("highest")
    return torch.device(device)


def card_name(device: str) -> str:
    """What the driver calls the card. Raises as `open_card`."""
    return torch.cuda.get_device_name(open_card(device))


def explained(backend: Backend, device: str) -> Backend:
    """The same backend, whose verbs, and those of the bookkeeping it makes, raise a DeviceError of one line where the
    card's memory does not suffice."""
    return _explained(backend, Backend, DeviceErrors(torch.device(device)))


def _explained(who: T, interface: type, errors: DeviceErrors) -> T:
    for name, verb in vars(interface).items():
        if callable(verb) and not name.startswith("_"):
            setattr(who, name, _within(errors, getattr(who, name)))
    return who


def _within(errors: DeviceErrors, verb: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with errors:
            found = verb(*arguments, **named)
        return _explained(found, Bookkeeping, errors) if isinstance(found, TensorTiers) else found

    return call
