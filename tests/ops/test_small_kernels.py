"""The Triton kernels of SwiGLU and rotary, in Triton's interpreter without a GPU, against autograd."""

import os
import subprocess
import sys

import pytest
import torch

from internlm.ops.rotary import rotary_tables
from internlm.ops.rotary_split import split_and_rotate_reference
from internlm.ops.swiglu import swiglu_reference


def check_swiglu(device="cpu"):
    from internlm.ops import swiglu_kernel

    torch.manual_seed(0)
    for tokens, size in ((3, 1500), (1, 64)):
        gate_up = torch.randn(tokens, 2, size, device=device, requires_grad=True)
        upstream = torch.randn(tokens, size, device=device)
        expected = swiglu_reference(gate_up)
        (grad,) = torch.autograd.grad(expected, gate_up, upstream)
        torch.testing.assert_close(swiglu_kernel.forward(gate_up.detach()), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(swiglu_kernel.backward(gate_up.detach(), upstream), grad, rtol=1e-5, atol=1e-6)


def check_rotary(device="cpu"):
    from internlm.ops import rotary_kernel

    torch.manual_seed(0)
    for kv_heads, groups, size, interleaved in ((7, 1, 16, False), (3, 4, 20, True), (2, 2, 64, True)):
        qkv = torch.randn(5, kv_heads, groups + 2, size, device=device, requires_grad=True)
        tables = rotary_tables(torch.tensor([0, 1, 2, 0, 900], device=device), size, 1e4, torch.float32)
        expected = split_and_rotate_reference(qkv, *tables, interleaved)
        upstream = [torch.randn_like(part) for part in expected]
        (grad,) = torch.autograd.grad(expected, qkv, upstream)
        for ours, part in zip(rotary_kernel.forward(qkv.detach(), *tables, interleaved), expected, strict=True):
            torch.testing.assert_close(ours, part.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rotary_kernel.backward(*upstream, *tables, interleaved), grad, rtol=1e-5, atol=1e-6)


def test_kernels_interpreted_agree_with_autograd():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Recorder:
    """Stands in for a kernel, and keeps the grids that it is started with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


def test_long_rows_fit_the_grid(monkeypatch):
    """A GPU takes at most 65,535 programs in all dims but the first."""
    pytest.importorskip("triton")
    from internlm.ops import rotary_kernel, swiglu_kernel

    kernels, tokens = Recorder(), 70_000
    for module, name in ((swiglu_kernel, "_forward"), (swiglu_kernel, "_backward"), (rotary_kernel, "_split")):
        monkeypatch.setattr(module, name, kernels)
    swiglu_kernel.forward(torch.empty(tokens, 2, 1))
    swiglu_kernel.backward(torch.empty(tokens, 2, 1), torch.empty(tokens, 1))
    tables = torch.empty(tokens, 1), torch.empty(tokens, 1), False
    q, k, v = rotary_kernel.forward(torch.empty(tokens, 1, 3, 2), *tables)
    rotary_kernel.backward(q, k, v, *tables)
    assert len(kernels.grids) == 4
    assert all(max(grid[1:]) <= 65_535 for grid in kernels.grids), kernels.grids


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("check", [check_swiglu, check_rotary])
def test_kernels_agree_with_autograd_on_the_gpu(check):
    check("cuda")


if __name__ == "__main__":
    check_swiglu()
    check_rotary()
