"""Attention over parts of the keys, joined, against the explicit softmax over all of them."""

import pytest
import torch

from internlm.ops import attention_parts as room
from internlm.ops.attention import attention_reference
from internlm.ops.attention_parts import part_attention, part_attention_backward
from internlm.ops.segments import Segments

CPU = ("cpu", torch.float64, 1e-10)
GPU = pytest.param(
    "cuda", torch.bfloat16, 3e-2, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), [CPU, GPU])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("border", [1, 40, 299])
def test_one_document_in_two_parts(device, dtype, tolerance, heads, kv_heads, border):
    """Early and late queries of a document of 300 tokens, the late ones with keys in two parts."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, h, 16, dtype=dtype, device=device) for h in (heads, kv_heads, kv_heads))
    grad = torch.randn_like(q)
    exact = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    expected = attention_reference(*exact, Segments.of((300,)))
    expected.backward(grad.double().cpu())

    here = Segments.of((border, 300 - border))  # causal inside each part
    here = Segments(here.cu_seqlens.to(device), here.lengths)
    early, late = slice(0, border), slice(border, 300)
    out, lse = part_attention(q, k, v, here)
    more, more_lse = part_attention(q[late], k[early], v[early], None)
    assert lse.shape == (heads, 300) and more_lse.shape == (heads, 300 - border)
    joined = torch.logaddexp(lse[:, late], more_lse)
    weights = [(x - joined).exp().T[..., None] for x in (lse[:, late], more_lse)]
    out = torch.cat((out[early], (out[late] * weights[0] + more * weights[1]).to(out.dtype)))
    lse = torch.cat((lse[:, early], joined), dim=1)

    grads = [x.double() for x in part_attention_backward(grad, q, k, v, out.to(dtype), lse, here)]
    late_lse = lse[:, late].contiguous()
    across = part_attention_backward(grad[late], q[late], k[early], v[early], out[late].to(dtype), late_lse, None)
    for whole, part, rows in zip(grads, across, (late, early, early), strict=True):
        whole[rows] += part
    for ours, theirs in zip((out, *grads), (expected, *(x.grad for x in exact)), strict=True):
        error = (ours.double().cpu() - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, error


def test_many_segments_and_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(room, "_BLOCK", 4)
    torch.manual_seed(0)
    segments = Segments.of((1, 11, 1, 3))
    q, k, v = (torch.randn(16, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    expected = attention_reference(q, k, v, segments)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with torch.no_grad():
        out, lse = part_attention(q, k, v, segments)
        grads = part_attention_backward(grad, q, k, v, out, lse, segments)
    for ours, theirs in zip((out, *grads), (expected, q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(ours, theirs)
