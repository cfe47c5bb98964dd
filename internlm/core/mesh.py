"""The only rank arithmetic of the project: which rank stands where on which axis.

The data ranks are factored into four nested axes, outermost first; neighbours on `param` are neighbours on a node:

    replica   copies of everything             size dp / os
    optim     shares optimizer states          size os / g
    grad      shares gradients as well         size g / p
    param     shares parameters as well        size p

Hence optimizer states are cut over optim x grad x param (os ranks), gradients over grad x param (g ranks), parameters
over param (p ranks): the divisor chain p | g | os | dp of Hybrid ZeRO.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from internlm.config.schema import ParallelConfig
from internlm.core.launch import World

AXES = ("replica", "optim", "grad", "param")


@dataclass(frozen=True)
class Mesh:
    """A rank's coordinates, and the process group of each axis."""

    world: World
    sizes: dict[str, int]
    coordinates: dict[str, int]
    groups: dict[str, dist.ProcessGroup]

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def dp_rank(self) -> int:
        return self.world.rank

    @property
    def dp_size(self) -> int:
        return self.world.size

    @property
    def world_group(self) -> dist.ProcessGroup:
        group = dist.group.WORLD
        assert group is not None, "the process group exists while a mesh does"
        return group

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on `axis` alone, in order."""
        return self.groups[axis]


def zero_sizes(parallel: ParallelConfig, dp_size: int) -> tuple[int, int, int]:
    """(p, g, os): ranks that share parameters, gradients and optimizer states; -1 stands for all data ranks."""

    def resolve(size: int) -> int:
        return dp_size if size == -1 else size

    return resolve(parallel.weight.size), resolve(parallel.gradient.size), resolve(parallel.zero1.size)


def build_mesh(parallel: ParallelConfig, world: World) -> Mesh:
    """The mesh of a run. Collective: every rank calls it. The sizes were checked by `config.checks`."""
    p, g, os = zero_sizes(parallel, world.size)
    assert world.size % os == 0 and os % g == 0 and g % p == 0, (p, g, os, world.size)
    sizes = dict(zip(AXES, (world.size // os, os // g, g // p, p), strict=True))
    device_mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=AXES)
    coordinates = {axis: device_mesh.get_local_rank(axis) for axis in AXES}
    return Mesh(world, sizes, coordinates, {axis: _group_of(device_mesh, axis) for axis in AXES})


def _group_of(device_mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The axis's own group. A `DeviceMesh` hands out the default group for an axis of all ranks; collectives on a lane
    must not mix with those that the main thread sends over the default group."""
    group = device_mesh.get_group(axis)
    if group is dist.group.WORLD and group.size() > 1:
        group = dist.new_group()
        assert group is not None
    return group
