"""Pipeline parallel: every schedule trains as one rank does."""

import threading
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.model.feed_forward import FeedForward
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.pipeline_layout import build_layout
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from tests.parallel.oracle import CPU, build_trainer, compare, global_batch, make_config
from tests.pool import run_ranks

SCHEDULES = ["1f1b", "interleaved", "zbv", "dualpipev"]
ZERO2 = {"gradient": {"size": 2}, "zero1": {"size": 2}}
ZERO3 = {"weight": {"size": 2}, **ZERO2}


def check(world_size: int, stages: int, schedule: str, parallel: dict[str, Any], **model: Any) -> None:
    if schedule == "interleaved":
        model["num_chunks"] = 2
    pipeline = {"size": stages, "schedule": schedule, **parallel.pop("pipeline", {})}
    compare(world_size, {"pipeline": pipeline, **parallel}, model=model)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_and_tied_embeddings(schedule: str) -> None:
    check(2, 2, schedule, {}, tie_word_embeddings=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_stages_cut_unevenly(schedule: str) -> None:
    check(4, 4, schedule, {}, num_layers=10)


@pytest.mark.parametrize(
    ("schedule", "parallel", "checkpoint"),
    [
        ("1f1b", ZERO3, 0.5),
        ("interleaved", ZERO2, "offload"),
        ("zbv", ZERO3, "selective"),
        ("dualpipev", {"zero1": {"size": 1}}, 0.5),
    ],
)
def test_data_ranks_and_recomputation(schedule: str, parallel: dict[str, Any], checkpoint: Any) -> None:
    check(4, 2, schedule, {**parallel}, num_layers=8, checkpoint=checkpoint, tie_word_embeddings=True)


def feed_forward_calls(rank: int, world_size: int, config: Config) -> int:
    trainer = build_trainer(rank, world_size, config, range(1))
    with patch.object(FeedForward, "forward", autospec=True, side_effect=FeedForward.forward) as forward:
        list(trainer.steps())
    return forward.call_count


def test_a_backward_in_two_parts_recomputes_once() -> None:
    model = {"num_layers": 4, "checkpoint": "feed_forward"}
    config = make_config({"pipeline": {"size": 2, "schedule": "zbv"}}, model=model)
    assert run_ranks(2, feed_forward_calls, config) == [2 * 2 * 4] * 2  # 2 blocks, 4 micro batches


@pytest.mark.parametrize(
    ("schedule", "mode", "checkpoint"),
    [("1f1b", "mtp", False), ("zbv", "msp", "feed_forward"), ("dualpipev", "fsp", "selective")],
)
def test_tensor_ranks(schedule: str, mode: str, checkpoint: Any) -> None:
    tensor = {"size": 2, "mode": mode}
    check(4, 2, schedule, {"tensor": tensor}, checkpoint=checkpoint, tie_word_embeddings=True)


class Recorder:
    """Events of the engine in order. Compute halts at the last of the events `held`, until another has come."""

    def __init__(self, held: str, until: str, count: int) -> None:
        self.events: list[str] = []
        self.held, self.until, self.count = held, until, count
        self.reached = threading.Event()
        self.in_time: list[bool] = []

    def __call__(self, event: str, unit: str) -> None:
        name = f"{event} {unit}"
        self.events.append(name)
        if name == self.until:
            self.reached.set()
        if name == self.held and self.events.count(name) == self.count:
            self.in_time.append(self.reached.wait(60))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "reached": None}


def traced_step(rank: int, world_size: int, config: Config, held: dict[int, tuple[str, str]]) -> Recorder:
    """One step whose engine tells a recorder; `held` by stage."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    rows = global_batch(0, 8)[mesh.dp_rank :: mesh.dp_size]
    recorder = Recorder(*held[mesh.coordinates["pipeline"]], len(rows))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    initial = partial(initial_value, config=config.model, seed=config.seed)
    engine = HybridZero(model, config, mesh, initial, placements, trace=recorder)
    schedule = build_schedule(model, engine, config, mesh)
    schedule.train(rows, [1.0] * len(rows), lambda output, part: None)
    engine.step(1e-3, 0.95)
    return recorder


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_reduced_while_the_last_backward_goes_on(schedule: str) -> None:
    """In the last micro batch, the reduction of a block begins before the backward of the block before it ends."""
    chunks = 1 if schedule == "1f1b" else 2
    layout = build_layout(schedule, 2, [2] * 2 * chunks)
    last = [layout.layers[layout.chunks_of(stage)[0]] for stage in range(2)]  # of each stage's last backward
    held = {stage: (f"backward layers.{a}", f"reduce.begin layers.{b}") for stage, (a, b) in enumerate(last)}
    parallel = {"pipeline": {"size": 2, "schedule": schedule}}
    model = {"num_layers": 4 * chunks, "num_chunks": 2 if schedule == "interleaved" else 1}
    for rank, recorder in enumerate(run_ranks(4, traced_step, make_config(parallel, model=model), held)):
        assert recorder.in_time == [True], (schedule, rank, recorder.events)
        blocks = [event for event in recorder.events if event.startswith("reduce.begin layers")]
        assert len(blocks) == len(set(blocks)) == 2 * chunks  # each once a step, not in every micro batch


def evaluated(rank: int, world_size: int, config: Config) -> tuple[float, list[Tensor]]:
    """The summed loss of four rows after a training step, and this rank's copy of the tied weight."""
    trainer = build_trainer(rank, world_size, config, range(1))
    list(trainer.steps())
    sums = torch.zeros((), dtype=torch.float64)
    trainer.schedule.eval_mode(True)
    for row in global_batch(7)[:4]:
        trainer.schedule.evaluate(row, lambda output, part: sums.add_(output.token_losses.sum()))
    dist.all_reduce(sums)
    engine = trainer.optimizer
    return float(sums), [engine.full_parameter(name) for name in engine.parameter_names() if "embedding" in name]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_evaluation_and_copies_of_tied_weights(schedule: str) -> None:
    model = {"tie_word_embeddings": True, "num_layers": 4}
    [(expected, [weight])] = run_ranks(1, evaluated, make_config(None, model=model))
    found = run_ranks(2, evaluated, make_config({"pipeline": {"size": 2, "schedule": schedule}}, model=model))
    assert all(loss == pytest.approx(expected, rel=1e-6) for loss, _ in found)
    copies = [copy for _, mine in found for copy in mine]
    assert len(copies) == (2 if schedule == "1f1b" else 1)
    for copy in copies:
        assert torch.equal(copy, copies[0]) and torch.allclose(copy, weight, rtol=1e-5, atol=1e-6)


def test_blocks_whose_backward_is_split_are_not_compiled() -> None:
    """The two parts of a compiled block's backward can't be had one by one."""
    check(2, 2, "zbv", {}, compile=True)
