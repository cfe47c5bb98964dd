"""What is known about a step: counted on the host before it, summed on the device during it, reported after it."""

import math
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.config.schema import ModelConfig
from internlm.core.mesh import Mesh
from internlm.data.loader import StepBatch
from internlm.model.batch import IGNORE_INDEX, Batch
from internlm.model.flops import model_flops
from internlm.ops.cross_entropy import LossOutput
from internlm.train.routing import ExpertLoad


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of forward and backward, of a batch or of a rank's share of it."""

    causal: float  # attention counts the pairs it computes: half of each segment's square
    full: float  # attention counts the whole square, as many reports do
    hardware: float  # causal, plus what activation recomputation computes again


def step_flops(config: ModelConfig, lengths: list[int]) -> StepFlops:
    """FLOPs of forward and backward over segments of the given lengths.

    A recomputed block does its forward, a third of its FLOPs, once more; a recomputed feed-forward layer its first
    product, that of gate and up. Routed experts repeat all of theirs: the weighting of their outputs needs these in
    backward.
    """
    causal, full = model_flops(config, lengths)
    blocks = causal - 6.0 * config.vocab_size * config.hidden_size * sum(lengths)
    recomputed = int(config.num_layers * config.recompute_fraction) / config.num_layers
    again = recomputed * blocks / 3
    if config.checkpoint == "feed_forward":
        again = 2.0 * config.num_layers * config.hidden_size * _recomputed_width(config) * sum(lengths)
    return StepFlops(causal, full, causal + again)


def _recomputed_width(config: ModelConfig) -> int:
    """Columns of the products that are computed again inside a feed-forward layer; see `step_flops`."""
    if config.num_experts == 1:
        return 2 * config.ffn_size
    shared = (3 if config.moe.mix_shared else 2) * config.moe.num_shared_experts
    router = config.num_experts + 2 * config.moe.mix_shared
    return (3 * config.moe.top_k + shared) * config.expert_size + router


@dataclass(frozen=True)
class BatchCounts:
    """Host-side facts of one step's batch, over all data ranks."""

    trained_tokens: int  # labels that are trained
    tokens: int  # all tokens, padding included
    samples: int  # segments
    largest_length: int  # tokens of the longest segment
    largest_batch: int  # most segments in a micro batch
    smallest_batch: int
    flops: StepFlops  # per rank, averaged over all ranks

    @staticmethod
    def of(facts: Tensor, num_ranks: int) -> "BatchCounts":
        """From what `count_batch` returned; waits for the device."""
        everyone = facts.cpu()
        trained, tokens, segments, *flop_sums = everyone[:, :_NUM_SUMS].sum(0).tolist()
        longest, most, fewest = everyone[:, _NUM_SUMS:].amax(0).tolist()
        mean = StepFlops(*(value / num_ranks for value in flop_sums))
        return BatchCounts(int(trained), int(tokens), int(segments), int(longest), int(most), -int(fewest), mean)


_NUM_SUMS = 6  # facts that are summed over the data ranks; of the others the largest counts


def count_batch(batch: StepBatch, config: ModelConfig, mesh: Mesh) -> Tensor:
    """The facts of `batch` on every data rank: fp64 [ranks, facts] on the device. One small gather, no waiting."""
    rows = batch.micro_batches
    samples = [len(row.segments.lengths) for row in rows]
    flops = step_flops(config, [length for row in rows for length in row.segments.lengths])
    trained, tokens = sum(row.num_trained for row in rows), sum(row.tokens.numel() for row in rows)
    sums = [trained, tokens, sum(samples), flops.causal, flops.full, flops.hardware]
    extremes = [max(row.segments.max_length for row in rows), max(samples), -min(samples)]
    mine = torch.tensor(sums + extremes, dtype=torch.float64).to(mesh.device, non_blocking=True)
    gathered = mine.new_empty(mesh.dp_size, mine.numel())
    dist.all_gather(list(gathered.unbind()), mine, group=mesh.group("data"))
    return gathered


@dataclass(frozen=True)
class TypeMetrics:
    """Sums over the trained tokens of one data source."""

    loss_sum: float
    correct: float
    tokens: float

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class StepTotals:
    """Sums over all trained tokens of a step and all data ranks, on the host."""

    objective: float  # the loss that was trained, label smoothing included
    loss_sum: float  # negative log likelihood
    correct: float
    types: dict[str, TypeMetrics]


def sum_over_tokens_(sums: Tensor, mesh: Mesh) -> None:
    """Adds up what ranks counted of different tokens, in place, for all ranks to know.

    Ranks of a tensor group count the same tokens; stages of a pipeline before the last have counted none.
    """
    if mesh.coordinates["tensor"] > 0:
        sums.zero_()
    dist.all_reduce(sums, group=mesh.world_group)


class StepSums:
    """Accumulates the sums of a step on the device, in float64, without ever waiting for it."""

    def __init__(self, type_names: list[str], device: torch.device) -> None:
        self.type_names = type_names if len(type_names) > 1 else []
        self._all = torch.zeros(3, dtype=torch.float64, device=device)
        self._types = torch.zeros(3, len(self.type_names), dtype=torch.float64, device=device)

    def add(self, output: LossOutput, batch: Batch) -> None:
        """Add one micro batch; all its tensors are on the device."""
        trained = batch.labels != IGNORE_INDEX
        losses = output.token_losses.double()
        correct = output.correct & trained
        self._all += torch.stack((output.loss_sum.detach().double(), losses.sum(), correct.sum().double()))
        if self.type_names and batch.type_ids is not None:
            per_token = torch.stack((losses, correct.double(), trained.double()))
            self._types.index_add_(1, batch.type_ids, per_token)

    def reduce(self, mesh: Mesh, *more: Tensor) -> tuple[StepTotals, list[float]]:
        """Sums over the data ranks, and the values of `more` as they are, in the one transfer to the host of a step."""
        packed = torch.cat((self._all, self._types.flatten()))
        sum_over_tokens_(packed, mesh)
        values = torch.cat((packed, *(value.detach().double().flatten() for value in more))).tolist()
        size = len(self.type_names)
        rows = (values[3 + row * size : 3 + (row + 1) * size] for row in range(3))
        types = {name: TypeMetrics(*sums) for name, *sums in zip(self.type_names, *rows, strict=True)}
        return StepTotals(values[0], values[1], values[2], types), values[packed.numel() :]


@dataclass(frozen=True)
class ValidReport:
    """Means over all trained tokens, or pairs (dpo), of a validation set and all data ranks; nan for an empty set."""

    name: str
    loss: float  # nats per token; of pairs, as in training
    accuracy: float  # of pairs: the share in which the chosen answer gained more on the reference
    perplexity: float  # nan for pairs
    num_tokens: int  # or pairs
    margin: float | None = None  # of pairs: beta times how much more the chosen answer gained

    def scalars(self) -> dict[str, float]:
        """What there is of the means, by the names of metrics.jsonl."""
        last = {"plex": self.perplexity} if self.margin is None else {"margin": self.margin}
        return {
            f"val/{self.name}_{key}": value for key, value in {"loss": self.loss, "acc": self.accuracy, **last}.items()
        }


@dataclass(frozen=True)
class Answer:
    """What the model in training made of a prompt of `evaluation.prompts`."""

    prompt: str
    text: str


@dataclass(frozen=True)
class StepReport:
    """One step as the monitor writes it; its fields are the keys of metrics.jsonl.

    `lr`, `adam_beta2` and `loss_scale` are the values that this step used. Of a batch that `data.skip_batches` leaves
    out, or that has nothing to train on any rank, only the counters mean anything (`skipped`).
    """

    step: int  # batches done, this one included, skipped ones too
    step_count: int  # successful updates so far
    skipped: bool = False  # nothing was computed
    updated: bool = False  # the update was made; False also when a gradient was not finite
    loss: float = math.nan  # token-weighted mean over all ranks of what is trained, label smoothing included
    perplexity: float = math.nan
    acc: float = math.nan  # share of trained tokens whose argmax is right; of pairs ranked rightly (dpo)
    grad_norm: float = math.nan  # global, before clipping, without the loss scale
    lr: float = 0.0
    adam_beta2: float = 0.0
    loss_scale: float = 1.0
    tgs: float = 0.0  # tokens per GPU and second, waiting for data included
    tflops: float = 0.0  # model TFLOP/s per GPU, causal attention
    mfu: float = 0.0  # share of the peak that model FLOPs use, causal attention
    mfu_full: float = 0.0  # the same, attention counted as a full square
    hfu: float = 0.0  # the same as mfu, recomputation counted
    num_consumed_tokens: int = 0
    num_trained_tokens: int = 0  # of this step; pairs (dpo)
    inf_nan_skip_batches: int = 0
    micro_num: int = 0  # micro batches per data rank
    num_samples_in_batch: int = 0
    largest_length: int = 0
    largest_batch: int = 0
    smallest_batch: int = 0
    step_time: float = 0.0  # seconds, waiting for data included
    fwd_bwd_time: float = 0.0  # seconds
    memory: int = 0  # peak bytes on this rank's device
    types: dict[str, TypeMetrics] = field(default_factory=dict)
    experts: ExpertLoad | None = None
    validation: tuple[ValidReport, ...] = ()
    answers: tuple[Answer, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)  # of `evaluation.tasks`, as TASK_MEASURE

    @property
    def is_evaluated(self) -> bool:
        """Whether the model was validated or evaluated after this step."""
        return bool(self.validation or self.answers or self.scores)

    def scalars(self) -> dict[str, float]:
        """All numbers, flat: types as loss/NAME, acc/NAME, tokens/NAME, validation as val/NAME_loss, _acc, _plex (of
        pairs _margin), scores as eval/TASK_MEASURE."""
        apart = ("types", "experts", "validation", "answers", "scores")
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        for name, metrics in self.types.items():
            flat[f"loss/{name}"] = metrics.loss
            flat[f"acc/{name}"] = metrics.accuracy
            flat[f"tokens/{name}"] = int(metrics.tokens)
        flat |= {} if self.experts is None else self.experts.scalars()
        for valid in self.validation:
            flat |= valid.scalars()
        return flat | {f"eval/{name}": score for name, score in self.scores.items()}


def perplexity(mean_loss: float) -> float:
    """exp of the mean negative log likelihood; inf where that has no float."""
    return math.inf if mean_loss >= 700 else math.exp(mean_loss)  # nan stays nan
