"""Pack checkpoints of several sizes in a fresh process each; report peak memory, seconds and MB/s.

    python benchmarks/pack_memory.py --sizes 512MiB 2GiB [--family llama|opt] [--dtype f16] [--dir DIR] [--quant f16]

Peak memory is the largest resident set the kernel saw: page cache is not part of it. The page cache is warm
with what fits of the checkpoint, which was just written; seconds include the final fsync.
Checkpoints and stores go to a temporary folder under --dir and are removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from flashinfer.units import format_size, parse_size

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_checkpoint import FAMILIES, make_checkpoint

CHILD = """
import json, resource, sys
from pathlib import Path
import flashinfer

report = flashinfer.pack(sys.argv[1], sys.argv[2], quant=sys.argv[3] or None)
usage = resource.getrusage(resource.RUSAGE_SELF)
status = Path("/proc/self/status")
if status.exists():
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
else:
    peak = usage.ru_maxrss
print(json.dumps({"peak_bytes": peak, "seconds": report.seconds, "bytes": report.bytes,
                  "cpu_seconds": usage.ru_utime + usage.ru_stime}))
"""
"""VmHWM, not ru_maxrss, on Linux: the latter begins with the peak of the process that forked."""


def measure(size: int, *, family: str, dtype: str, quant: str, directory: Path) -> dict[str, float]:
    """Make, pack, remove. Returns bytes of the checkpoint and what the child said."""
    work = Path(tempfile.mkdtemp(prefix="pack-memory-", dir=directory))
    try:
        weights = make_checkpoint(work / "checkpoint", family=family, size=size, dtype=dtype)
        command = [sys.executable, "-c", CHILD, str(work / "checkpoint"), str(work / "store"), quant]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        return {"checkpoint_bytes": weights, **json.loads(result.stdout)}
    finally:
        shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[parse_size("512MiB"), parse_size("2GiB")])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--quant", default="")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for size in args.sizes:
        r = measure(size, family=args.family, dtype=args.dtype, quant=args.quant, directory=args.dir)
        results.append(r)
        if not args.json:
            print(
                f"{args.family} {format_size(r['checkpoint_bytes'])} {args.dtype}: "
                f"peak {format_size(r['peak_bytes'])}, "
                f"{r['seconds']:.1f} s, {r['checkpoint_bytes'] / r['seconds'] / 1e6:.0f} MB/s, "
                f"{r['cpu_seconds']:.1f} s of processor time",
                flush=True,
            )
    spread = max(r["peak_bytes"] for r in results) - min(r["peak_bytes"] for r in results)
    if args.json:
        print(json.dumps({"schema_version": 1, "runs": results, "peak_spread_bytes": spread}))
    else:
        print(f"peaks lie within {format_size(spread)} of each other")


if __name__ == "__main__":
    main()
