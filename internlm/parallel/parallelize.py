"""From a plain model to one that trains: what is applied to it, in one fixed order.

Sharding over data ranks needs nothing here: `solver.HybridZero` hooks into the calls of the model's children.
"""

from internlm.config.schema import Config
from internlm.model.transformer import Transformer
from internlm.parallel.recompute import recompute_blocks


def parallelize(model: Transformer, config: Config) -> None:
    """Applies the config's recomputation to a model, on any device."""
    recompute_blocks(model.layers, config.model.recompute_fraction)
