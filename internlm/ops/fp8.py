"""Linear layers whose three matrix products run in 8-bit floating point (Micikevicius et al., 2022).

Each operand is scaled so that its largest magnitude is that of the format, E4M3, rounded, and multiplied by tensor
cores with fp32 sums; one scale a tensor, from the tensor itself. Hopper's products want both operands with the summed
dim innermost, so each is also needed transposed: one pass writes both. Gradients are E4M3 too: the paper's E5M2 has
more range, which a scale from the tensor itself makes up for, and 2 bits of mantissa, which cost a small model 2 % of
its loss (benchmarks/README.md).

    y  = x W^T        x  [tokens, in],    W  [out, in]
    dx = dy W         dy [tokens, out],   W^T [in, out]
    dW = dy^T x       dy^T [out, tokens], x^T [in, tokens]

Kept for backward: x^T and W^T in 8 bits. Off the GPU the same numbers are multiplied in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from internlm.ops.kernels import find_kernels

E4M3 = torch.float8_e4m3fn


_kernel = find_kernels("fp8_kernel")


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in] times weight [out, in] -> [tokens, out], plus bias [out]. All sizes are multiples of 16."""
    y = _Fp8Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def cast_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, n] -> (rounded [m, n], the same transposed [n, m], fp32 [] by which they are multiplied to be x again)."""
    scale = x.abs().max().float().clamp_min(1e-12) / torch.finfo(E4M3).max
    rounded = (x.float() / scale).to(E4M3)
    return rounded, rounded.T.contiguous(), scale


@torch.library.custom_op("internlm::fp8_cast", mutates_args=())
def _cast(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda and _kernel is not None:
        return _kernel.cast(x.contiguous())
    return cast_reference(x)


@_cast.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    scale = x.new_empty((), dtype=torch.float32)
    return x.new_empty(rows, columns, dtype=E4M3), x.new_empty(columns, rows, dtype=E4M3), scale


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k] times b [n, k] transposed -> [m, n]. `fast`: sums of fewer bits, which forward can bear."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() * scale_a) @ (b.float() * scale_b).T).to(dtype)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x8_t, scale_x = _cast(x)
        w8, w8_t, scale_w = _cast(weight)
        ctx.save_for_backward(x8_t, scale_x, w8_t, scale_w)
        return _product(x8, w8, scale_x, scale_w, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8_t, scale_x, w8_t, scale_w = ctx.saved_tensors
        g8, g8_t, scale_g = _cast(grad)
        grad_x = _product(g8, w8_t, scale_g, scale_w, grad.dtype, fast=False)
        return grad_x, _product(g8_t, x8_t, scale_g, scale_x, grad.dtype, fast=False)
