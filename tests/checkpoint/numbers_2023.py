"""Tensors that say of each element which it is, to be cut up by `folders_2023` and found again in a run."""

from math import prod

import numpy as np
import torch

from tests.checkpoint import folders_2023 as old


def numbered(g: old.Generation) -> dict[str, np.ndarray]:
    """Native parameters whose elements are numbered from 0 on, through all of them. Shapes: those of the model."""
    h, d, q_per_kv = old.HIDDEN, old.HEAD, old.HEADS // g.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (old.VOCAB, h), "head.weight": (old.VOCAB, h)}
    for layer in (f"layers.{i}" for i in range(old.LAYERS)):
        shapes[f"{layer}.attention.wqkv.weight"] = (g.kv_heads, q_per_kv + 2, d, h)
        shapes[f"{layer}.attention.wo.weight"] = (h, h)
        if g.bias:
            shapes |= {
                f"{layer}.attention.wqkv.bias": (g.kv_heads, q_per_kv + 2, d),
                f"{layer}.attention.wo.bias": (h,),
            }
        if g.num_experts > 1:
            shapes[f"{layer}.feed_forward.router.weight"] = (g.num_experts, h)
            shapes[f"{layer}.feed_forward.experts.w13"] = (g.num_experts, 2, old.FFN, h)
            shapes[f"{layer}.feed_forward.experts.w2"] = (g.num_experts, h, old.FFN)
        else:
            shapes[f"{layer}.feed_forward.w13.weight"] = (2, old.FFN, h)
            shapes[f"{layer}.feed_forward.w2.weight"] = (h, old.FFN)
        shapes |= {f"{layer}.attention_norm.weight": (h,), f"{layer}.ffn_norm.weight": (h,)}
    shapes["head.norm.weight"] = (h,)
    numbers, start = {}, 0
    for name, shape in shapes.items():
        numbers[name] = np.arange(start, start := start + prod(shape)).reshape(shape)
    return numbers


def under_generators_names(numbers: dict[str, np.ndarray], offset: int) -> old.Weights:
    """The numbers as `folders_2023.write` takes them."""
    named = {"model.embed_tokens.weight": numbers["embedding.weight"], "lm_head.weight": numbers["head.weight"]}
    named["model.norm.weight"] = numbers["head.norm.weight"]
    plain = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.router": "block_sparse_moe.router.layer",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for name, value in numbers.items():
        _, _, rest = name.partition("layers.")
        i, _, rest = rest.partition(".")
        layer, (part, _, kind) = f"model.layers.{i}", rest.rpartition(".")
        if part == "attention.wqkv":
            end = value.shape[3:]
            for letter, index in {"q": np.s_[:, :-2], "k": np.s_[:, -2], "v": np.s_[:, -1]}.items():
                named[f"{layer}.self_attn.{letter}_proj.{kind}"] = value[index].reshape(-1, *end)
        elif part == "feed_forward.w13":
            named[f"{layer}.mlp.gate_proj.weight"], named[f"{layer}.mlp.up_proj.weight"] = value
        elif part == "feed_forward.experts":
            file, shape = ("input", (-1, old.HIDDEN)) if kind == "w13" else ("output", (old.HIDDEN, -1))
            named[f"{layer}.block_sparse_moe.{file}_linear.weight"] = value.reshape(len(value), *shape)
        elif rest:
            named[f"{layer}.{plain[part]}.{kind}"] = value
    return {name: torch.from_numpy(value + offset).float() for name, value in named.items()}
