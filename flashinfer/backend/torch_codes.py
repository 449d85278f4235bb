"""Rows of codes in torch: what `quant.layout` says, operation by operation, so with the same bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flashinfer.quant.dynamic import TABLE
from flashinfer.quant.layout import ALIGNMENT, Layout
from flashinfer.quant.nested import GROUPS


def unpack_codes(raw: Tensor, layout: Layout, values: Tensor) -> None:
    """Encoded rows, uint8 `[n, bytes]` with any stride, as float32 `[n, elements]`, contiguous. Writes `values`, on
    whose device `raw` is. Takes up to 12 bytes for each value meanwhile."""
    elements = values.shape[1]
    codes = raw[:, layout.codes_at(elements) : layout.row_bytes(elements)]
    codes = (codes if layout.bits == 8 else _nibbles(codes))[:, :elements]
    torch.index_select(_table(layout, values.device), 0, codes.reshape(-1).int(), out=values.view(-1))
    scales = _scales(raw, layout, elements)
    values.mul_(_spread(scales, layout.group, elements))
    if layout.zero:
        values.add_(_spread(_zeros(raw, layout, elements, scales), layout.group, elements))


@cache
def _table(layout: Layout, device: torch.device) -> Tensor:
    return torch.from_numpy(layout.table).to(device)


@cache
def _map(device: torch.device) -> Tensor:
    return torch.from_numpy(TABLE).to(device)


def _nibbles(data: Tensor) -> Tensor:
    chunks = data.reshape(len(data), -1, 1, ALIGNMENT)
    return torch.cat([chunks & 15, chunks >> 4], dim=2).reshape(len(data), -1)


def _scales(raw: Tensor, layout: Layout, elements: int) -> Tensor:
    """Scales `[n, groups]`, as they are multiplied with."""
    stored = _copied(raw[:, : layout.zeros_at(elements)])
    match layout.scale:
        case "f16":
            scales = stored.view(torch.float16).float()
        case "f32":
            scales = stored.view(torch.float32)
        case "e8m0":  # the bits of the power of two; the smallest one is subnormal
            scales = (stored.int() << 23).clamp_(min=1 << 22).view(torch.float32)
        case "nested":
            scales = _nested(stored, layout.groups(elements))
    return scales * layout.unit


def _zeros(raw: Tensor, layout: Layout, elements: int, scales: Tensor) -> Tensor:
    """Zero-points `[n, groups]`, as they are added."""
    at, groups = layout.zeros_at(elements), layout.groups(elements)
    if layout.zero == "u8":
        return raw[:, at : at + groups].float().neg_() * scales
    return _copied(raw[:, at : at + 2 * groups]).view(torch.float16).float()


def _nested(stored: Tensor, groups: int) -> Tensor:
    floats = _copied(stored[:, :-groups]).view(torch.float32)
    largest = floats[:, 1:].repeat_interleave(GROUPS, dim=1)[:, :groups]
    return _map(stored.device)[stored[:, -groups:].int()] * largest + floats[:, :1]


def _spread(per_group: Tensor, group: int | None, columns: int) -> Tensor:
    """`[n, groups]` -> what each column has `[n, columns]`, or `[n, 1]` where the row is one group."""
    return per_group if group is None else per_group.repeat_interleave(group, dim=1)[:, :columns]


def _copied(data: Tensor) -> Tensor:
    """The same bytes, contiguous, at an even address."""
    return data.clone(memory_format=torch.contiguous_format)
