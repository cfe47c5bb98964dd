"""8-bit products against fp32 ones, and the Triton cast (in its interpreter without a GPU) against torch's."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from internlm.ops.fp8 import E4M3, cast_reference, fp8_linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def relative(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("device", DEVICES)
def test_value_and_gradients_are_near_exact(device):
    """Errors of some percent and no more: E4M3 has 3 bits of mantissa."""
    torch.manual_seed(0)
    shapes = (64, 96), (80, 96), (80,)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device=device).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = fp8_linear(*inputs), F.linear(*exact)
    upstream = torch.randn_like(out) * 1e-4
    out.backward(upstream)
    expected.backward(upstream.double())
    assert relative(out, expected) < 0.04 and out.dtype == torch.bfloat16
    assert relative(inputs[0].grad, exact[0].grad) < 0.04
    assert relative(inputs[1].grad, exact[1].grad) < 0.04
    assert relative(inputs[2].grad, exact[2].grad) < 0.01


def test_cast_uses_the_whole_range():
    x = torch.tensor([[3.0, -7.0], [0.0, 1e-9]])
    rounded, transposed, scale = cast_reference(x)
    assert rounded.float().abs().max() == torch.finfo(E4M3).max
    assert torch.equal(transposed.float(), rounded.float().T)
    assert relative(rounded.float() * scale, x) < 0.1
    assert all(part.float().isfinite().all() for part in cast_reference(torch.zeros(2, 2)))


def check_kernel(device="cpu"):
    """Also run as a script, in a process where Triton interprets (and rounds to 8 bits in its own way)."""
    from internlm.ops.fp8_kernel import cast

    x = torch.randn(150, 70, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    ours, expected = cast(x), cast_reference(x)
    assert torch.equal(ours[0].float(), ours[1].float().T)
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-6, atol=0)
    assert relative(ours[0].float() * ours[2], x.float()) < (0.04 if device == "cuda" else 0.1)


def test_kernel_interpreted_agrees_with_torch():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "tests.ops.test_fp8"], check=True, env=environment)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_on_gpu_agrees_with_torch():
    check_kernel("cuda")


if __name__ == "__main__":
    check_kernel()
