"""Loss, accuracy and perplexity on validation sets; of pairs (dpo) the margin."""

import math

import torch

from internlm.core.mesh import Mesh
from internlm.data.loader import ValidLoader
from internlm.model.batch import IGNORE_INDEX, Batch
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.schedule import Schedule
from internlm.train.metrics import ValidReport, perplexity, sum_over_tokens_
from internlm.train.preference import margin_sum, pair_places
from internlm.utils.logger import common_warning, get_logger

logger = get_logger(__name__)


@torch.no_grad()
def evaluate(schedule: Schedule, loader: ValidLoader, mesh: Mesh) -> ValidReport:
    """Run the model once over `loader` and average over all trained tokens, or pairs, of all data ranks.

    Collective: the loader has the same number of batches on every rank. The model is in eval mode while it runs.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=mesh.device)  # loss, correct, margin, what is counted

    def add(output: LossOutput, part: Batch) -> None:
        losses = output.token_losses.double()
        correct = (output.correct & (part.labels != IGNORE_INDEX)).sum()
        margin = margin_sum(output) if loader.of_pairs else losses.new_zeros(())
        count = pair_places(output).sum() if loader.of_pairs else losses.new_tensor(part.num_trained)
        sums.add_(torch.stack((losses.sum(), correct, margin, count)))

    schedule.eval_mode(True)
    for row in loader:
        schedule.evaluate(row, add)
    schedule.eval_mode(False)
    sum_over_tokens_(sums, mesh)
    loss_sum, correct, margin, count = sums.tolist()
    if count == 0:
        common_warning(logger, f"Validation dataset: {loader.name} is empty")
        return ValidReport(loader.name, math.nan, math.nan, math.nan, 0)
    loss = loss_sum / count
    if loader.of_pairs:
        return ValidReport(loader.name, loss, correct / count, math.nan, int(count), margin / count)
    return ValidReport(loader.name, loss, correct / count, perplexity(loss), int(count))
