"""The interfaces between a schedule, the trainer and the optimizer engine."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from internlm.model.batch import Batch
from internlm.ops.cross_entropy import LossOutput

# Called for each micro batch on the ranks that compute its loss: (output, the part of the row that it belongs to).
OnLoss = Callable[[LossOutput, Batch], None]
# `Transformer.loss` of a row, or `head_loss` where the row's hidden states are there: all but the row is still to give.
LossOf = Callable[..., LossOutput]
# What is trained: (the loss of a row, or of this rank's part of it; the whole row on the host; the weight of its summed
# loss) -> that loss.
Objective = Callable[[LossOf, Batch, float], LossOutput]


class GradientEngine(Protocol):
    """What a schedule needs of the optimizer; see `solver.HybridZero`."""

    def begin_step(self, num_micro_batches: int, chunks: Sequence[Collection[str]] | None = None) -> None: ...

    def end_backward(self, modules: Collection[str] | None = None) -> None: ...

    def fetch(self, modules: Collection[str]) -> None: ...

    def drop(self, modules: Collection[str]) -> None: ...
