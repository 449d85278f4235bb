"""A GGUF file quantised by llama.cpp's own quantiser.

python -m peers.quantise FULL.gguf OUT.gguf QUANT       # q8_0, q4_0, q4_k_m, ...
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp


def quantise(source: Path, out: Path, quant: str) -> None:
    """Write `out`, beside itself first, so that only a whole file gets its name."""
    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}", None)
    if kind is None:
        raise SystemExit(f"llama.cpp has no quantisation {quant}")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    draft = out.with_name(f"{out.name}.part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(draft).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not quantise {source.name} to {quant}")
    draft.replace(out)


if __name__ == "__main__":
    quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
