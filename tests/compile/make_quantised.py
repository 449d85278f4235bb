"""The golden matrices of quantised checkpoints, packed and dequantised by those who define the layouts. Needs their
packages, which the tests do not:

python -m tests.compile.make_quantised        # rewrites tests/compile/golden/quantised.npz

The file in the tree was made with auto_gptq 0.7.1, autoawq 0.2.9 and bitsandbytes 0.50.2 on a CPU, torch 2.13.0.
A case is its tensors, by the names they have in a checkpoint, and `values`, float32 `[out, in]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.quant.samples import uniform, weights

GOLDEN = Path(__file__).parent / "golden" / "quantised.npz"
OUT, COLUMNS = 32, 128
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq-asymmetric": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False},
    "gptq-whole-row": {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": True},
    "gptq-act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "sym": True},
    "gptq-8-asymmetric": {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "nf4-nested": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "nf4-astride": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "nf4-odd": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
BITSANDBYTES = {  # rows, columns, blocks; quantised twice
    "nf4": (OUT, 128, 128, False),
    "nf4-nested": (OUT, 128, 64, True),
    "nf4-astride": (88, 192, 64, True),  # a row of three blocks lies on both sides of the 256th
    "nf4-odd": (OUT, 72, 64, True),  # blocks do not end with the rows
    "fp4": (OUT, 128, 64, False),
}


def recipe(options: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Integers `[out, in]`, their scales and zero-points `[out, groups]`, and the group of each column."""
    bits, group = options["bits"], COLUMNS if options["group_size"] == -1 else options["group_size"]
    groups, index = COLUMNS // group, np.arange(COLUMNS, dtype=np.int32) // group
    if options.get("desc_act"):
        index = index[np.argsort(uniform(COLUMNS, 5))]
    scales = (1 + uniform(OUT * groups, 1).reshape(OUT, groups) % 512).astype(np.float32) / 16384
    zeros = 1 + uniform(OUT * groups, 2).reshape(OUT, groups) % (2**bits - 1)
    if options.get("sym", False):
        zeros[:] = 2 ** (bits - 1)
    return uniform(OUT * COLUMNS, 3).reshape(OUT, COLUMNS) % 2**bits, scales, zeros, index


def chosen(options: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Weights that the recipe's integers hold exactly, as a layer; scales, zero-points and groups as tensors."""
    import torch

    codes, scales, zeros, index = recipe(options)
    linear = torch.nn.Linear(COLUMNS, OUT, bias=False)
    linear.weight.data = torch.from_numpy((codes - zeros[:, index]) * scales[:, index]).float()
    return linear, *(torch.from_numpy(a) for a in (scales, zeros.astype(np.float32), index))


def gptq(options: dict[str, Any]) -> dict[str, Any]:
    import torch
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    linear, scales, zeros, index = chosen(options)
    packed = QuantLinear(options["bits"], options["group_size"], COLUMNS, OUT, False, weight_dtype=torch.float32)
    packed.pack(linear, scales, zeros, index)
    values = packed(torch.eye(COLUMNS)).T.contiguous()
    parts = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales.half(), "g_idx": packed.g_idx}
    return parts | {"values": values}


def awq(options: dict[str, Any]) -> dict[str, Any]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = options["group_size"]
    linear, scales, zeros, _ = chosen(options)
    made = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    values = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).T.contiguous()
    return {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales, "values": values}


def bitsandbytes(case: str) -> dict[str, Any]:
    import bitsandbytes.functional as bnb
    import torch

    rows, columns, block, nested = BITSANDBYTES[case]
    matrix = torch.from_numpy(weights(rows, columns))
    kind = case.partition("-")[0]
    codes, state = bnb.quantize_4bit(matrix, blocksize=block, quant_type=kind, compress_statistics=nested)
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": codes, **parts, "values": bnb.dequantize_4bit(codes, state)}


def make() -> dict[str, np.ndarray]:
    """Every case's arrays, by case and name."""
    found = {}
    for case, options in CASES.items():
        by = {"gptq": gptq, "awq": awq}.get(options["quant_method"])
        for name, tensor in (bitsandbytes(case) if by is None else by(options)).items():
            found[f"{case}/{name}"] = tensor.detach().numpy()
    return found


def golden(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Of a case its options, tensors and values."""
    with np.load(GOLDEN) as file:
        found = {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{case}/")}
    return json.loads(json.dumps(CASES[case])), found, found.pop("values")


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **make())
