"""Initial values: all of them, in one place, each a pure function of the parameter's name and the run's seed.

The standard deviations are those of InternLM's 2023 framework (`init="internlm"`, with the feed-forward names of its
successor InternEvo: the scaled one is the output projection) and of InternLM2 (`init="internlm2"`).
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt

import torch
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.core.random import seed_of

# Values are drawn in pieces of this many, each from a stream of its own: pieces can be drawn at once by all cores
# (one core draws 50 to 200 million normals a second, a minute or two for 7B) and sent to the device one by one, and how
# many there are changes nothing.
_PIECE = 2**20

# Experts start as a dense layer does; the router and the mixture of shared experts as other projections of the token.
_EXPERT_ROLES = {
    "feed_forward.experts.w13": "feed_forward.w13.weight",
    "feed_forward.experts.w2": "feed_forward.w2.weight",
    "feed_forward.shared.w13.weight": "feed_forward.w13.weight",
    "feed_forward.shared.w2.weight": "feed_forward.w2.weight",
    "feed_forward.router.weight": "feed_forward.w13.weight",
    "feed_forward.mix.weight": "feed_forward.w13.weight",
}


def initial_value(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The fp32 value that parameter `name` starts with, on `device`.

    The same on every layout, device and order of calls: always drawn on the CPU, from streams seeded by `name`.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if name.endswith(".lora_a"):  # uniform with the bound 1 / sqrt(inputs), as PEFT begins
        return _draw(name, prod(shape), seed, "uniform", 1 / sqrt(3 * shape[-1]), device).view(shape)
    if name.endswith((".bias", ".lora_b")):
        return torch.zeros(shape, device=device)
    kind = config.init_type if config.init == "internlm2" else "normal"
    return _draw(name, prod(shape), seed, kind, initial_std(name, config), device).view(shape)


def initial_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of the initial values of the weight matrix `name`."""
    layer = re.match(r"layers\.(\d+)\.", name)
    role = name[layer.end() :] if layer else name
    role = _EXPERT_ROLES.get(role, role)
    is_output = role in ("attention.wo.weight", "feed_forward.w2.weight")
    scale = 1 / sqrt(2 * (int(layer[1]) + 1)) if layer and is_output and config.use_scaled_init else 1.0
    if config.init == "internlm":
        unscaled_output = 0.006 if config.use_scaled_init else 0.0015
        std = {
            "embedding.weight": 0.0052,
            "head.weight": 0.0052,
            "attention.wqkv.weight": 0.006,
            "attention.wo.weight": unscaled_output,
            "feed_forward.w13.weight": 0.006,
            "feed_forward.w2.weight": unscaled_output,
        }
    else:
        std = {
            "embedding.weight": config.embedding_init_std,
            "head.weight": config.out_head_init_std,
            "attention.wqkv.weight": config.attn_wqkv_init_std,
            "attention.wo.weight": config.attn_other_init_std,
            "feed_forward.w13.weight": config.ffn_uplayer_init_std,
            "feed_forward.w2.weight": config.ffn_other_init_std,
        }
    assert role in std, f"{name} has no rule for its initial value"
    return std[role] * scale


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills the parameters of a model that is on a real device. For library use; the engine fills its own buffers."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed, parameter.device))


def _draw(name: str, count: int, seed: int, kind: str, std: float, device: torch.device | str) -> Tensor:
    """`count` fp32 numbers of mean 0 and standard deviation `std`, normal or uniform."""
    values = torch.empty(count, device=device)

    def fill(index: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(seed, f"{name}/{index}"))
        target = values[index * _PIECE : (index + 1) * _PIECE]
        piece = target if target.device.type == "cpu" else torch.empty(len(target))
        if kind == "normal":
            piece.normal_(0.0, std, generator=generator)
        else:
            piece.uniform_(-sqrt(3) * std, sqrt(3) * std, generator=generator)
        if piece is not target:
            target.copy_(piece)

    num_pieces = (count + _PIECE - 1) // _PIECE
    if num_pieces == 1:
        fill(0)
    else:
        with ThreadPoolExecutor(min(num_pieces, 16, os.cpu_count() or 1)) as pool:
            list(pool.map(fill, range(num_pieces)))
    return values
