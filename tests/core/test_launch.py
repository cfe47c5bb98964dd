"""What a process is, by the environment that a launcher gives it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internlm.core.launch import launch, world_from_env
from internlm.utils.errors import UserError


def test_the_launch_line_of_2023(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """srun -N 2 -n 16 --ntasks-per-node=8 --gpus-per-task=1: each process sees one GPU."""
    tasks = {"PROCID": "11", "LOCALID": "3", "NPROCS": "16", "JOB_NODELIST": "node[1-2]"}
    for name, value in tasks.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=node\[1-2\], can't be asked"):
        world_from_env("slurm")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node1; echo node2\n")
    scontrol.chmod(0o755)
    for num_gpus, local in ((1, 0), (8, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        world, address = world_from_env("slurm", 29500)
        assert (world.rank, world.size, world.device.index, address) == (11, 16, local, "tcp://node1:29500")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="this machine has 2 GPU"):
        world_from_env("slurm")
    with pytest.raises(UserError, match="SLURM_PROCID is missing: start with srun"):
        monkeypatch.delenv("SLURM_PROCID")
        world_from_env("slurm")


def test_ranks_that_are_started_again_find_no_addresses_of_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store over restarts, and gloo would look for the ranks of the attempt before."""
    agent = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    keys = []
    for count in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        before = agent.num_keys()
        with launch():
            pass
        keys.append(agent.num_keys() - before)
    assert keys[0] == keys[1] > 0  # all of them new
