"""Every config in configs/, with its axes and switches but smaller, trains for two steps."""

import math
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest

from internlm.config.checks import check
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.data.loader import build_train_loader
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.routing import Routing
from internlm.train.state import TrainState
from internlm.train.trainer import Trainer
from tests.parallel.oracle import CPU
from tests.pool import run_ranks

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
NO_DATA = ["data.type=synthetic", "data.train_folder=None", "data.valid_folder=None", "ckpt.load_ckpt_info=None"]
# What needs a model to start from, or text, has runs of its own: test_lora.py, test_preference.py, test_demo_sft.py.
NO_DATA += ["lora=None", "dpo=None", "evaluation.every=0", "evaluation.prompts=()"]


def shrunk(path: Path) -> Config:
    """The config with every axis of at most 2 ranks, few and small blocks, short rows of random tokens."""
    config = load_config(path, NO_DATA)
    model, stages = config.model, min(config.parallel.pipeline.size, 2)
    sections = config.model_dump()
    sections["model"] |= {
        "num_layers": max(2, stages * config.chunks_per_stage),
        "hidden_size": 32,
        "num_attention_heads": 4 * min(model.q_per_kv, 2),
        "num_kv_attention_heads": 4,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 64,
        "num_experts": min(model.num_experts, 4),
        "moe": {**model.moe.model_dump(), "top_k": min(model.moe.top_k, 2), "intermediate_size": 24},
    }
    sections["data"] |= {"seq_len": 16, "micro_num": 2 * stages, "total_steps": 2, "num_worker": 0, "min_length": 0}
    sections["data"] |= {"tokenizer_path": None, "valid_every": 0}
    for axis in sections["parallel"].values():
        axis |= {key: min(value, 2) for key, value in axis.items() if type(value) is int}
    return Config.model_validate(sections)


def num_ranks(config: Config) -> int:
    """Two data ranks, if they fit into 8."""
    return min(8, 2 * prod(config.parallel.axis_sizes.values()))


def train(rank: int, world_size: int, config: Config) -> list[tuple[float, bool]]:
    """As train.py does it: the loss of each step, and whether weights were updated."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    engine = HybridZero(model, config, mesh, partial(initial_value, config=config.model, seed=0), placements)
    schedule: Any = build_schedule(model, engine, config, mesh)
    loader = build_train_loader(config, mesh.dp_rank, mesh.dp_size)
    trainer = Trainer(schedule, engine, loader, TrainState(), config, mesh, {}, Routing(model, config))
    return [(report.loss, report.updated) for report in trainer.steps()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains(path: Path) -> None:
    config = shrunk(path)
    full = load_config(path, NO_DATA).parallel
    assert {axis for axis, size in full.axis_sizes.items() if size > 1} == {
        axis for axis, size in config.parallel.axis_sizes.items() if size > 1
    }
    ranks = num_ranks(config)
    check(config, ranks)
    results = run_ranks(ranks, train, config)
    assert all(result == results[0] for result in results)
    assert len(results[0]) == 2 and all(updated and math.isfinite(loss) for loss, updated in results[0])
