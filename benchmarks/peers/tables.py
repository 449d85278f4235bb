"""Runs of all rounds as figures per cap and contender, and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from .contest import Run

OURS = "flashinfer"
GB = 1e9


def summarize(runs: Sequence[Run], comparable: frozenset[str]) -> dict[str, Any]:
    """The three tables of one model. `comparable`: contenders whose logits should be ours."""
    caps = sorted({r.cap for r in runs})
    names = list(dict.fromkeys(r.contender for r in runs))
    groups = [(cap, name, [r for r in runs if (r.cap, r.contender) == (cap, name)]) for cap in caps for name in names]
    rows = [_row(cap, name, some) for cap, name, some in groups if some]
    ours = {row["cap"]: row["s_per_token"] for row in rows if row["contender"] == OURS}
    for row in rows:
        base = ours.get(row["cap"])
        row["times_ours"] = row["s_per_token"] / base if base and row["s_per_token"] else None
    mine = [(cap, [r for r in some if "predicted" in r.end]) for cap, name, some in groups if name == OURS]
    return {
        "rows": rows,
        "predictions": [_prediction(cap, some) for cap, some in mine if some],
        "logits": _logits(runs, names, comparable),
    }


def _middle(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return median(there) if there else None


def _row(cap: int, name: str, runs: Sequence[Run]) -> dict[str, Any]:
    seconds = [s for r in runs for s in r.tokens]
    first = [r.load_s + r.prompt_s for r in runs if r.load_s is not None and r.prompt_s is not None]
    return {
        "cap": cap,
        "contender": name,
        "peak": max(r.peak for r in runs),
        "charged": max(r.charged or 0 for r in runs),
        "endings": dict(Counter(r.status for r in runs)),
        "floor": _middle(r.end.get("floor") for r in runs),
        "s_per_token": _middle(seconds),
        "s_per_token_range": [min(seconds), max(seconds)] if seconds else None,
        "tokens": len(seconds),
        "bytes_per_token": _middle(sum(r.device) / len(r.device) if r.device else None for r in runs),
        "first_token_s": _middle(first),
        "disk": _middle(r.disk[0] for r in runs),
    }


def _prediction(cap: int, runs: Sequence[Run]) -> dict[str, Any]:
    """Ours under one cap: what the plan said and what came. Errors are (predicted - actual) / actual, by round."""
    ledger = [r.end["ledger"]["decode"] for r in runs]
    asked = [account["bytes_read"] / account["tokens"] for account in ledger]
    reached = [median(r.tokens) for r in runs]
    out: dict[str, Any] = {
        "cap": cap,
        "weights": _middle(r.end["weights"] for r in runs),
        "disk": [r.disk for r in runs],
        "bound": runs[0].end["predicted"]["probed"]["bound"],
        "bytes_ledger": median(asked),
        "bytes_kernel": median(sum(r.device) / len(r.device) for r in runs),
        "bytes_predicted": median(r.end["predicted"]["probed"]["bytes"] for r in runs),
        "bytes_error": [_off(r.end["predicted"]["probed"]["bytes"], a) for r, a in zip(runs, asked, strict=True)],
        "s_per_token": median(reached),
    }
    for name in ("probed", "cached"):
        said = [r.end["predicted"][name]["seconds"] for r in runs]
        out[f"s_{name}"] = median(said)
        out[f"s_{name}_error"] = [_off(s, a) for s, a in zip(said, reached, strict=True)]
    return out


def _off(predicted: float, actual: float) -> float | None:
    return (predicted - actual) / actual if actual else None if predicted else 0.0


def _logits(runs: Sequence[Run], names: Sequence[str], comparable: frozenset[str]) -> list[dict[str, Any]]:
    """Every run's logits against those of our first run."""
    reference = next((r.logits for r in runs if r.contender == OURS and r.logits is not None), None)
    out = []
    for name in names:
        theirs = [r.logits for r in runs if r.contender == name and r.logits is not None]
        if reference is None or not theirs or name not in comparable:
            continue
        same = sum(int((t.argmax(-1) == reference.argmax(-1)).sum()) for t in theirs)
        out.append({
            "contender": name, "runs": len(theirs), "positions": sum(len(t) for t in theirs), "same_greedy": same,
            "largest_difference": float(max(np.abs(t - reference).max() for t in theirs)),
            "largest_logit": float(np.abs(reference).max()), "spread": float(reference.std()),
            "identical": all(np.array_equal(t, reference) for t in theirs),
        })  # fmt: skip
    return out


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    out = ["# Under a cap", "", *(f"- {line}" for line in result["facts"]), ""]
    for model in result["models"]:
        out += [f"## {model['label']}", "", *(f"{note}  " for note in model["notes"]), ""]
        out += _main_table(model["tables"]["rows"])
        if model["tables"]["predictions"]:
            out += ["", "Predicted and reached, ours (off: predicted against reached, each round).", ""]
            out += _prediction_table(model["tables"]["predictions"])
        if model["tables"]["logits"]:
            out += ["", "Logits after the prompt and after every forced token, against those of our first run.", ""]
            out += _logits_table(model["tables"]["logits"])
        out.append("")
    return "\n".join(out)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _main_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ("cap, GB", "", "peak memory, GB", "s/token (range)", "times ours", "GB read/token", "first token, s",
              "probe before, GB/s", "ended")  # fmt: skip
    return _table(header, [
        (f"{r['cap'] / GB:.3g}", r["contender"], _number(r["peak"] / GB, 3), _spread(r), _number(r["times_ours"], 1),
         _number(r["bytes_per_token"] and r["bytes_per_token"] / GB), _number(r["first_token_s"], 1),
         _number(r["disk"] / GB), _ended(r))
        for r in rows
    ])  # fmt: skip


def _spread(row: dict[str, Any]) -> str:
    """Median and range of a token's seconds."""
    if row["s_per_token"] is None:
        return "-"
    digits = 2 if row["s_per_token"] >= 0.1 else 4
    low, high = row["s_per_token_range"]
    return f"{row['s_per_token']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _ended(row: dict[str, Any]) -> str:
    floor = f" (floor {row['floor'] / GB:.3f} GB)" if row["floor"] else ""
    total = sum(row["endings"].values())
    return (
        ", ".join(status if n == total else f"{status} {n} of {total}" for status, n in row["endings"].items()) + floor
    )


def _errors(errors: Sequence[float | None]) -> str:
    return ", ".join("-" if e is None else f"{e:+.1%}" for e in errors)


def _prediction_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ("cap, GB", "weights held, GB", "GB/token predicted", "asked (ledger)", "fetched (kernel)", "off",
              "s/token predicted, disk as probed", "reached", "off", "s/token, curve known before", "off",
              "disk probed, GB/s", "bound by")  # fmt: skip
    cells = []
    for r in rows:
        rates = [rate / GB for some in r["disk"] for rate in some]
        cells.append((
            f"{r['cap'] / GB:.3g}", _number(r["weights"] / GB), _number(r["bytes_predicted"] / GB, 3),
            _number(r["bytes_ledger"] / GB, 3), _number(r["bytes_kernel"] / GB, 3), _errors(r["bytes_error"]),
            _number(r["s_probed"]), _number(r["s_per_token"]), _errors(r["s_probed_error"]),
            _number(r["s_cached"]), _errors(r["s_cached_error"]),
            f"{median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f})", r["bound"],
        ))  # fmt: skip
    return _table(header, cells)


def _logits_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = (
        "",
        "runs",
        "largest difference",
        "largest logit",
        "standard deviation",
        "same greedy token",
        "bit for bit",
    )
    return _table(header, [
        (r["contender"], str(r["runs"]), f"{r['largest_difference']:.2g}", f"{r['largest_logit']:.3g}",
         f"{r['spread']:.2g}", f"{r['same_greedy']} of {r['positions']}", "yes" if r["identical"] else "no")
        for r in rows
    ])  # fmt: skip
