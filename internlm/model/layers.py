"""The small parts of a transformer: projections with N-d weights, norm, embedding, head.

Nothing here is initialised: values come from `model/init.py`, so that every layout starts from the same ones.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import ModelConfig
from internlm.ops.cross_entropy import LossOutput, linear_cross_entropy
from internlm.ops.fp8 import fp8_linear
from internlm.ops.rms_norm import rms_norm


class Linear(nn.Module):
    """y = x W^T + b where W is [*out_shape, size]: one GEMM, whose result [tokens, *out_shape] has the structure."""

    def __init__(
        self, size: int, out_shape: tuple[int, ...], bias: bool, dtype: torch.dtype, fp8: bool = False
    ) -> None:
        super().__init__()
        self.out_shape = out_shape
        self.product = fp8_linear if fp8 else F.linear
        self.weight = nn.Parameter(torch.empty(*out_shape, size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_shape, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, size] -> [tokens, *out_shape]."""
        bias = None if self.bias is None else self.bias.view(-1)
        return self.product(x, self.weight.view(prod(self.out_shape), -1), bias).unflatten(-1, self.out_shape)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim; the weight may be fp32 in a 16-bit model."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., size] -> the same shape in `dtype`, by default that of x."""
        return rms_norm(x, self.weight, self.eps, dtype)


class Embedding(nn.Module):
    """Rows of `weight` [vocab, hidden] by token id."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.grad_scale = config.embed_grad_scale
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [tokens] -> [tokens, hidden]."""
        return scale_gradient(F.embedding(tokens, self.weight), self.grad_scale)


class Head(nn.Module):
    """Final norm and projection to the vocabulary; with labels, straight to the loss."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
        super().__init__()
        self.grad_scale = config.embed_grad_scale
        self.norm_rows = config.norm_head
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, norm_dtype)
        self.cross_entropy = linear_cross_entropy  # replaced where the vocabulary is cut
        self.weight = None
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        tied_weight: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        upstream: float = 1.0,
        z_loss: float = 0.0,
        token_weights: Tensor | None = None,
    ) -> Tensor | LossOutput:
        """x [tokens, hidden] -> logits [tokens, vocab], or the loss against `labels` int64 [tokens].

        `tied_weight` is the embedding's weight when word embeddings are tied; without that the head owns one.
        `upstream`, `z_loss`, `token_weights`: see `linear_cross_entropy`.
        """
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None, "a head without a weight of its own is given the embedding's"
        weight = scale_gradient(weight, self.grad_scale)
        if self.norm_rows:
            weight = F.normalize(weight, dim=-1)
        x = self.norm(x, weight.dtype)
        if labels is None:
            return F.linear(x, weight)
        return self.cross_entropy(
            x, weight, labels, label_smoothing, upstream=upstream, z_loss=z_loss, token_weights=token_weights
        )


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, with its gradient times `scale`: what s*x + (1-s)*x.detach() means, without its rounding."""
    return x if scale == 1 else _ScaleGradient.apply(x, scale)
