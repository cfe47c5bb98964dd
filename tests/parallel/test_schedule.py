"""Accumulation, the schedule without a pipeline."""

from typing import Any

import torch
from torch import Tensor, nn

from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.model.batch import Batch
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.schedule import build_schedule
from tests.checkpoint.fake import world_of_one
from tests.solver.tiny import CPU, batch_of, global_rows, make_config


class Engine:
    def begin_step(self, num_micro_batches: int) -> None: ...

    def end_backward(self, modules: Any = None) -> None: ...


class Model(nn.Module):
    """Notes what its loss is told of the gradient to come, and what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.foretold: list[float] = []
        self.received: list[Tensor] = []

    def loss(self, batch: Batch, label_smoothing: float, upstream: float, z_loss: float) -> LossOutput:
        loss = torch.ones((), requires_grad=True)
        loss.register_hook(self.received.append)
        self.foretold.append(upstream)
        return LossOutput(loss, torch.zeros(1), torch.zeros(1, dtype=torch.bool))


def test_the_loss_knows_the_gradient_that_it_will_get() -> None:
    config, model = make_config(), Model()
    rows, weights = [batch_of(global_rows(0)[:2])] * 2, [0.25, 65536 / 7]
    with world_of_one():
        mesh = build_mesh(config.parallel, World(0, 0, 1, CPU))
        schedule = build_schedule(model, Engine(), config, mesh)  # type: ignore[arg-type]
        schedule.train(rows, weights, lambda output, part: None)
    assert model.foretold == weights
    assert [float(grad) for grad in model.received] == [float(torch.tensor(weight)) for weight in weights]
