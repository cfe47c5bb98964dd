"""What is trained, and what is measured, where nothing else is asked for: cross-entropy of the next token."""

from internlm.config.schema import LossConfig
from internlm.model.batch import Batch
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.contract import LossOf, Objective


def next_token(config: LossConfig) -> Objective:
    """With what training adds to it."""

    def objective(loss_of: LossOf, row: Batch, upstream: float) -> LossOutput:
        return loss_of(label_smoothing=config.label_smoothing, upstream=upstream, z_loss=config.z_loss)

    return objective


def plain_loss(loss_of: LossOf, row: Batch, upstream: float) -> LossOutput:
    """For evaluation."""
    return loss_of(upstream=upstream)
