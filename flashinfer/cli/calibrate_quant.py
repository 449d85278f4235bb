"""`flashinfer calibrate --quant`: the store in other codecs, and what that costs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashinfer.config import Cap, RunConfig

if TYPE_CHECKING:
    from flashinfer.tune.quantise import QuantReport
    from flashinfer.tune.quantising import QuantOptions

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""


def quantise_store(
    store: Path, text: Path, options: QuantOptions, *, cap: Cap, run: RunConfig, device: str, as_json: bool
) -> None:
    """Quantise, and print what came of it. Raises as `tune.quantise.quantise`."""
    from flashinfer.cli.progress import token_progress
    from flashinfer.tune.judge import check_peak
    from flashinfer.tune.quantise import quantise

    with token_progress() as progress:
        report = quantise(store, text, options, cap=cap, run=run, device=device, progress=progress)
    if as_json:
        print(json.dumps(_as_json(report)))
    else:
        for line in _lines(report):
            print(line)
    if report.resumed:
        print("went on with what an earlier calibration had done", file=sys.stderr)
    if report.dropped:
        print(
            "predictors and statistics were of the weights as they were, and are gone; to make them again, run "
            f"`flashinfer calibrate {store} --text {text}`",
            file=sys.stderr,
        )
    check_peak(cap)


def _as_json(report: QuantReport) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "calibrate --quant",
        "perplexity": report.after,
        "original_perplexity": report.before,
        "tokens": report.tokens,
        "weight_bytes": report.manifest.weight_bytes(),
        "original_weight_bytes": report.old.weight_bytes(),
        "codecs": dict(report.codecs),
        "kept": dict(report.kept),
        "predictors_dropped": report.dropped,
        "resumed": report.resumed,
    }


def _lines(report: QuantReport) -> list[str]:
    """For people: sizes, perplexities, and what was kept in more bits."""
    from flashinfer.units import format_size

    before, now = report.old.weight_bytes(), report.manifest.weight_bytes()
    counts = Counter(report.codecs.values())
    kept = Counter(codec or "its own type" for codec in report.kept.values())
    lines = [
        f"weights: {format_size(before)} -> {format_size(now)}, {now / before:.1%}",
        f"  matrices changed: {', '.join(f'{n} to {codec}' for codec, n in counts.most_common())}",
        f"  perplexity of {report.tokens} held-out tokens: {report.before:.4g} -> {report.after:.4g} "
        f"({report.after / report.before - 1.0:+.2%})",
    ]
    if kept:
        lines.append(f"  kept for it: {', '.join(f'{n} in {codec}' for codec, n in kept.most_common())}")
    return lines
