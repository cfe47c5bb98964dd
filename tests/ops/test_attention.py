"""Every attention backend against the explicit softmax, forward and backward."""

import sys
import warnings
from types import ModuleType

import pytest
import torch

from internlm.ops import attention as room
from internlm.ops import attention_flash
from internlm.ops.attention import attention, attention_reference, cached_attention, prepare_attention
from internlm.ops.attention_parts import part_attention, part_attention_backward
from internlm.ops.attention_ragged import cudnn_applies
from internlm.ops.segments import Segments
from internlm.utils.errors import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LENGTHS = [(8, 8, 8), (1, 7, 1, 1, 14), (24,), (1,), (1, 1, 1)]
HEADS = [(4, 4), (6, 2), (4, 1)]


def random_qkv(tokens: int, heads: int, kv_heads: int, size: int, **options):
    torch.manual_seed(0)
    shapes = ((tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size))
    return [torch.randn(shape, **options).requires_grad_() for shape in shapes]


def textbook(q, k, v, start, stop, query, head):
    """One output vector, written as in the paper, with the query's own segment [start, stop)."""
    group = q.shape[1] // k.shape[1]
    scores = torch.stack([q[query, head] @ k[j, head // group] for j in range(start, query + 1)]) / q.shape[-1] ** 0.5
    return (scores.softmax(0)[:, None] * v[start : query + 1, head // group]).sum(0)


def test_reference_is_the_textbook_formula():
    q, k, v = random_qkv(9, 4, 2, 8, dtype=torch.float64)
    out = attention_reference(q, k, v, Segments.of((3, 1, 5)))
    for start, stop in ((0, 3), (3, 4), (4, 9)):
        for query in range(start, stop):
            for head in range(4):
                torch.testing.assert_close(out[query, head], textbook(q, k, v, start, stop, query, head))


def assert_agrees(lengths, heads, kv_heads, size, backend, device, dtype, tolerance):
    segments = Segments.of(lengths)
    inputs = random_qkv(sum(lengths), heads, kv_heads, size, dtype=dtype, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    on_device = Segments(segments.cu_seqlens.to(device), segments.lengths)
    out = attention(*inputs, on_device, backend)
    expected = attention_reference(*exact, segments)
    assert out.shape == expected.shape and out.dtype == dtype
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    for ours, theirs in zip((out, *(x.grad for x in inputs)), (expected, *(x.grad for x in exact)), strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1)
        assert error < tolerance, f"{backend}: {error:.2e}"


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_cpu_agrees_with_reference(lengths, heads, kv_heads):
    assert_agrees(lengths, heads, kv_heads, 16, "auto", "cpu", torch.float32, 1e-5)


@needs_gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, (300, 1, 723), (512, 512)])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "cudnn", "flash", "flash4", "auto"])
@pytest.mark.parametrize("size", [64, 128])
def test_gpu_16bit_agrees_with_reference(lengths, heads, kv_heads, backend, size):
    if backend == "flash" and room.flash_attn_varlen_func is None:
        pytest.skip("no flash-attn")
    if backend == "cudnn" and not cudnn_applies(size)[0]:
        pytest.skip(cudnn_applies(size)[1])
    if backend == "flash4" and attention_flash.load_flash4():
        pytest.skip(attention_flash.load_flash4())
    assert_agrees(lengths, heads, kv_heads, size, backend, "cuda", torch.bfloat16, 3e-2)


@needs_gpu
@pytest.mark.parametrize("lengths", [(30, 10), (20, 20)])
@pytest.mark.parametrize("kernel", ["varlen", "flash4"])
def test_opaque_operation_keeps_its_promises_to_the_compiler(kernel, lengths):
    if kernel == "flash4" and attention_flash.load_flash4():
        pytest.skip(attention_flash.load_flash4())
    q, k, v = random_qkv(40, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    segments = Segments.of(lengths)
    args = q, k, v, segments.cu_seqlens.cuda(), segments.extent, kernel
    torch.library.opcheck(torch.ops.internlm.ragged_attention.default, args)


@needs_gpu
def test_gpu_fp32_agrees_with_reference():
    assert_agrees((300, 1, 723), 6, 2, 64, "auto", "cuda", torch.float32, 1e-4)


def test_choice(monkeypatch):
    bf16 = torch.bfloat16
    monkeypatch.setattr(room, "flash4_applies", lambda dtype, head_dim: (False, "why"))
    assert room._choice(bf16, 128, on_gpu=False, uniform=False)[0] == "sdpa"
    assert room._choice(bf16, 128, on_gpu=True, uniform=True)[0] == "sdpa"
    assert room._choice(torch.float32, 128, on_gpu=True, uniform=False)[0] == "sdpa"
    assert room._choice(bf16, 100, on_gpu=True, uniform=False)[0] == "sdpa"
    assert room._choice(bf16, 100, on_gpu=True, uniform=True)[0] == "sdpa"


def test_order_of_kernels_for_ragged_segments(monkeypatch):
    def choice(flash4: bool, cudnn: bool, flash: int) -> str:
        monkeypatch.setattr(attention_flash, "_kernels", (None, None) if flash4 else None)
        monkeypatch.setattr(room, "cudnn_applies", lambda head_dim: (cudnn, "why"))
        monkeypatch.setattr(room, "flash_attn_version", flash)
        return room._choice(torch.bfloat16, 128, on_gpu=True, uniform=False)[0]

    order = [choice(True, True, 3), choice(False, True, 3), *(choice(False, False, flash) for flash in (3, 2, 0))]
    assert order == ["flash4", "cudnn", "flash", "varlen", "varlen"]


@pytest.mark.parametrize("uniform", [True, False])
def test_flash4_is_chosen_where_it_was_measured_to_be_the_fastest(monkeypatch, uniform):
    monkeypatch.setattr(attention_flash, "_kernels", (None, None))
    monkeypatch.setattr(room, "cudnn_applies", lambda head_dim: (True, "why"))
    for dtype in (torch.bfloat16, torch.float16):
        chosen = {size: room._choice(dtype, size, on_gpu=True, uniform=uniform)[0] for size in (64, 96, 128, 256)}
        assert chosen == {64: "flash4", 96: chosen[96], 128: "flash4", 256: chosen[96]}
        assert chosen[96] == ("sdpa" if uniform else "cudnn")
    backend, reason = room._choice(torch.float32, 128, on_gpu=True, uniform=uniform)
    assert backend == "sdpa" and "don't take torch.float32" in reason.replace("doesn't", "don't")


def test_flash_when_installed(monkeypatch):
    """Called with the package's signature."""

    def stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == 14
        return attention_reference(q, k, v, Segments(cu_seqlens_q, tuple(cu_seqlens_q.diff().tolist())))

    monkeypatch.setattr(room, "flash_attn_varlen_func", stand_in)
    assert_agrees((1, 7, 14), 4, 2, 16, "flash", "cpu", torch.float32, 1e-5)


@pytest.mark.parametrize("lengths", [(1, 7, 14), (8, 8, 8)])
def test_flash4_when_installed(monkeypatch, lengths):
    """Called as the package wants it: a batch, with lse [batch, heads, length], or ragged, with lse [heads, tokens]."""

    def flat(q, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
        assert cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q
        if q.dim() == 4:
            assert cu_seqlens_q is None
            return Segments.of((q.shape[1],) * len(q))
        assert max_seqlen_q >= 14
        return Segments(cu_seqlens_q, tuple(cu_seqlens_q.diff().tolist()))

    def stand_in(q, k, v, causal, return_lse, **ragged):
        assert causal and return_lse
        out, lse = part_attention(*(x.flatten(0, -3) for x in (q, k, v)), flat(q, **ragged))
        lse = lse if q.dim() == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
        return out.view_as(q), lse, None, None, None

    def stand_in_backward(q, k, v, out, dout, lse, causal, **ragged):
        assert causal and lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else q.shape[1::-1])
        lse = lse if q.dim() == 3 else lse.transpose(0, 1).flatten(1)
        grads = part_attention_backward(*(x.flatten(0, -3) for x in (dout, q, k, v, out)), lse, flat(q, **ragged))
        return [x.view_as(like) for x, like in zip(grads, (q, k, v), strict=True)]

    monkeypatch.setattr(attention_flash, "_kernels", (stand_in, stand_in_backward))
    assert_agrees(lengths, 4, 2, 16, "flash4", "cpu", torch.float32, 1e-5)


@pytest.fixture
def package(monkeypatch):
    """A flash-attn-4 on a Hopper GPU, whose kernels are `_flash_attn_fwd` and `_flash_attn_bwd` of what is returned."""
    package = ModuleType("flash_attn.cute.interface")
    for name, module in (("flash_attn", package), ("flash_attn.cute", package), (package.__name__, package)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention_flash, "_kernels", None)
    monkeypatch.setattr(attention_flash, "_reason", "")
    monkeypatch.setattr(attention_flash, "version", lambda name: "5.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")
    return package


GPU = torch.device("cuda")


def test_flash4_is_done_without_where_it_is_another(package):
    """A release of flash-attn-4 that takes other arguments is no reason to fail, unless it is asked for by name."""
    package._flash_attn_fwd = lambda q, k, v, causal: None
    package._flash_attn_bwd = None
    prepare_attention("sdpa", GPU, torch.bfloat16, 128)
    prepare_attention("auto", GPU, torch.float32, 128)
    assert attention_flash._reason == ""  # not looked for
    with pytest.raises(UserError, match=r'attn_backend = "flash4": .* release 5.0 takes no cu_seqlens_k, .*return_lse'):
        prepare_attention("flash4", GPU, torch.bfloat16, 128)
    assert not attention_flash.flash4_applies(torch.bfloat16, 128)[0]
    assert room._choice(torch.bfloat16, 128, on_gpu=True, uniform=True)[0] == "sdpa"


@pytest.mark.parametrize(
    ("broken", "expected"),
    [("", ""), ("raises", "no ptxas"), ("zeros", "a trial's result is wrong"), ("nan", "a trial's result is wrong")],
)
def test_flash4_is_done_without_where_its_kernels_fail(package, monkeypatch, caplog, broken, expected):
    """Found before the first step: where a package is there, its compiler may still not fit this machine."""

    def forward(q, k, v, causal, return_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        if broken == "raises":
            raise RuntimeError("no ptxas\n  in a file, at a line")
        out, lse = part_attention(q, k, v, Segments(cu_seqlens_q, tuple(cu_seqlens_q.diff().tolist())))
        return out.to(q.dtype) * (broken != "zeros"), lse

    def backward(q, k, v, out, dout, lse, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        for name in ("aux_data", "mQ"):
            warnings.warn(f"Argument {name} (position 21) cannot be converted to a JitArgument for f.", stacklevel=1)
        segments = Segments(cu_seqlens_q, tuple(cu_seqlens_q.diff().tolist()))
        grads = part_attention_backward(dout, q, k, v, out, lse, segments)
        return [x * (float("nan") if broken == "nan" else 1) for x in grads]

    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward
    for name in ("arange", "tensor"):  # which the trial makes on the GPU
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **{**k, "device": None}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem = attention_flash.load_flash4()
    assert problem == (f"flash-attn-4 can't be used: {expected}" if expected else "")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * bool(expected)
    assert [str(warning.message)[:11] for warning in caught] == ["Argument mQ"] * (broken != "raises")
    applies, reason = attention_flash.flash4_applies(torch.bfloat16, 64)
    assert applies == (not expected) and expected in reason


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "expected"),
    [
        ("flash4", torch.float32, 128, "it takes 16-bit numbers, and model.dtype = torch.float32"),
        ("varlen", torch.float32, 128, "it takes 16-bit numbers, and model.dtype = torch.float32"),
        ("flash", torch.bfloat16, 128, "flash-attn is not installed"),
        ("cudnn", torch.bfloat16, 160, "heads of size 160"),
        ("varlen", torch.bfloat16, 100, "it takes no heads of size 100"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_the_first_step(monkeypatch, backend, dtype, size, expected):
    monkeypatch.setattr(room, "flash_attn_varlen_func", None)
    monkeypatch.setattr(room, "cudnn_applies", lambda head_dim: (head_dim <= 128, f"heads of size {head_dim}"))
    for fine in ("sdpa", "varlen", "cudnn"):
        prepare_attention(fine, GPU, torch.bfloat16, 128)
    with pytest.raises(UserError, match=f'model.attn_backend = "{backend}": {expected}; set "auto"'):
        prepare_attention(backend, GPU, dtype, size)


def test_packed_gradient_stays_in_its_segment():
    q, k, v = random_qkv(12, 2, 2, 8)
    attention(q, k, v, Segments.of((5, 7)))[5:].sum().backward()
    for x in (q, k, v):
        assert x.grad[:5].abs().max() == 0
        assert v.grad[5:].abs().max() > 0


def test_cached_attention_is_attention_over_a_prefix():
    q, k, v = random_qkv(10, 4, 2, 8)
    expected = attention_reference(q, k, v, Segments.of((10,)))
    # The last three queries of the row, over a cache whose tail holds rubbish.
    keys, values = (torch.cat((x, torch.full((4, 2, 8), 9.0))) for x in (k, v))
    out = cached_attention(q[None, 7:], keys[None], values[None], torch.arange(7, 10)[None])
    torch.testing.assert_close(out[0], expected[7:], atol=1e-5, rtol=1e-5)
