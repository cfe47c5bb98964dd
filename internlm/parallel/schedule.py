"""The order of forward and backward passes of a step's micro batches."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from internlm.config.schema import Config, LossConfig
from internlm.core.mesh import Mesh
from internlm.model.batch import Batch
from internlm.model.transformer import Transformer
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.contract import GradientEngine, LossOf, Objective, OnLoss
from internlm.parallel.pipeline import Pipeline
from internlm.parallel.sequence import own_part


class Schedule(Protocol):
    """Runs micro batches through the model, on all ranks together."""

    def train(self, rows: Sequence[Batch], weights: Sequence[float], on_loss: OnLoss) -> None:
        """Forward and backward of each row's summed loss times its weight."""
        ...

    def evaluate(self, row: Batch, on_loss: OnLoss) -> None:
        """Forward of one row, without gradients."""
        ...

    def eval_mode(self, on: bool) -> None:
        """Puts the model in eval mode, or back."""
        ...


class Accumulation:
    """One micro batch after the other; gradients add up. What there is without a pipeline."""

    def __init__(
        self, model: Transformer, engine: GradientEngine, mesh: Mesh, objective: Objective, measure: Objective
    ) -> None:
        self.model, self.engine, self.mesh = model, engine, mesh
        self.objective, self.measure = objective, measure

    def train(self, rows: Sequence[Batch], weights: Sequence[float], on_loss: OnLoss) -> None:
        self.engine.begin_step(len(rows))
        for row, weight in zip(rows, weights, strict=True):
            part = own_part(row, self.mesh).to(self.mesh.device)
            output = self.objective(partial(self.model.loss, part), row, weight)
            on_loss(output, part)
            (output.loss_sum * weight).backward()
            self.engine.end_backward()

    def evaluate(self, row: Batch, on_loss: OnLoss) -> None:
        part = own_part(row, self.mesh).to(self.mesh.device)
        on_loss(self.measure(partial(self.model.loss, part), row, 1.0), part)

    def eval_mode(self, on: bool) -> None:
        self.model.train(not on)


def build_schedule(
    model: Transformer, engine: GradientEngine, config: Config, mesh: Mesh, objective: Objective | None = None
) -> Schedule:
    """The schedule that `parallel.pipeline` asks for; `objective` None: cross-entropy of the next token."""
    trained, measured = objective or next_token(config.loss), objective or plain_loss
    if mesh.sizes["pipeline"] > 1:
        return Pipeline(model, engine, config, mesh, trained, measured)
    return Accumulation(model, engine, mesh, trained, measured)


def next_token(config: LossConfig) -> Objective:
    """Cross-entropy of the next token, with label smoothing and z-loss."""

    def objective(loss_of: LossOf, row: Batch, upstream: float) -> LossOutput:
        return loss_of(label_smoothing=config.label_smoothing, upstream=upstream, z_loss=config.z_loss)

    return objective


def plain_loss(loss_of: LossOf, row: Batch, upstream: float) -> LossOutput:
    """Cross-entropy of the next token alone, for evaluation."""
    return loss_of(upstream=upstream)
