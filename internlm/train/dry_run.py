"""What a run would be, without starting it: resolved config, parameter count, memory of each rank.

Parameters, gradients and optimizer states are exact: the engine's own plan of buffers, on a model without memory.
Activations and what lives for a moment are estimates by the formulas below, which a test holds against autograd.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from internlm.config.schema import Config, ModelConfig, Section
from internlm.core.mesh import zero_sizes
from internlm.model.transformer import build_model
from internlm.solver.buckets import Kind, UnitLayout, plan_units
from internlm.utils.device import torch_dtype

GIB = 2**30
# linear_cross_entropy works through the logits in chunks of at most so many elements on a GPU.
LOGITS_CHUNK = 2**29


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by class."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    gathered: int  # whole units that live while they are computed or reduced
    activations: int
    head: int  # the loss: gradient of the head's weight, a chunk of logits

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def report(config: Config, world_size: int) -> str:
    """The text that `train.py --dry_run` prints."""
    layouts = _plan(config, os=1)
    num_parameters = sum(slot.stop - slot.start for layout in layouts for slot in layout.slots)
    return "\n".join(
        [
            "resolved config",
            *_config_lines(config),
            "",
            f"model: {config.model_type}, {num_parameters:,} parameters ({num_parameters / 1e9:.3g} G)",
            *_batch_lines(config, world_size),
            "",
            *_memory_lines(config, world_size, num_parameters),
            "",
        ]
    )


def memory_per_rank(config: Config, world_size: int) -> Memory:
    """Memory of the fullest rank; all ranks hold equal shares."""
    p, g, os = zero_sizes(config.parallel, world_size)
    layouts = _plan(config, os)
    sizes = [_unit_bytes(config, layout, p, g, os) for layout in layouts]
    parameters, gradients, masters, moments = (sum(column) for column in zip(*sizes, strict=True))
    largest = max(layouts, key=lambda layout: layout.size)
    # The unit at work and the next one, fetched ahead; a gradient before it is reduced.
    num_gathered = 2 if config.parallel.weight.overlap else 1
    gathered = num_gathered * largest.size * largest.dtype.itemsize if p > 1 else 0
    gathered += largest.size * _grad_dtype(config, largest).itemsize if g > 1 else 0
    return Memory(parameters, gradients, masters, moments, gathered, _activations(config), _head(config))


def _plan(config: Config, os: int) -> list[UnitLayout]:
    shards: dict[Kind, int] = {"dense": os, "copied": os, "expert": os}
    return plan_units(
        build_model(config, device="meta"), shards, config.adam.no_decay, config.model.tie_word_embeddings
    )


def _grad_dtype(config: Config, layout: UnitLayout) -> torch.dtype:
    return torch.float32 if config.hybrid_zero_optimizer.grad_dtype == "torch.float32" else layout.dtype


def _unit_bytes(config: Config, layout: UnitLayout, p: int, g: int, os: int) -> tuple[int, int, int, int]:
    """(parameters, gradients, masters, moments) in bytes that one rank keeps of a unit."""
    engine = config.hybrid_zero_optimizer
    master = 0 if layout.dtype == torch.float32 else 2 if engine.master == "split" else 4
    moment = torch_dtype(engine.moment_dtype).itemsize
    return (
        layout.size // p * layout.dtype.itemsize,
        layout.size // g * _grad_dtype(config, layout).itemsize,
        layout.size // os * master,
        layout.size // os * 2 * moment,
    )


def saved_per_token(model: ModelConfig) -> int:
    """Bytes that autograd keeps of one token in one block that is not recomputed."""
    item = torch_dtype(model.dtype).itemsize
    residual = 4 if model.residual_in_fp32 else item
    hidden, ffn = model.hidden_size, model.ffn_size
    query = model.num_attention_heads * model.head_size
    key_value = 2 * model.num_kv_heads * model.head_size
    streams = 2 * hidden * residual  # inputs of both norms
    normed = 2 * hidden * item  # inputs of wqkv and w13
    attention = (query + key_value // 2) * item  # rotated queries and keys
    attention += (query + key_value) * item  # wqkv's output, which the values are a view of
    attention += query * item + model.num_attention_heads * 4  # output (input of wo) and log-sum-exp
    return streams + normed + attention + 3 * ffn * item  # gate, up and their product


def _activations(config: Config) -> int:
    """Saved for backward in one micro batch; one recomputed block is whole again while it is differentiated."""
    model = config.model
    tokens = config.data.seq_len * config.data.micro_bsz
    item = 4 if model.residual_in_fp32 else torch_dtype(model.dtype).itemsize
    recomputed = int(model.num_layers * model.recompute_fraction)
    whole = model.num_layers - recomputed + (1 if recomputed else 0)
    return tokens * (whole * saved_per_token(model) + recomputed * model.hidden_size * item)


def _head(config: Config) -> int:
    """fp32 gradient of the head's weight from forward to backward, and a chunk of logits with its gradient."""
    model = config.model
    item = torch_dtype(model.dtype).itemsize
    tokens = config.data.seq_len * config.data.micro_bsz
    chunk = min(LOGITS_CHUNK, tokens * model.vocab_size)
    return model.vocab_size * model.hidden_size * 4 + chunk * (4 + item) + 2 * tokens * model.hidden_size * item


# ---- text -----------------------------------------------------------------------------------------------------------


def _config_lines(section: Section, prefix: str = "  ") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _config_lines(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} = {value!r}"


def _batch_lines(config: Config, world_size: int) -> list[str]:
    data = config.data
    tokens = data.seq_len * data.micro_bsz * data.micro_num * world_size
    return [
        f"batch: seq_len {data.seq_len} * micro_bsz {data.micro_bsz} * micro_num {data.micro_num} * {world_size} data "
        f"ranks = {tokens:,} tokens a step, {tokens * data.total_steps:,} in {data.total_steps:,} steps"
    ]


def _memory_lines(config: Config, world_size: int, num_parameters: int) -> list[str]:
    p, g, os = zero_sizes(config.parallel, world_size)
    here, alone = memory_per_rank(config, world_size), _unsharded(config)
    rows = [
        ("parameters", here.parameters, alone.parameters, f"/ {p}"),
        ("gradients", here.gradients, alone.gradients, f"/ {g}"),
        ("optimizer states: masters", here.masters, alone.masters, f"/ {os}"),
        ("optimizer states: moments", here.moments, alone.moments, f"/ {os}"),
        ("units in use (estimate)", here.gathered, 0, "gathered parameters, gradients before reduction"),
        ("activations (estimate)", here.activations, 0, _recompute(config)),
        ("loss (estimate)", here.head, 0, "weight gradient in fp32, a chunk of logits"),
    ]
    lines = [
        f"memory per rank on {world_size} rank{'s' if world_size > 1 else ''}, (p, g, os) = ({p}, {g}, {os}): "
        f"{layout_name(p, g, os, world_size)}",
        f"  {'':<28}{'GiB':>10}{'bytes/param':>14}",
    ]
    for name, size, whole, note in rows:
        per_parameter = f"{whole / num_parameters:.2f}" if whole else ""
        lines.append(f"  {name:<28}{size / GIB:>10.3f}{per_parameter:>14}  {note}")
    states = alone.parameters + alone.gradients + alone.masters + alone.moments
    lines.append(f"  {'total':<28}{here.total / GIB:>10.3f}{states / num_parameters:>14.2f}  before sharding")
    return lines


def _unsharded(config: Config) -> Memory:
    """The same run on one rank that shares nothing."""
    alone = {axis: {"size": 1} for axis in ("zero1", "gradient", "weight")}
    return memory_per_rank(Config.model_validate({**config.model_dump(), "parallel": alone}), world_size=1)


def _recompute(config: Config) -> str:
    layers = config.model.num_layers
    return f"one micro batch, {int(layers * config.model.recompute_fraction)} of {layers} blocks recomputed"


def layout_name(p: int, g: int, os: int, dp: int) -> str:
    """What the literature calls a layout."""
    if os == 1:
        return "plain data parallel"
    if g == 1:
        return "ZeRO-1" if os == dp else f"ZeRO-1 in groups of {os}"
    if p == 1:
        return "ZeRO-2" if g == os == dp else f"ZeRO-2, gradients in groups of {g}, states in groups of {os}"
    if p == g == os:
        return "ZeRO-3" if p == dp else f"HSDP in groups of {p}"
    return f"HFSDP, parameters in groups of {p}, gradients {g}, states {os}"
