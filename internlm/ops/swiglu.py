"""SwiGLU: silu(gate) * up (Shazeer, 2020).

Only the input is kept for backward: plain autograd would keep silu(gate) as well, half as much again.

    torch   any device
    triton  two kernels (`swiglu_kernel.py`) behind an operation that a compiled block calls as it is; GPUs
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.ops.kernels import find_kernels

_kernels = find_kernels("swiglu_kernel")


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [tokens, 2, size] (0 gate, 1 up) -> [tokens, size], by autograd."""
    gate, up = gate_up.unbind(-2)
    return F.silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [tokens, 2, size] (0 gate, 1 up) -> [tokens, size]."""
    out: Tensor = torch.ops.internlm.swiglu(gate_up)
    return out


# Not by `torch.library.custom_op`: that imports torch._dynamo at the first call, which takes a CPU two seconds.
torch.library.define("internlm::swiglu", "(Tensor gate_up) -> Tensor")
torch.library.define("internlm::swiglu_backward", "(Tensor gate_up, Tensor grad) -> Tensor")


@torch.library.impl("internlm::swiglu", "default")
def _swiglu(gate_up: Tensor) -> Tensor:
    if gate_up.is_cuda and gate_up.numel() > 0 and _kernels is not None:
        return _kernels.forward(gate_up.contiguous())
    return swiglu_reference(gate_up)


@torch.library.register_fake("internlm::swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[2])


@torch.library.impl("internlm::swiglu_backward", "default")
def _swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    if gate_up.is_cuda and gate_up.numel() > 0 and _kernels is not None:
        return _kernels.backward(gate_up.contiguous(), grad.contiguous())
    gate, up = gate_up.unbind(-2)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.stack((grad_gate, grad * F.silu(gate)), dim=-2)


@torch.library.register_fake("internlm::swiglu_backward")
def _(gate_up: Tensor, grad: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    out: Tensor = torch.ops.internlm.swiglu_backward(ctx.saved_tensors[0], grad)
    return out


torch.library.register_autograd("internlm::swiglu", _differentiate, setup_context=_setup)
