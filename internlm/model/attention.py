"""Self-attention with grouped heads, and the key/value cache for generation."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.model.layers import Linear, RMSNorm
from internlm.ops.attention import attention, cached_attention
from internlm.ops.rotary_split import split_and_rotate
from internlm.ops.segments import Segments


class LayerCache(NamedTuple):
    """Keys and values of one layer, and where the tokens at hand go."""

    keys: Tensor  # [batch, max_length, kv_heads, head_dim], filled up to each row's length
    values: Tensor  # likewise
    places: Tensor  # int64 [batch, new], of the tokens at hand
    filled: int  # no row is longer once they are written

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v [batch * new, kv_heads, head_dim]; q [batch * new, heads, head_dim] attends to each row."""
        q, k, v = (x.unflatten(0, self.places.shape) for x in (q, k, v))
        rows = torch.arange(len(self.places), device=self.places.device)[:, None]
        self.keys[rows, self.places] = k.to(self.keys.dtype)
        self.values[rows, self.places] = v.to(self.values.dtype)
        keys, values = (x[:, : self.filled].to(q.dtype) for x in (self.keys, self.values))
        return cached_attention(q, keys, values, self.places).flatten(0, 1)


class KVCache:
    """What generation remembers: keys and values of every layer, and how many tokens each row holds.

    Rows are independent and hold only real tokens, from place 0 on, so a row's positions never depend on its
    neighbours. Prompts of different lengths are padded on the right: `num_new` of `Transformer.decode` says how many
    of a row's new tokens are real; what the padding wrote lies behind the row's length, is never attended to, and is
    overwritten by the next tokens. A finished row gets num_new 0 and stays as it is.

    `max_length` bounds the sum of the new tokens of all calls, padding included. `num_kv_heads` None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
        num_kv_heads: int | None = None,
    ) -> None:
        shape = (batch_size, max_length, num_kv_heads or config.num_kv_heads, config.head_size)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)  # tokens held by each row
        self.max_length = max_length
        self.longest = 0  # no row is longer; known on the host, so that decoding never waits for the device

    def places(self, num_tokens: int) -> Tensor:
        """Places, which are also positions, of the next `num_tokens` tokens of each row: int64 [batch, num_tokens]."""
        assert self.longest + num_tokens <= self.max_length, (
            f"{self.longest} + {num_tokens} tokens, the cache has room for {self.max_length}"
        )
        return self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)

    def layer(self, index: int, places: Tensor) -> LayerCache:
        """Layer `index`, ready for the tokens at `places`."""
        return LayerCache(self.keys[index], self.values[index], places, self.longest + places.shape[1])

    def advance(self, num_tokens: int, num_new: Tensor | None) -> None:
        """Counts tokens that every layer has stored: `num_tokens` in every row, or `num_new` [batch] of them."""
        self.lengths = self.lengths + (num_tokens if num_new is None else num_new)
        self.longest += num_tokens

    def put(self, row: int, source: "KVCache") -> None:
        """Row `row` becomes the only row of `source`."""
        assert len(source.lengths) == 1 and source.longest <= self.max_length
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for index, values in enumerate(theirs):
                mine[index][row, : source.longest] = values[0, : source.longest]
        self.lengths[row] = source.lengths[0]
        self.longest = max(self.longest, source.longest)


class Attention(nn.Module):
    """Grouped-query attention: `wqkv` holds, per kv head, its query heads, then key, then value."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
        super().__init__()
        heads, groups, size = config.num_kv_heads, config.q_per_kv, config.head_size
        self.interleaved = config.qk_interleaved
        # replaced where rows are cut between ranks
        self.attend: Callable[[Tensor, Tensor, Tensor, Segments], Tensor] = partial(
            attention, backend=config.attn_backend
        )
        self.wqkv = Linear(config.hidden_size, (heads, groups + 2, size), config.qkv_bias, dtype, config.fp8)
        self.wo = Linear(heads * groups * size, (config.hidden_size,), config.out_bias, dtype, config.fp8)
        self.q_norm = RMSNorm(size, config.layer_norm_epsilon, norm_dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.layer_norm_epsilon, norm_dtype) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments | None, cache: LayerCache | None = None
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; cos, sin [tokens, head_dim / 2].

        Tokens attend inside their segment, or, when decoding, to what the cache holds of their row.
        """
        qkv = self.wqkv(x)  # [tokens, kv_heads, groups + 2, d]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=2)
        q, k, v = split_and_rotate(qkv, cos, sin, self.interleaved)
        if cache is not None:
            out = cache.attend(q, k, v)
        else:
            assert segments is not None
            out = self.attend(q, k, v, segments)
        return self.wo(out.flatten(1))
