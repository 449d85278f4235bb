"""The report as Markdown, from figures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

GB = 1e9
Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """The whole report of `series.Series.to_json`."""
    tables = result["tables"]
    out = ["# Under the same caps", "", *(f"- {line}" for line in result["facts"]), ""]
    if not result["complete"]:
        out += ["**Incomplete: interrupted before all rounds were done.**", ""]
    out += [*(f"{note}  " for note in result["notes"]), ""]
    out += _table(("", "what runs", "on"), [(c["name"], c["what"], c["on"]) for c in result["contenders"]])
    if result["left_out"]:
        out += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in result["left_out"].items())]
    if tables["rows"]:
        out += ["", *_main_table(tables["rows"])]
    if tables["predictions"]:
        out += ["", "Predicted and reached, ours (off: predicted against reached, each round).", ""]
        out += _prediction_table(tables["predictions"])
    if tables["logits"]:
        name = tables["logits"][0]["reference"]
        out += ["", f"Logits after the prompt and after every forced token, against the first run of `{name}`.", ""]
        out += _logits_table(tables["logits"])
    return "\n".join([*out, ""])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def number(value: float | None, digits: int = 2) -> str:
    """So many digits behind the point; a dash where there is no number."""
    return "-" if value is None else f"{value:.{digits}f}"


def gigabytes(value: float | None, digits: int = 2) -> str:
    """Bytes in GB."""
    return number(None if value is None else value / GB, digits)


def cap_name(cap: int | None) -> str:
    """A cap in GB, or that there was none."""
    return "none" if cap is None else f"{cap / GB:.3g}"


def _main_table(rows: Sequence[Row]) -> list[str]:
    header = ("cap, GB", "", "s/token (range)", "times faster than llama.cpp", "than naive", "than llama.cpp in RAM",
              "GB read/token (kernel)", "asked", "reads", "first token, s", "peak memory, GB", "perplexity", "roofline",
              "probe before, GB/s", "ended")  # fmt: skip
    return _table(header, [
        (cap_name(r["cap"]), r["contender"], spread(r), number(r["to_llama"]), number(r["to_naive"]),
         number(r["to_ram"]), gigabytes(r["bytes_per_token"], 3), gigabytes(r["asked_per_token"], 3),
         number(r["reads_per_token"], 0), number(r["first_token_s"], 1), gigabytes(r["peak"], 3),
         "-" if r["perplexity"] is None else f"{r['perplexity']:.5g}",
         "-" if r["roofline"] is None else f"{r['roofline']:.0%}", gigabytes(r["disk"]), ended(r))
        for r in rows
    ])  # fmt: skip


def spread(row: Row) -> str:
    """Median and range of a token's seconds."""
    if row["s_per_token"] is None:
        return "-"
    digits = 2 if row["s_per_token"] >= 1 else 3 if row["s_per_token"] >= 0.1 else 4
    low, high = row["s_per_token_range"]
    return f"{row['s_per_token']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ended(row: Row) -> str:
    """How the runs ended, and how many of them, where they differ."""
    floor = f" (floor {row['floor'] / GB:.3f} GB)" if row["floor"] else ""
    total = sum(row["endings"].values())
    words = (status if n == total else f"{status} {n} of {total}" for status, n in row["endings"].items())
    return ", ".join(words) + floor


def _errors(errors: Sequence[float | None]) -> str:
    return ", ".join("-" if e is None else f"{e:+.1%}" for e in errors)


def _prediction_table(rows: Sequence[Row]) -> list[str]:
    header = ("cap, GB", "", "weights held, GB", "GB/token predicted", "asked", "fetched (kernel)", "off",
              "s/token predicted, disk as probed", "reached", "off", "s/token, curve known before", "off",
              "disk probed, GB/s", "bound by")  # fmt: skip
    cells = []
    for r in rows:
        rates = [rate / GB for some in r["disk"] for rate in some]
        cells.append((
            cap_name(r["cap"]), r["contender"], gigabytes(r["weights"]), gigabytes(r["bytes_predicted"], 3),
            gigabytes(r["bytes_asked"], 3), gigabytes(r["bytes_kernel"], 3), _errors(r["bytes_error"]),
            number(r["s_probed"], 3), number(r["s_per_token"], 3), _errors(r["s_probed_error"]),
            number(r["s_cached"], 3), _errors(r["s_cached_error"]),
            f"{median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f})", r["bound"],
        ))  # fmt: skip
    return _table(header, cells)


def _logits_table(rows: Sequence[Row]) -> list[str]:
    header = ("", "runs", "largest difference", "largest logit", "standard deviation", "same greedy token",
              "bit for bit")  # fmt: skip
    return _table(header, [
        (r["contender"], str(r["runs"]), f"{r['largest_difference']:.2g}", f"{r['largest_logit']:.3g}",
         f"{r['spread']:.2g}", f"{r['same_greedy']} of {r['positions']}", "yes" if r["identical"] else "no")
        for r in rows
    ])  # fmt: skip
