"""The only rank arithmetic of the project: which rank stands where on which axis.

The world is cut into five axes, outermost first; neighbours on the last ones are neighbours on a node:

    pipeline  stages of the model
    data      replicas that read different rows
    ring      parts of a row, between which keys and values travel
    ulysses   parts of a row, which exchange tokens for heads around attention
    tensor    parts of every matrix

Ranks that differ on data, ring and ulysses alone hold the same parameters. Hybrid ZeRO shares them out: it cuts these
dp = data x ring x ulysses ranks anew into four nested axes:

    replica   copies of everything             size dp / os
    optim     shares optimizer states          size os / g
    grad      shares gradients as well         size g / p
    param     shares parameters as well        size p

Hence optimizer states are cut over optim x grad x param (os ranks), gradients over grad x param (g ranks), parameters
over param (p ranks): the divisor chain p | g | os | dp of Hybrid ZeRO.

Experts have axes of their own, independent of the dense ones: all ranks of a stage, data x ring x ulysses x tensor,
hold different tokens; `expert` neighbours hold different experts, and the ranks that hold the same ones share them by
Hybrid ZeRO with the chain's sizes as far as they divide (the greatest common divisors).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from internlm.config.schema import ParallelConfig
from internlm.core.collectives import Group
from internlm.core.launch import World

MODEL_AXES = ("pipeline", "data", "ring", "ulysses", "tensor")
ZERO_AXES = ("replica", "optim", "grad", "param")


@dataclass(frozen=True)
class Axes:
    """Sizes of some axes, this rank's coordinate on each, and the ranks that differ from it on that axis alone."""

    sizes: Mapping[str, int]
    coordinates: Mapping[str, int]
    groups: Mapping[str, Group]

    def group(self, axis: str) -> Group:
        """The ranks that differ from this one on `axis` alone, in order."""
        return self.groups[axis]


@dataclass(frozen=True)
class Mesh(Axes):
    """A rank's place: on the axes of the model (and `expert`), and on the ZeRO axes of dense and expert parameters.

    The engine alone sends over the groups of `dense` and the ZeRO groups of `expert`, from its lanes, beside what
    everybody else sends: the order of collectives in a group must be the same on all its ranks. Hence two groups for
    `tensor`.
    """

    world: World
    dense: Axes
    expert: Axes

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def dp_rank(self) -> int:
        """Which rows this rank reads."""
        return self.coordinates["data"]

    @property
    def dp_size(self) -> int:
        return self.sizes["data"]

    @property
    def sequence_size(self) -> int:
        """Parts that a row is cut into, between which attention communicates."""
        return self.sizes["ring"] * self.sizes["ulysses"]

    @property
    def world_group(self) -> Group:
        group = dist.group.WORLD
        assert group is not None, "the process group exists while a mesh does"
        return group


def sharing_ranks(parallel: ParallelConfig, world_size: int) -> int:
    """dp: the ranks that hold the same dense parameters, data x ring x ulysses."""
    sizes = parallel.axis_sizes
    return world_size // (sizes["pipeline"] * sizes["tensor"])


def zero_sizes(parallel: ParallelConfig, dp_size: int) -> tuple[int, int, int]:
    """(p, g, os): ranks that share parameters, gradients and optimizer states; -1 stands for all `dp_size`."""

    def resolve(size: int) -> int:
        return dp_size if size == -1 else size

    return resolve(parallel.weight.size), resolve(parallel.gradient.size), resolve(parallel.zero1.size)


def expert_zero_sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, int, int]:
    """(p, g, os) of expert parameters: the dense chain as far as it divides the ranks that hold the same experts."""
    holders = world_size // parallel.axis_sizes["pipeline"] // parallel.expert.size
    p, g, os = zero_sizes(parallel, sharing_ranks(parallel, world_size))
    return gcd(p, holders), gcd(g, holders), gcd(os, holders)


def axes_of_world(parallel: ParallelConfig, world_size: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Three ways to cut the world into nested axes, outermost first: that of the model, and those by which dense and
    expert parameters are shared out. The sizes were checked by `config.checks`."""
    sizes = parallel.axis_sizes
    stages, tensor, experts = sizes["pipeline"], sizes["tensor"], parallel.expert.size
    dp = sharing_ranks(parallel, world_size)
    sizes["data"] = dp // (sizes["ring"] * sizes["ulysses"])
    model = {axis: sizes[axis] for axis in MODEL_AXES}
    dense = {"pipeline": stages, **_nested(zero_sizes(parallel, dp), dp), "tensor": tensor}
    expert_zero = _nested(expert_zero_sizes(parallel, world_size), dp * tensor // experts)
    return model, dense, {"pipeline": stages, **expert_zero, "expert": experts}


def coordinates_of(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Where a rank stands on nested axes."""
    assert 0 <= rank < prod(sizes.values()), (rank, sizes)
    coordinates = {}
    for axis in reversed(list(sizes)):
        rank, coordinates[axis] = divmod(rank, sizes[axis])
    return coordinates


def data_place(parallel: ParallelConfig, world: World) -> tuple[int, int]:
    """(dp_rank, dp_size): which rows this rank will read, and of how many readers. Needs no process group."""
    sizes = axes_of_world(parallel, world.size)[0]
    return coordinates_of(world.rank, sizes)["data"], sizes["data"]


def build_mesh(parallel: ParallelConfig, world: World) -> Mesh:
    """The mesh of a run. Collective: every rank calls it."""
    alone = _alone(world)
    model, dense, expert = (_axes(world, sizes, alone) for sizes in axes_of_world(parallel, world.size))
    return Mesh(
        sizes={**model.sizes, "expert": expert.sizes["expert"]},
        coordinates={**model.coordinates, "expert": expert.coordinates["expert"]},
        groups={**model.groups, "expert": expert.group("expert")},
        world=world,
        dense=dense,
        expert=expert,
    )


def _nested(chain: tuple[int, int, int], holders: int) -> dict[str, int]:
    """Sizes of the ZeRO axes for (p, g, os) among `holders` ranks."""
    p, g, os = chain
    assert holders % os == 0 and os % g == 0 and g % p == 0, (p, g, os, holders)
    return dict(zip(ZERO_AXES, (holders // os, os // g, g // p, p), strict=True))


def _axes(world: World, sizes: dict[str, int], alone: Group) -> Axes:
    """Cuts the world into nested axes of `sizes`, outermost first, with their groups.

    Groups are made for axes of more than one rank; the others share the group of this rank alone.
    """
    assert prod(sizes.values()) == world.size, (sizes, world.size)
    groups = dict.fromkeys(sizes, alone)
    wide = [axis for axis, size in sizes.items() if size > 1]
    if wide:
        shape = tuple(sizes[axis] for axis in wide)
        device_mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=tuple(wide))
        groups.update({axis: _own(device_mesh.get_group(axis)) for axis in wide})
    return Axes(sizes, coordinates_of(world.rank, sizes), groups)


def _own(group: Group) -> Group:
    """A group of all ranks, in place of the default one, which a `DeviceMesh` hands out for an axis of all ranks:
    collectives on a lane must not mix with those that the main thread sends over the default group."""
    if group is dist.group.WORLD:
        group = dist.new_group()  # type: ignore[assignment]
    return group


def _alone(world: World) -> Group:
    """The group of this rank alone, in which nothing is sent."""
    group = dist.new_group([world.rank], use_local_synchronization=True)
    assert group is not None
    return group
