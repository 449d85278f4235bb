"""The way in that no other package overwrites.

The package index has an unrelated project, `flashinfer-python`, that installs into the same
`flashinfer/` directory as this one. Whichever was installed last owns `flashinfer/__init__.py`, so
the check whether it is ours cannot live there. It looks without importing: theirs may load CUDA.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

MARKER = '__distribution__ = "flashinfer-offload"'
"""The line of our `flashinfer/__init__.py` that theirs does not have."""
FIX = "pip uninstall flashinfer-python && pip install --force-reinstall flashinfer-offload"


def shadowed_by() -> str | None:
    """Where the `flashinfer` that Python would import lies, if it is not this project's; else None."""
    spec = importlib.util.find_spec("flashinfer")
    assert spec is not None, "both packages are of one distribution"
    if spec.origin is None:  # no __init__.py: what uninstalling theirs leaves of ours
        return str(next(iter(spec.submodule_search_locations or ()), "an unknown place"))
    source = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    return None if MARKER in source else spec.origin


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C. Python remembers a bare KeyboardInterrupt that passed through `exec` and dies of it in the end."""


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise _Interrupt


def _unraisable(unraisable: UnraisableHookArgs) -> None:
    """An interruption that struck in a callback, where Python drops it, comes again a moment later."""
    if unraisable.exc_type is _Interrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(unraisable)


def main() -> int:
    """The `flashinfer` and `flashinfer-offload` commands: exit status 1 with one line where shadowed."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a background job ignores it
    signals = (signal.SIGINT, signal.SIGALRM) if heeded and hasattr(signal, "setitimer") else ()
    try:
        for number in signals:
            signal.signal(number, _interrupt)
            sys.unraisablehook = _unraisable
        return _run()
    except KeyboardInterrupt:  # before the command line could say so
        print("flashinfer: interrupted", file=sys.stderr)
        return 1
    finally:
        for number in signals:  # the outcome is decided: let nothing disturb the interpreter's exit
            signal.signal(number, signal.SIG_IGN)


def _run() -> int:
    foreign = shadowed_by()
    if foreign is not None:
        print(
            f"flashinfer: error: the package at {foreign} is not flashinfer-offload's; flashinfer-python "
            f"uses the same import name. Run: {FIX}",
            file=sys.stderr,
        )
        return 1
    from flashinfer.cli import main as command_line

    return command_line()
