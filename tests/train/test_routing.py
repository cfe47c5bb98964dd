"""What the log says of routers, counted by hand."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from internlm.config.schema import Config
from internlm.model.batch import IGNORE_INDEX
from internlm.model.init import initialize
from internlm.model.moe import Router
from internlm.model.transformer import Transformer, build_model
from internlm.monitor.monitor import Monitor
from internlm.train.metrics import StepReport
from tests.parallel.oracle import STEPS, build_trainer, global_batch, make_config
from tests.pool import run_ranks

NUM_EXPERTS, TOP_K, CAPACITY = 4, 2, 0.75
MODEL: dict[str, Any] = {
    "num_experts": NUM_EXPERTS,
    "moe": {"top_k": TOP_K, "capacity_factor": CAPACITY, "min_capacity": 1, "intermediate_size": 24},
}


def first_step(rank: int, world_size: int, config: Config) -> tuple[float, StepReport]:
    """Validation before any update, and the report of the first step."""
    trainer = build_trainer(rank, world_size, config, range(1))
    (validation,) = trainer.validate()
    return validation.loss, next(trainer.steps())


def plain(config: Config) -> Transformer:
    model = build_model(config, "cpu")
    initialize(model, config.model, config.seed)
    return model


def counted(config: Config) -> dict[str, float]:
    """The choices of each row in each layer, from the routers' inputs."""
    model, choices, dropped = plain(config).train(), [], 0.0
    layers = [module for module in model.modules() if isinstance(module, Router)]

    def count(router: Router, args: Any) -> None:
        nonlocal dropped
        scores = F.linear(args[0], router.weight)
        of_expert = torch.bincount(scores.argsort(-1, descending=True)[:, :TOP_K].flatten(), minlength=NUM_EXPERTS)
        most = ceil(CAPACITY * len(scores) * TOP_K / NUM_EXPERTS)
        dropped += float((of_expert - most).clamp_min(0).sum())
        choices.append(of_expert.double())

    for layer in layers:
        layer.register_forward_pre_hook(count)
    for row in global_batch(0):
        model(row)
    by_layer = torch.stack(choices).unflatten(0, (-1, len(layers))).sum(0)  # [layers, experts]
    loads = by_layer / by_layer.sum(1, keepdim=True) * NUM_EXPERTS
    named = {f"load/expert_{index}": float(load) for index, load in enumerate(loads.mean(0))}
    share = dropped / float(by_layer.sum())
    return named | {"load/max": float(loads.max()), "load/min": float(loads.min()), "load/dropped": share}


def test_the_load_of_each_expert_is_logged(tmp_path: Path) -> None:
    config = make_config(None, model=MODEL)
    expected = counted(config)
    assert expected["load/dropped"] > 0 and len({round(value, 3) for value in expected.values()}) == len(expected)
    for parallel, ranks in (({}, 1), ({"expert": {"size": 2}, "context": {"ring": 2}}, 2)):
        for rank, (_, report) in enumerate(run_ranks(ranks, first_step, make_config(parallel, model=MODEL))):
            folder = tmp_path / f"{ranks}-{rank}"
            with Monitor(config, folder) as monitor:
                monitor.report(report)
            logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
            assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_validation_drops_nothing() -> None:
    config = make_config(None, model=MODEL)
    rows, model = global_batch(STEPS), plain(config)
    losses = {}
    for training in (True, False):
        model.train(training)
        sums = [
            F.cross_entropy(model(row).detach(), row.labels, ignore_index=IGNORE_INDEX, reduction="sum") for row in rows
        ]
        losses[training] = float(sum(sums)) / sum(row.num_trained for row in rows)
    assert losses[True] != pytest.approx(losses[False], rel=1e-5)
    ((found, _),) = run_ranks(1, first_step, config)
    assert found == pytest.approx(losses[False], rel=1e-6)
