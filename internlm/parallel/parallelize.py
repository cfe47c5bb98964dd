"""From a plain model to one that trains: what is applied to it, in one fixed order, before it has memory.

Sharding over the ranks that hold the same parameters needs nothing here: `solver.HybridZero` hooks into the calls of
the model's children.
"""

from dataclasses import replace

from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement, whole
from internlm.model.transformer import Transformer
from internlm.parallel.compile import compile_blocks
from internlm.parallel.expert import cut_experts
from internlm.parallel.offload import offload_blocks
from internlm.parallel.recompute import recompute_blocks
from internlm.parallel.sequence import cut_sequences
from internlm.parallel.split import pipeline_layout
from internlm.parallel.stages import cut_stages
from internlm.parallel.tensor import cut_tensors
from internlm.utils.device import set_matmul_precision


def parallelize(model: Transformer, config: Config, mesh: Mesh) -> dict[str, Placement]:
    """Takes from a model on the meta device what other ranks have, as `config.parallel` says, then recomputes and
    compiles blocks.

    Returns the placement of each parameter that is not whole here, by name.
    """
    set_matmul_precision(config.model.dtype)
    copied = cut_stages(model, config, mesh)
    placements = {**cut_tensors(model, config, mesh), **cut_experts(model, config, mesh)}
    for name in copied:
        placement = placements.get(name) or whole(tuple(model.get_parameter(name).shape))
        placements[name] = replace(placement, at_both_ends=True)
    cut_sequences(model, mesh)
    layout = pipeline_layout(config)
    chunks = [
        [model.layers[layer] for layer in layout.layers[chunk]]
        for chunk in layout.chunks_of(mesh.coordinates["pipeline"])
    ]
    for blocks in chunks:
        recompute_blocks(blocks, config.model)
    compile_blocks(model.layers, config, mesh)
    if config.model.checkpoint == "offload":
        offload_blocks(chunks)
    return placements
