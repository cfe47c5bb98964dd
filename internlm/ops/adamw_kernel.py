"""The Triton kernel of `adamw.py`: one pass over parameter, gradient, moments and master.

Contraction to fused multiply-add is off, and division and square root are the correctly rounded ones, so that results
equal those of the torch path bit for bit. Both cost nothing: the kernel waits for memory. (Every launch of a kernel in
this folder says whether it contracts: Triton's default changes, and an environment variable sets it.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024

# KIND: how the fp32 weight is stored.
PLAIN, SPLIT, COPY = 0, 1, 2


@triton.jit
def _adamw(param, grad, exp_avg, exp_avg_sq, other, scalars, size, decay_stop, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """`other`: the remainder (KIND 1) or the fp32 master (KIND 2); a bfloat16 `param` is passed as its bits, int16."""
    grad_factor, one_minus_beta1 = tl.load(scalars), tl.load(scalars + 1)
    beta2, one_minus_beta2 = tl.load(scalars + 2), tl.load(scalars + 3)
    bias_correction2_sqrt, negative_step_size = tl.load(scalars + 4), tl.load(scalars + 5)
    shrink, eps, ok = tl.load(scalars + 6), tl.load(scalars + 7), tl.load(scalars + 8)

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if KIND == 1:
        upper = tl.load(param + at, inside, 0).to(tl.int32) << 16
        w = (upper + tl.load(other + at, inside, 0).to(tl.int32)).to(tl.float32, bitcast=True)
    elif KIND == 2:
        w = tl.load(other + at, inside, 0.0)
    else:
        w = tl.load(param + at, inside, 0.0)
    g = tl.where(ok > 0, tl.load(grad + at, inside, 0.0).to(tl.float32) * grad_factor, 0.0)
    m = tl.load(exp_avg + at, inside, 0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, inside, 0.0).to(tl.float32)

    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    denominator = tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps
    w = w * tl.where(at < decay_stop, shrink, 1.0) + tl.div_rn(m * negative_step_size, denominator)

    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), inside)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), inside)
    bits = w.to(tl.int32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    if KIND == 1:
        tl.store(other + at, (bits - (upper << 16)).to(tl.int16), inside)
    elif KIND == 2:
        tl.store(other + at, w, inside)
    if param.dtype.element_ty == tl.int16:
        tl.store(param + at, upper.to(tl.int16), inside)
    else:
        tl.store(param + at, w.to(param.dtype.element_ty), inside)


def launch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    decay_stop: int,
    remainder: Tensor | None,
    master: Tensor | None,
) -> None:
    """As `adamw_reference_`."""
    kind, other = PLAIN, param
    if remainder is not None:
        kind, other = SPLIT, remainder
    elif master is not None:
        kind, other = COPY, master
    bits = param.view(torch.int16) if param.dtype == torch.bfloat16 else param
    grid = (triton.cdiv(param.numel(), BLOCK),)
    _adamw[grid](
        bits, grad, exp_avg, exp_avg_sq, other, scalars, param.numel(), decay_stop, kind, BLOCK, enable_fp_fusion=False
    )
