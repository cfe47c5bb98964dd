"""Rotary position embedding (Su et al., 2021): pairs of elements turned by an angle that grows with the position.

Pair j of a head of size d turns by position * base^(-2j/d). Half-split pairs element j with j + d/2, interleaved pairs
2j with 2j + 1; the two differ only by a fixed permutation of each head's rows in the projections.

A model reads texts n times longer than it was trained on when pairs turn more slowly:

    linear   every pair n times
    llama3   pairs that turn less than low_freq_factor times in the old length n times, those that turn more than
             high_freq_factor times not at all, a linear blend of both between (Llama 3.1)
    yarn     the same, but the blend goes by the pairs' numbers, and sines and cosines grow (Peng et al., 2023)
    dynamic  by a base that grows with the text once it is longer than the trained length ("NTK-aware")

The order of the operations is that of transformers, so that angles are equal to theirs bit for bit.
"""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from internlm.config.rope_section import RopeScaling


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
    texts: tuple[Tensor, Tensor | int] | None = None,
    trained_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [tokens, head_dim / 2], of the angles at `positions` [tokens].

    Dynamic scaling alone looks at the lengths of the `texts` in the row: int64 [texts], and how many tokens of each are
    here. None: none is longer than `trained_length`.

    Angles are computed in fp32 (a 16-bit position would be off by whole turns), the tables rounded to `dtype`. They are
    products with rounded inverse frequencies, as in transformers and InternLM of 2023: a quotient is as exact, but
    differs from them by 1e-5 radians at position 250, which a trained model's logits show.
    """

    def inverse(base: float | Tensor) -> Tensor:
        return 1.0 / base**exponents

    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    factor = 1.0
    if scaling is None or (scaling.type == "dynamic" and texts is None):
        frequencies = inverse(base)
    elif scaling.type == "linear":
        frequencies = inverse(base) / scaling.factor
    elif scaling.type == "dynamic":
        assert texts is not None
        lengths, num_tokens = texts
        # One by one: torch's powers of a single number and of many differ in the last bit.
        grown = [_grown_base(base, head_dim, scaling.factor, length, trained_length) for length in lengths.unbind()]
        frequencies = torch.stack([inverse(one) for one in grown]).repeat_interleave(num_tokens, 0)
    elif scaling.type == "llama3":
        frequencies = _blend_by_turns(inverse(base), scaling)
    else:
        frequencies, factor = _blend_by_number(base**exponents, base, scaling), _yarn_factor(scaling)
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def _grown_base(base: float, head_dim: int, factor: float, length: Tensor, trained_length: int) -> Tensor:
    stretched = factor * length.clamp_min(trained_length) / trained_length - (factor - 1)
    return base * stretched ** (head_dim / (head_dim - 2))


def _blend_by_turns(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    old_length, factor = scaling.original_max_position_embeddings, scaling.factor
    assert old_length is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * pi / frequencies
    share = (old_length / wavelengths - low) / (high - low)  # of the frequency that stays
    blend = (1 - share) * frequencies / factor + share * frequencies
    slow, fast = wavelengths > old_length / low, wavelengths < old_length / high
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, blend))


def _blend_by_number(wavelengths: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """`wavelengths` [head_dim / 2] in units of 2 pi."""
    old_length, half = scaling.original_max_position_embeddings, len(wavelengths)
    assert old_length is not None

    def number(turns: float) -> float:
        """The number of the pair that turns this many times in the old length."""
        return (2 * half * log(old_length / (turns * 2 * pi))) / (2 * log(base))

    first, last = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:  # as transformers, against a division by zero
        last += 0.001
    ramp = (torch.arange(half, dtype=torch.float32, device=wavelengths.device) - first) / (last - first)
    stays = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - stays) + 1.0 / wavelengths * stays


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def grown(weight: float) -> float:
        return 0.1 * weight * log(scaling.factor) + 1.0

    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)


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
