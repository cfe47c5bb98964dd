"""Loss, accuracy and perplexity on validation sets."""

import math

import torch

from internlm.core.mesh import Mesh
from internlm.data.loader import ValidLoader
from internlm.model.batch import IGNORE_INDEX, Batch
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.schedule import Schedule
from internlm.train.metrics import ValidReport, perplexity, sum_over_tokens_
from internlm.utils.logger import common_warning, get_logger

logger = get_logger(__name__)


@torch.no_grad()
def evaluate(schedule: Schedule, loader: ValidLoader, mesh: Mesh) -> ValidReport:
    """Run the model once over `loader` and average over all trained tokens of all data ranks.

    Collective: the loader has the same number of batches on every rank. The model is put in eval mode meanwhile.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # loss, correct, tokens

    def add(output: LossOutput, part: Batch) -> None:
        trained = part.labels != IGNORE_INDEX
        sums.add_(torch.stack((output.token_losses.double().sum(), (output.correct & trained).sum(), trained.sum())))

    schedule.eval_mode(True)
    for row in loader:
        schedule.evaluate(row, add)
    schedule.eval_mode(False)
    sum_over_tokens_(sums, mesh)
    loss_sum, correct, tokens = sums.tolist()
    if tokens == 0:
        common_warning(logger, f"Validation dataset: {loader.name} is empty")
        return ValidReport(loader.name, math.nan, math.nan, math.nan, 0)
    loss = loss_sum / tokens
    return ValidReport(loader.name, loss, correct / tokens, perplexity(loss), int(tokens))
