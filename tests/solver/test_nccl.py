import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gpus_train_as_one_process_does(world_size: int) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPU(s)")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    subprocess.run([*command, "-m", "tests.solver.nccl_oracle"], cwd=ROOT, check=True)
