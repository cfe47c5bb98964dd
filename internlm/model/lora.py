"""LoRA: small trained matrices beside frozen projections (Hu et al., 2021).

y = W x + b + alpha / rank * B A dropout(x), where A is [rank, in] and B [*out, rank] starts at zero, so that training
begins at the base model. Where ours is one fused projection and others have several (q, k, v), these share A.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import LoraConfig
from internlm.model.layers import Linear

NAMES = ("lora_a", "lora_b")

Projection = Callable[[Tensor], Tensor]


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2] in NAMES


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Freezes `model` and puts adapters beside the projections that `lora.target` names."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    model.requires_grad_(False)
    for name, linear in linears.items():
        if any(fnmatch(name, pattern) for pattern in lora.target):
            weight = linear.weight
            linear.lora_a = nn.Parameter(weight.new_empty(lora.rank, weight.shape[-1]))
            linear.lora_b = nn.Parameter(weight.new_empty(*linear.out_shape, lora.rank))
            alone = partial(Linear.forward, linear)
            linear.forward = partial(adapted, linear, lora, alone, _same)  # type: ignore[method-assign]


def _same(x: Tensor) -> Tensor:
    return x


def adapted(linear: Linear, lora: LoraConfig, project: Projection, carry: Projection, x: Tensor) -> Tensor:
    """The frozen projection `project(x)` plus the adapter's output: x [tokens, in] -> [tokens, *out].

    `carry` is applied between A and B, [tokens, rank] -> [tokens, rank]: what tensor ranks send there.
    """
    lora_a, lora_b = (linear.get_parameter(name) for name in NAMES)
    low = carry(F.linear(F.dropout(x, lora.dropout, linear.training), lora_a))
    update = F.linear(low, lora_b.view(prod(linear.out_shape), -1)).unflatten(-1, linear.out_shape)
    return project(x) + lora.scale * update


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The weight that does what weight and adapter do together, fp32: 16 bits would drop small updates."""
    return weight.float() + scale * torch.tensordot(lora_b.float(), lora_a.float(), 1)
