"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) over the last dim (Zhang and Sennrich, 2019)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """All in fp32, rounded once to `dtype`. x [..., size], weight [size]."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm of x [..., size] with statistics in fp32; the result has `dtype`, by default that of x.

    torch's fused kernel wants one dtype everywhere; an fp32 weight or an fp32 residual stream takes the plain path. So
    does the compiler, which fuses it with its neighbours.
    """
    dtype = dtype or x.dtype
    if x.is_cuda and not torch.compiler.is_compiling() and x.dtype == weight.dtype == dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps, dtype)
