"""RMSNorm, rotary and SwiGLU against torch's own functions and the formulas of the papers."""

import cmath

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from internlm.config.rope_section import RopeScaling
from internlm.ops.rms_norm import rms_norm, rms_norm_reference
from internlm.ops.rotary import rotary_tables, rotate
from internlm.ops.rotary_split import split_and_rotate, split_and_rotate_reference
from internlm.ops.swiglu import swiglu, swiglu_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_equals_torch(device, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 64, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(64, dtype=dtype, device=device, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, expected = rms_norm(x, weight, 1e-5), F.rms_norm(exact[0], (64,), exact[1], 1e-5)
    assert out.dtype == dtype
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    for ours, theirs in zip((out, x.grad, weight.grad), (expected, exact[0].grad, exact[1].grad), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_paths_agree_in_16_bit(device):
    x, weight = torch.randn(50, 64, dtype=torch.bfloat16, device=device), torch.rand(64, device=device)
    plain = rms_norm_reference(x, weight.bfloat16(), 1e-5, torch.bfloat16)
    torch.testing.assert_close(rms_norm(x, weight.bfloat16(), 1e-5), plain, rtol=1e-2, atol=1e-2)


def test_rms_norm_mixed_dtypes():
    x, weight = torch.randn(4, 16), torch.rand(16)
    assert rms_norm(x.bfloat16(), weight, 1e-5).dtype == torch.bfloat16
    assert rms_norm(x, weight.bfloat16(), 1e-5, torch.bfloat16).dtype == torch.bfloat16
    # Statistics of a 16-bit input are fp32: squares of 300 don't fit into fp16.
    torch.testing.assert_close(
        rms_norm(torch.full((1, 16), 300.0).half(), torch.ones(16), 1e-5), torch.ones(1, 16).half()
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_complex_rotation(interleaved):
    torch.manual_seed(0)
    size, base, positions = 8, 100.0, torch.tensor([0, 1, 7, 500])
    x = torch.randn(4, 3, size)
    out = rotate(x, *rotary_tables(positions, size, base, torch.float32), interleaved)
    for token, position in enumerate(positions.tolist()):
        for j in range(size // 2):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + size // 2)
            turn = cmath.exp(1j * position * base ** (-2 * j / size))
            for head in range(3):
                expected = complex(x[token, head, a], x[token, head, b]) * turn
                # fp32 angles of a few hundred are good to some 1e-5.
                assert abs(complex(out[token, head, a], out[token, head, b]) - expected) < 2e-4


def test_interleaved_is_half_split_with_permuted_rows():
    x = torch.randn(6, 2, 16)
    cos, sin = rotary_tables(torch.arange(6), 16, 10000.0, torch.float32)
    half_to_interleaved = torch.arange(16).view(2, 8).T.flatten()  # 0, 8, 1, 9, ...
    half_split = rotate(x, cos, sin)[..., half_to_interleaved]
    assert torch.equal(rotate(x[..., half_to_interleaved], cos, sin, interleaved=True), half_split)


def test_rotary_tables_round_at_the_end():
    positions = torch.tensor([100_001])
    exact = rotary_tables(positions, 4, 10000.0, torch.float32)
    rounded = rotary_tables(positions, 4, 10000.0, torch.bfloat16)
    for a, b in zip(exact, rounded, strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_swiglu_value_and_gradient():
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2, 7, dtype=torch.float64, requires_grad=True)
    out = swiglu(gate_up)
    torch.testing.assert_close(out, F.silu(gate_up[:, 0]) * gate_up[:, 1])
    assert torch.autograd.gradcheck(swiglu, gate_up)
    (ours,) = torch.autograd.grad(out.sum(), gate_up)
    (plain,) = torch.autograd.grad(swiglu_reference(gate_up).sum(), gate_up)
    torch.testing.assert_close(ours, plain)


@pytest.mark.gpu
def test_swiglu_of_more_tokens_than_the_second_dim_of_a_grid_has():
    gate_up = torch.randn(2**16 + 3, 2, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    exact = gate_up.detach().double().requires_grad_()
    out, expected = swiglu(gate_up), swiglu_reference(exact)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gate_up.grad.double(), exact.grad, rtol=1e-2, atol=1e-2)


def test_swiglu_keeps_only_its_input():
    gate_up = torch.randn(5, 2, 7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        swiglu(gate_up)
    assert kept == [70]


@pytest.mark.parametrize("base", [1e4, 1e6])
def test_angles_are_those_of_transformers_bit_for_bit(base):
    positions = torch.arange(0, 32768, 7)
    config = LlamaConfig(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": base})
    expected = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    for table, theirs in zip(rotary_tables(positions, 128, base, torch.float32), expected, strict=True):
        assert torch.equal(table, theirs[0, :, :64])


SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 16.0, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_scaled_angles_are_those_of_transformers_bit_for_bit(base, scaling):
    old_length = {"original_max_position_embeddings": 4096} if scaling["rope_type"] in ("llama3", "yarn") else {}
    ours = RopeScaling(
        type=scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}, **old_length
    )
    theirs = LlamaConfig(
        head_dim=128, max_position_embeddings=4096, rope_parameters={**scaling, **old_length, "rope_theta": base}
    )
    rotary = LlamaRotaryEmbedding(theirs)
    for length in (4000, 32768, 5000, 100):
        positions = torch.arange(0, length, 7)
        expected = rotary(torch.empty(0), positions[None])
        texts = positions[-1:] + 1, len(positions)
        tables = rotary_tables(positions, 128, base, torch.float32, ours, texts, 4096)
        for table, other in zip(tables, expected, strict=True):
            assert torch.equal(table, other[0, :, :64]), length
        if scaling["rope_type"] == "dynamic":
            rotary = LlamaRotaryEmbedding(theirs)  # it would go on with the longest text so far


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_projection_is_split_and_rotated(interleaved):
    """One operation with a gradient of its own, against the same by autograd."""
    torch.manual_seed(0)
    qkv = torch.randn(4, 3, 2 + 2, 8, dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(torch.tensor([0, 1, 0, 700]), 8, 1e4, torch.float64)
    q, k, v = split_and_rotate(qkv, *tables, interleaved)
    torch.testing.assert_close((q, k, v), split_and_rotate_reference(qkv, *tables, interleaved))
    torch.testing.assert_close(q[:, 5], rotate(qkv[:, 2, 1], *tables, interleaved))  # second query of the third group
    assert torch.equal(v, qkv[:, :, 3]) and not torch.equal(k[1], qkv[1, :, 2])
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, *tables, interleaved), qkv)
