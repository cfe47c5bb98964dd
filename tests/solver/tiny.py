"""A tiny model, its batches, and what a single process with torch's AdamW makes of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import Mesh, build_mesh
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.init import initial_value, initialize
from internlm.model.transformer import Transformer, build_model
from internlm.solver.hybrid_zero import HybridZero, Trace

CPU = torch.device("cpu")
ROWS, ROW_LENGTH, VOCAB = 24, 6, 32  # rows of a global batch: divisible by 8 ranks x 3 micro batches
LR, BETA2 = 1e-3, 0.95
Chain = tuple[int, int, int]


def divisor_chains(world_size: int) -> list[Chain]:
    """Every (p, g, os) with p | g | os | world_size."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [(p, g, os) for os in divisors for g in divisors for p in divisors if os % g == 0 and g % p == 0]


def make_config(chain: Chain = (1, 1, 1), clip: float = 0.0, **sections: dict[str, Any]) -> Config:
    """A two-layer model in fp32 without projection biases: the gradient of a key bias is zero but for rounding, and
    Adam would make steps of that noise."""
    p, g, os = chain
    model = {
        "num_layers": 2,
        "hidden_size": 16,
        "vocab_size": VOCAB,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "dtype": "torch.float32",
    }
    return Config.model_validate(
        {
            "model_type": "LLAMA2",
            "model": {**model, **sections.get("model", {})},
            "data": {"seq_len": ROW_LENGTH, "total_steps": 10},
            "parallel": {
                "weight": {"size": p, **sections.get("weight", {})},
                "gradient": {"size": g},
                "zero1": {"size": os},
            },
            "hybrid_zero_optimizer": {"clip_grad_norm": clip, **sections.get("hybrid_zero_optimizer", {})},
            "adam": {"lr": LR, "adam_beta2": BETA2, "weight_decay": 0.1, **sections.get("adam", {})},
            "grad_scaler": sections.get("grad_scaler", {}),
            "use_fp32_norm": sections.get("use_fp32_norm", False),
        }
    )


def batch_of(rows: Tensor) -> Batch:
    """Rows [n, ROW_LENGTH + 1] of tokens as one packed batch. About a third of the labels is not trained, unevenly."""
    tokens, labels = rows[:, :-1].flatten(), rows[:, 1:].clone()
    labels[labels % 3 == 0] = IGNORE_INDEX
    count = len(rows)
    return Batch(
        tokens=tokens,
        labels=labels.flatten(),
        positions=torch.arange(ROW_LENGTH).repeat(count),
        segments=Segments.of((ROW_LENGTH,) * count),
        num_trained=int((labels != IGNORE_INDEX).sum()),
    )


def global_rows(step: int) -> Tensor:
    return torch.randint(VOCAB, (ROWS, ROW_LENGTH + 1), generator=torch.Generator().manual_seed(step))


@dataclass
class Run:
    """What a few steps of training gave."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def train_reference(config: Config, steps: int = 5, device: torch.device = CPU) -> Run:
    """One process, the whole batch at once, `torch.optim.AdamW`."""
    model = build_model(config, device)
    initialize(model, config.model, config.seed)
    adam = config.adam
    optimizer = torch.optim.AdamW(
        model.parameters(), adam.lr, (adam.adam_beta1, BETA2), adam.adam_eps, adam.weight_decay, foreach=False
    )
    run = Run()
    for step in range(steps):
        batch = batch_of(global_rows(step)).to(device)
        loss = torch.nn.functional.cross_entropy(model(batch).float(), batch.labels, ignore_index=IGNORE_INDEX)
        loss.backward()
        limit = config.hybrid_zero_optimizer.clip_grad_norm or float("inf")
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(float(loss.detach()))
    run.parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return run


def build_engine(config: Config, mesh: Mesh, trace: Trace | None = None) -> tuple[Transformer, HybridZero]:
    model = build_model(config)

    def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
        return initial_value(name, shape, config.model, config.seed)

    return model, HybridZero(model, config, mesh, value_of, trace=trace)


def train_step(model: Transformer, engine: HybridZero, mesh: Mesh, step: int, accumulation: int) -> tuple[float, float]:
    """One step on this rank's share of the global batch. Returns (loss, grad norm) of the global batch."""
    rows = global_rows(step)
    total = batch_of(rows).num_trained
    engine.begin_step(accumulation)
    loss_sum = torch.zeros((), device=mesh.device)
    for share in rows[mesh.dp_rank :: mesh.dp_size].chunk(accumulation):
        loss = model.loss(batch_of(share).to(mesh.device)).loss_sum
        (loss / total * engine.loss_scale).backward()
        engine.end_backward()
        loss_sum += loss.detach()
    result = engine.step(LR, BETA2)
    dist.all_reduce(loss_sum)
    return float(loss_sum) / total, float(result.grad_norm)


def train_engine(
    rank: int, world_size: int, config: Config, accumulation: int, steps: int = 5, device: torch.device = CPU
) -> Run:
    """The same by the engine, on this rank of the process group."""
    return train_on(build_mesh(config.parallel, World(rank, rank, world_size, device)), config, accumulation, steps)


def train_on(mesh: Mesh, config: Config, accumulation: int, steps: int = 5) -> Run:
    """The same on a mesh that exists already."""
    model, engine = build_engine(config, mesh)
    run = Run()
    for step in range(steps):
        loss, norm = train_step(model, engine, mesh, step, accumulation)
        run.losses.append(loss)
        run.norms.append(norm)
    engine.wait()  # what its lane still fetches must not mix with the next engine's transfers on this mesh
    run.parameters = {name: engine.full_parameter(name) for name in engine.parameter_names()}
    return run


def difference(run: Run, other: Run) -> dict[str, float]:
    """Largest absolute difference of losses, norms and parameters."""
    assert run.parameters.keys() == other.parameters.keys()
    return {
        "loss": max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True)),
        "norm": max(abs(a - b) for a, b in zip(run.norms, other.norms, strict=True)),
        "parameters": max(
            float((value - other.parameters[name]).abs().max()) for name, value in run.parameters.items()
        ),
    }
