"""What a run would be, without starting it: resolved config, parameter count, memory of each rank."""

from collections.abc import Iterator
from math import prod

from internlm.config.schema import Config, Section
from internlm.core.mesh import sharing_ranks, zero_sizes
from internlm.model.flops import num_active_parameters
from internlm.model.transformer import build_model
from internlm.train.memory import Memory, memory_per_rank

GIB = 2**30


def report(config: Config, world_size: int) -> str:
    """The text that `train.py --dry_run` prints."""
    num_parameters = sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())
    return "\n".join(
        [
            "resolved config",
            *_config_lines(config),
            "",
            f"model: {config.model_type}, {num_parameters:,} parameters ({num_parameters / 1e9:.3g} G)"
            + _active(config),
            *_batch_lines(config, world_size),
            "",
            *_memory_lines(config, world_size, num_parameters),
            "",
        ]
    )


def _active(config: Config) -> str:
    active = num_active_parameters(config.model)
    return f", {active:,} ({active / 1e9:.3g} G) active for a token" if config.model.num_experts > 1 else ""


def _config_lines(section: Section, prefix: str = "  ") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _config_lines(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} = {value!r}"


def _batch_lines(config: Config, world_size: int) -> list[str]:
    data = config.data
    sizes = config.parallel.axis_sizes
    readers = world_size // prod(sizes.values())
    tokens = data.seq_len * data.micro_bsz * data.micro_num * readers
    return [
        f"ranks: {world_size} = {' * '.join(f'{axis} {size}' for axis, size in {**sizes, 'data': readers}.items())}",
        f"batch: seq_len {data.seq_len} * micro_bsz {data.micro_bsz} * micro_num {data.micro_num} * {readers} data "
        f"ranks = {tokens:,} tokens a step, {tokens * data.total_steps:,} in {data.total_steps:,} steps",
    ]


def _memory_lines(config: Config, world_size: int, num_parameters: int) -> list[str]:
    dp = sharing_ranks(config.parallel, world_size)
    p, g, os = zero_sizes(config.parallel, dp)
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
        f"{layout_name(p, g, os, dp)}",
        f"  {'':<28}{'GiB':>10}{'bytes/param':>14}",
    ]
    for name, size, whole, note in rows:
        per_parameter = f"{whole / num_parameters:.2f}" if whole else ""
        lines.append(f"  {name:<28}{size / GIB:>10.3f}{per_parameter:>14}  {note}")
    states = alone.parameters + alone.gradients + alone.masters + alone.moments
    lines.append(f"  {'total':<28}{here.total / GIB:>10.3f}{states / num_parameters:>14.2f}  before sharding")
    if here.host:
        lines.append(f"  {'in host memory (estimate)':<28}{here.host / GIB:>10.3f}{'':>14}  offloaded activations")
    return lines


def _unsharded(config: Config) -> Memory:
    """The same run on one rank that shares nothing."""
    return memory_per_rank(Config.model_validate({**config.model_dump(), "parallel": {}}), world_size=1)


def _recompute(config: Config) -> str:
    layers = config.model.num_layers
    kept = "one micro batch" if config.parallel.pipeline.size == 1 else f"what {config.pipeline_schedule} has under way"
    if config.model.checkpoint == "feed_forward":
        return f"{kept}, feed-forward layers recomputed"
    if config.model.checkpoint == "offload":
        return f"{kept}, gate and up of feed-forward layers wait in host memory"
    if config.model.checkpoint == "selective":
        return f"{kept}, results of matrix products and attention are kept"
    return f"{kept}, {int(layers * config.model.recompute_fraction)} of {layers} blocks recomputed"


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
