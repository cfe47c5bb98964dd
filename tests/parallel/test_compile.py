"""Compiled blocks: compiled once for all blocks and rows, inside the engine's hooks, with all recomputation."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._functorch import config as functorch

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.parallel.offload import HostBuffers
from internlm.parallel.parallelize import parallelize
from tests.pool import run_ranks
from tests.solver.tiny import CPU, ROW_LENGTH, ROWS, Chain, build_engine, make_config, train_step


def train(rank: int, world_size: int, chain: Chain, compiled: bool, kind: Any) -> tuple[list[Any], int, float, int]:
    """Losses and norms of three steps, how many graphs were compiled, how many tensors [tokens, hidden] the blocks kept
    for backward in the mean (where no hooks of theirs are nearer than those here), and buffers made on the host."""
    graphs, kept = [], []

    def keep(tensor: Any) -> Any:
        kept.append(tuple(tensor.shape))
        return tensor

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    real, torch.compile = torch.compile, lambda *args, **kwargs: real(*args, backend=backend, **kwargs)  # type: ignore
    try:
        config = make_config(chain, 0.1, model={"num_layers": 4, "checkpoint": kind, "compile": compiled})
        mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
        model, engine = build_engine(config, mesh)
        parallelize(model, config, mesh)
        made = patch.object(HostBuffers, "_make", autospec=True, side_effect=HostBuffers._make)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), made as make:
            steps = [train_step(model, engine, mesh, step, 2) for step in range(3)]
        assert functorch.ban_recompute_materialized_backward  # other models of this process compile as they did
        tokens = ROWS // mesh.dp_size // 2 * ROW_LENGTH
        normed = kept.count((tokens, config.model.hidden_size)) / (3 * 2 * 4)
        return steps, len(graphs), normed, make.call_count
    finally:
        torch.compile = real


@pytest.mark.parametrize("chain", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", [False, "selective", "feed_forward", "offload", 0.5])
def test_compiled_blocks_train_as_plain_ones(chain: Chain, kind: Any) -> None:
    plain, none, _, _ = run_ranks(2, train, chain, False, False)[0]
    found, graphs, kept, buffers = run_ranks(2, train, chain, True, kind)[0]
    assert kept == {False: 6, "feed_forward": 4}.get(kind, kept)  # two less: results of norms
    assert buffers == (3 if kind == "offload" else 0)  # of all blocks but the last, used again and again
    assert none == 0 and graphs == (2 if kind == 0.5 else 1)  # one for the recomputed half, one for the other
    for ours, theirs in zip(found, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
