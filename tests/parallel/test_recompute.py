from typing import Any

import pytest

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.parallel.parallelize import parallelize
from tests.pool import run_ranks
from tests.solver.tiny import CPU, Chain, build_engine, make_config, train_step


def count_calls(rank: int, world_size: int, chain: Chain, fraction: Any) -> tuple[list[tuple[float, float]], int]:
    """Losses and norms of three steps, and how often the attention of the blocks ran."""
    config = make_config(chain, 0.1, model={"num_layers": 4, "checkpoint": fraction})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model, engine = build_engine(config, mesh)
    parallelize(model, config, mesh)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for layer in model.layers:
        layer.attention.register_forward_pre_hook(count)
    return [train_step(model, engine, mesh, step, 2) for step in range(3)], calls[0]


@pytest.mark.parametrize("chain", [(1, 1, 1), (2, 2, 2)])
def test_recomputation_changes_time_and_not_results(chain: Chain) -> None:
    plain, calls = run_ranks(2, count_calls, chain, False)[0]
    assert calls == 3 * 2 * 4
    for fraction, blocks in ((0.5, 2), (0.3, 1), (True, 4)):
        found, calls = run_ranks(2, count_calls, chain, fraction)[0]
        assert found == plain
        assert calls == 3 * 2 * (4 + blocks)
