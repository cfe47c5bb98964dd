"""Which blocks each chunk of a pipeline has, and which stage each chunk.

A chunk is a run of neighbouring blocks; chunks are numbered in the order of the forward pass. A stage (a rank of the
pipeline axis) has one chunk, or several: dealt out in turns (`interleaved`), or down the stages and up again, so that
the first stage has the last chunk as well (the V of `zbv` and `dualpipev`). The first chunk has the embedding, the last
one the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from internlm.config.schema import V_SCHEDULES, Config, ModelConfig
from internlm.model.flops import flops_per_token


@dataclass(frozen=True)
class PipelineLayout:
    """What every rank knows of the pipeline."""

    schedule: str  # "1f1b" | "interleaved" | "zbv" | "dualpipev"
    num_stages: int
    layers: tuple[range, ...]  # blocks of each chunk
    stage_of: tuple[int, ...]  # stage of each chunk

    @property
    def num_chunks(self) -> int:
        return len(self.layers)

    def chunks_of(self, stage: int) -> list[int]:
        """The chunks of a stage, in the order of the forward pass."""
        return [chunk for chunk, owner in enumerate(self.stage_of) if owner == stage]

    def parts_of(self, stage: int) -> list[str]:
        """Names of all parts of the model that a stage has."""
        return [name for chunk in self.chunks_of(stage) for name in self.modules(chunk)]

    def modules(self, chunk: int) -> list[str]:
        """Names of the model's parts that a chunk consists of, in the order of the forward pass."""
        first = ["embedding"] if chunk == 0 else []
        last = ["head"] if chunk == self.num_chunks - 1 else []
        return [*first, *(f"layers.{index}" for index in self.layers[chunk]), *last]


def pipeline_layout(config: Config) -> PipelineLayout:
    """The layout that `parallel.pipeline` and `model.num_chunks` ask for; the sizes were checked by `config.checks`."""
    pipeline, schedule = config.parallel.pipeline, config.pipeline_schedule
    stages = pipeline.size
    if stages == 1:
        return PipelineLayout(schedule, 1, (range(config.model.num_layers),), (0,))
    per_stage = config.chunks_per_stage
    count = stages * per_stage
    if pipeline.split == "even":
        sizes = even_split(config.model.num_layers, count, rounds=per_stage if schedule == "interleaved" else 1)
    elif pipeline.split == "flops":
        sizes = balanced_split(config.model.num_layers, count, head_cost(config.model, config.data.seq_len))
    else:
        sizes = list(pipeline.split)
    assert sum(sizes) == config.model.num_layers and min(sizes) > 0, sizes
    return build_layout(schedule, stages, sizes)


def build_layout(schedule: str, num_stages: int, sizes: Sequence[int]) -> PipelineLayout:
    """The layout of chunks with so many blocks each."""
    if schedule in V_SCHEDULES:
        stage_of = [*range(num_stages), *reversed(range(num_stages))]
    else:
        stage_of = [chunk % num_stages for chunk in range(len(sizes))]
    layers = tuple(range(*bounds) for bounds in pairwise(accumulate(sizes, initial=0)))
    return PipelineLayout(schedule, num_stages, layers, tuple(stage_of))


def even_split(num_layers: int, num_chunks: int, rounds: int = 1) -> list[int]:
    """Blocks per chunk, by the rule of InternLM's 2023 framework: an equal part of the blocks for each round over the
    stages, and of what doesn't divide in a round, one block more for each of its last chunks."""
    share, stages = num_layers // rounds, num_chunks // rounds
    size, rest = divmod(share, stages)
    return [size + (stage >= stages - rest) for stage in range(stages)] * rounds


def balanced_split(num_layers: int, num_chunks: int, head: float) -> list[int]:
    """Blocks per chunk such that the slowest chunk is as fast as can be.

    Args:
        head: cost of the head, which the last chunk has, in blocks.
    """
    costs = [1.0] * (num_chunks - 1) + [1.0 + head]
    for _ in range(num_layers - num_chunks):
        costs[costs.index(min(costs))] += 1
    return [round(cost) for cost in costs[:-1]] + [round(costs[-1] - head)]


def head_cost(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of the head, in blocks. The embedding, a look-up, has none."""
    one, two = (flops_per_token(model.model_copy(update={"num_layers": count}), seq_len).causal for count in (1, 2))
    block = (two - one) * (1 + model.recompute_fraction / 3)
    return (2 * one - two) / block
