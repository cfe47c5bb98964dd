"""The Triton kernels of `fp8.py`: the largest magnitude in one pass, both layouts of the rounded tensor in another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
TILE = 128


@triton.jit
def _largest(x, result, size, BLOCK: tl.constexpr):
    """result fp32 [], 0 before: max |x|."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.abs(tl.load(x + at, at < size, 0.0).to(tl.float32))
    tl.atomic_max(result, tl.max(values, 0))


@triton.jit
def _cast(x, largest, out, out_t, scale, rows, columns, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """x [rows, columns] -> out, and out_t [columns, rows]."""
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    at_t = column.to(tl.int64)[:, None] * rows + row[None, :]
    factor = LIMIT / tl.maximum(tl.load(largest), 1e-12)
    values = tl.load(x + at, inside, 0.0).to(tl.float32) * factor
    rounded = tl.minimum(tl.maximum(values, -LIMIT), LIMIT).to(out.dtype.element_ty)
    tl.store(out + at, rounded, inside)
    tl.store(out_t + at_t, tl.trans(rounded), tl.trans(inside))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, tl.maximum(tl.load(largest), 1e-12) / LIMIT)


def cast(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `cast_reference`, of contiguous x [m, n]."""
    rows, columns = x.shape
    largest = torch.zeros((), device=x.device)
    scale = torch.empty((), device=x.device)
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    out_t = torch.empty(columns, rows, dtype=torch.float8_e4m3fn, device=x.device)
    _largest[(triton.cdiv(x.numel(), BLOCK),)](x, largest, x.numel(), BLOCK, num_warps=8, enable_fp_fusion=True)
    grid = (triton.cdiv(columns, TILE), triton.cdiv(rows, TILE))
    limit = torch.finfo(out.dtype).max
    _cast[grid](x, largest, out, out_t, scale, rows, columns, limit, TILE, num_warps=8, enable_fp_fusion=True)
    return out, out_t, scale
