"""Activation recomputation: blocks that keep only their input, and run again in backward."""

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from internlm.utils.logger import get_logger

logger = get_logger(__name__)


def num_recomputed(num_blocks: int, fraction: float) -> int:
    """How many of the blocks of a pipeline's chunk are recomputed, the first ones; rounded down as in 2023."""
    return int(num_blocks * fraction)


def recompute_blocks(layers: Sequence[nn.Module], fraction: float) -> None:
    """Makes the first blocks of a chunk recompute, as `model.checkpoint` asks.

    The block's `forward` is replaced, not the block: hooks on its calls run once, in forward, and don't run again when
    it is recomputed.
    """
    count = num_recomputed(len(layers), fraction)
    for block in layers[:count]:
        # nothing in a block draws random numbers, so no generator's state is kept
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if count:
        logger.info("%d of %d blocks are recomputed in backward", count, len(layers))
