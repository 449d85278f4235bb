"""Options of the commands that run a model and write text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from flashinfer.cli.options import usage_errors
from flashinfer.config import CacheConfig, IoConfig, RunConfig


class Objective(StrEnum):
    """What the planner minimises."""

    TIME = "time"
    BYTES = "bytes"


class Device(StrEnum):
    """Where arithmetic runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Reader(StrEnum):
    """How the store is read."""

    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"
    KVIKIO = "kvikio"


DEFAULT_OBJECTIVE, DEFAULT_READER, DEFAULT_WINDOW, DEFAULT_THREADS = (
    Objective(IoConfig.objective), Reader(IoConfig.reader), CacheConfig.window, RunConfig.threads,
)  # fmt: skip
ADAPTED = "with an adapter: calibrated predictors are not used"
"""What is said of a run with one: `auto`, too, is exact then."""
WindowOption = Annotated[int, typer.Option(min=0, help="Tokens whose neurons the cache tries to keep.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int | None, typer.Option(help="Draw among the K most probable tokens; 0 is off.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw among the most probable tokens that sum to P.")]
MinPOption = Annotated[float | None, typer.Option(help="Draw among tokens at least P times as probable as the best.")]
PenaltyOption = Annotated[float | None, typer.Option(help="Above 1 avoids tokens seen before.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")]
ObjectiveOption = Annotated[Objective, typer.Option(help="time: fastest; bytes: fewest bytes read.")]
ReaderOption = Annotated[
    Reader, typer.Option(help="auto: io_uring, or threads where there is none; kvikio: straight to a GPU's memory.")
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Compute threads; 0 is all cores.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="What the model is told before the conversation.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="NAME|FILE",
        help="How the model wants conversations: a built-in name, or a jinja file. (default: the checkpoint's own)",
    ),
]


def check_text_options(sampling: dict[str, Any], stops: list[str]) -> None:
    """Raise typer.BadParameter for a sampling value out of its range, or an empty stop string."""
    from flashinfer.generate import Sampler, StopStrings
    from flashinfer.text import GenerationDefaults

    with usage_errors():
        Sampler(GenerationDefaults().sampling(**sampling))
        StopStrings(stops)
