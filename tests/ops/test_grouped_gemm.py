"""Every path of the grouped product agrees with one product per group."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.ops.grouped_gemm import grouped_linear, grouped_linear_reference, has_grouped_mm

CASES = [(3, 0, 4, 1), (0, 0, 8, 0), (2, 2, 2, 2)]


def inputs(counts: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(counts), 16, generator=generator).to(device, dtype)
    weight = torch.randn(len(counts), 24, 16, generator=generator).to(device, dtype)
    return rows.requires_grad_(), weight.requires_grad_(), torch.tensor(counts, device=device)


def by_hand(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    group = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return torch.einsum("ri,roi->ro", rows, weight[group])


@pytest.mark.parametrize("counts", CASES)
def test_loop(counts: tuple[int, ...]) -> None:
    rows, weight, sizes = inputs(counts, torch.float64)
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear_reference(r, w, sizes), (rows, weight))
    torch.testing.assert_close(grouped_linear(rows, weight, sizes), by_hand(rows, weight, sizes))


@pytest.mark.parametrize("counts", CASES)
def test_torch_kernel_means_the_same(counts: tuple[int, ...]) -> None:
    """F.grouped_mm on the CPU, as `grouped_linear` calls it on a GPU."""
    rows, weight, sizes = inputs(counts, torch.float32)
    offsets = sizes.cumsum(0, dtype=torch.int32)
    output = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    expected = grouped_linear_reference(rows, weight, sizes)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(y, (rows, weight), grad) for y in (output, expected))
    torch.testing.assert_close(found, wanted)


def test_the_loop_runs_where_the_kernel_cannot() -> None:
    rows, weight, _ = inputs((3, 5), torch.bfloat16)
    assert not has_grouped_mm(rows, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", CASES)
def test_gpu(counts: tuple[int, ...]) -> None:
    rows, weight, sizes = inputs(counts, torch.bfloat16, "cuda")
    assert has_grouped_mm(rows, weight)
    output, expected = grouped_linear(rows, weight, sizes), grouped_linear_reference(rows, weight, sizes)
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.02)
    grad = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(y, (rows, weight), grad) for y in (output, expected))
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.05)
