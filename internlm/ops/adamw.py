"""AdamW over flat shards, in place, for parameters with or without an fp32 master.

One update is, as in Loshchilov and Hutter (2019) and `torch.optim.AdamW`:

    g = grad * grad_factor                        (loss scale and clipping folded into one factor)
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

with arithmetic in fp32 whatever the storage. All scalars live on the device, so a step that must not happen (a norm
that is not finite) becomes an update by nothing, and the host never waits to know.

The **split master**: an fp32 number is its upper 16 bits, rounded half away from zero, which is a bfloat16, and a
signed 16-bit remainder. The parameter itself is the first part; only the remainder is stored besides. Rounding half to
even would not do: a tie needs 65,537 remainders. The idea of storing the low bits is from NVIDIA Apex and DeepSpeed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements per pass: temporaries stay in the cache of a CPU core, and bounded on a GPU.
CHUNK_CPU = 1 << 16
CHUNK_GPU = 1 << 26


@dataclass(frozen=True)
class AdamScalars:
    """The scalars of one update as 0-dim fp32 tensors on the device of the shards."""

    grad_factor: Tensor
    one_minus_beta1: Tensor  # 0 when the step is skipped, so that nothing moves
    beta2: Tensor  # 1 when skipped
    one_minus_beta2: Tensor  # 0 when skipped
    bias_correction2_sqrt: Tensor
    negative_step_size: Tensor  # - lr / (1 - beta1^t), 0 when skipped
    shrink: Tensor  # 1 - lr * weight_decay, 1 when skipped
    eps: float
    ok: Tensor  # bool


def adam_scalars(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    update: int,
    grad_factor: Tensor,
    ok: Tensor,
) -> AdamScalars:
    """Scalars of update number `update`, counted from 1. `ok` is a bool tensor []; False makes the update void."""
    beta1, beta2 = betas

    def unless_skipped(value: float, skipped: float) -> Tensor:
        # computed in double and rounded once, as torch.optim does with its Python scalars
        pair = torch.tensor((value, skipped), dtype=torch.float32)
        if ok.is_cuda:
            pair = pair.pin_memory().to(ok.device, non_blocking=True)
        return torch.where(ok, pair[0], pair[1])

    return AdamScalars(
        grad_factor=grad_factor.float(),
        one_minus_beta1=unless_skipped(1 - beta1, 0.0),
        beta2=unless_skipped(beta2, 1.0),
        one_minus_beta2=unless_skipped(1 - beta2, 0.0),
        bias_correction2_sqrt=unless_skipped((1 - beta2**update) ** 0.5, 1.0),
        negative_step_size=unless_skipped(-lr / (1 - beta1**update), 0.0),
        shrink=unless_skipped(1 - lr * weight_decay, 1.0),
        eps=eps,
        ok=ok,
    )


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: AdamScalars,
    *,
    remainder: Tensor | None = None,
    master: Tensor | None = None,
) -> None:
    """Updates one flat shard in place.

    Args:
        param: [n] fp32, or 16-bit with either of the two masters.
        grad: [n] any float dtype.
        exp_avg, exp_avg_sq: [n] fp32 or bf16.
        remainder: [n] int16, the other half of a bf16 `param`.
        master: [n] fp32, of which `param` is the rounded copy.
    """
    chunk = CHUNK_GPU if param.is_cuda else CHUNK_CPU
    for start in range(0, param.numel(), chunk):
        part = slice(start, start + chunk)
        if remainder is not None:
            weight = join_master(param[part], remainder[part])
        else:
            weight = param[part] if master is None else master[part]
        _update(weight, grad[part], exp_avg[part], exp_avg_sq[part], scalars)
        if remainder is not None:
            param[part], remainder[part] = split_master(weight)
        elif master is not None:
            param[part] = round_to(weight, param.dtype)


def _update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: AdamScalars) -> None:
    # inf and nan must not reach the moments, not even times zero
    g = torch.where(s.ok, grad.float() * s.grad_factor, 0.0)
    m, v = exp_avg.float(), exp_avg_sq.float()  # no copy when they are fp32 already
    m.lerp_(g, s.one_minus_beta1)
    v.mul_(s.beta2).addcmul_(g * s.one_minus_beta2, g)
    denominator = (v.sqrt() / s.bias_correction2_sqrt).add_(s.eps)
    weight.mul_(s.shrink).addcdiv_(m * s.negative_step_size, denominator)
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
