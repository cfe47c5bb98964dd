"""From a plain model to one that trains: everything that is applied to it, in one fixed order, before it has memory.

Sharding over the ranks that hold the same parameters needs nothing here: `solver.HybridZero` hooks into the calls of
the model's children.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement, whole
from internlm.model.transformer import Transformer
from internlm.ops.attention import prepare_attention
from internlm.parallel.compile import compile_blocks
from internlm.parallel.expert import cut_experts, route_by
from internlm.parallel.offload import offload_blocks
from internlm.parallel.pipeline_layout import pipeline_layout
from internlm.parallel.recompute import recompute_blocks
from internlm.parallel.sequence import cut_sequences
from internlm.parallel.stages import cut_stages, relayed
from internlm.parallel.tensor import Mode, attach, cut_tensors
from internlm.utils.device import set_matmul_precision, torch_dtype
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)


def parallelize(model: Transformer, config: Config, mesh: Mesh) -> dict[str, Placement]:
    """Cuts a model on the meta device down to this rank's part, as `config.parallel` says; then sets up recomputation
    and compilation of its blocks.

    Returns the placement of each parameter that is cut or has copies, by name; all others are whole.
    """
    set_matmul_precision(config.model.dtype)
    if config.model.fp8 and config.model.num_experts > 1:
        log_once(logger, f"model.fp8 = True leaves products of routed experts in {config.model.dtype}", logging.WARNING)
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
    if mesh.sizes["ring"] == 1:  # a ring has kernels of its own
        dtype = torch_dtype(config.model.dtype)
        prepare_attention(config.model.attn_backend, mesh.device, dtype, config.model.head_size)
    compile_blocks(model.layers, config, mesh)
    if config.model.checkpoint == "offload":
        offload_blocks(chunks)
    return placements


@contextmanager
def whole_answers(model: Transformer, config: Config, mesh: Mesh) -> Iterator[None]:
    """Inside the `with`, every rank that calls the model gets the results of all layers for all tokens. For forward
    only; all ranks must make the same calls with the same tokens.

    In msp and fsp each rank has a part of the tokens between cut regions, and few tokens can't be cut into equal parts.
    So these modes compute as mtp does, with the same weights.
    """
    mode: Any = config.parallel.tensor.mode
    switched = mesh.sizes["tensor"] > 1 and mode != "mtp"
    if switched:
        _communicate(model, config, mesh, "mtp")
    try:
        with relayed(model, config, mesh):
            yield
    finally:
        if switched:
            _communicate(model, config, mesh, mode)


def _communicate(model: Transformer, config: Config, mesh: Mesh, mode: Mode) -> None:
    attach(model, config, mesh, mode)
    route_by(model, mode, mesh)
