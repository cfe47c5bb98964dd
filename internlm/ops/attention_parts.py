"""Attention over some of the keys, with the log-sum-exp by which such parts are joined.

Softmax attention over all keys is the average of attention over parts of the keys, weighted by exp(lse), where lse is
the log-sum-exp of a part's scores. The gradient of a part needs only the final result and the lse over all keys.

Shapes: q [queries, heads, head_dim], k and v [keys, kv_heads, head_dim], lse [heads, queries] in fp32 (fp64
stays). With `segments`, queries and keys are the same tokens and attention is causal inside each segment; without,
every query attends to every key.

    flash   the kernels of torch's varlen_attn; 16-bit on a GPU
    plain   explicit softmax, some queries at a time; any device and dtype
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from internlm.ops.segments import Segments
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

# Queries at a time in plain attention: scores of 128 queries, 32 heads and 64k keys are 1 GiB in fp32.
_BLOCK = 128


def part_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """(attention over the given keys in the dtype of q, or fp32 where that is computed; lse)."""
    if not _flash_takes(q):
        return _plain(q, k, v, segments)
    ends_q, ends_k, longest_q, longest_k = _ends(q, k, segments)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, ends_q, ends_k, longest_q, longest_k, 0.0, segments is not None, False
    )
    return out, lse


def part_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by way of the given keys. `out` and `lse` are those over all keys."""
    if not _flash_takes(q):
        return _plain_backward(grad, q, k, v, out, lse, segments)
    ends_q, ends_k, longest_q, longest_k = _ends(q, k, segments)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, 0.0, segments is not None, *no_dropout
    )


def _flash_takes(q: Tensor) -> bool:
    sixteen_bit = q.dtype in (torch.float16, torch.bfloat16)
    takes = q.is_cuda and sixteen_bit and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    name = "flash" if takes else "plain"
    log_once(logger, f"attention in parts: {name} ({q.device.type}, {q.dtype}, heads of size {q.shape[-1]})")
    return takes


def _ends(q: Tensor, k: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens and longest length of queries and of keys."""
    if segments is not None:
        return segments.cu_seqlens, segments.cu_seqlens, segments.max_length, segments.max_length
    both = torch.arange(2, dtype=torch.int32, device=q.device)  # made on the device: no copy, no synchronisation
    return both * len(q), both * len(k), len(q), len(k)


def _plain(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    q, k, v = _in_groups(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(*q.shape[1:3], len(q))
    for rows, keys, masked in _blocks(q, k, segments):
        scores = _scores(q[rows], k[keys], masked)
        lse[..., rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), v[keys])
    return out.flatten(1, 2), lse.flatten(0, 1)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = q.shape, k.shape, v.shape
    q, k, v = _in_groups(q, k, v)
    grad, out = (x.to(q.dtype).view_as(q) for x in (grad, out))
    lse = lse.view(*q.shape[1:3], len(q))
    mean = (grad * out).sum(-1).permute(1, 2, 0)  # [kv_heads, group, queries]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, masked in _blocks(q, k, segments):
        weights = (_scores(q[rows], k[keys], masked) - lse[..., rows, None]).exp()
        grad_v[keys] += torch.einsum("hgqk,qhgd->khd", weights, grad[rows])
        grad_weights = torch.einsum("qhgd,khd->hgqk", grad[rows], v[keys])
        grad_scores = weights * (grad_weights - mean[..., rows, None]) / q.shape[-1] ** 0.5
        grad_q[rows] = torch.einsum("hgqk,khd->qhgd", grad_scores, k[keys])
        grad_k[keys] += torch.einsum("hgqk,qhgd->khd", grad_scores, q[rows])
    return grad_q.view(shapes[0]), grad_k, grad_v


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of computation, query heads by key/value head: q [queries, kv_heads, group, head_dim]."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    return q.unflatten(1, (k.shape[1], -1)).contiguous(), k, v


def _scores(q: Tensor, k: Tensor, masked: Tensor | None) -> Tensor:
    """[kv_heads, group, queries, keys]."""
    scores = torch.einsum("qhgd,khd->hgqk", q, k) / q.shape[-1] ** 0.5
    return scores if masked is None else scores.masked_fill(masked, -torch.inf)


def _blocks(q: Tensor, k: Tensor, segments: Segments | None) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """_BLOCK queries at a time: (queries, the keys that they may see, bool [queries, keys] where they may not)."""
    if segments is None:
        for start in range(0, len(q), _BLOCK):
            yield slice(start, start + _BLOCK), slice(0, len(k)), None
        return
    begin = 0
    for length in segments.lengths:
        for start in range(begin, begin + length, _BLOCK):
            stop = min(start + _BLOCK, begin + length)
            masked = torch.ones(stop - start, stop - begin, dtype=torch.bool, device=q.device).triu(start - begin + 1)
            yield slice(start, stop), slice(begin, stop), masked
        begin += length
