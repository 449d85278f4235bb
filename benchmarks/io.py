"""Random and sequential reads of a disk, fio beside ours; method and results in `README.md` beside this file.

python benchmarks/io.py PATH [--file-size 4GiB] [--seconds 2] [--json]    the same as `flashinfer bench io`
python benchmarks/io.py table REPORT.json                                 what that printed with --json, as markdown
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flashinfer.cli import main

HEAD = (
    "| pattern | size | in flight | MB/s | p50 ms | p99 ms | CPU s/GB "
    "| fio MB/s | p50 ms | p99 ms | CPU s/GB | % of fio | CPU |"
)


def markdown(report: dict[str, Any]) -> str:
    """Medians, in brackets the range over the rounds; the last two columns are ours over fio's, round by round."""
    lines = [
        f"{report['device']}, {report['filesystem']}; a file of {report['file_bytes'] / 1e9:.2f} GB; {report['note']}; "
        f"beside {report['fio'] or 'nothing'}; {report['results'][0]['rounds']} rounds; the kernel fetched "
        f"{100 * (report['device_share'] or 0):.0f} % of the bytes asked for",
        "",
        HEAD,
        "| --- " * HEAD.count(" | ") + "| --- |",
    ]
    for row in report["results"]:
        cells = [row["pattern"], f"{row['chunk'] // 1024} KiB", str(row["threads"]), *_figures(row)]
        if (fio := row["fio"]) is not None:
            speed = f"{100 * fio['speed']:.0f} % ({100 * fio['speed_low']:.0f}-{100 * fio['speed_high']:.0f})"
            cells += [*_figures(fio), speed, f"{fio['cpu']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> list[str]:
    speed = f"{row['mb_per_s']:.0f} ({row['low']:.0f}-{row['high']:.0f})"
    return [speed, f"{1e3 * row['p50_s']:.3g}", f"{1e3 * row['p99_s']:.3g}", f"{row['cpu_s_per_gb']:.3g}"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        print(markdown(json.loads(Path(sys.argv[2]).read_text())))
    else:
        raise SystemExit(main(["bench", "io", *sys.argv[1:]]))
