"""Ring attention: keys and values go round among the ranks that hold parts of a row, while attention is computed.

Step 0 is causal attention among a rank's own tokens. In step s a rank computes the queries that attend to keys of the
rank s before it (zigzag.py says which), while the keys of step s + 1 are on their way. Keys go straight to the
rank that needs them, and only as many as it needs: in rows of many short documents, next to none.

Partial results are joined in fp32 by lse, the log-sum-exp of their scores. Backward sends keys and values again,
instead of keeping those of all ranks, and returns their gradients to the owner; each part's gradient is exact given the
final lse.

The idea is that of Ring Attention (Liu et al., 2023).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.core.collectives import Group, shift
from internlm.ops.attention_parts import part_attention, part_attention_backward
from internlm.parallel.zigzag import RingSegments


def ring_attention(q: Tensor, k: Tensor, v: Tensor, segments: RingSegments, group: Group) -> Tensor:
    """Causal attention inside documents that are spread over `group`.

    q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] of this rank's tokens -> as q. Collective.
    """
    return _RingAttention.apply(q, k, v, segments, group)  # type: ignore[no-untyped-call]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: RingSegments, group: Group) -> Tensor:
        arriving = _fetch(k, v, segments, 1, group)
        out, lse = part_attention(q, k, v, segments)
        # Copies, to change in place: "selective" keeps what attention returned, and hands it out again.
        total, lse = out.to(lse.dtype, copy=True), lse.clone()
        for number, step in enumerate(segments.steps, 1):
            keys_values, arriving = arriving(), _fetch(k, v, segments, number + 1, group)
            if step.compute is not None:
                assert keys_values is not None
                rows, (their_k, their_v) = step.compute.queries, keys_values
                _merge_(total[rows], lse[:, rows], *part_attention(q[rows], their_k, their_v, None))
        out = total.to(q.dtype)
        ctx.segments, ctx.group = segments, group
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        segments, group = ctx.segments, ctx.group
        grad = grad.contiguous()
        arriving = _fetch(k, v, segments, 1, group)
        grad_q, *own = (x.to(lse.dtype) for x in part_attention_backward(grad, q, k, v, out, lse, segments))
        grad_kv = torch.stack(own)
        returning: list[tuple[slice | None, Callable[[], Tensor | None]]] = []
        for number, step in enumerate(segments.steps, 1):
            keys_values, arriving = arriving(), _fetch(k, v, segments, number + 1, group)
            computed = None
            if step.compute is not None:
                assert keys_values is not None
                rows, (their_k, their_v) = step.compute.queries, keys_values
                rows_lse = lse[:, rows].contiguous()
                grad_rows, *computed = part_attention_backward(
                    grad[rows], q[rows], their_k, their_v, out[rows], rows_lse, None
                )
                grad_q[rows] += grad_rows
            # Back to the owner; what this rank sent forward in the same step returns from where it went.
            outgoing = None if computed is None else torch.stack(computed).to(k.dtype)
            incoming = None if step.send is None else torch.empty_like(grad_kv[:, step.send], dtype=k.dtype)
            returning.append((step.send, shift(outgoing, incoming, -number, group)))
        for rows, arrive in returning:
            part = arrive()
            if part is not None:
                grad_kv[:, rows] += part
        grad_k, grad_v = grad_kv.to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


def _fetch(k: Tensor, v: Tensor, segments: RingSegments, number: int, group: Group) -> Callable[[], Tensor | None]:
    """Starts to send and receive the keys and values [2, rows, kv_heads, head_dim] of a step."""
    if number > len(segments.steps):
        return _nothing
    step = segments.steps[number - 1]
    outgoing = None if step.send is None else torch.stack((k[step.send], v[step.send]))
    incoming = None
    if step.compute is not None:
        keys = step.compute.keys
        incoming = k.new_empty(2, keys.stop - keys.start, *k.shape[1:])
    return shift(outgoing, incoming, number, group)


def _merge_(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Joins attention over two sets of keys in place: totals [tokens, heads, d], log-sum-exps [heads, tokens]."""
    joined = torch.logaddexp(lse, part_lse)
    old, new = ((x - joined).exp().T[..., None] for x in (lse, part_lse))
    total.mul_(old).add_(part * new)
    lse.copy_(joined)


def _nothing() -> None:
    return None
