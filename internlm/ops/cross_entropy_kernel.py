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

    # Largest logit and its first place, sum of exponentials relative to the running largest, sum of logits.
    best = float("-inf")
    place = 0
    exponentials = 0.0
    total = 0.0
    for start in range(0, VOCAB, BLOCK):
        inside = start + columns < VOCAB
        x = tl.load(logits + start + columns, inside, float("-inf")).to(tl.float32)
        block_best = tl.max(x, 0)
        block_place = start + tl.argmax(x, 0)
        place = tl.where(block_best > best, block_place, place)
        largest = tl.maximum(best, block_best)
        exponentials = exponentials * tl.exp(best - largest) + tl.sum(tl.exp(x - largest), 0)
        total += tl.sum(tl.where(inside, x, 0.0), 0)
        best = largest
    # Relative to the largest: near certainty, what is missing to p = 1 would drown in log_sum's rounding.
    above_best = tl.log(exponentials)
    log_sum = best + above_best

    loss = tl.where(trained, best - at_label + above_best, 0.0)
    uniform = tl.where(trained, log_sum - total / VOCAB, 0.0)
    z = tl.where(trained, z_weight * log_sum * log_sum, 0.0)
    tl.store(losses + row, loss)
    tl.store(objective + row, (1 - smoothing) * loss + smoothing * uniform + z)
    tl.store(correct + row, place == label)

    if GRADIENT:
        scale = tl.where(trained, scale, 0.0)
        # d/dx of log_sum is p, which the z-loss weighs by 2 z log_sum more
        of_p = scale * (1 + 2 * z_weight * log_sum)
        for start in range(0, VOCAB, BLOCK):
            inside = start + columns < VOCAB
            x = tl.load(logits + start + columns, inside, 0.0).to(tl.float32)
            target = tl.where(start + columns == label, 1 - smoothing, 0.0) + smoothing / VOCAB
            gradient = tl.div_rn(tl.exp(x - best), exponentials) * of_p - scale * target
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
        BLOCK,
        num_warps=8,
    )
    return losses, objective, correct
