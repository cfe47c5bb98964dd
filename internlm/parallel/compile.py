"""torch.compile for each block: its small operations become a few kernels, and less is kept for backward.

The engine's hooks stay outside: they run in the call of a block, the compiled code replaces its `forward`. All blocks
share one piece of compiled code, whose shapes are static: rows of a run have one length, and what differs between
ragged rows comes as tensors (`ops/segments.py`). The first step pays 10 to 40 s, later runs find the code in torch's
cache.

Where memory is short, as `model.checkpoint` says, norms are computed again in backward rather than kept for the
products that follow them: a pass at the speed of memory for 4 bytes a token and hidden element.
"""

import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm.config.schema import V_SCHEDULES, Config
from internlm.core.mesh import Mesh
from internlm.model.transformer import Block
from internlm.ops.segments import Segments
from internlm.parallel.recompute import replace_forward
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

RECOMPUTES_NORMS = ("feed_forward", "offload")  # values of model.checkpoint with which backward computes norms again


def compile_blocks(layers: nn.ModuleList, config: Config, mesh: Mesh) -> None:
    """Compiles the blocks where `model.compile` says so. Whether and why is logged."""
    problem = why_not_compiled(config, mesh, mesh.device.type)
    if problem:
        level = logging.WARNING if config.model.compile is True else logging.INFO
        log_once(logger, f"blocks are not compiled: {problem}", level)
        return
    blocks = [block for block in layers if isinstance(block, Block)]
    whole_graph = config.model.attn_backend != "flash"  # a call that can't be traced parts a block's graph in two
    # Not `torch.compile(block.forward)`: one function for all blocks is compiled once for all.
    compiled = torch.compile(_run, fullgraph=whole_graph, dynamic=False)
    # The compiler keeps by default what a matrix product of the backward reads. Set around the calls that compile, as
    # other models of this process may want it otherwise.
    from torch._functorch import config as functorch  # here, as compiling needs it anyway: 1.6 s

    keeping = functorch.patch(ban_recompute_materialized_backward=config.model.checkpoint not in RECOMPUTES_NORMS)
    for block in blocks:
        replace_forward(block, partial(_compiled_forward, compiled, keeping, block.forward))
    log_once(logger, f"{len(blocks)} of {len(layers)} blocks are compiled (model.compile={config.model.compile!r})")


def why_not_compiled(config: Config, mesh: Mesh, device: str) -> str | None:
    """Why the blocks would not be compiled on a type of device; None if they would."""
    switch = config.model.compile
    if switch is False:
        return "model.compile=False"
    if switch == "auto" and device != "cuda":
        return 'model.compile="auto" compiles on GPUs only'
    if config.model.num_experts > 1:
        return "how many tokens an expert gets differs from row to row"
    if mesh.sizes["pipeline"] > 1 and config.pipeline_schedule in V_SCHEDULES:
        return f"{config.pipeline_schedule} splits backward in two, and that of a compiled block is one piece"
    communicating = [f"{axis} {mesh.sizes[axis]}" for axis in ("tensor", "ring", "ulysses") if mesh.sizes[axis] > 1]
    if communicating:
        return f"they communicate ({', '.join(communicating)})"
    return None


def _run(forward: Any, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
    return forward(x, cos, sin, segments)


def _compiled_forward(
    compiled: Any,
    keeping: AbstractContextManager[None],
    forward: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Segments | None,
    cache: Any = None,
) -> Tensor:
    if segments is None:  # decoding: shapes differ from call to call
        return forward(x, cos, sin, None, cache)
    torch._dynamo.mark_dynamic(segments.cu_seqlens, 0)  # read by none but the opaque operation
    with keeping:
        return compiled(forward, x, cos, sin, segments)
