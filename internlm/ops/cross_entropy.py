"""Output projection and cross-entropy in one operation that never holds all logits.

With a vocabulary of 100k the logits of 16k tokens are 6.6 GB in fp32, several times that with their gradient. Here rows
are taken in chunks: logits, token losses, predictions and the chunk's gradients, then the chunk is dropped. Hence the
gradients of hidden states and weight are computed in the *forward*, for an upstream gradient of 1, and backward only
scales them. What that costs: an fp32 gradient of the weight lives from forward to backward, and a forward with
gradients enabled whose backward never comes has done the work for nothing. What it saves is the third GEMM of
recomputing the logits in backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100

# Elements of one chunk of logits. On a GPU 2 GB in fp32, which keeps the GEMMs at 4k to 8k rows for usual
# vocabularies; on a CPU small enough to stay near the caches.
_CHUNK_ELEMENTS = {"cuda": 2**29, "cpu": 2**22}


class LossOutput(NamedTuple):
    """What a training step needs to know of a packed row."""

    loss_sum: Tensor  # fp32 scalar with gradient: sum over trained tokens, label smoothing included
    token_losses: Tensor  # fp32 [tokens]: -log p(label) without smoothing, 0 where the label is IGNORE_INDEX
    correct: Tensor  # bool [tokens]: the label has the highest logit


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> LossOutput:
    """The same as `linear_cross_entropy`, plainly: all logits at once, gradients by autograd."""
    logits = F.linear(hidden, weight).float()
    loss_sum = F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    with torch.no_grad():
        token_losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        return LossOutput(loss_sum, token_losses, logits.argmax(-1) == labels)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> LossOutput:
    """Cross-entropy of `hidden @ weight.T` against `labels`, chunk by chunk.

    hidden [tokens, hidden], weight [vocab, hidden] of one dtype; labels int64 [tokens] below vocab or IGNORE_INDEX.
    Only `loss_sum` carries gradient, and only once (no second derivatives).
    """
    return LossOutput(
        *_LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss_sum = torch.zeros((), device=hidden.device)
        token_losses = torch.empty(len(labels), device=hidden.device)
        correct = torch.empty(len(labels), device=hidden.device, dtype=torch.bool)
        rows = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**22) // len(weight))
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight).float()  # [rows, vocab]
            correct[part] = logits.argmax(-1) == labels[part]
            chunk_loss, token_losses[part] = _losses(logits, labels[part], label_smoothing)
            loss_sum += chunk_loss
            if not (need_hidden or need_weight):
                continue
            grad_logits = _logits_to_gradient_(logits, labels[part], label_smoothing).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product_(grad_weight, grad_logits.T, hidden[part])
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(token_losses, correct)
        return loss_sum, token_losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            # Scaled in fp32 and rounded once, without a second fp32 tensor of the weight's size.
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_loss, out=scaled)
        return grad_hidden, grad_weight, None, None, None


def _losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(sum of the smoothed losses, token losses without smoothing [rows]) of fp32 logits [rows, vocab]."""
    trained = labels != IGNORE_INDEX
    log_normaliser = logits.logsumexp(-1)
    at_label = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    token_losses = torch.where(trained, log_normaliser - at_label, 0)
    if label_smoothing == 0:
        return token_losses.sum(), token_losses
    # Smoothing mixes in the mean over the vocabulary of -log p.
    uniform = torch.where(trained, log_normaliser - logits.mean(-1), 0)
    return ((1 - label_smoothing) * token_losses + label_smoothing * uniform).sum(), token_losses


def _logits_to_gradient_(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Overwrites fp32 logits [rows, vocab] with the gradient of the summed loss: softmax - target, 0 where ignored."""
    trained = (labels != IGNORE_INDEX)[:, None]
    torch.softmax(logits, dim=-1, out=logits)
    if label_smoothing > 0:
        logits.sub_(label_smoothing / logits.shape[-1])
    at_label = torch.full_like(trained, label_smoothing - 1, dtype=logits.dtype)
    logits.scatter_add_(-1, labels.clamp_min(0)[:, None], at_label)
    return logits.mul_(trained)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with an fp32 total [m, n], also for 16-bit a [m, k] and b [k, n]."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # on a CPU torch has no product of 16-bit matrices into fp32
        torch.addmm(total, a.float(), b.float(), out=total)
