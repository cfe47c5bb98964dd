"""Activation recomputation: what a block does not keep for backward, and computes again there."""

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from internlm.config.schema import ModelConfig
from internlm.model.feed_forward import FeedForward
from internlm.ops.swiglu import swiglu
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

aten = torch.ops.aten
# What "selective" keeps: results of matrix products and attention, all that is slow. Norms, rotation and SwiGLU are
# computed again from them, at the speed of memory.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._flash_attention_forward.default,  # of a ring, each step's
}
KEPT_BY_NAME = {"internlm::fp8_cast", "internlm::ragged_attention", "flash_attn::_flash_attn_varlen_forward"}


def num_recomputed(num_blocks: int, fraction: float) -> int:
    """How many of the blocks of a pipeline's chunk are recomputed, the first ones; rounded down as in 2023."""
    return int(num_blocks * fraction)


def num_with_recomputation(num_blocks: int, checkpoint: bool | float | str) -> int:
    """How many of the blocks of a chunk, the first ones, compute anything again in backward."""
    return num_blocks if isinstance(checkpoint, str) else num_recomputed(num_blocks, float(checkpoint))


def recompute_blocks(layers: Sequence[nn.Module], config: ModelConfig) -> None:
    """Makes the blocks of a chunk recompute, as `model.checkpoint` asks: the first ones from their input;
    "feed_forward": of all of them the inside of the feed-forward layer; "offload": that from its first product, which
    `offload.py` moves; "selective": all of them from the results of matrix products and attention.

    The `forward` is replaced, not the module: hooks on its calls run once, in forward, and don't run again when it is
    recomputed.
    """
    if config.checkpoint == "feed_forward":
        for block in layers:
            layer = block.get_submodule("feed_forward")
            replace_forward(layer, MethodType(_recomputed_layer, layer))
        logger.info("the feed-forward layers of all blocks are recomputed in backward, but for their last product")
        return
    if config.checkpoint == "offload":
        for block in layers:
            layer = block.get_submodule("feed_forward")
            replace_forward(layer, MethodType(_recomputed_from_product, layer))
        return
    selective, count = config.checkpoint == "selective", num_with_recomputation(len(layers), config.checkpoint)
    for block in layers[:count]:
        replace_forward(block, partial(_recomputed, block.forward, selective))
    if selective:
        logger.info("all blocks keep results of matrix products and attention, and recompute the rest in backward")
    elif count:
        logger.info("%d of %d blocks are recomputed in backward", count, len(layers))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """`module(...)` runs `forward` between its hooks."""
    module.forward = forward


def _recomputed(forward: Callable[..., Any], selective: bool, *args: Any) -> Any:
    # nothing in a block draws random numbers, so no generator's state is kept
    if not selective:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _recomputed_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A method of the layer and no closure, so that one compiled code serves all blocks."""
    return checkpoint(type(layer).forward, layer, x, use_reentrant=False, preserve_rng_state=False)


def _recomputed_from_product(layer: FeedForward, x: Tensor) -> Tensor:
    product = layer.w13(x)
    return checkpoint(_after_product, layer, product, use_reentrant=False, preserve_rng_state=False)


def _after_product(layer: FeedForward, product: Tensor) -> Tensor:
    return layer.w2(swiglu(product))


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or getattr(op, "name", str)().split(".")[0] in KEPT_BY_NAME
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
