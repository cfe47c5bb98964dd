"""From a launcher's environment to a process group, a device and a rank.

Facts of the environment variables: torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; Slurm sets
SLURM_PROCID, SLURM_LOCALID, SLURM_NPROCS and SLURM_JOB_NODELIST.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from internlm.utils.environment import attempt
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

Launcher = Literal["torch", "slurm"]
TIMEOUT = timedelta(minutes=30)
DEFAULT_PORT = 8888  # of the Slurm launcher since 2023


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def world_from_env(launcher: Launcher, port: int = DEFAULT_PORT) -> tuple[World, str | None]:
    """The world that the launcher's environment describes, and the rendezvous address.

    Without any launcher's variables: a world of one, which meets nobody.

    Raises:
        UserError: a variable of the launcher is missing.
    """
    env: Mapping[str, str] = os.environ
    if launcher == "slurm":
        rank, size = _int(env, "SLURM_PROCID", launcher), _int(env, "SLURM_NPROCS", launcher)
        local_rank = int(env.get("SLURM_LOCALID", rank % max(1, torch.cuda.device_count())))
        address: str | None = f"tcp://{_first_slurm_host(env)}:{port}"
    elif "RANK" in env or "WORLD_SIZE" in env:
        rank, size = _int(env, "RANK", launcher), _int(env, "WORLD_SIZE", launcher)
        local_rank = _int(env, "LOCAL_RANK", launcher)
        address = "env://"
    else:
        rank, size, local_rank = 0, 1, 0
        address = None
    if torch.cuda.is_available():
        if launcher == "slurm" and torch.cuda.device_count() == 1:
            local_rank = 0  # srun --gpus-per-task=1 shows each process a GPU of its own
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPU(s): "
                f"start at most {torch.cuda.device_count()} processes here (torchrun --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    return World(rank, local_rank, size, device), address


@contextmanager
def launch(launcher: Launcher = "torch", port: int = DEFAULT_PORT) -> Iterator[World]:
    """Joins the process group for the body of a `with`, and leaves it at the end, whatever happens.

    NCCL on GPUs, gloo on the CPU; a group that exists already is used and left alone.
    """
    world, address = world_from_env(launcher, port)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if dist.is_initialized():
        yield World(dist.get_rank(), world.local_rank, dist.get_world_size(), world.device)
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    device_id = world.device if backend == "nccl" else None
    store = _store(address, world)
    dist.init_process_group(backend, None, TIMEOUT, world.size, world.rank, store, device_id=device_id)
    logger.info("launched %d rank(s) by %s on %s with %s", world.size, launcher, world.device.type, backend)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _store(address: str | None, world: World) -> dist.Store:
    """Where the ranks find each other."""
    if not address:
        # Port 0: the system chooses as the store binds; a port looked up before might be another process's by then.
        return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=TIMEOUT)
    store, _, _ = next(rendezvous(address, world.rank, world.size, timeout=TIMEOUT))
    # After a restart torchrun's store still holds the addresses of the ranks that died (torch 2.13, static rendezvous).
    return dist.PrefixStore(f"attempt {attempt()}", store)


@contextmanager
def simulated_world(rank: int, size: int) -> Iterator[World]:
    """One rank of a world that isn't there, for the body of a `with`: groups are made and collectives do nothing.

    With it a single process builds what any rank of thousands would have.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch's own means; importing it registers it

    assert not dist.is_initialized(), "the world can't be replaced while it exists"
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())  # type: ignore[no-untyped-call]
    try:
        yield World(rank, 0, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _int(env: Mapping[str, str], name: str, launcher: str) -> int:
    if name not in env:
        how = "torchrun" if launcher == "torch" else "srun"
        raise UserError(f"environment variable {name} is missing: start with {how}, or choose another --launcher")
    return int(env[name])


def _first_slurm_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_JOB_NODELIST")
    if nodes is None:
        return "127.0.0.1"
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listing.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"scontrol, which names the hosts of SLURM_JOB_NODELIST={nodes}, can't be asked ({error}): make it "
            "available where the job runs, or start torchrun on each node"
        ) from error
