"""The command line: which commands there are, and how an error becomes one line and an exit status.

Each command is a module of this package with a function `command`, or a Typer `app` where it has
subcommands. Only the one that is called is imported; their heavy imports are inside functions.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from flashinfer import __distribution__, __version__
from flashinfer.cli.options import LogLevelOption, set_log_level
from flashinfer.errors import FlashInferError, PlatformError

PROGRAM: Final = "flashinfer"
COMMANDS: Final = {
    "demo": "Pack the embedded checkpoint and generate from it under a cap below its size.",
    "pack": "Rewrite a checkpoint as a weight store.",
    "inspect": "Show what is in a weight store.",
    "verify": "Check every checksum of a weight store.",
    "plan": "Say where each byte of a memory cap goes, and how fast that will be.",
    "generate": "Continue a prompt under a memory cap.",
    "chat": "Hold a conversation under a memory cap.",
    "calibrate": "Learn from a text which neurons fire, and write predictors into a store.",
    "eval": "Measure perplexity, and what predictors cost in quality.",
    "bench": "Measure the disk, generation and the cache; compare with other programs.",
    "doctor": "Look at this machine and at the place of a store.",
}
"""Name and short help of every command, in the order of `--help`."""

# typer carries its own click or not, depending on its version: find the base class through what it exports
_CLICK_ERROR: Final = typer.BadParameter.__mro__[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: this process's arguments); returns the exit status.

    0: done. 1: an expected error, one line on stderr. 2: wrong usage, one line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        _check_platform()
        _never_fail_to_encode()
        command: Any = typer.main.get_command(_app(next((a for a in given if a in COMMANDS), None)))
        with command.make_context(PROGRAM, given) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as e:
        return e.exit_code
    except BrokenPipeError:
        # the reader went away; what is left in the buffer must not fail once more at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as e:
        if logging.getLogger("flashinfer").isEnabledFor(logging.DEBUG):
            traceback.print_exception(e)
        status, message = describe(e)
        print(message, file=sys.stderr)
        return status


def describe(error: BaseException) -> tuple[int, str]:
    """Exit status and the line to print for an error that ended a command."""
    match error:
        case FlashInferError():
            return 1, _line(str(error))
        case KeyboardInterrupt() | typer.Abort():
            return 1, f"{PROGRAM}: interrupted"
        case _ if isinstance(error, _CLICK_ERROR):
            return 2, _usage(error)
        case MemoryError():
            return 1, _line("out of memory; lower --memory, or close other programs")
        case OSError():
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            return 1, _line(f"{where}{error.strerror or error}")
    hint = "this is a bug: please report it with what `--log-level debug` prints"
    return 1, _line(f"{type(error).__name__}: {error} ({hint})")


def _line(message: str) -> str:
    return f"{PROGRAM}: error: {' '.join(message.split())}"


def _usage(error: Any) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    path = error.ctx.command_path if error.ctx is not None else PROGRAM
    return f"{_line(error.format_message())} (see `{path} --help`)"


def _check_platform() -> None:
    if sys.platform == "win32":
        raise PlatformError("Windows is not supported; use Linux, or WSL 2 on this machine")


def _never_fail_to_encode() -> None:
    """A character the terminal's encoding lacks is shown as `?` rather than ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _app(called: str | None) -> typer.Typer:
    """The whole command line; of all commands only `called` is real, the others show their short help."""
    app = typer.Typer(
        name=PROGRAM,
        help="Generate text from language models larger than memory.",
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, short in COMMANDS.items():
        module = importlib.import_module(f"flashinfer.cli.{name}") if name == called else None
        if module is None:
            app.command(name, help=short)(_not_called)
        elif hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=short)
        else:
            app.command(name)(module.command)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        print(f"{__distribution__} {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
    log_level: LogLevelOption = None,
) -> None:
    set_log_level(log_level)


def _not_called() -> None:
    raise AssertionError("only the command that is called is ever run")
