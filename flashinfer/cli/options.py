"""Options several commands share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flashinfer.config import Cap, RunConfig
from flashinfer.units import parse_cap_size

MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Cap on the whole process, e.g. 4GiB or 50%. (without a cap: what is free)"
    ),
]
WeightMemoryOption = Annotated[
    str | None,
    typer.Option("--weight-memory", metavar="SIZE", help="Instead: cap on memory that holds weights."),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        "--vram", metavar="SIZE", help="Cap on the device's own memory, e.g. 6GiB. (default: what is free there)"
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="Apply a LoRA adapter as peft saved it; the store stays as it is."),
]


class BackendChoice(StrEnum):
    """What computes on the CPU."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"


class KvChoice(StrEnum):
    """What keys and values are kept in."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"


DEFAULT_BACKEND, DEFAULT_KV = BackendChoice(RunConfig.backend), KvChoice(RunConfig.kv_type)
BackendOption = Annotated[
    BackendChoice, typer.Option("--backend", help="Computes on the CPU. auto: native where it was built, else torch.")
]
KvOption = Annotated[
    KvChoice,
    typer.Option("--kv-type", help="Keys and values: f16 halves their memory, int8 quarters it; both round them."),
]
PredictorOption = Annotated[
    str,
    typer.Option(
        "--predictor",
        metavar="NAME[:TARGET]",
        help="Who names the neurons to read: exact, certified (exact, too), low-rank or threshold (approximations, at "
        "a calibrated level), all, or auto: the fastest within --max-ppl-increase. Of a mixture of experts the router.",
    ),
]
ExpertsOption = Annotated[
    int | None,
    typer.Option(
        "--experts-per-token",
        min=1,
        help="Of a mixture of experts: so many for each token, an approximation. (default: as many as the model has)",
    ),
]
MaxPplOption = Annotated[
    str, typer.Option("--max-ppl-increase", metavar="SHARE", help="What --predictor auto may cost in perplexity.")
]
DEFAULT_PPL = f"{RunConfig.max_ppl_increase:.0%}"


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


def parse_predictor_options(
    predictor: str, max_ppl_increase: str, experts_per_token: int | None = None
) -> tuple[str, float]:
    """The first two as `RunConfig` has them. Raises typer.BadParameter."""
    from flashinfer.choice import parse_predictor
    from flashinfer.units import parse_share

    if experts_per_token is not None:
        if predictor not in (RunConfig.predictor, "router"):
            raise typer.BadParameter("only the router chooses experts: leave --predictor out", param_hint="--predictor")
        predictor = f"router:{experts_per_token}"
    with usage_errors("--predictor"):
        parse_predictor(predictor)
    with usage_errors("--max-ppl-increase"):
        return predictor, parse_share(max_ppl_increase)


def parse_cap(memory: str | None, weight_memory: str | None, vram: str | None = None) -> Cap:
    """The cap from `--memory` (a size, or a share of the usable memory: `50%`), `--weight-memory` and `--vram` (sizes).

    Raises:
        typer.BadParameter: both, or no size.
        CapTooLargeError: more than this process may use.
    """
    if memory is not None and weight_memory is not None:
        raise typer.BadParameter("give --memory or --weight-memory, not both")
    from flashinfer.machine import memory_cap

    with usage_errors("--memory"):
        whole = None if memory is None else memory_cap(memory)
    with usage_errors("--weight-memory"):
        weights = None if weight_memory is None else parse_cap_size(weight_memory)
    with usage_errors("--vram"):
        return Cap(whole, weights, None if vram is None else parse_cap_size(vram))
