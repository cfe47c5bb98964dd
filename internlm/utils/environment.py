"""What the environment says of how this process was started."""

import os


def started_by_slurm() -> bool:
    """Whether srun started this process, and not a torchrun inside an allocation."""
    return "SLURM_PROCID" in os.environ and "RANK" not in os.environ
