"""The way in that no other package overwrites.

The package index has an unrelated project, `flashinfer-python`, that installs into the same
`flashinfer/` directory as this one. Whichever was installed last owns `flashinfer/__init__.py`, so
the check whether it is ours cannot live there. It looks without importing: theirs may load CUDA.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

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


def main() -> int:
    """The `flashinfer` and `flashinfer-offload` commands: exit status 1 with one line where shadowed."""
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


if __name__ == "__main__":
    sys.exit(main())
