"""Options several commands share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import typer

from flashinfer.config import Cap
from flashinfer.units import parse_size


class LogLevel(StrEnum):
    """How much the program says about itself on stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogLevelOption = Annotated[
    LogLevel | None, typer.Option("--log-level", help="debug also shows the traceback of an error.")
]


def set_log_level(level: LogLevel | None) -> None:
    """Log to stderr from `level` on; None leaves it as it is (warnings, unless set before)."""
    if level is None:
        return
    logging.basicConfig(format="flashinfer: %(levelname)s: %(message)s")
    logging.getLogger("flashinfer").setLevel(level.value.upper())


@contextlib.contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """A ValueError of the block is the user's mistake in `option`: wrong usage, exit status 2."""
    try:
        yield
    except ValueError as e:
        raise typer.BadParameter(str(e), param_hint=option) from e


def parse_cap(memory: str | None, weight_memory: str | None) -> Cap:
    """The cap from `--memory` and `--weight-memory`. Raises typer.BadParameter: both, or no size."""
    if memory is not None and weight_memory is not None:
        raise typer.BadParameter("give --memory or --weight-memory, not both")
    return Cap(_parse_size(memory, "--memory"), _parse_size(weight_memory, "--weight-memory"))


def _parse_size(text: str | None, option: str) -> int | None:
    with usage_errors(option):
        return None if text is None else parse_size(text)
