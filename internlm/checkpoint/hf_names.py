"""Tensors under their native names and under those of each Hugging Face layout.

A layout is a table: native parameter -> the Hugging Face tensors cut out of it. A row says which index of the native
tensor a Hugging Face tensor is, so the same row serves both ways: export reads `native[index]`, import writes it.
What no index can express (rotary pairing, the normalised head) is done on whole native tensors, before or after.

| layout | tensors | loads in transformers |
|---|---|---|
| llama | Llama's names; biases on q, k, v and o or on none | by itself |
| qwen2 | the same names; biases on q, k, v | by itself |
| qwen3 | the same names; norms on q and k, biases on all four or none | by itself |
| mixtral | the same names; experts instead of the feed-forward layer | by itself |
| qwen3_moe | those of qwen3; experts instead of the feed-forward layer | by itself |
| granitemoe | the same names; biases as llama, experts instead of the feed-forward layer | by itself |
| internlm | the same names; what InternLM published in 2023 | with remote code |
| internlm3 | the same names; biases on q, k, v or on none, as InternLM3 publishes | with remote code |
| internlm2 | fused wqkv grouped by key/value head, as InternLM2 publishes | with remote code |
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from internlm.config.schema import ModelConfig
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError

Index = tuple[int | slice, ...]
ALL: Index = ()

# {i} is the layer. The index of a fused parameter: [kv_heads, q_per_kv + 2, ...] holds queries, key, value.
_LLAMA: dict[str, list[tuple[str, Index]]] = {
    "embedding.weight": [("model.embed_tokens.weight", ALL)],
    "layers.{i}.attention_norm.weight": [("model.layers.{i}.input_layernorm.weight", ALL)],
    **{
        f"layers.{{i}}.attention.wqkv.{kind}": [
            (f"model.layers.{{i}}.self_attn.q_proj.{kind}", (slice(None), slice(0, -2))),
            (f"model.layers.{{i}}.self_attn.k_proj.{kind}", (slice(None), -2)),
            (f"model.layers.{{i}}.self_attn.v_proj.{kind}", (slice(None), -1)),
        ]
        for kind in ("weight", "bias")
    },
    "layers.{i}.attention.q_norm.weight": [("model.layers.{i}.self_attn.q_norm.weight", ALL)],
    "layers.{i}.attention.k_norm.weight": [("model.layers.{i}.self_attn.k_norm.weight", ALL)],
    "layers.{i}.attention.wo.weight": [("model.layers.{i}.self_attn.o_proj.weight", ALL)],
    "layers.{i}.attention.wo.bias": [("model.layers.{i}.self_attn.o_proj.bias", ALL)],
    "layers.{i}.ffn_norm.weight": [("model.layers.{i}.post_attention_layernorm.weight", ALL)],
    "layers.{i}.feed_forward.w13.weight": [
        ("model.layers.{i}.mlp.gate_proj.weight", (0,)),
        ("model.layers.{i}.mlp.up_proj.weight", (1,)),
    ],
    "layers.{i}.feed_forward.w2.weight": [("model.layers.{i}.mlp.down_proj.weight", ALL)],
    "head.norm.weight": [("model.norm.weight", ALL)],
    "head.weight": [("lm_head.weight", ALL)],
}

# {e} is the expert, the first index of the native parameter.
_MIXTRAL: dict[str, list[tuple[str, Index]]] = {
    **_LLAMA,
    "layers.{i}.feed_forward.router.weight": [("model.layers.{i}.block_sparse_moe.gate.weight", ALL)],
    "layers.{i}.feed_forward.experts.w13": [
        ("model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight", (0,)),
        ("model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight", (1,)),
    ],
    "layers.{i}.feed_forward.experts.w2": [("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", ALL)],
}

_QWEN3_MOE: dict[str, list[tuple[str, Index]]] = {
    **_LLAMA,
    "layers.{i}.feed_forward.router.weight": [("model.layers.{i}.mlp.gate.weight", ALL)],
    "layers.{i}.feed_forward.experts.w13": [
        ("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", (0,)),
        ("model.layers.{i}.mlp.experts.{e}.up_proj.weight", (1,)),
    ],
    "layers.{i}.feed_forward.experts.w2": [("model.layers.{i}.mlp.experts.{e}.down_proj.weight", ALL)],
}

# Experts stay together. IBM's Granite, whose factors are 1 for us, is the family with biases beside experts.
_GRANITEMOE: dict[str, list[tuple[str, Index]]] = {
    **_LLAMA,
    "layers.{i}.feed_forward.router.weight": [("model.layers.{i}.block_sparse_moe.router.layer.weight", ALL)],
    "layers.{i}.feed_forward.experts.w13": [("model.layers.{i}.block_sparse_moe.input_linear.weight", ALL)],
    "layers.{i}.feed_forward.experts.w2": [("model.layers.{i}.block_sparse_moe.output_linear.weight", ALL)],
}

_INTERNLM2: dict[str, list[tuple[str, Index]]] = {
    "embedding.weight": [("model.tok_embeddings.weight", ALL)],
    "layers.{i}.attention_norm.weight": [("model.layers.{i}.attention_norm.weight", ALL)],
    "layers.{i}.attention.wqkv.weight": [("model.layers.{i}.attention.wqkv.weight", ALL)],
    "layers.{i}.attention.wqkv.bias": [("model.layers.{i}.attention.wqkv.bias", ALL)],
    "layers.{i}.attention.wo.weight": [("model.layers.{i}.attention.wo.weight", ALL)],
    "layers.{i}.attention.wo.bias": [("model.layers.{i}.attention.wo.bias", ALL)],
    "layers.{i}.ffn_norm.weight": [("model.layers.{i}.ffn_norm.weight", ALL)],
    "layers.{i}.feed_forward.w13.weight": [
        ("model.layers.{i}.feed_forward.w1.weight", (0,)),
        ("model.layers.{i}.feed_forward.w3.weight", (1,)),
    ],
    "layers.{i}.feed_forward.w2.weight": [("model.layers.{i}.feed_forward.w2.weight", ALL)],
    "head.norm.weight": [("model.norm.weight", ALL)],
    "head.weight": [("output.weight", ALL)],
}

LAYOUTS = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "granitemoe": _GRANITEMOE,
    "internlm": _LLAMA,
    "internlm3": _LLAMA,
    "internlm2": _INTERNLM2,
}
_REMOTE_SCALING = {"internlm": ("dynamic",), "internlm2": ("linear", "dynamic")}  # what their published code knows
REMOTE_CODE = ("internlm", "internlm2", "internlm3")  # layouts whose model class is not part of transformers


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor and the place of its values."""

    name: str
    shape: tuple[int, ...]
    native: str
    index: Index

    def cut(self, native: Tensor) -> Tensor:
        """The values out of the native parameter, in `shape`; a view where torch can make one."""
        return native[self.index].reshape(self.shape)

    def paste(self, native: Tensor, value: Tensor) -> None:
        """Write `value` (in `shape`) into its place in the native parameter."""
        part = native[self.index]
        part.copy_(value.reshape(part.shape))


def native_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter, in the order of the forward pass."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(model).named_parameters()}


def default_layout(model: ModelConfig) -> str:
    """The layout that transformers loads without remote code: INTERNLM, INTERNLM2_PUBLIC and LLAMA2 fit llama."""
    if model.num_experts > 1:
        with_biases = "granitemoe" if model.out_bias else "mixtral"
        return "qwen3_moe" if model.qk_norm else with_biases
    if model.qk_norm:
        return "qwen3"
    return "qwen2" if model.qkv_bias and not model.out_bias else "llama"


def check_layout(layout: str, model: ModelConfig) -> None:
    """Raise UserError naming the switch where `layout` has no place for a part of the model."""
    experts = (model.num_experts > 1, f"num_experts={model.num_experts}")
    same_biases = model.qkv_bias == model.out_bias
    biases = f"qkv_bias={model.qkv_bias}, out_bias={model.out_bias}"
    problems = {
        "llama": [(not same_biases, biases), (model.qk_norm, "qk_norm=True"), experts],
        "qwen2": [(not model.qkv_bias or model.out_bias, biases), (model.qk_norm, "qk_norm=True"), experts],
        "qwen3": [(not same_biases, biases), (not model.qk_norm, "qk_norm=False"), experts],
        "mixtral": [
            (model.qkv_bias or model.out_bias, biases),
            (model.qk_norm, "qk_norm=True"),
            (not model.moe.normalises, "weights of experts that don't add up to one"),
            *_beyond_plain_experts(model),
        ],
        "qwen3_moe": [
            (not same_biases, biases),
            (not model.qk_norm, "qk_norm=False"),
            *_beyond_plain_experts(model),
        ],
        "granitemoe": [
            (not same_biases, biases),
            (model.qk_norm, "qk_norm=True"),
            (not model.moe.normalises, "weights of experts that don't add up to one"),
            (model.head_size * model.num_attention_heads != model.hidden_size, f"head_dim={model.head_size}"),
            *_beyond_plain_experts(model),
        ],
        "internlm": [
            (not same_biases, biases),
            (model.qk_norm, "qk_norm=True"),
            (model.q_per_kv != 1, f"num_kv_attention_heads={model.num_kv_heads}"),
            (model.head_size * model.num_attention_heads != model.hidden_size, f"head_dim={model.head_size}"),
            experts,
        ],
        "internlm3": [(model.out_bias, biases), (model.qk_norm, "qk_norm=True"), experts],
        "internlm2": [
            (not same_biases, biases),
            (model.qk_norm, "qk_norm=True"),
            (model.head_size * model.num_attention_heads != model.hidden_size, f"head_dim={model.head_size}"),
            experts,
        ],
    }
    scaling = model.rope_scaling
    for remote, types in _REMOTE_SCALING.items():
        wrong = scaling is not None and scaling.type not in types
        problems[remote].append((wrong, f"rope_scaling.type={scaling.type!r}" if scaling is not None else ""))
    if layout not in problems:
        raise UserError(f"Hugging Face layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    found = [text for wrong, text in problems[layout] if wrong]
    if found:
        best = default_layout(model)
        advice = f"use the layout {best}" if best != layout else "transformers has no class for this mixture"
        raise UserError(f"the Hugging Face layout {layout} cannot hold a model with {', '.join(found)}: {advice}")


def _beyond_plain_experts(model: ModelConfig) -> list[tuple[bool, str]]:
    """What the families of transformers lack, as `check_layout` lists it."""
    moe = model.moe
    return [
        (model.num_experts == 1, "num_experts=1"),
        (moe.score != "softmax", f"moe.score={moe.score!r}"),
        (moe.num_shared_experts > 0, f"moe.num_shared_experts={moe.num_shared_experts}"),
        (moe.bias_rate > 0, f"moe.bias_rate={moe.bias_rate}"),
    ]


def entries(layout: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """All Hugging Face tensors of a model with these native shapes; those of one parameter are neighbours."""
    table, found = LAYOUTS[layout], []
    for native, shape in shapes.items():
        layer = re.match(r"layers\.(\d+)\.", native)
        generic = native if layer is None else f"layers.{{i}}.{native[layer.end() :]}"
        apart = any("{e}" in name for name, _ in table[generic])  # each expert has tensors of its own
        rows = [
            (name.format(i=layer and layer[1], e=expert), (expert, *index) if apart else index)
            for expert in range(shape[0] if apart else 1)
            for name, index in table[generic]
        ]
        for name, index in rows:
            part = torch.empty(shape, device="meta")[index].shape
            # Matrices keep their input dim, all others become rows; vectors become flat.
            is_vector = native.endswith(".bias") or len(part) == 1
            flat: tuple[int, ...] = (part.numel(),) if is_vector else (part[:-1].numel(), part[-1])
            if ".experts." in native and not apart:
                flat = (part[0], part[1:-1].numel(), part[-1])
            found.append(Entry(name, flat, native, index))
    return found


def to_half_split(native: str, value: Tensor) -> Tensor:
    """A parameter of a model with qk_interleaved=True, rearranged for rotary pairs (j, j + d/2).

    Within each query and key head elements 0, 2, 4 ... come first, then 1, 3, 5 ...; other parameters are unchanged.
    """
    return _rearrange_heads(native, value, lambda head_dim: torch.arange(head_dim).view(-1, 2).T.flatten())


def to_interleaved(native: str, value: Tensor) -> Tensor:
    """The inverse of `to_half_split`."""
    return _rearrange_heads(native, value, lambda head_dim: torch.arange(head_dim).view(2, -1).T.flatten())


def _rearrange_heads(native: str, value: Tensor, order: Callable[[int], Tensor]) -> Tensor:
    if native.endswith(("q_norm.weight", "k_norm.weight")):
        return value[order(len(value))]
    if ".wqkv." not in native:
        return value
    rearranged = value.clone()
    rearranged[:, :-1] = value[:, :-1, order(value.shape[2])]  # [kv_heads, q_per_kv + 1, head_dim, ...]: all but v
    return rearranged


def normalised_rows(head: Tensor) -> Tensor:
    """[vocab, hidden]: each row divided by its L2 norm in fp32, as norm_head=True does in the forward pass."""
    return normalize(head.float(), dim=-1)
