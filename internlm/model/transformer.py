"""The one transformer: pre-norm decoder blocks between an embedding and a head; families differ by switches.

A packed row in, logits or loss out. `embedding`, each of `layers` and `head` are called as modules and own their
parameters, so that code that shards, recomputes or compiles them can hook their calls.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from internlm.config.schema import Config, ModelConfig
from internlm.model.attention import Attention, KVCache, LayerCache
from internlm.model.batch import Batch
from internlm.model.feed_forward import FeedForward
from internlm.model.layers import Embedding, Head, RMSNorm
from internlm.model.lora import add_adapters
from internlm.model.moe import MoE
from internlm.ops.cross_entropy import LossOutput
from internlm.ops.rotary import rotary_tables
from internlm.ops.segments import Segments
from internlm.utils.device import torch_dtype


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.residual_dtype = torch.float32 if config.residual_in_fp32 else dtype
        self.attention_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, norm_dtype)
        self.attention = Attention(config, dtype, norm_dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, norm_dtype)
        self.feed_forward = FeedForward(config, dtype) if config.num_experts == 1 else MoE(config, dtype)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden] in the residual stream's dtype; see `Attention.forward`."""
        x = x.to(self.residual_dtype)
        x = x + self.attention(self.attention_norm(x, self.dtype), cos, sin, segments, cache)
        return x + self.feed_forward(self.ffn_norm(x, self.dtype))


class Transformer(nn.Module):
    """Embedding, blocks, head. Parameters are not initialised here, see `model/init.py`."""

    def __init__(self, config: ModelConfig, use_fp32_norm: bool = False) -> None:
        super().__init__()
        dtype = torch_dtype(config.dtype)
        norm_dtype = torch.float32 if use_fp32_norm else dtype
        self.config = config
        self.embedding = Embedding(config, dtype)
        self.layers = nn.ModuleList(Block(config, dtype, norm_dtype) for _ in range(config.num_layers))
        self.head = Head(config, dtype, norm_dtype)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads that are computed here: all, unless tensor ranks share them."""
        return next(layer for layer in self.layers if isinstance(layer, Block)).attention.wqkv.out_shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the projections."""
        return torch_dtype(self.config.dtype)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [tokens, vocab] of a packed row, in the model's dtype."""
        return self.head(self._hidden(batch), self._tied_weight())

    def loss(
        self,
        batch: Batch,
        label_smoothing: float = 0.0,
        upstream: float = 1.0,
        z_loss: float = 0.0,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> LossOutput:
        """Summed loss, token losses and predictions of a packed row, without ever holding all its logits.

        `upstream` is the factor between the summed loss and what backward starts from, if known: `ops.cross_entropy`.
        `weigh` makes weights of the tokens, fp32 [tokens], from their losses; the head then runs twice.
        """
        return self.head_loss(self._hidden(batch), batch, label_smoothing, upstream, z_loss, weigh)

    def head_loss(
        self,
        x: Tensor,
        batch: Batch,
        label_smoothing: float = 0.0,
        upstream: float = 1.0,
        z_loss: float = 0.0,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> LossOutput:
        """`loss` from the output of the last block [tokens, hidden]."""
        tied, weights = self._tied_weight(), None
        if weigh is not None:
            with torch.no_grad():
                weights = weigh(self.head(x, tied, batch.labels).token_losses)
        return self.head(x, tied, batch.labels, label_smoothing, upstream, z_loss, weights)

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor, batch: Batch) -> Tensor:
        """x [tokens, hidden] through some of `layers`, neighbours in order."""
        dtype = torch_dtype(self.config.dtype)
        texts = None
        if self._is_longer(batch.segments.max_length):
            lengths = torch.tensor(batch.segments.lengths, device=x.device)
            texts = lengths, lengths
        cos, sin = self._rotary(batch.positions, dtype, texts)
        for block in blocks:
            x = block(x, cos, sin, batch.segments)
        return x

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: KVCache, num_new: Tensor | None = None) -> Tensor:
        """Logits [batch, vocab] behind the last of the new tokens int64 [batch, new] that continue the rows of `cache`.

        The tokens are appended to the cache. Rows shorter than `new` are padded on the right with any valid id:
        `num_new` int64 [batch] counts the real tokens of each row; logits of a row without any mean nothing.
        """
        places = cache.places(tokens.shape[1])
        x = self.embedding(tokens.flatten())
        texts = None
        if self._is_longer(cache.longest + tokens.shape[1]):
            texts = cache.lengths + (tokens.shape[1] if num_new is None else num_new), tokens.shape[1]
        cos, sin = self._rotary(places.flatten(), x.dtype, texts)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None, cache.layer(index, places))
        cache.advance(tokens.shape[1], num_new)
        rows = torch.arange(len(tokens), device=x.device)
        last = tokens.shape[1] - 1 if num_new is None else (num_new - 1).clamp(min=0)
        return self.head(x.unflatten(0, tokens.shape)[rows, last], self._tied_weight())

    def _is_longer(self, length: int) -> bool:
        """Whether rotary angles of a text depend on how long it is."""
        scaling = self.config.rope_scaling
        return scaling is not None and scaling.type == "dynamic" and length > self.config.max_position_embeddings

    def _rotary(
        self, positions: Tensor, dtype: torch.dtype, texts: tuple[Tensor, Tensor | int] | None
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_tables(
            positions,
            config.head_size,
            config.rope_base,
            dtype,
            config.rope_scaling,
            texts,
            config.max_position_embeddings,
        )

    def _hidden(self, batch: Batch) -> Tensor:
        """Output of the last block [tokens, hidden]."""
        return self.run_blocks(self.layers, self.embedding(batch.tokens), batch)

    def _tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_word_embeddings else None


def build_model(config: Config, device: torch.device | str = "meta") -> Transformer:
    """The run's model, with its adapters, and with uninitialised parameters on `device`; "meta" takes no memory."""
    with torch.device(device):
        model = Transformer(config.model, config.use_fp32_norm)
        if config.lora is not None:
            add_adapters(model, config.lora)
        return model
