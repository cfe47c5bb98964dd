"""Rotary position embedding (Su et al., 2021): pairs of elements turned by an angle that grows with the position.

Pair j of a head of size d turns by position * base^(-2j/d). Half-split pairs element j with j + d/2, interleaved pairs
2j with 2j + 1; the two differ only by a fixed permutation of each head's rows in the projections.
"""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [tokens, head_dim / 2], of the angles at `positions` [tokens].

    Angles are computed in fp32 (a 16-bit position would be off by whole turns), the tables rounded to `dtype`. They are
    products with rounded inverse frequencies, as in transformers and InternLM of 2023: a quotient is as exact, but
    differs from them by 1e-5 radians at position 250, which a trained model's logits show.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    inverse_frequencies = 1.0 / base**exponents
    angles = positions.float()[:, None] * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [tokens, ..., head_dim] with each pair turned; cos, sin [tokens, head_dim / 2]. Contiguous, dtype of x."""
    # Pairs [..., 2, d/2] or [..., d/2, 2]: (a cos - b sin, b cos + a sin) is the pair times cos plus its flip times
    # (-sin, sin). Said so, it compiles to one pass over x; two halves glued together take three times as long.
    dim = -1 if interleaved else -2
    shape = [cos.shape[0], *[1] * (x.dim() - 2), cos.shape[1]]
    shape.insert(len(shape) if interleaved else -1, 1)
    cos, sin = cos.view(shape), sin.view(shape)
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    return (pairs * cos + pairs.flip(dim) * torch.cat((-sin, sin), dim)).flatten(-2)
