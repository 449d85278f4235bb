"""Quality against bytes: what each predictor, at each level, costs and saves. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashinfer.errors import PlotError
from flashinfer.units import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (7.0, 4.6)
DOTS = 150
"""Per inch, where the file holds dots."""
BYTES = 24 * MIB
"""Memory that drawing takes at most beside the libraries that `check_plot` loads."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Point:
    """One predictor: its kind (points of a kind are joined), its name, bytes read per token, and in percent what it
    adds to the perplexity."""

    kind: str
    name: str
    bytes: float
    increase: float


def check_plot(path: Path) -> None:
    """Load what `draw` needs, and see that it can write such a file.

    Raises:
        PlotError: there is no matplotlib, or it does not write files of that kind.
    """
    try:
        figure = importlib.import_module("matplotlib.figure")
        importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError as e:
        raise PlotError("--plot needs matplotlib: pip install 'flashinfer-offload[plot]'") from e
    kinds = figure.FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise PlotError(f"{path} should end in one of {', '.join('.' + kind for kind in sorted(kinds))}")
    if not path.parent.is_dir():
        raise PlotError(f"{path.parent} is no directory; make it, or plot elsewhere")


def draw(path: Path, points: Sequence[Point], title: str) -> None:
    """Write the plot to a file. Raises PlotError: it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    axes = figure.add_subplot()
    unit = _unit(max(p.bytes for p in points))
    for kind in dict.fromkeys(p.kind for p in points):
        _draw_kind(axes, sorted((p for p in points if p.kind == kind), key=lambda p: p.bytes), 1024**unit)
    axes.axhline(0.0, color="0.8", zorder=0)
    axes.set_xlim(left=0.0)
    axes.set_xlabel(f"read per token ({_UNITS[unit]})")
    axes.set_ylabel("added to the perplexity (%)")
    axes.set_title(title, fontsize="medium")
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file. Raises PlotError: it cannot be written."""
    try:
        figure.savefig(path)
    except OSError as e:
        raise PlotError(f"cannot write {path}: {e.strerror or e}") from e


def _draw_kind(axes: Axes, points: Sequence[Point], scale: int) -> None:
    """The points of one predictor, joined in order of bytes, each with its level."""
    x, y = [p.bytes / scale for p in points], [p.increase for p in points]
    axes.plot(x, y, marker="o", linewidth=1.0, label=points[0].kind)
    for p, at in zip(points, zip(x, y, strict=True), strict=True):
        _, colon, target = p.name.partition(":")
        if colon:
            axes.annotate(target, at, xytext=(4, 4), textcoords="offset points", fontsize="x-small")


def _unit(largest: float) -> int:
    """Which of the units keeps the largest below 1024."""
    return next((n for n in range(len(_UNITS) - 1) if largest < 1024 ** (n + 1)), len(_UNITS) - 1)
