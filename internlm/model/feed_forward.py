"""The gated feed-forward layer."""

import torch
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.model.layers import Linear
from internlm.ops.swiglu import swiglu


class FeedForward(nn.Module):
    """w2(silu(gate) * up); `w13` holds gate (0) and up (1), so that both are one GEMM."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, size: int | None = None) -> None:
        super().__init__()
        size = config.ffn_size if size is None else size
        self.w13 = Linear(config.hidden_size, (2, size), bias=False, dtype=dtype, fp8=config.fp8)
        self.w2 = Linear(size, (config.hidden_size,), bias=False, dtype=dtype, fp8=config.fp8)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return self.w2(swiglu(self.w13(x)))
