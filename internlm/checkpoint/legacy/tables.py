"""The tensors of 2023 under their names there, and how they were cut between ranks.

A row says of which pieces of a native parameter a tensor of 2023 consists, stacked along its rows, and along which dim
tensor parallel cut each piece. The same row serves reading and writing. Facts: the published sources of InternLM
(v0.1.0 to v0.2.1dev20240102) and InternEvo.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from internlm.checkpoint.hf_names import ALL, Index

Family = Literal["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"]
# first: only tensor rank 0 has it, since a row-parallel projection adds its bias once.
Cut = Literal["rows", "columns", "first", "whole"]
# Which of w1, w2, w3 is what: InternLM to 0.2.1 and InternEvo to 0.2.3, or InternEvo from 0.3.0.
MLP_NAMES = {"old": {"gate": "w1", "up": "w2", "down": "w3"}, "new": {"gate": "w1", "up": "w3", "down": "w2"}}
# What precedes an expert's number in keys: InternLM 0.2.1, or InternEvo. Our keys here are those of the latter.
EXPERTS = {"old": "moe_layer.experts.experts", "new": "moe_layer.experts.wrapped_experts"}
_Q: Index = (slice(None), slice(0, -2))
_K: Index = (slice(None), -2)
_V: Index = (slice(None), -1)


@dataclass(frozen=True)
class Row:
    """One tensor of 2023: the native pieces that are stacked in it, and how each piece was cut."""

    key: str  # {i} is the layer
    pieces: tuple[Index, ...]
    cut: Cut
    in_block: bool = (
        True  # isp cuts what is in a block between weight ranks, and embedding and head between tensor ranks
    )


def rows(family: Family, mlp: Literal["old", "new"], split_hidden: bool, num_experts: int = 1) -> dict[str, list[Row]]:
    """Native parameter -> tensors of 2023. `split_hidden`: the embedding was cut along its columns."""
    w = MLP_NAMES[mlp]
    if family == "INTERNLM":
        layer, attention, mlp_name = "blocks.{i}", "mixer", "mlp"
        embedding, head, norms, output = "embedding", "head", ("norm1", "norm2"), "out_proj"
        qkv = {kind: [Row(f"{layer}.mixer.Wqkv.{kind}", (_Q, _K, _V), "rows")] for kind in ("weight", "bias")}
    else:
        layer, attention, mlp_name = "layers.{i}", "attention", "feed_forward"
        embedding, head, norms, output = "tok_embeddings", "output", ("attention_norm", "ffn_norm"), "wo"
        parts: dict[str, Index] = {"wqkv": ALL} if family == "INTERNLM2_PUBLIC" else {"wq": _Q, "wk": _K, "wv": _V}
        qkv = {
            kind: [Row(f"{layer}.attention.{name}.{kind}", (index,), "rows") for name, index in parts.items()]
            for kind in ("weight", "bias")
        }
    inner = "" if split_hidden else ".word_embeddings"
    feed_forward = _feed_forward("layers.{i}.feed_forward", f"{layer}.{mlp_name}", w)
    if num_experts > 1:
        feed_forward = _experts(f"{layer}.{mlp_name}", w, num_experts)
    return {
        "embedding.weight": [
            Row(f"{embedding}{inner}.weight", (ALL,), "columns" if split_hidden else "rows", in_block=False)
        ],
        "layers.{i}.attention.wqkv.weight": qkv["weight"],
        "layers.{i}.attention.wqkv.bias": qkv["bias"],
        "layers.{i}.attention.wo.weight": [Row(f"{layer}.{attention}.{output}.weight", (ALL,), "columns")],
        "layers.{i}.attention.wo.bias": [Row(f"{layer}.{attention}.{output}.bias", (ALL,), "first")],
        **feed_forward,
        "layers.{i}.attention_norm.weight": [Row(f"{layer}.{norms[0]}.weight", (ALL,), "whole")],
        "layers.{i}.ffn_norm.weight": [Row(f"{layer}.{norms[1]}.weight", (ALL,), "whole")],
        # isp shares it, as the norms in blocks, among ranks of the same weight rank
        "head.norm.weight": [Row("norm.weight", (ALL,), "whole")],
        "head.weight": [Row(f"{head}.weight", (ALL,), "rows", in_block=False)],
    }


def _feed_forward(native: str, old: str, w: Mapping[str, str]) -> dict[str, list[Row]]:
    return {
        f"{native}.w13.weight": [
            Row(f"{old}.{w['gate']}.weight", ((0,),), "rows"),
            Row(f"{old}.{w['up']}.weight", ((1,),), "rows"),
        ],
        f"{native}.w2.weight": [Row(f"{old}.{w['down']}.weight", (ALL,), "columns")],
    }


def _experts(old: str, w: Mapping[str, str], num_experts: int) -> dict[str, list[Row]]:
    """Router and experts, and the dense layer beside them (moe_use_residual=True) with the weights of the mixture."""
    native, expert = "layers.{i}.feed_forward", f"{old}.{EXPERTS['new']}"
    numbers = range(num_experts)
    return {
        f"{native}.router.weight": [Row(f"{old}.moe_layer.gate.wg.weight", (ALL,), "whole")],
        f"{native}.experts.w13": [
            Row(f"{expert}.{e}.{w[name]}.weight", ((e, part),), "rows")
            for e in numbers
            for part, name in enumerate(("gate", "up"))
        ],
        f"{native}.experts.w2": [Row(f"{expert}.{e}.{w['down']}.weight", ((e,),), "columns") for e in numbers],
        **_feed_forward(f"{native}.shared", f"{old}.residual_mlp", w),
        f"{native}.mix.weight": [Row(f"{old}.coefficient.weight", (ALL,), "whole")],
        f"{native}.mix.bias": [Row(f"{old}.coefficient.bias", (ALL,), "whole")],
    }


def generic(native: str) -> tuple[str, int | None]:
    """("layers.{i}.attention.wo.weight", 3) of layers.3.attention.wo.weight; the layer is None outside of blocks."""
    found = re.match(r"layers\.(\d+)\.", native)
    return (native, None) if found is None else (f"layers.{{i}}.{native[found.end() :]}", int(found[1]))


def join(row: Row, shards: Sequence[Tensor], is_isp: bool) -> list[Tensor]:
    """The pieces of a tensor, whole, from all ranks' shards. A matrix piece is 2-d, rows of heads or features first."""
    if row.cut == "whole" or (row.cut == "first" and not is_isp):
        return [shards[0]]
    if is_isp and row.in_block:  # cut by rows, whatever the tensor means
        return list(torch.cat(list(shards)).chunk(len(row.pieces)))
    dim = 1 if row.cut == "columns" else 0
    parts = [shard.chunk(len(row.pieces)) for shard in shards]
    return [torch.cat(piece, dim) for piece in zip(*parts, strict=True)]


def shard(row: Row, native: Tensor, rank: int, ranks: int) -> Tensor | None:
    """What tensor rank `rank` of `ranks` held of it; None where it held nothing. The inverse of `join`."""
    pieces = [native[index] for index in row.pieces]
    # Matrices keep their columns, everything before becomes rows; biases are vectors.
    is_vector = row.key.endswith(".bias") or native.dim() == 1
    flat = [piece.reshape(-1) if is_vector else piece.reshape(-1, piece.shape[-1]) for piece in pieces]
    if row.cut == "first" and rank:
        return None
    if row.cut in ("first", "whole"):
        return flat[0].clone()
    dim = 1 if row.cut == "columns" else 0
    return torch.cat([piece.chunk(ranks, dim)[rank] for piece in flat])


def family_of(keys: Mapping[str, object]) -> Family | None:
    """Which family wrote a model file with these keys (prefix cut off)."""
    for key in keys:
        if re.fullmatch(r"blocks\.\d+\.mixer\.Wqkv\.weight", key):
            return "INTERNLM"
        if re.fullmatch(r"layers\.\d+\.attention\.wqkv\.weight", key):
            return "INTERNLM2_PUBLIC"
        if re.fullmatch(r"layers\.\d+\.attention\.wq\.weight", key):
            return "LLAMA2"
    return None
