"""SwiGLU: silu(gate) * up (Shazeer, 2020)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [tokens, 2, size] (0 gate, 1 up) -> [tokens, size], by autograd."""
    gate, up = gate_up.unbind(-2)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input for backward: plain autograd would keep silu(gate) as well, half as much again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_reference(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.unbind(-2)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.stack((grad_gate, grad * F.silu(gate)), dim=-2)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [tokens, 2, size] (0 gate, 1 up) -> [tokens, size]."""
    return _SwiGLU.apply(gate_up)
