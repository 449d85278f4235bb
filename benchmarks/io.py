"""Random and sequential reads of a disk; method and results in `README.md` beside this file.

python benchmarks/io.py PATH [--file-size 4GiB] [--seconds 2] [--json]
"""

from flashinfer.cli import main

if __name__ == "__main__":
    import sys

    raise SystemExit(main(["bench", "io", *sys.argv[1:]]))
