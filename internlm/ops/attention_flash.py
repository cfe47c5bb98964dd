"""Attention by the packages of FlashAttention's authors: flash-attn 2 or 3, and flash-attn-4.

The function of the former is called as it is. The latter has kernels for Hopper in CuTe DSL, compiled at their first
use. torch.compile can't trace its functions for autograd, so the two functions below them that launch the kernels are
called here, behind the operation of `attention_ragged.py`. These two are not a public interface, and the package is a
beta with a compiler below it. So when they are loaded, their arguments are compared with those passed here, and a short
row is tried; if either fails, attention does without them.

Segments of one length go in as a batch, whose backward is 4 % faster than that of ragged segments.
"""

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from internlm.utils.environment import set_default
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


def _find_flash_attn() -> tuple[Callable[..., Tensor] | None, int]:
    """The package's function and its version, looked up once: a compiled block cannot import."""
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            return None, 0
        return flash_attn_varlen_func, 2
    return flash_attn_varlen_func, 3


flash_attn_varlen_func, flash_attn_version = _find_flash_attn()

_RAGGED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FORWARD = ("q", "k", "v", "causal", "return_lse", *_RAGGED)
_BACKWARD = ("q", "k", "v", "out", "dout", "lse", "causal", *_RAGGED)

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# Sizes of heads with which it was measured to be faster than cuDNN (benchmarks/README.md): by 5 to 13 % with 128, but
# for rows of 1,024 with shared key/value heads (2 % slower), and by 21 to 24 % with 64.
_HEAD_DIMS = (64, 128)

_kernels: tuple[Callable[..., Any], Callable[..., Any]] | None = None
_reason = ""  # why there are none; empty before they were looked for


def load_flash4() -> str:
    """Looks for the package, once; returns why it can't be used, or "". Compiled code only asks `flash4_applies`.

    Its import takes 3 s, its kernels take as long again until they are on disk: /tmp/USER, or where
    FLASH_ATTENTION_CUTE_DSL_CACHE_DIR says.
    """
    global _kernels, _reason
    if _kernels is None and not _reason:
        try:
            _kernels = _find()
            _try()
        except Exception as error:  # whatever is wrong with it, others take its place
            told = (str(error).strip() or type(error).__name__).splitlines()[0]  # a compiler's tells pages
            _reason = f"flash-attn-4 can't be used: {told}"
            if _kernels is not None:  # on a machine that it is for, and maybe on this rank alone
                logger.warning("%s; attention is slower without it", _reason)
            _kernels = None
    return _reason


def _find() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        release = version("flash-attn-4")
    except PackageNotFoundError:
        raise ImportError("it is not installed") from None
    major = torch.cuda.get_device_capability()[0]
    if major != 9:
        raise RuntimeError(f"compute capability {major}.x; it was measured on 9.x")
    set_default("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    # Of an argument that is empty here, and left out: nothing that a user could fix.
    warnings.filterwarnings("ignore", r"Argument aux_data \(position \d+\) cannot be converted", UserWarning)
    for function, names in ((_flash_attn_fwd, _FORWARD), (_flash_attn_bwd, _BACKWARD)):
        missing = set(names) - set(signature(function).parameters)
        if missing:
            raise TypeError(f"release {release} takes no {', '.join(sorted(missing))}")
    return _flash_attn_fwd, _flash_attn_bwd


@torch.no_grad()
def _try() -> None:
    """Compiles both kernels and looks at what they do, which a driver, or a compiler of another release, may spoil."""
    x = torch.arange(24 * 4 * 128.0, device="cuda").sin().view(24, 4, 128).bfloat16()  # a run's random numbers stay
    starts, ends = [0, 1, 8, 9, 10], torch.tensor((0, 1, 8, 9, 10, 24), dtype=torch.int32, device="cuda")
    out, lse = forward(x, x, x, ends, 5, 14)
    grads = torch.stack(backward(x, x, x, x, out, lse, ends, 5, 14))
    # the first token of a segment sees nothing but itself
    if not torch.allclose(out[starts], x[starts], atol=3e-2) or not grads.isfinite().all():
        raise RuntimeError("a trial's result is wrong")


def flash4_applies(dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    """Whether flash-attn-4 is loaded and the fastest for such heads, and why or why not."""
    if dtype not in SIXTEEN_BIT:
        return False, f"flash-attn-4 doesn't take {dtype}"
    if _kernels is None:
        return False, _reason or "flash-attn-4 was not looked for"
    if head_dim not in _HEAD_DIMS:
        return False, f"flash-attn-4 was measured with heads of size 64 and 128, not {head_dim}"
    return True, "flash-attn-4 is installed"


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Output as q, log-sum-exp fp32 [heads, tokens] in an order of its own, of q [tokens, heads, head_dim] and k, v
    [tokens, kv_heads, head_dim].

    `cu_seqlens` int32 [count + 1]; `longest` on the host.
    """
    problem = load_flash4()
    assert _kernels is not None, problem
    arranged, ragged = _arrange((q, k, v), cu_seqlens, count, longest)
    out, lse, *_ = _kernels[0](*arranged, causal=True, return_lse=True, **ragged)
    return out.flatten(0, -3), lse.view(q.shape[1], q.shape[0])


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    count: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    assert _kernels is not None, _reason
    arranged, ragged = _arrange((q, k, v, out, grad), cu_seqlens, count, longest)
    lse = lse if ragged else lse.view(count, q.shape[1], longest)
    dq, dk, dv = (x.flatten(0, -3) for x in _kernels[1](*arranged, lse, causal=True, **ragged))
    return dq, dk, dv


def _arrange(
    tensors: tuple[Tensor, ...], cu_seqlens: Tensor, count: int, longest: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Segments of one length as a batch [count, longest, heads, head_dim], others as they lie, with their ends."""
    if count * longest == len(tensors[0]):
        return [x.unflatten(0, (count, longest)) for x in tensors], {}
    # Only a bound: with less, rows of short segments would be compiled for once more.
    return list(tensors), dict(zip(_RAGGED, (cu_seqlens, cu_seqlens, *[max(longest, 1024)] * 2), strict=True))
