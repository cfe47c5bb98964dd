"""Causal attention inside the segments of a packed row, and of new tokens over a key/value cache.

Shapes: q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]; query head i uses kv head i // (heads /
kv_heads). Scores are scaled by 1 / sqrt(head_dim).

Which kernel runs is decided here and nowhere else (`model.attn_backend`):

    sdpa    F.scaled_dot_product_attention: segments of one length as a batch in one call, else segment by segment;
            any device and dtype; on Hopper torch prefers cuDNN
    flash4  the kernels of flash-attn-4, if that is installed and a trial succeeds; 16-bit on Hopper
    cudnn   ragged segments in one call of cuDNN, if nvidia-cudnn-frontend is installed; 16-bit on Hopper and later
    varlen  the same by the FlashAttention 2 that comes with torch; 16-bit on a GPU
    flash   flash_attn_varlen_func of the flash-attn package (3 if installed, else 2)

"auto" takes flash4 for heads of 64 and 128; else, or where that can't run, sdpa for segments of one length, and for
ragged ones the first that applies of cudnn, flash with version 3, varlen. benchmarks/README.md has what each achieves.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.ops import attention_flash
from internlm.ops.attention_flash import SIXTEEN_BIT, flash4_applies, flash_attn_varlen_func, flash_attn_version
from internlm.ops.attention_ragged import cudnn_applies, ragged_attention
from internlm.ops.segments import Segments
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

Backend = Literal["auto", "sdpa", "flash4", "cudnn", "varlen", "flash"]


def prepare_attention(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Loads the kernels that compiled blocks will call on `device`, which they can't do, and logs which "auto" takes.

    Raises UserError where `backend` can't run.
    """
    if device.type != "cuda":
        return
    if backend == "auto":
        if dtype in SIXTEEN_BIT:
            attention_flash.load_flash4()
        for uniform in (True, False):
            _log(*_choice(dtype, head_dim, on_gpu=True, uniform=uniform))
    elif problem := _why_not(backend, dtype, head_dim):
        raise UserError(f'model.attn_backend = "{backend}": {problem}; set "auto"')


def _why_not(backend: Backend, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend that is asked for by name can't run on this GPU; "" if it can."""
    if backend == "sdpa":
        return ""
    if dtype not in SIXTEEN_BIT:
        return f"it takes 16-bit numbers, and model.dtype = {dtype}"
    if not _takes_heads(head_dim):
        return f"it takes no heads of size {head_dim}"
    if backend == "flash4":
        problem = attention_flash.load_flash4()
        return f"{problem} (its package is in the extra gpu)" if problem else ""
    if backend == "cudnn":
        applies, reason = cudnn_applies(head_dim)
        return "" if applies else reason
    return "flash-attn is not installed" if backend == "flash" and flash_attn_varlen_func is None else ""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Explicit softmax in fp32 (fp64 stays), document by document -> [tokens, heads, head_dim] in that dtype."""
    work = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for q_, k_, v_ in zip(*(x.to(work).split(segments.lengths) for x in (q, k, v)), strict=True):
        k_, v_ = (x.repeat_interleave(groups, dim=1) for x in (k_, v_))
        scores = torch.einsum("qhd,khd->hqk", q_, k_) / q.shape[-1] ** 0.5
        masked = torch.ones(len(q_), len(q_), dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(masked, -torch.inf).softmax(-1), v_))
    return torch.cat(outputs)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: Backend = "auto") -> Tensor:
    """Causal attention inside each segment -> [tokens, heads, head_dim]."""
    if backend == "auto":
        backend = choose_backend(q, segments)
    if backend == "sdpa":
        return _sdpa(q, k, v, segments)
    if backend == "flash":
        return _flash(q, k, v, segments)
    return ragged_attention(q, k, v, segments.cu_seqlens, segments.extent, backend)


def choose_backend(q: Tensor, segments: Segments) -> Backend:
    """The backend for q [tokens, heads, head_dim]; the first time each reason occurs it is logged."""
    compiling = torch.compiler.is_compiling()
    if q.is_cuda and q.dtype in SIXTEEN_BIT and not compiling:
        attention_flash.load_flash4()
    uniform = segments.num_equal > 0
    backend, reason = _choice(q.dtype, q.shape[-1], on_gpu=q.is_cuda, uniform=uniform)
    if not compiling:
        _log(backend, reason)
    return backend


def _log(backend: Backend, reason: str) -> None:
    log_once(logger, f"attention: {backend} ({reason})")


def _takes_heads(head_dim: int) -> bool:
    """Whether the kernels other than sdpa take heads of this size."""
    return head_dim % 8 == 0 and head_dim <= 256


def _choice(dtype: torch.dtype, head_dim: int, *, on_gpu: bool, uniform: bool) -> tuple[Backend, str]:
    """What "auto" takes, and why. `uniform`: all segments have one length."""
    if not on_gpu:
        return "sdpa", "no GPU"
    applies, flash4_reason = flash4_applies(dtype, head_dim)
    if applies:
        return "flash4", f"{'segments of one length' if uniform else 'ragged segments'}, {flash4_reason}"
    if uniform:
        return "sdpa", f"segments of one length make a batch; not flash4: {flash4_reason}"
    if dtype not in SIXTEEN_BIT:
        return "sdpa", f"segment by segment: the kernels for ragged segments don't take {dtype}"
    if not _takes_heads(head_dim):
        return "sdpa", f"segment by segment: the kernels for ragged segments don't take heads of size {head_dim}"
    applies, reason = cudnn_applies(head_dim)
    if applies:
        return "cudnn", f"ragged segments, {reason}; not flash4: {flash4_reason}"
    if flash_attn_version == 3:
        return "flash", f"ragged segments, flash-attn 3 is installed; not flash4: {flash4_reason}; not cudnn: {reason}"
    return "varlen", f"ragged segments; not flash4: {flash4_reason}; not cudnn: {reason}"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if segments.num_equal:
        return _sdpa_batch(q, k, v, segments.num_equal)
    pieces = zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([_sdpa_batch(q_, k_, v_, 1) for q_, k_, v_ in pieces])


def _sdpa_batch(q: Tensor, k: Tensor, v: Tensor, num_segments: int) -> Tensor:
    """`num_segments` segments of the same length."""
    # [segments * length, heads, head_dim] -> [segments, heads, length, head_dim]
    q_, k_, v_ = (x.unflatten(0, (num_segments, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    assert flash_attn_varlen_func is not None
    ends, longest = segments.cu_seqlens, segments.max_length
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, query_positions: Tensor) -> Tensor:
    """Attention of new tokens over a cache: key j of a row is seen by queries at positions >= j.

    q [batch, new, heads, head_dim], keys and values [batch, length, kv_heads, head_dim],
    query_positions int64 [batch, new] -> [batch, new, heads, head_dim].
    """
    places = torch.arange(keys.shape[1], device=q.device)
    seen = places <= query_positions[:, None, :, None]  # [batch, 1, new, length]
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, keys, values))
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=seen, enable_gqa=q.shape[2] != keys.shape[2])
    return out.transpose(1, 2)
