"""Measure what a block and the head of a model cost on this device, and cut the model's pipeline by it.

    python tools/measure_split.py --config configs/70B_llama2.py [section.key=value ...]

Trains on random tokens with models of a few blocks, everything else as the config says but on one device alone. Prints
how even each way to cut the pipeline is, and the setting to give to every run with this config:
parallel.pipeline.split=(9, 8, 8, 7).
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.config.checks import check
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.launch import World, launch
from internlm.core.mesh import build_mesh
from internlm.model.batch import Batch, Segments
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.pipeline_layout import balanced_split, head_cost, pipeline_layout
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import setup_logging
from internlm.utils.timers import DeviceTimer

NUM_BLOCKS = (1, 3)  # of the two models whose difference is what blocks cost; of a 70B, 3.1 G parameters: 50 GB
WARM_UP = 3


def measured_head(config: Config, world: World, repeats: int) -> tuple[float, float]:
    """Seconds of a micro batch in a block, forward and backward, and of the head with the loss in blocks."""
    few, many = (seconds_of(config, count, world, repeats) for count in NUM_BLOCKS)
    block = (many - few) / (NUM_BLOCKS[1] - NUM_BLOCKS[0])
    if block <= 0:
        raise UserError(
            f"{NUM_BLOCKS[1]} blocks took no longer ({many:.3g} s) than {NUM_BLOCKS[0]} ({few:.3g} s): the device is "
            "busy with something else, or the model too small to be measured; use parallel.pipeline.split=flops"
        )
    return block, max(0.0, few / block - NUM_BLOCKS[0])


def seconds_of(config: Config, num_layers: int, world: World, repeats: int) -> float:
    """Forward and backward of a micro batch by a model of `num_layers` blocks, the fastest of some."""
    model_section = config.model.model_copy(update={"num_layers": num_layers, "num_chunks": 1})
    alone = config.model_copy(update={"model": model_section, "parallel": type(config.parallel)()})
    mesh = build_mesh(alone.parallel, world)
    model = build_model(alone)
    placements = parallelize(model, alone, mesh)
    initial = partial(initial_value, config=alone.model, seed=alone.seed, device=mesh.device)
    schedule = build_schedule(model, HybridZero(model, alone, mesh, initial, placements), alone, mesh)
    row = random_row(alone)
    timer, found = DeviceTimer(mesh.device), []
    for _ in track(range(WARM_UP + repeats), f"{num_layers} blocks"):
        timer.start()
        schedule.train([row], [1 / row.num_trained], lambda output, part: None)
        timer.stop()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(timer.seconds)
    return min(found[WARM_UP:])


def random_row(config: Config) -> Batch:
    """A packed row of whole documents of random tokens."""
    data = config.data
    tokens, labels = torch.randint(config.model.vocab_size, (2, data.seq_len * data.micro_bsz))
    positions = torch.arange(data.seq_len).repeat(data.micro_bsz)
    return Batch(tokens, labels, positions, Segments.of((data.seq_len,) * data.micro_bsz), num_trained=len(tokens))


def splits(config: Config, head: float) -> dict[str, list[int]]:
    """Blocks per chunk by every rule that `parallel.pipeline.split` knows, and by a measured head."""
    model, count = config.model, pipeline_layout(config).num_chunks
    found = {"as configured": [len(layers) for layers in pipeline_layout(config).layers]}
    found["flops"] = balanced_split(model.num_layers, count, head_cost(model, config.data.seq_len))
    return {**found, "measured": balanced_split(model.num_layers, count, head)}


def slowest(sizes: Sequence[int], head: float) -> float:
    """Cost of the slowest chunk, of what it would be if all were equal."""
    costs = [*sizes[:-1], sizes[-1] + head]
    return max(costs) * len(costs) / sum(costs)


def show(config: Config, block: float, head: float) -> None:
    """The comparison, and the setting."""
    table = Table("split", "blocks of each chunk", "slowest chunk, of an equal share")
    found = splits(config, head)
    for name, sizes in found.items():
        table.add_row(name, ", ".join(map(str, sizes)), f"{slowest(sizes, head):.3f}")
    console = Console()
    console.print(f"a block takes {block * 1e3:.4g} ms a micro batch, the head as long as {head:.2f} blocks")
    console.print(table)
    console.print(f"parallel.pipeline.split=({', '.join(map(str, found['measured']))})", highlight=False)


def measure(arguments: Sequence[str] | None) -> None:
    """Raises UserError for a config without a pipeline, or with mistakes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="Python file that describes the run")
    parser.add_argument("--repeats", type=int, default=10, help="micro batches timed (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that win over the file")
    given = parser.parse_intermixed_args(arguments)
    config = load_config(given.config, given.overrides)
    if config.parallel.pipeline.size == 1:
        raise UserError("parallel.pipeline.size = 1: there is nothing to split; set the number of stages")
    if given.repeats < 1:
        raise UserError(f"--repeats {given.repeats}: must be at least 1")
    check(config, prod(config.parallel.axis_sizes.values()))
    with launch() as world:
        block, head = measured_head(config, world, given.repeats)
    show(config, block, head)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the split is printed, 2 for a mistake that the user can fix."""
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
