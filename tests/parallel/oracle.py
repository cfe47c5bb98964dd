"""Any layout against one rank: the same rows, five steps by the trainer, every loss, norm and parameter compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.data.loader import StepBatch
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.routing import Routing
from internlm.train.state import TrainState
from internlm.train.trainer import Trainer
from tests.pool import run_ranks
from tests.train.tiny import ListLoader

STEPS = 5
ROW_LENGTH, VOCAB = 32, 64
ROWS = 4  # of a global batch, unless a layout needs more
CPU = torch.device("cpu")
RELATIVE = 1e-5
# Adam divides a gradient by its own size: with the usual 1e-8, one that is little but rounding would move a weight as
# far as any other. With this the update follows the gradient, and a gradient of the wrong scale shows as well.
ADAM_EPS = 1e-3

DENSE: dict[str, Any] = {
    "num_layers": 2,  # 4 in a pipeline, see `compare`
    "hidden_size": 32,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 4,
    "intermediate_size": 48,
    "qkv_bias": False,
    "out_bias": True,
    "dtype": "torch.float32",
}


def make_config(parallel: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A tiny dense model in fp32 with clipping that always acts; `sections` are laid over it.

    There is no bias on keys: its gradient is zero but for rounding, and Adam would make steps of that noise.
    """
    return Config.model_validate(
        {
            "model_type": sections.get("model_type", "LLAMA2"),
            "model": {**DENSE, **sections.get("model", {})},
            "data": {"seq_len": ROW_LENGTH, "total_steps": 100, **sections.get("data", {})},
            "parallel": parallel or {},
            "adam": {"lr": 1e-3, "weight_decay": 0.1, "adam_eps": ADAM_EPS},
            "lr_scheduler": {"type": "constant"},
            "hybrid_zero_optimizer": {"clip_grad_norm": 0.5, **sections.get("hybrid_zero_optimizer", {})},
            **{
                key: value for key, value in sections.items() if key in ("loss", "lora", "use_fp32_norm", "grad_scaler")
            },
        }
    )


def random_row(generator: torch.Generator) -> Batch:
    """A packed row of random tokens in documents of random lengths, one-token and whole-row ones included."""
    lengths: list[int] = []
    while sum(lengths) < ROW_LENGTH:
        longest = ROW_LENGTH - sum(lengths)
        drawn = int(torch.randint(1, ROW_LENGTH + 8, (), generator=generator))
        lengths.append(min(drawn, longest))
    tokens = torch.randint(VOCAB, (ROW_LENGTH,), generator=generator)
    labels = torch.randint(VOCAB, (ROW_LENGTH,), generator=generator)
    labels[torch.rand(ROW_LENGTH, generator=generator) < 0.3] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens, labels, positions, Segments.of(tuple(lengths)), None, int((labels != IGNORE_INDEX).sum()))


def global_batch(step: int, num_rows: int = ROWS) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    return [random_row(generator) for _ in range(num_rows)]


def num_rows(config: Config, world_size: int) -> int:
    """4 or 8: two micro batches for each data rank, or as many as the schedule needs, as far as 8 rows go."""
    stages = config.parallel.pipeline.size
    micro_batches = max(2, stages * (2 if config.pipeline_schedule == "dualpipev" else 1))
    readers = world_size // prod(config.parallel.axis_sizes.values())
    return ROWS if readers * micro_batches <= ROWS else 8


class ValidRows(list[Batch]):
    """What the trainer wants of a validation set."""

    name, of_pairs = "valid", False


@dataclass
class Run:
    """What a few steps of training gave."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    routing: list[dict[str, float]] = field(default_factory=list)  # losses and loads of experts, where there are any
    valid_loss: float = 0.0
    parameters: dict[str, Tensor] = field(default_factory=dict)  # global ones, of which this rank holds a part


def build_trainer(rank: int, world_size: int, config: Config, steps: Sequence[int], rows: int = ROWS) -> Trainer:
    """As train.py builds it, with the rows of `global_batch` dealt to the data ranks."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    initial = partial(initial_value, config=config.model, seed=config.seed)
    engine = HybridZero(model, config, mesh, initial, placements)
    schedule = build_schedule(model, engine, config, mesh)
    batches = [
        StepBatch(step, global_batch(step, rows)[mesh.dp_rank :: mesh.dp_size], num_rows=rows, end=(step + 1) * rows)
        for step in steps
    ]
    loader: Any = ListLoader(batches)
    valid: Any = ValidRows(global_batch(STEPS, rows)[mesh.dp_rank :: mesh.dp_size])
    return Trainer(schedule, engine, loader, TrainState(), config, mesh, {"valid": valid}, Routing(model, config))


def train(rank: int, world_size: int, config: Config, rows: int = ROWS) -> Run:
    """Five steps on this rank of the process group."""
    trainer = build_trainer(rank, world_size, config, range(STEPS), rows)
    run = Run()
    for report in trainer.steps():
        run.losses.append(report.loss)
        run.norms.append(report.grad_norm)
        run.routing.append({} if report.experts is None else report.experts.scalars())
    (validation,) = trainer.validate()
    run.valid_loss = validation.loss
    engine = trainer.optimizer
    run.parameters = {name: engine.full_parameter(name) for name in engine.parameter_names()}
    run.parameters |= {name: buffer.clone() for name, buffer in engine.buffers.items()}
    return run


@cache
def _one_rank(config_json: str, rows: int) -> Run:
    return run_ranks(1, train, Config.model_validate_json(config_json), rows)[0]


def compare(world_size: int, parallel: dict[str, Any], **sections: Any) -> None:
    """Trains on `world_size` ranks and on one, and asserts that they agree.

    All ranks must tell the same losses and norms; every global parameter must be somewhere, and agree with one rank's
    wherever it is.
    """
    model = {"num_layers": 4 if "pipeline" in parallel else 2, **sections.get("model", {})}
    config = make_config(parallel, **{**sections, "model": model})
    rows = num_rows(config, world_size)
    alone = make_config(None, **{**sections, "model": {**model, "checkpoint": False, "compile": "auto"}})
    expected = _one_rank(alone.model_dump_json(), rows)
    runs: list[Run] = run_ranks(world_size, train, config, rows)
    seen: set[str] = set()
    for rank, run in enumerate(runs):
        for what, found, wanted in (("loss", run.losses, expected.losses), ("norm", run.norms, expected.norms)):
            for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
                assert abs(a - b) <= RELATIVE * abs(b), (parallel, rank, what, step, a, b)
        for step, (found_load, wanted_load) in enumerate(zip(run.routing, expected.routing, strict=True)):
            for what, number in wanted_load.items():
                assert abs(found_load[what] - number) <= RELATIVE * abs(number), (parallel, rank, what, step)
        assert abs(run.valid_loss - expected.valid_loss) <= RELATIVE * expected.valid_loss, (parallel, rank)
        for name, value in run.parameters.items():
            wanted_value = expected.parameters[name]
            assert value.shape == wanted_value.shape, (parallel, rank, name)
            error = float((value - wanted_value).abs().max() / wanted_value.abs().max().clamp_min(1e-30))
            assert error <= RELATIVE, (parallel, rank, name, error)
            seen.add(name)
    assert seen == set(expected.parameters), set(expected.parameters) - seen
