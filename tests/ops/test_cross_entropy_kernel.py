"""The Triton kernel of the loss, in its interpreter without a GPU, against the torch path on one chunk of logits."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from internlm.ops import cross_entropy as room
from internlm.ops.cross_entropy import IGNORE_INDEX


def check_kernel(device="cpu", dtypes=(torch.float32,)):
    """Also run as a script, in a process where Triton interprets."""
    from internlm.ops.cross_entropy_kernel import losses_and_gradient_

    for dtype, (smoothing, z_loss), vocab in itertools.product(dtypes, [(0.0, 0.0), (0.1, 1e-2)], [50, 5000]):
        logits = (torch.randn(9, vocab, generator=torch.Generator().manual_seed(0)) * 4).to(device, dtype)
        logits[6, 6], logits[6, min(6 + 4096, vocab - 1)] = 99.0, 99.0  # of equals the first counts
        if smoothing == 0:  # which asks for a mean over all
            logits[7, ::3] = float("-inf")
        labels = torch.tensor([0, vocab - 1, IGNORE_INDEX, 3, 4, 5, 6, 7, int(logits[8].argmax())], device=device)
        torch_path = room._chunk_losses(logits, labels, smoothing, z_loss)
        gradient = room._to_gradient_(torch_path[0].clone(), labels, smoothing, None) * 8
        gradient[2] = 0
        losses, objective, correct = losses_and_gradient_(logits, labels, smoothing, z_loss, 8.0, True)
        torch.testing.assert_close(losses, torch_path[1].token_losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(objective.sum(), torch_path[1].loss_sum, rtol=1e-5, atol=1e-5)
        assert torch.equal(correct, torch_path[1].correct) and correct[6] and correct[8]
        bits = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(logits.float(), gradient, rtol=bits, atol=bits)


def test_kernel_interpreted_agrees_with_torch():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "tests.ops.test_cross_entropy_kernel"], check=True, env=environment)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_on_gpu_agrees_with_torch():
    assert room._triton_losses is not None
    check_kernel("cuda", (torch.float32, torch.bfloat16, torch.float16))


if __name__ == "__main__":
    check_kernel()
