"""What `flashinfer eval` says: rows of plain values, as a table of 80 columns, as notes, and as points of a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashinfer.units import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from flashinfer.tune.judge import Quality
    from flashinfer.tune.plot import Point

Row = dict[str, Any]
COLUMNS = (
    ("perplexity", "read"), ("added", "reads"), ("KL", "hits"), ("top-1", "time"), ("common", "range"),
    ("recall", "precision"), ("named", ""),
)  # fmt: skip
"""Of each predictor two lines: quality above, and the cost of a decoded token below."""


def report(
    judged: Sequence[Quality], costs: Sequence[Row | None], against: str | None, greedy_tokens: int
) -> list[Row]:
    """One row of plain values for each predictor; what is not known is None. Shares are of 1, times in seconds.

    against: what the first row, with which the others are compared, is called; None where nothing is compared."""
    base = judged[0].score.perplexity if against is not None else math.nan
    rows = []
    for n, (q, cost) in enumerate(zip(judged, costs, strict=True)):
        compared = against is not None and n > 0
        row = {
            "predictor": against if against is not None and n == 0 else q.name,
            "kind": q.choice.kind,
            "approximation": q.choice.note or None,
            "perplexity": _finite(q.score.perplexity),
            "nll": _finite(q.score.nll),
            "tokens": q.score.tokens,
            "increase": _finite(q.score.perplexity / base - 1.0) if compared else None,
            "kl": q.kl and _finite(q.kl),
            "top1_agreement": q.agreement,
            "greedy": {"common": list(q.prefixes), "of": greedy_tokens} if q.prefixes else None,
            **{name: _mean([getattr(layer, name) for layer in q.named]) for name in ("density", "recall", "precision")},
            "layers": [asdict(layer) for layer in q.named],
            "seconds": q.seconds,
            "decode": cost and _decode(cost),
        }
        rows.append(row)
    return rows


def _decode(cost: Row) -> Row:
    """Of `bench.generate.summary`, what is per decoded token."""
    slow, fast = cost["tokens_per_second_range"]
    names = ("bytes_read", "device_bytes", "reads", "hit_rate", "useful_share", "weights_in_memory")
    times = {"seconds": 1.0 / cost["tokens_per_second"], "seconds_range": [1.0 / fast, 1.0 / slow]}
    return {name: cost[name] for name in names} | times | {"io_wait": 1e-3 * cost["io_wait_ms"]}


def table(rows: Sequence[Row]) -> Table:
    """All predictors, two lines each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    costs = any(row["decode"] for row in rows)
    found = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    found.add_column("predictor", no_wrap=True)
    for above, below in COLUMNS:
        found.add_column(f"{above}\n{below}" if costs or below == "precision" else above, justify="right", no_wrap=True)
    for row in rows:
        pairs = zip(_quality(row), _cost(row), strict=True)
        found.add_row(row["predictor"], *(f"{above}\n{below}" if costs or below else above for above, below in pairs))
    return found


def _quality(row: Row) -> list[str]:
    greedy = row["greedy"]
    common = "-" if greedy is None else f"{_mean(greedy['common']):.3g}/{greedy['of']}"
    return [
        _or_dash(row["perplexity"], lambda p: f"{p:.4f}" if p < 1e4 else f"{p:.4g}"),
        _or_dash(row["increase"], lambda share: f"{share:+.2%}"),
        _or_dash(row["kl"], lambda kl: f"{kl:.2g}"),
        _or_dash(row["top1_agreement"], lambda share: f"{share:.2%}"),
        common,
        _or_dash(row["recall"], lambda share: f"{share:.1%}"),
        f"{row['density']:.1%}",
    ]


def _cost(row: Row) -> list[str]:
    precision, cost = f"{row['precision']:.1%}", row["decode"]
    if cost is None:
        return ["", "", "", "", "", precision, ""]
    unit, scale = ("s", 1.0) if cost["seconds"] >= 1.0 else ("ms", 1e3)
    low, high = (scale * seconds for seconds in cost["seconds_range"])
    return [
        format_size(cost["bytes_read"]),
        f"{cost['reads']:.4g}",
        f"{cost['hit_rate']:.0%}",
        f"{scale * cost['seconds']:.3g} {unit}",
        f"{low:.3g}-{high:.3g}",
        precision,
        "",
    ]


def notes(rows: Sequence[Row], about: Row) -> list[str]:
    """By which protocol that was measured, and every approximation by name, with the layer in which it misses most."""
    text, protocol, decode = about["text"], about["protocol"], about["decode"]
    bos = "no BOS" if protocol["bos"] is None else f"BOS {protocol['bos']}"
    lines = [
        f"{protocol['tokens']} tokens scored of the text's first {text['tokens']}: context {protocol['context']}, "
        f"stride {protocol['stride']}, {bos}"
    ]
    if decode is not None:
        rounds = "1 round" if decode["rounds"] == 1 else f"medians of {decode['rounds']} rounds"
        lines.append(f"per token: {decode['tokens']} decoded after a prompt of {decode['prompt']}, {rounds}")
    if any(row["kind"] == "threshold" for row in rows):
        lines.append("recall of thresholds: the share they keep of what all neurons add to the output")
    named = [row for row in rows if row["approximation"] is not None]
    return lines + [f"{row['predictor']} approximates: {row['approximation']}{_worst(row)}" for row in named]


def _worst(row: Row) -> str:
    recalls = [layer["recall"] for layer in row["layers"]]
    if None in recalls:
        return ""
    layer = min(range(len(recalls)), key=recalls.__getitem__)
    return f"; least recall here {recalls[layer]:.1%}, in layer {layer}"


def points(rows: Sequence[Row]) -> list[Point]:
    """What is plotted of them; the reference adds nothing to its own perplexity."""
    from flashinfer.tune.plot import Point

    return [
        Point(row["kind"], row["predictor"], row["decode"]["bytes_read"], 100 * (row["increase"] or 0.0))
        for row in rows
    ]


def _or_dash(value: float | None, written: Callable[[float], str]) -> str:
    return "-" if value is None else written(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
