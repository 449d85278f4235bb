"""Speed against size of read, a line for each number of reads in flight, as in "LLM in a flash" (arXiv 2312.11514,
figure 2b). Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashinfer.bench.io_figures import Result
from flashinfer.tune.plot import DOTS, INCHES, check_plot, save
from flashinfer.units import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plot", "draw"]


def draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Write the plot to a file: a panel for each pattern; medians, the range over the rounds as a band, fio's medians
    as crosses.

    Raises:
        PlotError: it cannot be written.
    """
    from matplotlib.figure import Figure

    patterns = list(dict.fromkeys(r.combination.pattern for r in results))
    figure = Figure(figsize=(INCHES[0] * (1 + len(patterns)) / 2, INCHES[1]), dpi=DOTS, layout="constrained")
    panels = figure.subplots(1, len(patterns), sharey=True, squeeze=False)[0]
    for axes, pattern in zip(panels, patterns, strict=True):
        _draw_panel(axes, [r for r in results if r.combination.pattern == pattern])
        axes.set_title(f"{pattern} reads", fontsize="medium")
    panels[0].set_ylim(bottom=0.0)
    panels[0].set_ylabel("MB/s")
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def _draw_panel(axes: Axes, results: Sequence[Result]) -> None:
    for i, group in enumerate(dict.fromkeys((r.combination.reader, r.combination.threads) for r in results)):
        line = [r for r in results if (r.combination.reader, r.combination.threads) == group]
        _draw_line(axes, sorted(line, key=lambda r: r.combination.chunk), f"C{i}", f"{group[0]}, {group[1]} in flight")
    if any(r.fio for r in results):
        axes.plot([], [], "x", color="0.4", label="fio")
    chunks = sorted({r.combination.chunk for r in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(chunks, [format_size(chunk) for chunk in chunks], rotation=30)
    axes.set_xlabel("size of a read")


def _draw_line(axes: Axes, results: Sequence[Result], color: str, name: str) -> None:
    chunks = [r.combination.chunk for r in results]
    axes.plot(chunks, [r.mb_per_s for r in results], color=color, marker="o", markersize=3, linewidth=1.0, label=name)
    axes.fill_between(chunks, [r.low for r in results], [r.high for r in results], color=color, alpha=0.12, linewidth=0)
    beside = [(r.combination.chunk, r.fio.mb_per_s) for r in results if r.fio is not None]
    if beside:
        axes.plot(*zip(*beside, strict=True), "x", color=color)
