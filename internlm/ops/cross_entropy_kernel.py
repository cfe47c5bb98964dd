"""The Triton kernel of `cross_entropy.py`: logits of a chunk to losses and, in place, to gradients.

One program a row. It reads the row twice, the second time mostly from the L2 cache, and writes it once: 4 bytes of
traffic a 16-bit logit, where the torch path moves about 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
IGNORE_INDEX = -100
LOWEST = tl.constexpr(-3e38)  # a column's largest before it has seen a logit: finite, as inf - inf is no number


@triton.jit
def _losses_and_gradient(
    logits,
    labels,
    losses,
    objective,
    correct,
    stride,
    smoothing,
    z_weight,
    scale,
    VOCAB: tl.constexpr,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """losses: -log p(label); objective: with smoothing and z-loss; if GRADIENT, logits become its gradient * scale."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    trained = label != IGNORED
    # read long before any thread overwrites it: the reductions below are barriers
    at_label = tl.load(logits + tl.where(trained, label, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK)

    # For each column of a block: the largest logit and its place, the sum of exponentials relative to it, the sum of
    # logits. Threads meet only after the loop: a reduction for each block took most of the kernel's time.
    lane_best = tl.full((BLOCK,), LOWEST, tl.float32)
    lane_place = tl.zeros((BLOCK,), tl.int32)
    lane_exponentials = tl.zeros((BLOCK,), tl.float32)
    lane_total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        inside = start + columns < VOCAB
        x = tl.load(logits + start + columns, inside, float("-inf")).to(tl.float32)
        above = x - lane_best
        smaller = tl.exp(-tl.abs(above))  # of the two, relative to the larger
        lane_exponentials = tl.where(above > 0, lane_exponentials * smaller + 1, lane_exponentials + smaller)
        lane_place = tl.where(above > 0, start + columns, lane_place)
        lane_best = tl.maximum(lane_best, x)
        if SMOOTH:
            lane_total += tl.where(inside, x, 0.0)
    best = tl.max(lane_best, 0)
    place = tl.min(tl.where(lane_best == best, lane_place, VOCAB), 0)  # the first of equals
    exponentials = tl.sum(lane_exponentials * tl.exp(lane_best - best), 0)
    # Relative to the largest: near certainty, what is missing to p = 1 would drown in log_sum's rounding.
    above_best = tl.log(exponentials)
    log_sum = best + above_best

    loss = tl.where(trained, best - at_label + above_best, 0.0)
    z = tl.where(trained, z_weight * log_sum * log_sum, 0.0)
    tl.store(losses + row, loss)
    if SMOOTH:
        uniform = tl.where(trained, log_sum - tl.sum(lane_total, 0) / VOCAB, 0.0)
        tl.store(objective + row, (1 - smoothing) * loss + smoothing * uniform + z)
    else:
        tl.store(objective + row, loss + z)
    tl.store(correct + row, place == label)

    if GRADIENT:
        scale = tl.where(trained, scale, 0.0)
        # d/dx of log_sum is p = exp(x - best) / exponentials, which the z-loss weighs by 2 z log_sum more
        of_p = tl.div_rn(scale * (1 + 2 * z_weight * log_sum), exponentials)
        for start in range(0, VOCAB, BLOCK):
            inside = start + columns < VOCAB
            x = tl.load(logits + start + columns, inside, 0.0).to(tl.float32)
            target = tl.where(start + columns == label, 1 - smoothing, 0.0) + smoothing / VOCAB
            gradient = tl.exp(x - best) * of_p - scale * target
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), inside)


def losses_and_gradient_(
    logits: Tensor, labels: Tensor, smoothing: float, z_weight: float, scale: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(token losses fp32 [rows], objective fp32 [rows], prediction is right bool [rows]) of logits [rows, vocab].

    With `gradient`, the logits are overwritten by the gradient of the summed objective times `scale`; rows without a
    label get zeros.
    """
    rows, vocab = logits.shape
    losses = torch.empty(rows, device=logits.device)
    objective = torch.empty_like(losses)
    correct = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _losses_and_gradient[(rows,)](
        logits,
        labels,
        losses,
        objective,
        correct,
        logits.stride(0),
        smoothing,
        z_weight,
        scale,
        vocab,
        IGNORE_INDEX,
        gradient,
        smoothing > 0,
        BLOCK,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return losses, objective, correct
