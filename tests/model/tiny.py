"""Tiny models and packed rows for the tests of this folder."""

from collections.abc import Sequence
from typing import Any

import torch

from internlm.config.schema import ModelConfig
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.transformer import Transformer


def tiny_config(**options: Any) -> ModelConfig:
    """Two layers, 4 query heads over 2 kv heads, fp32."""
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "vocab_size": 61,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "intermediate_size": 48,
        "dtype": "torch.float32",
    }
    return ModelConfig(**{**defaults, **options})


def random_model(config: ModelConfig, seed: int = 0, use_fp32_norm: bool = False) -> Transformer:
    """All parameters random, norms and biases too: a constant would hide mistakes."""
    model = Transformer(config, use_fp32_norm)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(center, 0.2, generator=generator)
    return model


def random_batch(lengths: Sequence[int], vocab_size: int = 61, seed: int = 0) -> Batch:
    """A packed row of random documents; the label of each document's last token is ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    labels = tokens.roll(-1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens, labels, positions, Segments.of(tuple(lengths)), num_trained=sum(lengths) - len(lengths))
