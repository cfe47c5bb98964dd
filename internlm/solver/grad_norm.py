"""The global gradient norm, and the factor that clipping makes of it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from internlm.core.collectives import all_reduce_
from internlm.core.mesh import Mesh


def global_norm(counted_grads: Iterable[Tensor], mesh: Mesh) -> Tensor:
    """L2 norm over all parameters: fp32 [] on the device. One all-reduce.

    Every element is among the `counted_grads` of exactly one rank. Sums run in fp64, so that the norm hardly depends on
    how the elements are cut.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for grad in counted_grads:
        total += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    all_reduce_(total, mesh.world_group)
    return total.sqrt().float()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm), as `torch.nn.utils.clip_grad_norm_` has it; max_norm 0: no clipping."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
