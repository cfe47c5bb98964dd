"""What environment variables say about how this process was started, and how to set one."""

import os


def started_by_slurm() -> bool:
    """Whether srun started this process, and not a torchrun inside an allocation."""
    return "SLURM_PROCID" in os.environ and "RANK" not in os.environ


def job_id() -> str:
    """The job's number from Slurm or Kubernetes; "none" elsewhere."""
    pod = os.environ.get("KUBERNETES_POD_NAME", "none")
    return os.environ.get("SLURM_JOB_ID", pod.split("-")[0])


def launched_rank() -> int:
    """The rank that torchrun or Slurm gave this process; 0 without them, or where it is no number."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() else 0


def attempt() -> str:
    """Which start of this job by torchrun this is; "" where there is one only, or where nodes count for themselves."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""


def set_default(name: str, value: str) -> None:
    """Sets a variable for a library that has no other switch. A value set by the user stays."""
    os.environ.setdefault(name, value)
