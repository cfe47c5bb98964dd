"""The Triton kernels of `rotary_split.py`: queries, keys and values leave the result of the projection in one pass, and
their gradients come back into one tensor, so that nothing is glued together."""

import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # of a token that one program turns
# Programs: tokens x groups of heads. Only the first dim of a grid may exceed 65,535.


@triton.jit
def _split(
    qkv,
    q,
    k,
    v,
    cos,
    sin,
    num_heads,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """qkv [tokens, kv_heads, GROUPS + 2, 2 HALF] to q, k and v, turned; with BACK from them, turned back.

    `num_heads` of qkv: kv_heads * (GROUPS + 2). WIDTH is HALF, rounded up to a power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, WIDTH)[None, :]
    inside = (head < num_heads) & (pair < HALF)
    group, kind = head // (GROUPS + 2), head % (GROUPS + 2)
    kv_heads = num_heads // (GROUPS + 2)
    is_q, is_k, is_v = inside & (kind < GROUPS), inside & (kind == GROUPS), inside & (kind == GROUPS + 1)

    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    whole = qkv + (token * num_heads + head) * 2 * HALF
    q += ((token * kv_heads + group) * GROUPS + kind) * 2 * HALF
    k += (token * kv_heads + group) * 2 * HALF
    v += (token * kv_heads + group) * 2 * HALF
    c = tl.load(cos + token * HALF + pair, pair < HALF, 0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + pair, pair < HALF, 0.0).to(tl.float32)
    c, s = tl.where(is_v, 1.0, c), tl.where(is_v, 0.0, s)
    if BACK:
        a = tl.load(q + first, is_q, 0.0) + tl.load(k + first, is_k, 0.0) + tl.load(v + first, is_v, 0.0)
        b = tl.load(q + second, is_q, 0.0) + tl.load(k + second, is_k, 0.0) + tl.load(v + second, is_v, 0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        tl.store(whole + first, (a * c + b * s).to(qkv.dtype.element_ty), inside)
        tl.store(whole + second, (b * c - a * s).to(qkv.dtype.element_ty), inside)
    else:
        a, b = tl.load(whole + first, inside, 0.0).to(tl.float32), tl.load(whole + second, inside, 0.0).to(tl.float32)
        turned_a, turned_b = (a * c - b * s).to(qkv.dtype.element_ty), (b * c + a * s).to(qkv.dtype.element_ty)
        tl.store(q + first, turned_a, is_q)
        tl.store(q + second, turned_b, is_q)
        tl.store(k + first, turned_a, is_k)
        tl.store(k + second, turned_b, is_k)
        tl.store(v + first, turned_a, is_v)
        tl.store(v + second, turned_b, is_v)


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `split_and_rotate_reference`, of contiguous tensors."""
    tokens, kv_heads, rows, size = qkv.shape
    q = qkv.new_empty(tokens, kv_heads * (rows - 2), size)
    k, v = qkv.new_empty(tokens, kv_heads, size), qkv.new_empty(tokens, kv_heads, size)
    _launch(qkv, q, k, v, cos, sin, interleaved, back=False)
    return q, k, v


def backward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of qkv from those of its parts, all contiguous."""
    tokens, kv_heads, size = k.shape
    qkv = q.new_empty(tokens, kv_heads, q.shape[1] // kv_heads + 2, size)
    _launch(qkv, q, k, v, cos, sin, interleaved, back=True)
    return qkv


def _launch(
    qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool
) -> None:
    tokens, kv_heads, rows, size = qkv.shape
    num_heads, half = kv_heads * rows, size // 2
    grid = (tokens, triton.cdiv(num_heads, HEADS))
    width = triton.next_power_of_2(half)
    sizes = num_heads, rows - 2, half, width
    _split[grid](qkv, q, k, v, cos, sin, *sizes, interleaved, back, HEADS, enable_fp_fusion=True)
