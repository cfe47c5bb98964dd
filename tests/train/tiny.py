"""A tiny model, its batches, and a loader that gives out what it was given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import Mesh, build_mesh
from internlm.data.loader import StepBatch
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.init import initial_value, initialize
from internlm.model.transformer import Transformer, build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.routing import Routing
from internlm.train.state import TrainState
from internlm.train.trainer import Trainer

VOCAB = 37
LR = 1e-2


def make_config(**sections: Any) -> Config:
    """Two layers in fp32, a constant learning rate, no clipping."""
    model = {
        "num_layers": 2,
        "hidden_size": 16,
        "vocab_size": VOCAB,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "dtype": "torch.float32",
    }
    defaults: dict[str, Any] = {
        "model_type": "LLAMA2",
        "model": model,
        "data": {"seq_len": 8, "total_steps": 10},
        "adam": {"lr": LR, "weight_decay": 0.1},
        "lr_scheduler": {"type": "constant", "warmup_ratio": 0.0},
        "hybrid_zero_optimizer": {"clip_grad_norm": 0.0},
    }
    for name, section in sections.items():
        old = defaults.get(name, {})
        defaults[name] = {**old, **section} if isinstance(section, dict) else section
    return Config.model_validate(defaults)


def make_row(seed: int, lengths: Sequence[int], trained: int, low: int = 0, types: int = 0) -> Batch:
    """A packed row of random tokens >= `low`; the first `trained` labels are trained, the others are not."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    tokens = torch.randint(low, VOCAB, (size,), generator=generator)
    labels = torch.randint(low, VOCAB, (size,), generator=generator)
    labels[trained:] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in lengths])
    type_ids = torch.randint(types, (size,), generator=generator) if types else None
    return Batch(tokens, labels, positions, Segments.of(tuple(lengths)), type_ids, trained)


@dataclass
class ListLoader:
    """Stands in for the train loader."""

    batches: list[StepBatch]
    type_names: list[str] = field(default_factory=lambda: ["all"])

    def seek(self, batch: int, place: int | None) -> None:
        first = self.batches[0]
        assert (batch, place) == (first.index, first.end - first.num_rows)

    def __iter__(self) -> Iterator[StepBatch]:
        return iter(self.batches)


@dataclass
class NamedRows:
    """Stands in for a validation loader."""

    name: str
    rows: list[Batch]
    of_pairs: bool = False

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.rows)


def step_batches(steps: Sequence[Sequence[Batch]], rank: int = 0, world_size: int = 1) -> list[StepBatch]:
    """Batches of this rank: every world_size-th row of each step, one a micro batch."""
    return [
        StepBatch(index, list(rows[rank::world_size]), num_rows=len(rows), end=(index + 1) * len(rows))
        for index, rows in enumerate(steps)
    ]


def make_trainer(
    config: Config,
    batches: list[StepBatch],
    rank: int = 0,
    world_size: int = 1,
    type_names: Sequence[str] = ("all",),
    valid_loaders: dict[str, Any] | None = None,
    value_of: Any = None,
) -> Trainer:
    """A trainer on this rank of an initialised group."""
    mesh: Mesh = build_mesh(config.parallel, World(rank, rank, world_size, torch.device("cpu")))
    model = build_model(config)
    initial = partial(initial_value, config=config.model, seed=config.seed)
    placements = parallelize(model, config, mesh)
    engine = HybridZero(model, config, mesh, value_of or initial, placements)
    loader: Any = ListLoader(batches, list(type_names))
    schedule = build_schedule(model, engine, config, mesh)
    return Trainer(schedule, engine, loader, TrainState(), config, mesh, valid_loaders or {}, Routing(model, config))


def parameters_of(trainer: Trainer) -> dict[str, Tensor]:
    engine = trainer.optimizer
    return {name: engine.full_parameter(name) for name in engine.parameter_names()}


def reference_model(config: Config) -> Transformer:
    """The same weights in a plain module."""
    model = build_model(config, "cpu")
    initialize(model, config.model, config.seed)
    return model


def token_losses(model: Transformer, row: Batch) -> tuple[Tensor, Tensor]:
    """(losses, right) of the trained tokens of a row, by torch's cross entropy on plain logits."""
    logits = model(row).float()
    kept = row.labels != IGNORE_INDEX
    losses = F.cross_entropy(logits[kept], row.labels[kept], reduction="none")
    return losses, logits[kept].argmax(-1) == row.labels[kept]
