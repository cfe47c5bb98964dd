import pytest
import torch

from internlm.config.schema import ParallelConfig
from internlm.core.launch import World, simulated_world
from internlm.core.mesh import ZERO_AXES, axes_of_world, build_mesh, coordinates_of
from tests.pool import run_ranks

CPU = torch.device("cpu")


def sizes(p: int, g: int, os: int) -> ParallelConfig:
    return ParallelConfig.model_validate({"weight": {"size": p}, "gradient": {"size": g}, "zero1": {"size": os}})


def members(rank: int, world_size: int, p: int, g: int, os: int) -> dict[str, list[int]]:
    mesh = build_mesh(sizes(p, g, os), World(rank, rank, world_size, CPU))
    return {axis: torch.distributed.get_process_group_ranks(mesh.dense.group(axis)) for axis in ZERO_AXES}


def test_axes_are_nested_with_param_innermost() -> None:
    groups = run_ranks(8, members, 2, 4, 4)
    assert groups[5]["param"] == [4, 5]
    assert groups[5]["grad"] == [5, 7]
    assert groups[5]["optim"] == [5]
    assert groups[5]["replica"] == [1, 5]


@pytest.mark.parametrize("chain", [(1, 1, 1), (1, 1, 8), (1, 2, 8), (2, 2, 4), (8, 8, 8)])
def test_axes_reach_every_rank_once(chain: tuple[int, int, int]) -> None:
    for rank, groups in enumerate(run_ranks(8, members, *chain)):
        assert all(rank in ranks for ranks in groups.values())
        product = 1
        for ranks in groups.values():
            product *= len(ranks)
        assert product == 8


def test_minus_one_is_everybody() -> None:
    assert run_ranks(4, members, 1, 1, -1)[2]["optim"] == [0, 1, 2, 3]


LARGE = ParallelConfig.model_validate(
    {"pipeline": {"size": 4}, "context": {"ring": 2, "ulysses": 2}, "tensor": {"size": 8}, "expert": {"size": 16}}
)


@pytest.mark.parametrize("rank", [0, 7, 8, 255, 256, 777, 1023])
def test_a_pretended_rank_stands_where_the_arithmetic_says(rank: int) -> None:
    """The groups that a `DeviceMesh` makes are those of equal coordinates on all other axes."""
    model, dense, expert = axes_of_world(LARGE, 1024)
    with simulated_world(rank, 1024) as world:
        mesh = build_mesh(LARGE, world)
        for axes, sizes in ((mesh, model), (mesh.dense, dense), (mesh.expert, expert)):
            here = coordinates_of(rank, sizes)
            assert {axis: axes.coordinates[axis] for axis in sizes} == here
            for axis in sizes:
                same = [
                    other
                    for other in range(1024)
                    if all(n == here[a] for a, n in coordinates_of(other, sizes).items() if a != axis)
                ]
                assert torch.distributed.get_process_group_ranks(axes.group(axis)) == same, axis
