from typing import Any
from unittest.mock import patch

import pytest
import torch

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.parallel.offload import Copy, HostBuffers, Kept, Transfers
from internlm.parallel.parallelize import parallelize
from tests.pool import run_ranks
from tests.solver.tiny import CPU, Chain, build_engine, make_config, train_step


def count_calls(rank: int, world_size: int, chain: Chain, fraction: Any) -> tuple[list[Any], int, int]:
    """Losses and norms of three steps, how often the attention of the blocks ran, and buffers made on the host."""
    config = make_config(chain, 0.1, model={"num_layers": 4, "checkpoint": fraction})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model, engine = build_engine(config, mesh)
    parallelize(model, config, mesh)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for layer in model.layers:
        layer.attention.register_forward_pre_hook(count)
    with patch.object(HostBuffers, "_make", autospec=True, side_effect=HostBuffers._make) as make:
        return [train_step(model, engine, mesh, step, 2) for step in range(3)], calls[0], make.call_count


@pytest.mark.parametrize("chain", [(1, 1, 1), (2, 2, 2)])
def test_recomputation_changes_time_and_not_results(chain: Chain) -> None:
    plain, calls, _ = run_ranks(2, count_calls, chain, False)[0]
    assert calls == 3 * 2 * 4
    for fraction, blocks in ((0.5, 2), (0.3, 1), (True, 4), ("offload", 0)):
        found, calls, buffers = run_ranks(2, count_calls, chain, fraction)[0]
        assert found == plain
        assert buffers == (3 if fraction == "offload" else 0)  # of all blocks but the last, used again and again
        assert calls == 3 * 2 * (4 + blocks)


def buffers_beside_fp8(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Shapes of what leaves in a step."""
    config = make_config((1, 1, 1), 0.1, model={"num_layers": 3, "checkpoint": "offload", "fp8": True})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model, engine = build_engine(config, mesh)
    parallelize(model, config, mesh)
    with patch.object(Kept, "leave", autospec=True, side_effect=Kept.leave) as leave:
        train_step(model, engine, mesh, 0, 1)
    return [tuple(call.args[0]._shape) for call in leave.call_args_list]


def test_offloading_leaves_8_bit_weights_alone() -> None:
    """A transposed w13 is as wide as its product."""
    shapes = run_ranks(1, buffers_beside_fp8)[0]
    assert [len(shape) for shape in shapes] == [3, 3]  # [tokens, 2, ffn] of all blocks but the last


def test_a_copy_that_nobody_comes_for_is_waited_for() -> None:
    """Of a backward that was given up: the memory that is still written to must not go to somebody else."""
    transfers = Transfers()
    kept = transfers.keep(torch.ones(2, 3), stays=False)
    kept.come()
    with patch.object(Copy, "wait") as wait:
        del kept
    wait.assert_called_once()
