"""Seconds per token, by cap and contender. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashinfer.bench.compare.markdown import cap_name
from flashinfer.tune.plot import DOTS, save

INCHES_PER_ROW = 0.28
NOTE = "No plot: matplotlib is not installed (pip install 'flashinfer-offload[bench]')."


def can_plot() -> bool:
    """Whether there is what `draw` needs."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write the plot to a file: a panel for each cap, medians with their ranges, on a common logarithmic scale.
    rows: those of `figures.summarize` that decoded tokens.

    Raises:
        PlotError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    caps = list(dict.fromkeys(row["cap"] for row in rows))
    counts = [sum(row["cap"] == cap for row in rows) for cap in caps]
    height = INCHES_PER_ROW * sum(counts) + 0.7 * len(caps) + 0.8
    figure = Figure(figsize=(7.0, height), dpi=DOTS, layout="constrained")
    panels = figure.subplots(len(caps), sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axes, cap in zip(panels, caps, strict=True):
        some = [row for row in rows if row["cap"] == cap]
        middle = [row["s_per_token"] for row in some]
        below = [m - row["s_per_token_range"][0] for m, row in zip(middle, some, strict=True)]
        above = [row["s_per_token_range"][1] - m for m, row in zip(middle, some, strict=True)]
        axes.errorbar(middle, [row["contender"] for row in some], xerr=[below, above], fmt="o", color="0.2")
        axes.margins(y=0.5 / len(some))
        axes.grid(axis="x", color="0.9")
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title("no cap" if cap is None else f"{cap_name(cap)} GB", fontsize="small", loc="left")
        axes.tick_params(labelsize="small")
    panels[-1].set_xlabel("seconds per token (median, range)")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)
