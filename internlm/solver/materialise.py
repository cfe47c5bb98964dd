"""From a model without memory to one that has it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def materialise_parameter(model: nn.Module, name: str, device: torch.device) -> nn.Parameter:
    """Replaces a parameter on the meta device by an empty one, to become a view of its unit's buffer."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    old = getattr(module, attribute)
    new = nn.Parameter(torch.empty(0, dtype=old.dtype, device=device), requires_grad=old.requires_grad)
    setattr(module, attribute, new)
    return new


def materialise_buffers(
    model: nn.Module, value_of: Callable[[str, tuple[int, ...]], Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Gives the buffers of a model on the meta device memory and their first values. Returns them by name.

    Buffers are values that no gradient changes, such as the biases of routers: whole on every rank that has the module,
    and any change is made to all copies alike.
    """
    buffers = {}
    for name, empty in list(model.named_buffers()):
        module_name, _, attribute = name.rpartition(".")
        buffers[name] = value_of(name, tuple(empty.shape)).to(device, empty.dtype)
        setattr(model.get_submodule(module_name), attribute, buffers[name])
    return buffers
