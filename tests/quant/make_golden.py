"""The golden bytes of bitsandbytes on a CPU, row by row. Needs bitsandbytes, which the tests do not:

python -m tests.quant.make_golden        # rewrites tests/quant/golden/bitsandbytes.npz

The file in the tree was made with bitsandbytes 0.50.2, torch 2.13.0, numpy 2.4.6 on x86-64 with AVX-512.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.quant.samples import OUTLIERS, hard_rows

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.npz"
COLUMNS = 4096


def make() -> dict[str, np.ndarray]:
    """Codes and scales by codec."""
    import bitsandbytes.functional as bnb
    import torch

    rows = torch.from_numpy(hard_rows(COLUMNS))
    others = rows.clone()
    others[:, list(OUTLIERS)] = 0
    found = {"dynamic_map": bnb.create_dynamic_map()}
    found["int8_codes"], found["int8_scales"], _ = bnb.int8_vectorwise_quant(rows.clone())
    found["llm_codes"], found["llm_scales"], _ = bnb.int8_vectorwise_quant(others)
    dynamic = [bnb.quantize_blockwise(row, blocksize=2048) for row in rows]
    found["dynamic8_codes"] = torch.stack([codes for codes, _ in dynamic])
    found["dynamic8_scales"] = torch.stack([state.absmax for _, state in dynamic])
    nf4 = [bnb.quantize_4bit(row, blocksize=64, quant_type="nf4", compress_statistics=True) for row in rows]
    found["nf4_codes"] = torch.stack([codes[:, 0] for codes, _ in nf4])
    found["nf4_scales"] = torch.stack([state.absmax for _, state in nf4])
    found["nf4_largest"] = torch.stack([state.state2.absmax for _, state in nf4])
    found["nf4_mean"] = torch.stack([state.offset for _, state in nf4])
    return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **make())
