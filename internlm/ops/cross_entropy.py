"""Output projection and cross-entropy in one operation that never holds all logits.

With a vocabulary of 100k the logits of 16k tokens are 6.6 GB in fp32, several times that with their gradient. Here rows
are taken in chunks: logits, token losses, predictions and the chunk's gradients, then the chunk is dropped. Hence the
gradients of hidden states and weight are computed in the *forward*, for an upstream gradient that the caller announces
(1 if it can't), and backward only scales them. This costs memory for an fp32 gradient of the weight from forward to
backward, and a forward with gradients enabled computes them even if no backward follows. It saves a GEMM, since
backward need not recompute the logits.

    torch   any device, any group
    triton  one kernel turns a chunk's logits into losses and, in place, into their gradient; GPUs, whole vocabulary
            (`cross_entropy_kernel.py`)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.core.collectives import Group
from internlm.ops.kernels import find_kernels
from internlm.ops.vocabulary import cut_losses, local_labels

IGNORE_INDEX = -100

# Elements of one chunk of logits. On a GPU some 5k rows of the usual vocabularies: 1 GB by the kernel, 5 GB by torch;
# fewer rows make slow matrix products. On a CPU: near the caches.
CHUNK_ELEMENTS = {"cuda": 2**29, "cpu": 2**22}


_kernel = find_kernels("cross_entropy_kernel")
_triton_losses: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = _kernel and _kernel.losses_and_gradient_


class LossOutput(NamedTuple):
    """What a training step needs to know of a packed row."""

    loss_sum: Tensor  # fp32 scalar with gradient: sum over trained tokens, label smoothing and z-loss included
    token_losses: Tensor  # fp32 [tokens]: -log p(label) without smoothing, 0 where the label is IGNORE_INDEX
    correct: Tensor  # bool [tokens]: the label has the highest logit


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> LossOutput:
    """The same as `linear_cross_entropy`, plainly: all logits at once, gradients by autograd."""
    logits = F.linear(hidden, weight).float()
    loss_sum = F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    trained = labels != IGNORE_INDEX
    loss_sum = loss_sum + z_loss * (logits.logsumexp(-1).square() * trained).sum()
    with torch.no_grad():
        token_losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        return LossOutput(loss_sum, token_losses, logits.argmax(-1) == labels)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    group: Group | None = None,
    upstream: float = 1.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
) -> LossOutput:
    """Cross-entropy of `hidden @ weight.T` against `labels`, chunk by chunk.

    hidden [tokens, hidden], weight [vocab, hidden] of one dtype; labels int64 [tokens] below vocab or IGNORE_INDEX.
    Only `loss_sum` carries gradient, and only once (no second derivatives). It includes `z_loss` times the squared
    log-sum-exp of each trained token's logits, which keeps them from drifting (PaLM, Chowdhery et al., 2022).

    With a `group`, each of its ranks has the same tokens and an equal part of the vocabulary, in order of rank; the
    result is the same on all of them, and the gradient of `hidden` is this rank's part of a sum over the group.

    `token_weights` fp32 [tokens] multiply the tokens' parts of `loss_sum` and its gradient, not `token_losses`; with
    them there is neither label smoothing nor z-loss.
    `upstream` is the factor by which `loss_sum` will be multiplied before backward, loss scale included, where that is
    known. It changes no result in exact arithmetic. In float16, whose least positive number is 6e-8, gradients are
    rounded after it and not before: that is what a loss scale is for. Any positive number is allowed.
    """
    assert token_weights is None or label_smoothing == z_loss == 0
    scale = upstream if hidden.dtype == torch.float16 else 1.0  # other dtypes have the exponents of float32
    return LossOutput(
        *_LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, label_smoothing, z_loss, group, scale, token_weights, torch.is_grad_enabled()
        )
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_smoothing: float,
        z_loss: float,
        group: Group | None,
        scale: float,
        token_weights: Tensor | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss_sum = torch.zeros((), device=hidden.device)
        token_losses = torch.empty(len(labels), device=hidden.device)
        correct = torch.empty(len(labels), device=hidden.device, dtype=torch.bool)
        rows = _chunk_rows(len(labels), len(weight), hidden.device.type)
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            grad_logits, chunk = _chunk(
                F.linear(hidden[part], weight),
                labels[part],
                (label_smoothing, z_loss, scale),
                group,
                need_hidden or need_weight,
            )
            loss_sum += chunk.loss_sum if token_weights is None else chunk.token_losses @ token_weights[part]
            token_losses[part], correct[part] = chunk.token_losses, chunk.correct
            if grad_logits is None:
                continue
            # Rows without a label have no gradient. Masking here spares a pass over the vocabulary.
            trained = (labels[part] != IGNORE_INDEX)[:, None].to(hidden.dtype)
            if token_weights is not None:
                trained = trained * token_weights[part, None].to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part]).mul_(trained)
            if grad_weight is not None:
                _add_product_(grad_weight, grad_logits.T, hidden[part] * trained)
        ctx.weight_dtype, ctx.scale = weight.dtype, scale
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(token_losses, correct)
        return loss_sum, token_losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad_loss / ctx.scale
        if grad_hidden is not None:
            grad_hidden = grad_hidden * factor.to(grad_hidden.dtype)
        if grad_weight is not None:
            # Scaled in fp32 and rounded once, without a second fp32 tensor of the weight's size.
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, factor, out=scaled)
        return grad_hidden, grad_weight, *[None] * 7


def _chunk_rows(tokens: int, vocab: int, device_type: str) -> int:
    """Rows of a chunk: as few chunks as the memory allows, alike, and whole tiles of a matrix product each."""
    most = max(1, CHUNK_ELEMENTS.get(device_type, 2**22) // vocab)
    rows = -(-tokens // -(-tokens // most))
    return min(most, -(-rows // 128) * 128)


def _chunk(
    logits: Tensor, labels: Tensor, options: tuple[float, float, float], group: Group | None, gradient: bool
) -> tuple[Tensor | None, LossOutput]:
    """Losses of `logits` [rows, vocab] and, if asked for, the gradient of their sum times a scale, in the same dtype.

    `options`: label smoothing, weight of the z-loss, scale. Rows without a label may have any finite gradient.
    """
    label_smoothing, z_loss, scale = options
    if group is None and logits.is_cuda and _triton_losses is not None:
        losses, objective, correct = _triton_losses(logits, labels, label_smoothing, z_loss, scale, gradient)
        return logits if gradient else None, LossOutput(objective.sum(), losses, correct)
    if group is None:
        probabilities, chunk = _chunk_losses(logits, labels, label_smoothing, z_loss)
    else:
        probabilities, chunk = _cut_chunk_losses(logits, labels, label_smoothing, z_loss, group)
    if not gradient:
        return None, chunk
    grad_logits = _to_gradient_(probabilities, labels, label_smoothing, group)
    return (grad_logits if scale == 1 else grad_logits.mul_(scale)).to(logits.dtype), chunk


def _chunk_losses(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> tuple[Tensor, LossOutput]:
    """Losses of `logits` [rows, vocab] in any dtype, in few passes over them; and, fp32 [rows, vocab], probabilities,
    times what the z-loss weighs them by: the gradient is that minus the target."""
    trained = labels != IGNORE_INDEX
    best, prediction = logits.max(-1)
    best = best.float()
    at_label = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0].float()
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # -log p(label) by way of the best, whose p is at least 1 / vocab: p(label) itself may be 0 in fp32.
    loss_of_best = -probabilities.gather(-1, prediction[:, None])[:, 0].log()
    token_losses = torch.where(trained, best - at_label + loss_of_best, 0)
    loss_sum = token_losses.sum()
    if label_smoothing > 0:  # mixes in the mean over the vocabulary of -log p
        uniform = torch.where(trained, best - logits.mean(-1, dtype=torch.float32) + loss_of_best, 0)
        loss_sum = (1 - label_smoothing) * loss_sum + label_smoothing * uniform.sum()
    if z_loss > 0:
        log_sum = torch.where(trained, best + loss_of_best, 0)
        loss_sum = loss_sum + z_loss * log_sum.square().sum()
        probabilities.mul_(1 + 2 * z_loss * log_sum[:, None])
    return probabilities, LossOutput(loss_sum, token_losses, prediction == labels)


def _cut_chunk_losses(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, group: Group
) -> tuple[Tensor, LossOutput]:
    """`_chunk_losses` where each rank of `group` has a part of the vocabulary."""
    trained = labels != IGNORE_INDEX
    probabilities, token_losses, loss_sum, prediction = cut_losses(
        logits, labels, trained, label_smoothing, z_loss, group
    )
    return probabilities, LossOutput(loss_sum, token_losses, prediction == labels)


def _to_gradient_(probabilities: Tensor, labels: Tensor, label_smoothing: float, group: Group | None) -> Tensor:
    """Turns [rows, vocab] into the gradient of the summed loss by the logits, in place: probabilities - target."""
    size = probabilities.shape[-1]
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if label_smoothing > 0:
        probabilities.sub_(label_smoothing / (size * ranks))
    places, here = local_labels(labels, rank * size, size)
    minus_target = torch.where(here, label_smoothing - 1.0, 0.0)[:, None]
    return probabilities.scatter_add_(-1, places[:, None], minus_target)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with an fp32 total [m, n], also for 16-bit a [m, k] and b [k, n]."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # on a CPU torch has no product of 16-bit matrices into fp32
        torch.addmm(total, a.float(), b.float(), out=total)
