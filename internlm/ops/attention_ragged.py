"""Attention inside ragged segments as one opaque operation, so that a compiled block takes any row.

Number and longest length of the segments come as a tensor on the host: read here, outside compiled code, without
waiting for the device.

    varlen  torch's FlashAttention 2, whose grid is as long as the longest segment
    cudnn   cuDNN, by graphs that `attention_cudnn.py` builds
    flash4  FlashAttention 4 (`attention_flash.py`), which is the fastest for segments of one length as well
"""

from typing import Any

import torch
from torch import Tensor

from internlm.ops import attention_flash


def _import_cudnn() -> tuple[Any, str]:
    try:
        from internlm.ops import attention_cudnn
    except ImportError as error:
        return None, f"nvidia-cudnn-frontend is not there ({error})"
    return attention_cudnn, "nvidia-cudnn-frontend is installed"


_cudnn, _cudnn_reason = _import_cudnn()


def cudnn_applies(head_dim: int) -> tuple[bool, str]:
    """Whether cuDNN's ragged attention can run on this GPU, and why or why not."""
    if _cudnn is None:
        return False, _cudnn_reason
    major = torch.cuda.get_device_capability()[0]
    if major < 9 or head_dim > 128 or head_dim % 16:
        return False, f"compute capability {major}.x, heads of size {head_dim}; it wants 9 and at most 128"
    return True, _cudnn_reason


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, extent: Tensor, kernel: str) -> Tensor:
    """Causal attention in each segment: q [tokens, heads, head_dim], k, v [tokens, kv_heads, head_dim] -> as q.

    16-bit tensors on a GPU; cu_seqlens int32 [segments + 1] there; extent int64 [2] on the host (see `Segments`).
    """
    return _forward(q, k, v, cu_seqlens, extent, kernel)[0]


@torch.library.custom_op("internlm::ragged_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, extent: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Output, log-sum-exp."""
    count, longest = extent.tolist()
    if kernel == "cudnn":
        return _cudnn.forward(q, k, v, cu_seqlens, count, longest)
    if kernel == "flash4":
        return attention_flash.forward(q, k, v, cu_seqlens, count, longest)
    ends = cu_seqlens, cu_seqlens, longest, longest
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *ends, 0.0, True, False, scale=q.shape[-1] ** -0.5)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, extent: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    lse = (tokens, heads) if kernel == "cudnn" else (heads, tokens)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("internlm::ragged_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    extent: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    count, longest = extent.tolist()
    if kernel == "cudnn":
        return _cudnn.backward(grad, q, k, v, out, lse, cu_seqlens, count, longest)
    if kernel == "flash4":
        return attention_flash.backward(grad, q, k, v, out, lse, cu_seqlens, count, longest)
    ends = cu_seqlens, cu_seqlens, longest, longest
    no_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *ends, 0.0, True, *no_dropout, scale=q.shape[-1] ** -0.5
    )


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, cu_seqlens, extent, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, extent)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.kernel), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
