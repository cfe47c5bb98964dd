"""Tiny checkpoint folders as the frameworks of 2023 wrote them, made from a description of their format alone.

A model is given under Llama's names, which transformers can run: `Weights`. `write` cuts it up as one generation did.
Nothing of `internlm.checkpoint` is used here, so that reader and generator can't share a mistake.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.experts_2023 import moe_tensors, random_experts, split_files, write_experts
from tests.checkpoint.side_files_2023 import fake_classes, write_counters

Weights = dict[str, Tensor]  # Llama's names -> whole tensors
LAYERS, HIDDEN, HEADS, HEAD, FFN, VOCAB = 4, 32, 4, 8, 48, 64


@dataclass(frozen=True)
class Generation:
    """What distinguishes the folders of one version, and the layout of the run that wrote one."""

    family: str = "INTERNLM"
    kv_heads: int = HEADS
    prefix: str = "model."  # InternEvo dropped it in 0.3.3
    old_mlp: bool = True  # w2 up and w3 down, until InternEvo 0.3.0
    bias: bool = True
    split_hidden: bool = True
    adapt_hf: bool = True
    inv_freq: bool = False  # a buffer of 0.1 and 0.2.0
    groups: tuple[str, ...] = ("default",)
    plan: str = "inside"  # in the optimizer file, "apart" in gpus-*.pt (0.1), or "none"
    overlap: bool = False  # overlap_sync_param deals parameters out by another rule
    has_step: bool = True  # {step}.step and config_file.pt came with 0.2.0
    tp: int = 1
    pp: int = 1
    chunks: int = 1
    zero: int = 1
    wp: int | None = None  # isp
    dp: int = 1
    num_experts: int = 1
    residual: bool = False  # a dense layer beside the experts
    wrapped: bool = False  # how InternEvo spelled the experts' keys
    ep: int = 1  # data ranks that share the experts between them
    dtype: torch.dtype = torch.bfloat16
    fp32_norm: bool = False  # use_fp32_norm
    fp32_apart: bool = True  # whether parameters of an fp32 model are in the group fp32, or in default

    def at(self, **layout: Any) -> "Generation":
        return replace(self, **layout)


V01 = Generation(inv_freq=True, plan="apart", has_step=False)
V02 = Generation(inv_freq=True, groups=("default",))
V021 = Generation(groups=("default", "fp32"))
EVO02_INTERNLM2 = Generation("INTERNLM2_PUBLIC", 2, old_mlp=False, bias=False, groups=("default", "fp32"))
EVO02_LLAMA2 = Generation("LLAMA2", 2, bias=False, groups=("default", "fp32"))  # w2 is up, as of INTERNLM then
EVO032 = Generation(old_mlp=False, groups=("default", "fp32"))  # new names, and still the prefix
EVO033 = EVO032.at(prefix="")
EVO_INTERNLM2 = EVO02_INTERNLM2.at(prefix="")
EVO_LLAMA2 = EVO_INTERNLM2.at(family="LLAMA2")
MOE_GROUPS = ("default", "fp32", "moe_ep_size_2")
V021_MOE = V021.at(num_experts=4, ep=2, zero=2, groups=MOE_GROUPS)
EVO_MOE = EVO033.at(num_experts=4, ep=2, zero=2, groups=MOE_GROUPS, wrapped=True)
EVO_ISP = EVO_INTERNLM2.at(groups=("default", "embed_head", "fp32"), wp=2)


def random_weights(generation: Generation, seed: int = 0, vocab: int = VOCAB, ffn: int = FFN) -> Weights:
    """fp32, every tensor random, norms and biases too."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.2 + mean

    kv = generation.kv_heads * HEAD
    weights = {"model.embed_tokens.weight": normal(vocab, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = normal(rows, HIDDEN)
            if generation.bias:
                weights[f"{layer}.self_attn.{name}_proj.bias"] = normal(rows)
        if generation.num_experts > 1:
            weights |= random_experts(generation, layer, HIDDEN, ffn, normal)
        else:
            weights[f"{layer}.mlp.gate_proj.weight"] = normal(ffn, HIDDEN)
            weights[f"{layer}.mlp.up_proj.weight"] = normal(ffn, HIDDEN)
            weights[f"{layer}.mlp.down_proj.weight"] = normal(HIDDEN, ffn)
        weights[f"{layer}.input_layernorm.weight"] = normal(HIDDEN, mean=1.0)
        weights[f"{layer}.post_attention_layernorm.weight"] = normal(HIDDEN, mean=1.0)
    weights["model.norm.weight"] = normal(HIDDEN, mean=1.0)
    weights["lm_head.weight"] = normal(vocab, HIDDEN)
    return weights


def write(
    folder: Path,
    generation: Generation,
    masters: Weights,
    moments: tuple[Weights, Weights] | None = None,
    step: int = 7,
    **config: Any,
) -> None:
    """One checkpoint; with `moments` (exp_avg, exp_avg_sq) also the files that a resume needs."""
    folder.mkdir(parents=True)
    g = generation
    with fake_classes() as classes:
        for t, w, p in _ranks(g):
            name = f"tp{t}_pp{p}" if g.wp is None else f"tp{t}_wp{w}_pp{p}"
            state, experts = split_files(cut(g, masters, t, w, p))
            write_experts(folder, experts, sum(_stage_sizes(g)[:p]) * g.chunks, t, g.dtype)
            torch.save(
                OrderedDict((key, value.to(dtype_of(g, key))) for key, value in state.items()),
                folder / f"model_{name}.pt",
            )
            torch.save({}, folder / f"topo_{name}.json")
        if moments is not None:
            _write_optimizer(folder, g, masters, moments, step, classes)
            write_counters(folder, step)
        torch.save(classes["Config"](_model_config(g, masters, **config)), folder / "model_config.pt")
        if g.has_step:
            torch.save("model = dict()", folder / "config_file.pt")
            torch.save({"step": step}, folder / f"{step}.step")


def _ranks(g: Generation) -> list[tuple[int, int, int]]:
    """(tensor, weight, pipeline) ranks that write a model file."""
    if g.wp is None:
        return [(t, 0, p) for p in range(g.pp) for t in range(g.tp)]
    ranks = range(g.tp * g.dp)  # weight and tensor ranks are both counted within a stage
    return sorted({(r % g.tp, r % g.wp, p) for p in range(g.pp) for r in ranks})


def dtype_of(g: Generation, key: str) -> torch.dtype:
    """Of a tensor in a model file: routers are fp32 in every model."""
    return torch.float32 if ".moe_layer.gate." in key or (g.fp32_norm and "norm" in key) else g.dtype


def _stage_sizes(g: Generation) -> list[int]:
    """Layers of each stage in one chunk."""
    base, more = divmod(LAYERS // g.chunks, g.pp)
    return [base + (stage >= g.pp - more) for stage in range(g.pp)]  # the last stages get the remainder


def cut(
    g: Generation, whole: Weights, t: int, w: int, p: int, experts: range | None = None
) -> "OrderedDict[str, Tensor]":
    """The state dict of one rank, in the order of its modules; `experts`: those that it held, by default all."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    per_chunk, sizes = LAYERS // g.chunks, _stage_sizes(g)
    experts = range(g.num_experts) if experts is None else experts
    for chunk in range(g.chunks):
        prefix = (f"{chunk}." if g.chunks > 1 else "") + g.prefix
        if p == 0 and chunk == 0:
            _embedding(g, state, prefix, whole, t)
        first = chunk * per_chunk + sum(sizes[:p])
        for local in range(sizes[p]):
            _layer(g, state, prefix, local, f"model.layers.{first + local}", whole, (t, w), experts)
        if p == g.pp - 1 and chunk == g.chunks - 1:
            name = "head" if g.family == "INTERNLM" else "output"
            state[f"{prefix}norm.weight"] = whole["model.norm.weight"]
            state[f"{prefix}{name}.weight"] = whole["lm_head.weight"].chunk(g.tp, 0)[t]
    return OrderedDict((key, value.clone()) for key, value in state.items())


def _embedding(g: Generation, state: dict[str, Tensor], prefix: str, whole: Weights, t: int) -> None:
    name = "embedding" if g.family == "INTERNLM" else "tok_embeddings"
    value = whole["model.embed_tokens.weight"]
    if g.split_hidden:
        state[f"{prefix}{name}.weight"] = value.chunk(g.tp, 1)[t]
    else:
        state[f"{prefix}{name}.word_embeddings.weight"] = value.chunk(g.tp, 0)[t]


def _layer(
    g: Generation,
    state: dict[str, Tensor],
    prefix: str,
    local: int,
    layer: str,
    whole: Weights,
    ranks: tuple[int, int],
    experts: range,
) -> None:
    t, w = ranks

    def column(value: Tensor) -> Tensor:  # a column-parallel layer cuts its output features
        return value.chunk(g.tp, 0)[t] if g.wp is None else value.chunk(g.wp, 0)[w]

    def row(value: Tensor) -> Tensor:  # a row-parallel one its input features; isp never does
        return value.chunk(g.tp, 1)[t] if g.wp is None else value.chunk(g.wp, 0)[w]

    parts = [whole[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
    biases = [whole[f"{layer}.self_attn.{name}_proj.bias"] for name in "qkv"] if g.bias else []
    if not g.adapt_hf:
        parts[:2] = [_interleave(value) for value in parts[:2]]
    if g.family == "INTERNLM":
        block, mixer, mlp, norms, out = f"{prefix}blocks.{local}", "mixer", "mlp", ("norm1", "norm2"), "out_proj"
        for kind, tensors in (("weight", parts), ("bias", biases)):
            # tensor ranks hold q, k and v rows of their own heads; isp gathers the whole matrix, and cuts it as one
            stacked = torch.cat([column(part) for part in tensors]) if g.wp is None else column(torch.cat(tensors))
            state[f"{block}.{mixer}.Wqkv.{kind}"] = stacked
        if g.inv_freq:
            state[f"{block}.{mixer}.rotary_emb.inv_freq"] = torch.ones(HEAD // 2)
    else:
        block, mixer, out = f"{prefix}layers.{local}", "attention", "wo"
        mlp, norms = "feed_forward", ("attention_norm", "ffn_norm")
        if g.family == "LLAMA2":
            for name, part in zip(("wq", "wk", "wv"), parts, strict=True):
                state[f"{block}.attention.{name}.weight"] = column(part)
        else:
            state[f"{block}.attention.wqkv.weight"] = column(_grouped(parts, g.kv_heads))
            if g.bias:
                state[f"{block}.attention.wqkv.bias"] = column(_grouped(biases, g.kv_heads))
    state[f"{block}.{mixer}.{out}.weight"] = row(whole[f"{layer}.self_attn.o_proj.weight"])
    if g.bias and g.wp is not None:
        state[f"{block}.{mixer}.{out}.bias"] = row(whole[f"{layer}.self_attn.o_proj.bias"])
    elif g.bias and t == 0:
        state[f"{block}.{mixer}.{out}.bias"] = whole[f"{layer}.self_attn.o_proj.bias"]
    state[f"{block}.{norms[0]}.weight"] = whole[f"{layer}.input_layernorm.weight"]
    state[f"{block}.{norms[1]}.weight"] = whole[f"{layer}.post_attention_layernorm.weight"]
    if g.num_experts > 1:
        moe = moe_tensors(g, layer, whole, experts, column, row)
        state.update({f"{block}.{mlp}.{name}": value for name, value in moe.items()})
        return
    up, down = ("w2", "w3") if g.old_mlp else ("w3", "w2")
    mlp_tensors = {
        "w1": column(whole[f"{layer}.mlp.gate_proj.weight"]),
        up: column(whole[f"{layer}.mlp.up_proj.weight"]),
        down: row(whole[f"{layer}.mlp.down_proj.weight"]),
    }
    for name in sorted(mlp_tensors):
        state[f"{block}.{mlp}.{name}.weight"] = mlp_tensors[name]


def _grouped(parts: list[Tensor], kv_heads: int) -> Tensor:
    """For each key/value head its queries, then the key, then the value."""
    q, k, v = (part.chunk(kv_heads) for part in parts)
    return torch.cat([torch.cat(group) for group in zip(q, k, v, strict=True)])


def _interleave(value: Tensor) -> Tensor:
    """Rows of each head from half-split to even/odd order."""
    heads = value.reshape(-1, HEAD, value.shape[-1])
    moved = torch.empty_like(heads)
    moved[:, 0::2], moved[:, 1::2] = heads[:, : HEAD // 2], heads[:, HEAD // 2 :]
    return moved.reshape(value.shape)


def _model_config(g: Generation, whole: Weights, **more: Any) -> dict[str, Any]:
    config = {
        "checkpoint": False,
        "num_attention_heads": HEADS,
        "embed_split_hidden": g.split_hidden,
        "vocab_size": len(whole["lm_head.weight"]),
        "embed_grad_scale": 1,
        "parallel_output": True,
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "mlp_ratio": 1.5,
        "apply_post_layer_norm": False,
        "dtype": g.dtype,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-5,
        "use_flash_attn": True,
        "num_chunks": g.chunks,
    }
    if g.num_experts > 1:
        config |= {"num_experts": g.num_experts, "moe_use_residual": g.residual}
    if g.num_experts > 1 and not g.wrapped:  # InternEvo moved the gate's keys to a section that it didn't save
        config |= {"moe_gate_k": 2, "moe_capacity_factor": 1.0, "moe_noisy_gate_policy": None, "moe_use_rts": True}
    if g.family != "INTERNLM":
        config |= {"num_kv_attention_heads": g.kv_heads, "no_bias": not g.bias, "adapt_hf": g.adapt_hf}
    return config | more


# ---- optimizer -------------------------------------------------------------------------------------------------------


def _write_optimizer(
    folder: Path, g: Generation, masters: Weights, moments: tuple[Weights, Weights], step: int, classes: dict[str, Any]
) -> None:
    if g.wp is None:
        ranks = [(t, 0, p, z) for t, _, p in _ranks(g) for z in range(g.zero)]
    else:
        ranks = [(r % g.tp, r % g.wp, p, r // g.tp) for p in range(g.pp) for r in range(g.tp * g.dp)]
    for t, w, p, z in ranks:
        held = range(z % g.ep * g.num_experts // g.ep, (z % g.ep + 1) * g.num_experts // g.ep)
        kinds = [cut(g, weights, t, w, p, held) for weights in (masters, *moments)]
        states, plan = _optimizer_state(g, kinds, t, w, z, step, classes)
        if g.plan == "inside":
            states["zero_devide_optim_plan"] = plan
        if g.plan == "apart":
            torch.save(plan, folder / f"gpus-{g.tp * g.pp * g.zero}_pp-{p}_tp-{t}_zo-{z}.pt")
        name = f"tp{t}_pp{p}_zo{z}" if g.wp is None else f"tp{t}_wp{w}_pp{p}_dp{z}"
        torch.save(states, folder / f"optimizer_{name}.pt")


def _optimizer_state(
    g: Generation, kinds: list["OrderedDict[str, Tensor]"], t: int, w: int, z: int, step: int, classes: dict[str, Any]
) -> tuple[dict[str, Any], list[list[list[str]]]]:
    keys = [key for key in kinds[0] if "inv_freq" not in key]
    groups = _grouped_keys(g, keys)
    plan, flats, states, param_groups = [], {}, {}, []
    for number, (name, members) in enumerate(groups.items()):
        ordered = sorted(members, key=lambda key: -kinds[0][key].numel())
        size, rank = _zero_group(g, name, t, z)
        owned = _deal(g, members, ordered, kinds[0], size)
        ids = [["_".join(map(str, (ordered.index(key), *kinds[0][key].shape))) for key in part] for part in owned]
        plan.append(ids if members else [])
        mine = owned[rank] if members else []
        about = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "name": name, "params": []}
        if len(g.groups) > 1:
            about |= {"dp_mode": classes["ParallelMode"].ZERO1, "dtype": g.dtype}
        if mine:
            about["params"] = [len(states)]
            master, exp_avg, exp_avg_sq = (torch.cat([kind[key].flatten().float() for key in mine]) for kind in kinds)
            flats[number] = master
            states[len(states)] = {"step": torch.tensor(float(step)), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        param_groups.append(about)
    return {
        "grad_scaler": {"_scale": 2.0**14, "_growth_step": 5, "_hysteresis_step": 1},
        "base_optim_states": {"state": states, "param_groups": param_groups},
        "flat_fp32_weights": flats,
    }, plan


def _grouped_keys(g: Generation, keys: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {name: [] for name in g.groups}
    for key in keys:
        if ".experts." in key:
            groups[f"moe_ep_size_{g.ep}"].append(key)
        elif "gate" in groups and ".moe_layer.gate." in key:
            groups["gate"].append(key)
        elif "norm" in groups and "norm" in key:
            groups["norm"].append(key)
        elif "embed_head" in groups and ("embedding" in key or "output." in key or "head." in key):
            groups["embed_head"].append(key)
        elif "fp32" in groups and dtype_of(g, key) == torch.float32 and (g.fp32_apart or g.dtype != torch.float32):
            groups["fp32"].append(key)
        else:
            groups["default"].append(key)
    return groups


def _zero_group(g: Generation, name: str, t: int, z: int) -> tuple[int, int]:
    """(size, this rank) of the ranks among which a group is shared."""
    if name.startswith("moe"):  # data ranks that held the same experts
        return g.zero // g.ep, z // g.ep
    if g.wp is None:
        return g.zero, z
    if name == "embed_head":
        return g.dp, z
    rank, ranks = z * g.tp + t, g.tp * g.dp // g.wp
    size = g.zero if g.zero > 1 else ranks
    return size, rank // g.wp % size


def _deal(
    g: Generation, members: list[str], ordered: list[str], state: dict[str, Tensor], size: int
) -> list[list[str]]:
    owned: list[list[str]] = [[] for _ in range(size)]
    if g.overlap:
        limit = 1.01 * (sum(state[key].numel() for key in members) // size)
        rank = count = 0
        for key in members:
            if count + state[key].numel() > limit and rank + 1 < size:
                rank, count = rank + 1, 0
            else:
                count += state[key].numel()
            owned[rank].append(key)
        return owned
    sizes = [0] * size
    for key in ordered:
        rank = min(range(size), key=lambda r: sizes[r])
        owned[rank].append(key)
        sizes[rank] += state[key].numel()
    return owned
