"""AdamW over flat shards, in place, for parameters with or without an fp32 master.

One update is, as in Loshchilov and Hutter (2019) and `torch.optim.AdamW`:

    g = grad * grad_factor                        (loss scale and clipping folded into one factor)
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

with arithmetic in fp32 whatever the storage. All scalars live on the device, so a step that must not happen (a norm
that is not finite) becomes an update by nothing, and the host never waits to know.

Every operation is rounded on its own, in the order written, so that both paths agree bit for bit on any device:

    torch   a dozen passes over memory; any device
    triton  one pass: 26 bytes a parameter with split master and fp32 moments; GPUs (`adamw_kernel.py`)

The **split master**: an fp32 number is its upper 16 bits, rounded half away from zero, which is a bfloat16, and a
signed 16-bit remainder. The parameter itself is the first part; only the remainder is stored besides. Rounding half to
even would not do: a tie needs 65,537 remainders. The idea of storing the low bits is from NVIDIA Apex and DeepSpeed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from internlm.ops.kernels import find_kernels

# Elements per pass of the torch path: temporaries stay in the cache of a CPU core, and bounded on a GPU.
CHUNK_CPU = 1 << 16
CHUNK_GPU = 1 << 26

# Places in the tensor of scalars.
GRAD_FACTOR, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, BIAS_CORRECTION2_SQRT = range(5)
NEGATIVE_STEP_SIZE, SHRINK, EPS, OK = range(5, 9)


_kernel = find_kernels("adamw_kernel")
_triton_update: Callable[..., None] | None = _kernel and _kernel.launch


def adam_scalars(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    update: int,
    grad_factor: Tensor,
    ok: Tensor,
) -> Tensor:
    """Scalars of update number `update`, counted from 1: fp32 [9] on the device of `ok`.

    `ok` is a bool tensor []; False makes the update void. Computed in double and rounded once, as torch.optim does with
    its Python scalars; one transfer, without a synchronisation.
    """
    beta1, beta2 = betas
    root, step_size = (1 - beta2**update) ** 0.5, lr / (1 - beta1**update)
    real, void = (
        (0.0, 1 - beta1, beta2, 1 - beta2, root, -step_size, 1 - lr * weight_decay, eps, 1.0),
        (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, eps, 0.0),
    )
    table = torch.tensor((real, void), dtype=torch.float32)
    if ok.is_cuda:
        table = table.pin_memory().to(ok.device, non_blocking=True)
    scalars = torch.where(ok, table[0], table[1])
    scalars[GRAD_FACTOR] = grad_factor
    return scalars


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    *,
    decay_stop: int,
    remainder: Tensor | None = None,
    master: Tensor | None = None,
) -> None:
    """Updates one flat shard in place.

    Args:
        param: [n] fp32, or 16-bit with either of the two masters.
        grad: [n] any float dtype.
        exp_avg, exp_avg_sq: [n] fp32 or bf16.
        scalars: from `adam_scalars`.
        decay_stop: weight decay applies to elements [0, decay_stop).
        remainder: [n] int16, the other half of a bf16 `param`.
        master: [n] fp32, of which `param` is the rounded copy.
    """
    if param.numel() == 0:
        return
    update = adamw_reference_ if _triton_update is None or not param.is_cuda else _triton_update
    update(param, grad, exp_avg, exp_avg_sq, scalars, decay_stop, remainder, master)


def adamw_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    decay_stop: int,
    remainder: Tensor | None,
    master: Tensor | None,
) -> None:
    """`adamw_` by torch's operations."""
    size, chunk = param.numel(), CHUNK_GPU if param.is_cuda else CHUNK_CPU
    border = min(max(decay_stop, 0), size)
    for begin, end, shrink in ((0, border, scalars[SHRINK]), (border, size, torch.ones_like(scalars[SHRINK]))):
        for start in range(begin, end, chunk):
            part = slice(start, min(start + chunk, end))
            if remainder is not None:
                weight = join_master(param[part], remainder[part])
            else:
                weight = param[part] if master is None else master[part]
            _update(weight, grad[part], exp_avg[part], exp_avg_sq[part], scalars, shrink)
            if remainder is not None:
                param[part], remainder[part] = split_master(weight)
            elif master is not None:
                param[part] = round_to(weight, param.dtype)


def _update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Tensor, shrink: Tensor) -> None:
    # inf and nan must not reach the moments, not even times zero
    g = torch.where(s[OK] > 0, grad.float() * s[GRAD_FACTOR], 0.0)
    m, v = exp_avg.float(), exp_avg_sq.float()  # no copy when they are fp32 already
    m.add_((g - m).mul_(s[ONE_MINUS_BETA1]))
    v.mul_(s[BETA2]).add_(g.square_().mul_(s[ONE_MINUS_BETA2]))
    # torch's fp32 square root on CPUs is off by a bit in a fifth of all cases
    denominator = v.double().sqrt_().float().div_(s[BIAS_CORRECTION2_SQRT]).add_(s[EPS])
    weight.mul_(shrink).add_((m * s[NEGATIVE_STEP_SIZE]).div_(denominator))
    if exp_avg.dtype != torch.float32:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> (bf16 [n], int16 [n]): the number rounded half away from zero, and what is missing to it, exact."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    remainder = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split_master`: (bf16 [n], int16 [n]) -> fp32 [n], in new memory."""
    return ((param.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def round_to(master: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [n] -> dtype [n]; to bfloat16 as `split_master` does, so that both kinds of master train alike."""
    return split_master(master)[0] if dtype == torch.bfloat16 else master.to(dtype)
