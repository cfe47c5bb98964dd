"""What lies beside the tensors in tiny folders of 2023: counters, and the classes that their pickles name."""

import enum
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_MODULES = ("internlm.core.context.parallel_context", "internlm.core.context.process_group_initializer")


def write_counters(folder: Path, step: int) -> None:
    """context.pt, sampler.pt, schedulder.pt after `step` updates and one batch more that overflowed."""
    torch.save(
        {
            "batch_count": step + 1,  # one batch overflowed
            "num_consumed_samples_in_epoch": 4 * (step + 2),
            "num_consumed_tokens": 32 * (step + 2),
            "inf_nan_skip_batches": 1,
            "step_count": step,
            "tensorboard_folder": "RUN/tb",
        },
        folder / "context.pt",
    )
    torch.save(
        {
            "batch_size": 4,
            "raw_rampup_batch_size": "",
            "rng_state": np.random.RandomState(1024).get_state(),
            "epoch": 0,
            "seed": 1024,
            "data_world_size": 1,
            "num_consumed_samples_in_epoch": 4 * (step + 2),
            "batch_count": step + 2,
            "indices": np.arange(8),
        },
        folder / "sampler.pt",
    )
    scheduler = {"warmup_epochs": 4, "finished": True, "_init_steps": 0, "_warmup_steps": 4, "base_lrs": [1e-4]}
    scheduler |= {"last_epoch": step, "_step_count": step + 1, "_last_lr": [9e-5]}
    after = {"T_max": 16, "eta_min": 0, "base_lrs": [1e-4], "last_epoch": step - 4, "_last_lr": [9e-5]}
    scheduler |= {"after_scheduler_type": "CosineAnnealingLR", "after_scheduler_dict": after}
    torch.save(scheduler, folder / "schedulder.pt")


@contextmanager
def fake_classes() -> Iterator[dict[str, Any]]:
    """The attribute dict and the enum of 2023, importable under their old names while files are written."""

    class Config(dict):  # type: ignore[type-arg]
        def __getattr__(self, name: str) -> Any:
            if name in self:
                return self[name]
            raise AttributeError(name)

    class ParallelMode(enum.Enum):
        ZERO1 = "zero1"

    saved = {name: sys.modules.get(name) for name in _MODULES}
    for name, cls in zip(_MODULES, (Config, ParallelMode), strict=True):
        module = types.ModuleType(name)
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
        sys.modules[name] = module
    try:
        yield {"Config": Config, "ParallelMode": ParallelMode}
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
