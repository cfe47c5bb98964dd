"""From a plain model to one that trains: what is applied to it, in one fixed order, before it has memory.

Sharding over the ranks that hold the same parameters needs nothing here: `solver.HybridZero` hooks into the calls of
the model's children.
"""

from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement
from internlm.model.transformer import Transformer
from internlm.parallel.recompute import recompute_blocks
from internlm.parallel.sequence import cut_sequences
from internlm.parallel.tensor import cut_tensors
from internlm.utils.device import set_matmul_precision


def parallelize(model: Transformer, config: Config, mesh: Mesh) -> dict[str, Placement]:
    """Cuts a model on the meta device as `config.parallel` says, then applies recomputation.

    Returns the placement of each parameter that is not whole here, by name.
    """
    set_matmul_precision(config.model.dtype)
    placements = cut_tensors(model, config, mesh)
    cut_sequences(model, mesh)
    recompute_blocks(model.layers, config.model.recompute_fraction)
    return placements
