"""Checkpoints that others quantised: GPTQ, AWQ, bitsandbytes in four bits, MXFP4, fp8 in blocks.

`docs/checkpoints.md` says what is kept.
"""

from flashinfer.checkpoint.quantised.checkpoint import dequantising

__all__ = ["dequantising"]
