"""What it costs that a quantised checkpoint's down cannot keep its codes: the table of `docs/quantization.md`.

    python benchmarks/quantised_checkpoints.py CHECKPOINT --text HELD_OUT [--tokens 8192]

CHECKPOINT, a llama in one safetensors file, is written as GPTQ, AWQ and bitsandbytes lay it out, each value rounded to
nearest (`tests/quantised_checkpoints.py`), packed, and held by `flashinfer eval` against the values its codes stand
for. Some are packed by recipes, too.
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

from flashinfer.store import open_store
from flashinfer.units import format_size
from tests.quantised_checkpoints import awq, bitsandbytes, gptq, quantised

ROOT = Path(__file__).parent.parent
SCHEMES = {
    "GPTQ, group 64, symmetric": gptq(64),
    "GPTQ, group 64": gptq(64, symmetric=False),
    "GPTQ, group 64, act-order": gptq(64, ordered=True),
    "AWQ, group 64": awq(64),
    "bitsandbytes nf4": bitsandbytes(nested=True),
}
DOWN = tuple(f"layers.*.ffn.down.weight={codec}" for codec in ("int4g64", "int4g64z", "int4g64iz", "nf4", "int8"))
RECIPES = {
    "GPTQ, group 64, symmetric": DOWN,
    "GPTQ, group 64, act-order": ("attn=int4g32iz,ffn=int4g32iz", "attn=int8,ffn=int8"),
    "AWQ, group 64": DOWN,
}
"""What they are packed as, too, with `--quant`."""
HEADER = ("checkpoint", "gate, up, attention in", "down in", "weights", "its values", "packed", "KL", "top-1")


def flashinfer(*arguments: object) -> str:
    command = [sys.executable, "-m", "flashinfer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def line(name: str, store: Path, reference: Path, a: argparse.Namespace) -> str:
    how = ("--against", reference, "--tokens", a.tokens, "--greedy-tokens", 0, "--json")
    before, after = json.loads(flashinfer("eval", store, "--text", a.text, *how))["rows"][:2]
    m = open_store(store).manifest
    down = next(p.codec for p in m.layers[0].parts if p.role == "down.weight")
    cells: tuple[Any, ...] = (
        name, m.tensors["layers.0.attn.q.weight"].codec, down, format_size(m.weight_bytes()),
        f"{before['perplexity']:.4f}", f"{after['perplexity']:.4f} ({after['increase']:+.2%})", f"{after['kl']:.2g}",
        f"{after['top1_agreement']:.2%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=8192)
    a = p.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    for name, scheme in SCHEMES.items():
        with tempfile.TemporaryDirectory(prefix="flashinfer-quantised-") as folder:
            theirs, values = Path(folder) / "theirs", Path(folder) / "values"
            quantised(a.checkpoint, theirs, values, scheme)
            reference, store = Path(folder) / "values.flash", Path(folder) / "theirs.flash"
            flashinfer("pack", values, reference)
            flashinfer("pack", theirs, store)
            print(line(name, store, reference, a), flush=True)
            for recipe in RECIPES.get(name, ()):
                flashinfer("pack", theirs, store, "--force", "--quant", recipe)
                print(line(name, store, reference, a), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
