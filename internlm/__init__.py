"""internlm: trains large language models, from one laptop core to thousands of GPUs.

The names below are all that a training script needs, in the order in which data flows through one. Each is imported
from its room when it is first used, so `import internlm` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0.dev0"

if TYPE_CHECKING:
    from internlm.apis.generate import generate, load_model
    from internlm.apis.sampling import Sampling
    from internlm.checkpoint.checkpointer import Checkpointer
    from internlm.checkpoint.hf import export_hf
    from internlm.config.loader import load_config
    from internlm.core.launch import launch
    from internlm.core.mesh import build_mesh
    from internlm.data.loader import build_train_loader, build_valid_loaders
    from internlm.model.init import initial_value
    from internlm.model.transformer import build_model
    from internlm.monitor.monitor import Monitor
    from internlm.parallel.parallelize import parallelize
    from internlm.parallel.schedule import build_schedule
    from internlm.solver.hybrid_zero import HybridZero
    from internlm.train.evaluate import evaluate
    from internlm.train.state import TrainState
    from internlm.train.trainer import Trainer
    from internlm.utils.errors import UserError

_ROOMS = {
    "load_config": "config.loader",
    "launch": "core.launch",
    "build_mesh": "core.mesh",
    "build_model": "model.transformer",
    "parallelize": "parallel.parallelize",
    "initial_value": "model.init",
    "HybridZero": "solver.hybrid_zero",
    "build_schedule": "parallel.schedule",
    "build_train_loader": "data.loader",
    "build_valid_loaders": "data.loader",
    "TrainState": "train.state",
    "Trainer": "train.trainer",
    "evaluate": "train.evaluate",
    "Checkpointer": "checkpoint.checkpointer",
    "export_hf": "checkpoint.hf",
    "Monitor": "monitor.monitor",
    "generate": "apis.generate",
    "load_model": "apis.generate",
    "Sampling": "apis.sampling",
    "UserError": "utils.errors",
}

# Functions of the 2023 framework that scripts called, and what does their work.
_OF_2023 = {
    "initialize_distributed_env": "internlm.launch",
    "launch_from_slurm": 'internlm.launch("slurm")',
    "launch_from_torch": "internlm.launch",
    "get_default_parser": "train.py",
    "initialize_trainer": "internlm.Trainer",
}

__all__ = [  # noqa: RUF022 (the order of a script)
    "load_config",
    "launch",
    "build_mesh",
    "build_model",
    "parallelize",
    "initial_value",
    "HybridZero",
    "build_schedule",
    "build_train_loader",
    "build_valid_loaders",
    "TrainState",
    "Trainer",
    "evaluate",
    "Checkpointer",
    "export_hf",
    "Monitor",
    "generate",
    "load_model",
    "Sampling",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name in _OF_2023:
        raise AttributeError(f"internlm.{name} is of the framework of 2023; see doc/library.md for {_OF_2023[name]}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'internlm' has no attribute {name!r}")
    value = getattr(import_module(f"internlm.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
