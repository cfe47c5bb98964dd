"""Loss, accuracy and perplexity on validation sets."""

import math

import torch
import torch.distributed as dist

from internlm.core.mesh import Mesh
from internlm.data.loader import ValidLoader
from internlm.model.batch import IGNORE_INDEX
from internlm.model.transformer import Transformer
from internlm.train.metrics import ValidReport, perplexity
from internlm.utils.logger import common_warning, get_logger

logger = get_logger(__name__)


@torch.no_grad()
def evaluate(model: Transformer, loader: ValidLoader, mesh: Mesh) -> ValidReport:
    """Run `model` once over `loader` and average over all trained tokens of all data ranks.

    Collective: the loader has the same number of batches on every rank. The model is put in eval mode meanwhile.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # loss, correct, tokens
    training = model.training
    model.eval()
    for row in loader:
        batch = row.to(mesh.device)
        output = model.loss(batch)
        trained = batch.labels != IGNORE_INDEX
        sums += torch.stack((output.token_losses.double().sum(), (output.correct & trained).sum(), trained.sum()))
    model.train(training)
    dist.all_reduce(sums, group=mesh.world_group)
    loss_sum, correct, tokens = sums.tolist()
    if tokens == 0:
        common_warning(logger, f"Validation dataset: {loader.name} is empty")
        return ValidReport(loader.name, math.nan, math.nan, math.nan, 0)
    loss = loss_sum / tokens
    return ValidReport(loader.name, loss, correct / tokens, perplexity(loss), int(tokens))
