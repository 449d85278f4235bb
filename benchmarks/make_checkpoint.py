"""Write a random-weights Hugging Face checkpoint of about a given size, one piece at a time.

    python benchmarks/make_checkpoint.py OUT --size 2GiB [--family llama|opt] [--dtype f16|bf16|f32]

Nothing is planted in it (`synthetic.py` does that): weights are normal random numbers from a fixed seed, so
that nothing on the way compresses them. The tokenizer is byte-level: one token per byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashinfer.quant import codec_named
from flashinfer.units import format_size, parse_size

sys.path.insert(0, str(Path(__file__).resolve().parent))
from planted.shapes import TORCH_NAMES, Shape
from planted.write import write_random

VOCAB = 320
FAMILIES = {"llama": (128, 8 / 3), "opt": (64, 4.0)}
"""Per family: the size of a head, and FFN neurons per hidden value."""


def choose_shape(family: str, size: int, dtype: str) -> Shape:
    """The shape whose weights come nearest to `size` bytes: wider models are deeper, as real ones are."""
    head, ratio = FAMILIES[family]
    itemsize = codec_named(dtype).row_bytes(1)
    candidates = []
    for hidden in range(4 * head, 8192 + 1, 4 * head):
        ffn = int(ratio * hidden) // 256 * 256
        for layers in range(4, 65):
            total = itemsize * layers * (4 * hidden**2 + (3 if family == "llama" else 2) * hidden * ffn)
            candidates.append((abs(total - size) / size + abs(layers - hidden / 128) / 100, hidden, ffn, layers))
    _, hidden, ffn, layers = min(candidates)
    return Shape(family, hidden, ffn, layers, hidden // head, VOCAB, dtype=dtype)


def make_checkpoint(out: Path, *, family: str, size: int, dtype: str, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    return write_random(out, choose_shape(family, size, dtype), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=parse_size, default="512MiB")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--dtype", choices=sorted(TORCH_NAMES), default="f16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = make_checkpoint(args.out, family=args.family, size=args.size, dtype=args.dtype, seed=args.seed)
    print(f"{args.out}: {format_size(total)} of weights")


if __name__ == "__main__":
    main()
