"""Queries, keys and values from the projection's result: split, the first two turned by their positions (`rotary.py`).

One operation, which a compiled block calls without looking inside. Autograd alone would keep the projection's result
beside its rotated copies, and concatenate the result's gradient from three tensors.

    torch   any device
    triton  one pass in each direction (`rotary_kernel.py`); GPUs
"""

from typing import Any

import torch
from torch import Tensor

from internlm.ops.kernels import find_kernels
from internlm.ops.rotary import rotate

_kernels = find_kernels("rotary_kernel")


def split_and_rotate_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `split_and_rotate`, by autograd."""
    q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)  # [tokens, kv_heads, groups | 1 | 1, head_dim]
    q, k = (rotate(x, cos, sin, interleaved).flatten(1, 2) for x in (q, k))
    return q, k, v.squeeze(2)


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [tokens, kv_heads, groups + 2, head_dim] -> q [tokens, heads, head_dim] and k, both turned, and v, each
    [tokens, kv_heads, head_dim]. cos, sin [tokens, head_dim / 2] get no gradient."""
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.internlm.split_and_rotate(qkv, cos, sin, interleaved)
    return out


# Not by `torch.library.custom_op`: see `swiglu.py`.
_TURN = "Tensor cos, Tensor sin, bool interleaved"
torch.library.define("internlm::split_and_rotate", f"(Tensor qkv, {_TURN}) -> (Tensor, Tensor, Tensor)")
torch.library.define("internlm::split_and_rotate_backward", f"(Tensor q, Tensor k, Tensor v, {_TURN}) -> Tensor")


@torch.library.impl("internlm::split_and_rotate", "default")
def _split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.is_cuda and qkv.numel() > 0 and _kernels is not None:
        return _kernels.forward(qkv.contiguous(), cos.contiguous(), sin.contiguous(), interleaved)
    q, k, v = split_and_rotate_reference(qkv, cos, sin, interleaved)
    return q, k, v.clone(memory_format=torch.contiguous_format)  # what an operation returns is no view of its input


@torch.library.register_fake("internlm::split_and_rotate")
def _(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, kv_heads, rows, size = qkv.shape
    q = qkv.new_empty(tokens, kv_heads * (rows - 2), size)
    return q, qkv.new_empty(tokens, kv_heads, size), qkv.new_empty(tokens, kv_heads, size)


@torch.library.impl("internlm::split_and_rotate_backward", "default")
def _join_gradients(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if q.is_cuda and q.numel() > 0 and _kernels is not None:
        return _kernels.backward(*(part.contiguous() for part in (q, k, v, cos, sin)), interleaved)
    q, k = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2)
    return torch.cat((rotate(q, cos, -sin, interleaved), rotate(k, cos, -sin, interleaved), v.unsqueeze(2)), dim=2)


@torch.library.register_fake("internlm::split_and_rotate_backward")
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    tokens, kv_heads, size = k.shape
    return q.new_empty(tokens, kv_heads, q.shape[1] // kv_heads + 2, size)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:
    out = torch.ops.internlm.split_and_rotate_backward(q, k, v, *ctx.saved_tensors, ctx.interleaved)
    return out, None, None, None


torch.library.register_autograd("internlm::split_and_rotate", _differentiate, setup_context=_setup)
