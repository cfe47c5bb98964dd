"""Real training in a worker pool: the whole path of train.py, and what is left of it in checkpoints."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from internlm.apis.in_training import evaluated
from internlm.checkpoint.checkpointer import Checkpointer
from internlm.checkpoint.legacy.pickles import read_pickle
from internlm.checkpoint.reference import build_objective
from internlm.checkpoint.reference_sums import give_reference
from internlm.checkpoint.shards import parse_key
from internlm.checkpoint.storage import Storage
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.core.random import seed_of
from internlm.data.loader import build_train_loader, build_valid_loaders
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.routing import Routing
from internlm.train.state import TrainState
from internlm.train.trainer import Trainer

Chain = tuple[int, int, int]
ROWS = 4  # of a global batch, on any number of ranks


def run_config(chain: Chain, world_size: int, total_steps: int = 20, **sections: Any) -> Config:
    """Two layers on random tokens; learning rate, beta2 and loss scale all change with the steps."""
    p, g, os = chain
    model = {
        "num_layers": 2,
        "hidden_size": 16,
        "vocab_size": 48,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "intermediate_size": 24,
        "dtype": "torch.float32",
        "qkv_bias": True,
    }
    defaults: dict[str, Any] = {
        "model": model,
        "data": {
            "type": "synthetic",
            "seq_len": 8,
            "micro_bsz": 1,
            "micro_num": ROWS // world_size,
            "total_steps": total_steps,
            "num_worker": 0,
        },
        "parallel": {"weight": {"size": p}, "gradient": {"size": g}, "zero1": {"size": os}},
        "adam": {"lr": 1e-2, "weight_decay": 0.1},
        "lr_scheduler": {"warmup_ratio": 0.2, "total_steps": 20},
        "beta2_scheduler": {"init_beta2": 0.8, "c": 0.5},
        "grad_scaler": {"fp16": {"initial_scale": 2.0**19, "growth_interval": 8}},
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section} if isinstance(section, dict) else section
    return Config.model_validate(defaults)


def train(rank: int, world_size: int, config: Config, folder: Path, stop_at: int | None = None) -> dict[str, list[Any]]:
    """Trains (on) until `stop_at` batches are done. Returns what each step saw: its samples, a random number ..."""
    torch.manual_seed(seed_of(config.seed, f"rank {rank}"))
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, torch.device("cpu")))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    initial = partial(initial_value, config=config.model, seed=config.seed)
    optimizer = HybridZero(model, config, mesh, initial, placements)
    schedule = build_schedule(model, optimizer, config, mesh, build_objective(config, mesh, optimizer.lanes))
    state = TrainState()
    checkpointer = Checkpointer(config, folder, optimizer, state, mesh)
    checkpointer.resume()
    seen: dict[str, list[Any]] = {
        "losses": [],
        "norms": [],
        "scales": [],
        "samples": [],
        "random": [],
        "answers": [],
        "scores": [],
        "validation": [],
    }
    if stop_at != state.batch_count:
        loader, other = (build_train_loader(config, mesh.dp_rank, mesh.dp_size) for _ in range(2))
        other.seek(state.batch_count)
        samples = other.row_numbers()
        held_out = build_valid_loaders(config, mesh.dp_rank, mesh.dp_size)
        give_reference(config, mesh, model, optimizer, checkpointer, loader, held_out)
        trainer = Trainer(schedule, optimizer, loader, state, config, mesh, held_out, Routing(model, config))
        for report in evaluated(trainer.steps(), model, optimizer, config, mesh):
            seen["losses"].append(report.loss)
            seen["norms"].append(report.grad_norm.hex())  # as text: nan is not equal to itself
            seen["scales"].append(report.loss_scale)
            seen["samples"].append(next(samples))
            seen["answers"] += [answer.text for answer in report.answers]
            seen["scores"] += report.scores.items()
            seen["validation"] += [(one.name, one.loss, one.accuracy, one.margin) for one in report.validation]
            seen["random"].append(float(torch.rand(())))
            checkpointer.after_step(report)
            if report.step == stop_at:
                break
    checkpointer.close()
    return seen


def resave(rank: int, world_size: int, config: Config, source: Path, target: Path) -> None:
    """Loads everything from the checkpoint `source` on this layout and saves it under `target`."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, torch.device("cpu")))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    optimizer = HybridZero(model, config, mesh, lambda name, shape: torch.full(shape, 7.0), placements)
    load = {"load_ckpt_info": {"path": str(source), "content": ("all",)}}
    config = Config.model_validate({**config.model_dump(), "ckpt": load})
    checkpointer = Checkpointer(config, target, optimizer, TrainState(), mesh)
    checkpointer.resume()
    checkpointer.save()
    checkpointer.close()


def global_tensors(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Whole tensors of a checkpoint as raw bits, put together with the safetensors library alone."""
    whole: dict[tuple[str, str], np.ndarray] = {}
    for path in sorted(folder.glob("[mo]*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            for key in file.keys():  # noqa: SIM118 (the library's handle is no mapping)
                name, kind, box = parse_key(key)
                bits = bits_of(file.get_tensor(key))
                target = whole.setdefault((name, kind), np.full(shapes[name], -1, bits.dtype))
                target[tuple(slice(*span) for span in box)] = bits
    return whole


def bits_of(tensor: Tensor) -> np.ndarray:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def contents(folder: Path) -> dict[str, Any]:
    """Tensors, bit for bit, and counters of a checkpoint."""
    tensors = {key: array.tobytes() for key, array in global_tensors(folder).items()}
    return {"tensors": tensors, "state": json.loads((folder / "state.json").read_text())}


def random_states(folder: Path) -> dict[str, bytes]:
    """States of the random generators, by rank's file."""
    return {path.name: load_file(path)["cpu"].numpy().tobytes() for path in sorted(folder.glob("rng-*.safetensors"))}


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage to a folder of 2023: `change` is given what its pickle `name` holds."""

    def damage(folder: Path) -> None:
        state = read_pickle(Storage(str(folder)), name)
        change(state)
        torch.save(state, folder / "new")  # the old file is mapped
        (folder / "new").replace(folder / name)

    return damage
