"""The paper's ladder and other programs under memory caps, interleaved; method and results in `README.md` beside this.

python benchmarks/compare.py STORE --memory 3.4GB [--packed STORE] [--checkpoint DIR] [--peer-python PYTHON] ...
"""

from flashinfer.cli import main

if __name__ == "__main__":
    import sys

    raise SystemExit(main(["bench", "compare", *sys.argv[1:]]))
