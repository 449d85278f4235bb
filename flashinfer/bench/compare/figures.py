"""Runs of all rounds as figures per cap and contender. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from flashinfer.bench.compare.contenders import IN_RAM, LLAMA, NAIVE, Contender
from flashinfer.bench.compare.contest import Run
from flashinfer.bench.compare.disk import roofline
from flashinfer.bench.compare.quality import Logits, largest_difference, perplexity, same_greedy

Row = dict[str, Any]
EXACT = frozenset({"all", "exact", "certified", "router"})
"""Predictors that leave out nobody who fires."""


def summarize(
    runs: Sequence[Run], contenders: Sequence[Contender], script: Sequence[int], rates: Mapping[str, float]
) -> dict[str, list[Row]]:
    """Three tables. script: the forced tokens; rates: bytes/s at which each backend's threads scan memory."""
    who = {c.name: c for c in contenders}
    caps = sorted({r.cap for r in runs}, key=lambda cap: (cap is None, cap or 0))
    groups = [(cap, c, [r for r in runs if (r.cap, r.contender) == (cap, c.name)]) for cap in caps for c in contenders]
    groups = [group for group in groups if group[2]]
    reference = _reference(runs, contenders)
    rows = [_row(cap, c, some) | _of_ours(c, some, rates) | _quality(c, some, script) for cap, c, some in groups]
    for row in rows:
        row |= {key: _times(row, rows, name, row["cap"]) for key, name in (("to_llama", LLAMA), ("to_naive", NAIVE))}
        row["to_ram"] = _times(row, rows, IN_RAM, None)
    return {
        "rows": rows,
        "predictions": [_prediction(cap, c, some) for cap, c, some in groups if _predicts(c) and _ended_well(some)],
        "logits": [] if reference is None else _logits(runs, who, *reference),
    }


def _ended_well(runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r.status == "ok"]


def _middle(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return median(there) if there else None


def _row(cap: int | None, c: Contender, runs: Sequence[Run]) -> Row:
    seconds = [s for r in runs for s in r.tokens]
    return {
        "cap": cap,
        "contender": c.name,
        "peak": max(r.peak for r in runs),
        "charged": max(r.charged or 0 for r in runs),
        "endings": dict(Counter(r.status for r in runs)),
        "floor": _middle(r.end.get("floor") for r in runs),
        "s_per_token": _middle(seconds),
        "s_per_token_range": [min(seconds), max(seconds)] if seconds else None,
        "tokens": len(seconds),
        "bytes_per_token": _middle(sum(r.device) / len(r.device) if r.device else None for r in runs),
        "first_token_s": _middle(r.first_token_s for r in runs),
        "disk": _middle(r.disk[0] for r in runs),
    }


def _times(row: Row, rows: Sequence[Row], name: str, cap: int | None) -> float | None:
    """How many times faster a token is than that contender's under that cap."""
    base = next((r["s_per_token"] for r in rows if (r["contender"], r["cap"]) == (name, cap)), None)
    return base / row["s_per_token"] if base and row["s_per_token"] else None


def _of_ours(c: Contender, runs: Sequence[Run], rates: Mapping[str, float]) -> Row:
    """What only ours can say of itself: what it asked for, and how near a token comes to what its bytes take."""
    well = _ended_well(runs) if c.rung else []
    if c.rung is None or not well:
        return {"asked_per_token": None, "reads_per_token": None, "roofline": None}
    dram = rates[c.rung.backend]
    shares = [
        roofline(r.end["asked"]["bytes"], median(r.disk), r.end["predicted"]["probed"]["dram_bytes"], dram, s)
        for r in well
        for s in [median(r.tokens)]
    ]
    return {
        "asked_per_token": median(r.end["asked"]["bytes"] for r in well),
        "reads_per_token": median(r.end["asked"]["reads"] for r in well),
        "roofline": median(shares),
    }


def _quality(c: Contender, runs: Sequence[Run], script: Sequence[int]) -> Row:
    found = [r.logits for r in runs if r.logits is not None and c.comparable]
    return {"perplexity": _middle(perplexity(logits, script) for logits in found)}


def _predicts(c: Contender) -> bool:
    """The planner knows nothing of reads part by part."""
    return c.rung is not None and not c.rung.apart


def _prediction(cap: int | None, c: Contender, some: Sequence[Run]) -> Row:
    """What the plan said and what came. Errors are (predicted - reached) / reached, by round."""
    runs = _ended_well(some)
    asked = [r.end["asked"]["bytes"] for r in runs]
    reached = [median(r.tokens) for r in runs]
    out: Row = {
        "cap": cap,
        "contender": c.name,
        "weights": _middle(r.end["weights"] for r in runs),
        "disk": [r.disk for r in runs],
        "bound": runs[0].end["predicted"]["probed"]["bound"],
        "bytes_asked": median(asked),
        "bytes_kernel": _middle(sum(r.device) / len(r.device) if r.device else None for r in runs),
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


def _reference(runs: Sequence[Run], contenders: Sequence[Contender]) -> tuple[str, Logits] | None:
    """The first run of an exact one of ours, and whose it was; of the native ones where there are any."""
    exact = [c for c in contenders if c.rung is not None and c.predictor in EXACT]
    exact.sort(key=lambda c: c.rung is not None and c.rung.backend != "native")
    for c in exact:
        for r in runs:
            if r.contender == c.name and r.logits is not None:
                return c.name, r.logits
    return None


def _logits(runs: Sequence[Run], who: Mapping[str, Contender], name: str, reference: Logits) -> list[Row]:
    """Every comparable contender's logits, of all its runs, against the reference's."""
    out = []
    for c in who.values():
        found = [r.logits for r in runs if r.contender == c.name and r.logits is not None]
        if not found or not c.comparable:
            continue
        out.append({
            "contender": c.name, "reference": name, "runs": len(found), "positions": sum(len(t) for t in found),
            "same_greedy": sum(same_greedy(t, reference) for t in found),
            "largest_difference": max(largest_difference(t, reference) for t in found),
            "largest_logit": float(abs(reference).max()), "spread": float(reference.std()),
            "identical": all(bool((t == reference).all()) for t in found),
        })  # fmt: skip
    return out
