"""What each codec costs in quality and saves in bytes: the table of `docs/quantization.md`.

    python benchmarks/codecs.py CHECKPOINT --text HELD_OUT [--calibrate TEXT] [--into docs/quantization.md]

Every codec is packed and held against the checkpoint's own type on the same text by `flashinfer eval`, with half of the
store's weight bytes in memory and the fewest bytes as the objective. With --calibrate each store is calibrated on that
text, too (exact selection only: neuron order and records are chosen again), and its bytes, reads and waits over
CALIBRATED tokens stand behind those before. --into replaces what lies between the lines `<!-- codecs -->` and
`<!-- /codecs -->` of a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from flashinfer.quant import CODECS
from flashinfer.store import open_store
from flashinfer.units import format_size

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- codecs -->", "<!-- /codecs -->"
CALIBRATED = 2048
"""Tokens to calibrate on, and to count reads over afterwards."""
HEADER = ("codec", "store", "perplexity", "against own type", "KL", "top-1", "bytes/token", "reads", "waits, ms",
          "per neuron: bits x parts, stored")  # fmt: skip


def flashinfer(*arguments: object) -> str:
    command = [sys.executable, "-m", "flashinfer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def judged(store: Path, reference: Path, text: Path, tokens: int) -> dict[str, Any]:
    """The store's row of `flashinfer eval`, held against the reference."""
    half = open_store(store).manifest.weight_bytes() // 2
    how = ("--against", reference, "--tokens", tokens, "--weight-memory", half, "--io-objective", "bytes")
    found = json.loads(flashinfer("eval", store, "--text", text, *how, "--greedy-tokens", 0, "--json"))
    row: dict[str, Any] = found["rows"][1]
    return row


def cells(codec: str, store: Path, before: dict[str, Any], after: dict[str, Any] | None) -> tuple[str, ...]:
    m, runs = open_store(store).manifest, [r["decode"] for r in (before, after) if r is not None]
    layer = m.layers[0]
    ideal = sum(CODECS[p.codec].row_bytes(p.elements) for p in layer.parts)
    stored = layer.record_bytes / layer.bundles_per_record
    return (
        codec, format_size(m.weight_bytes()), f"{before['perplexity']:.4f}", f"{before['increase']:+.2%}",
        f"{before['kl']:.2g}", f"{before['top1_agreement']:.2%}",
        " → ".join(format_size(r["bytes_read"]) for r in runs), " → ".join(f"{r['reads']:.0f}" for r in runs),
        " → ".join(f"{1e3 * r['io_wait']:.1f}" for r in runs), f"{ideal} B, {stored:.0f} B ({stored / ideal:.2f})",
    )  # fmt: skip


def table(a: argparse.Namespace, codecs: list[str]) -> list[str]:
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    with tempfile.TemporaryDirectory(prefix="flashinfer-codecs-") as folder:
        reference = Path(folder) / "reference.flash"
        flashinfer("pack", a.checkpoint, reference)
        for codec in codecs:
            store, after = Path(folder) / f"{codec}.flash", None
            flashinfer("pack", a.checkpoint, store, "--quant", codec)
            row = judged(store, reference, a.text, a.tokens)
            if a.calibrate is not None:
                flashinfer(
                    "calibrate", store, "--text", a.calibrate, "--predictor", "certified", "--tokens", CALIBRATED
                )
                after = judged(store, reference, a.text, CALIBRATED)
            lines.append(f"| {' | '.join(cells(codec, store, row, after))} |")
            print(lines[-1], file=sys.stderr)
    return lines


def into(file: Path, lines: list[str]) -> None:
    """Replace the table in the file."""
    text = file.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not rest or END not in rest:
        raise SystemExit(f"{file} has no lines {BEGIN} and {END}")
    file.write_text("\n".join([f"{head}{BEGIN}", *lines, f"{END}{tail}"]))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--calibrate", type=Path)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--codec", action="append")
    p.add_argument("--into", type=Path)
    a = p.parse_args()
    lines = table(a, a.codec or [name for name in CODECS if name != "f32"])
    print("\n".join(lines))
    if a.into is not None:
        into(a.into, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
