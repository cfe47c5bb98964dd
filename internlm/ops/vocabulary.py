"""Losses of a chunk of logits whose vocabulary is cut between the ranks of a group; no rank ever holds a whole row."""

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.collectives import Group


def cut_losses(
    logits: Tensor, labels: Tensor, trained: Tensor, label_smoothing: float, z_loss: float, group: Group
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(probabilities, token losses, smoothed loss sum, predictions) of this rank's columns of some rows.

    logits [rows, vocab / ranks] in any dtype, of consecutive parts of the vocabulary in order of rank; labels int64
    [rows] in the whole vocabulary, trained bool [rows]. Probabilities [rows, vocab / ranks] are fp32, of this rank's
    part, and times what the z-loss weighs them by; the rest is the same on every rank. Three small collectives: the
    largest logit, sums over the vocabulary, the first place of the largest.
    """
    size = logits.shape[-1]
    start = group.rank() * size
    logits = logits.float()
    own_best, own_prediction = logits.max(-1)
    best = own_best.clone()
    dist.all_reduce(best, dist.ReduceOp.MAX, group=group)
    probabilities = (logits - best[:, None]).exp_()
    own_label, here = local_labels(labels, start, size)
    at_label = logits.gather(-1, own_label[:, None])[:, 0].masked_fill(~here, 0)
    sums = torch.stack((probabilities.sum(-1), at_label, logits.sum(-1)))
    dist.all_reduce(sums, group=group)
    denominator, at_label, total = sums
    prediction = torch.where(own_best == best, own_prediction + start, torch.iinfo(torch.int64).max)
    dist.all_reduce(prediction, dist.ReduceOp.MIN, group=group)
    log_sum = best + denominator.log()
    token_losses = torch.where(trained, log_sum - at_label, 0)
    loss_sum = token_losses.sum()
    if label_smoothing > 0:
        uniform = torch.where(trained, log_sum - total / (size * group.size()), 0)
        loss_sum = (1 - label_smoothing) * loss_sum + label_smoothing * uniform.sum()
    probabilities.div_(denominator[:, None])
    if z_loss > 0:
        log_sum = torch.where(trained, log_sum, 0)
        loss_sum = loss_sum + z_loss * log_sum.square().sum()
        probabilities.mul_(1 + 2 * z_loss * log_sum[:, None])
    return probabilities, token_losses, loss_sum, prediction


def local_labels(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """(place in [start, start + size), whether it is there) of each label int64 [rows]; place 0 where it isn't."""
    local = labels - start
    here = (local >= 0) & (local < size)
    return local.masked_fill(~here, 0), here
