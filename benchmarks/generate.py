"""Decoding with a cache, always-miss and naive, interleaved; method and results in `README.md` beside this file.

python benchmarks/generate.py STORE [--memory 4GiB | --weight-memory 1GiB] [-n 32] [--rounds 3] [--json]
"""

from flashinfer.cli import main

if __name__ == "__main__":
    import sys

    raise SystemExit(main(["bench", "generate", *sys.argv[1:]]))
