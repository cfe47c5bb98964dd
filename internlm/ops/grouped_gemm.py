"""One product per group of rows, each group with a weight of its own: what the experts of a layer compute.

Which path runs is decided here and nowhere else:

    grouped  torch's F.grouped_mm: one kernel for all groups, which reads the group sizes on the device; bfloat16 on
             GPUs from compute capability 8.0 on, widths in multiples of 8
    loop     one product after the other; any device and dtype, waits for the group sizes
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

_ALIGNMENT = 8  # elements: grouped_mm wants rows of 16 bytes


def grouped_linear_reference(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows [rows, in] in order of their group, weight [groups, out, in], counts int64 [groups] -> [rows, out]."""
    parts = rows.split(counts.tolist())
    # unbind, not indexing: its backward stacks the gradients, where each index would make a whole one
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=True)])


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows [rows, in] in order of their group, weight [groups, out, in], counts int64 [groups] -> [rows, out].

    The counts add up to the rows; a group may be empty. Differentiable by rows and weight.
    """
    if not has_grouped_mm(rows, weight):
        log_once(logger, f"experts: one product after the other ({rows.dtype} on {rows.device.type})")
        return grouped_linear_reference(rows, weight, counts)
    log_once(logger, "experts: grouped GEMM by F.grouped_mm")
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


def has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's kernel takes these tensors."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and weight.shape[1] % _ALIGNMENT == 0
        and weight.shape[2] % _ALIGNMENT == 0
    )
