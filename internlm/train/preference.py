"""Direct preference optimisation (Rafailov et al., 2023): the chosen of two answers becomes likelier than the rejected.

With log p of an answer's tokens under the trained model and under the fixed reference, the loss of a pair is

    -log sigmoid(beta * ((chosen - chosen_reference) - (rejected - rejected_reference)))

A row holds whole pairs, chosen before rejected, then padding. The loss of a pair needs the sums over both answers, so
the head runs twice: first for the sums, then as a cross-entropy whose tokens are weighted by the derivative. The
reference's sums come with the row, or from a function of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.config.schema import DpoConfig
from internlm.model.batch import IGNORE_INDEX, Batch
from internlm.model.moe import RowPart
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.contract import LossOf

AnswerSums = Callable[[Batch], Tensor]

_SMALLEST = 2.0**-149  # of fp32


class PreferenceLoss:
    """The objective of a step's rows; `reference`: `answer_sums` under the reference, None if rows bring them.

    `part`: how the tokens of this rank lie in a row. Token losses are gathered, so that each rank finds the same.
    """

    def __init__(self, config: DpoConfig, reference: AnswerSums | None, part: RowPart) -> None:
        self.beta, self.reference, self.part = config.beta, reference, part

    def __call__(self, loss_of: LossOf, row: Batch, upstream: float) -> LossOutput:
        """Sum over the pairs of a row, of which `row.num_trained` counts the pairs.

        In the result a pair stands at the first trained token of its chosen answer: there is its loss, and `correct`
        where the chosen answer gained more on the reference than the rejected one.
        """
        reference = row.reference if self.reference is None else self.reference(row)
        assert reference is not None, "checkpoint.reference gives each row its sums"
        pairs = _num_pairs(row)
        reference = F.pad(reference, (0, 2 * pairs - len(reference)))
        kept: list[tuple[Tensor, Tensor]] = []

        def derivative(losses: Tensor) -> Tensor:
            """d loss / d token loss, [tokens here]."""
            segment = _segment_of(row, losses.device)
            sums = reference.to(losses.device) - _sums(self.part.gather(losses), segment, pairs)  # log p / p_reference
            margin = (self.beta * (sums[0::2] - sums[1::2])).to(losses.dtype)
            kept.append((margin, segment))
            slope = self.beta * torch.sigmoid(-margin)
            return self.part.own(torch.stack((slope, -slope), dim=1).flatten()[segment])

        surrogate = loss_of(upstream=upstream, weigh=derivative).loss_sum
        margin, segment = kept[0]
        trained = row.labels.to(margin.device, non_blocking=True) != IGNORE_INDEX
        first = trained & (_trained_before(trained, segment, 2 * pairs) == 0) & (segment % 2 == 0)
        first, segment = self.part.own(first), self.part.own(segment)
        token_losses = torch.where(first, F.softplus(-margin)[segment // 2], 0.0)
        # the surrogate has the gradient, the pairs' losses the value
        loss_sum = surrogate - surrogate.detach() + token_losses.sum()
        return LossOutput(loss_sum, token_losses, first & (margin > 0)[segment // 2])


def answer_sums(losses: Tensor, row: Batch) -> Tensor:
    """The sums of a whole row's token losses over each answer, then zeros for the padding, fp64 [2 * pairs]."""
    return _sums(losses, _segment_of(row, losses.device), _num_pairs(row))


def _sums(losses: Tensor, segment: Tensor, pairs: int) -> Tensor:
    sums = losses.new_zeros(2 * pairs, dtype=torch.float64)
    return sums.index_add_(0, segment, losses.double())


def margin_sum(output: LossOutput) -> Tensor:
    """The sum of a row's margins: beta times how much more the chosen answer gained than the rejected one. fp64 [].

    A loss is -log of the probability that is the sigmoid of the margin. In fp32 it is 0 from a margin of 104 on, which
    counts as 103 then.
    """
    losses = output.token_losses[pair_places(output)].double().clamp_min(_SMALLEST)
    return (-losses - torch.log(-torch.expm1(-losses))).sum()


def pair_places(output: LossOutput) -> Tensor:
    """Where the pairs of this rank's part of a row stand, bool [tokens here]; other places have neither loss nor
    success."""
    return (output.token_losses > 0) | output.correct


def _num_pairs(row: Batch) -> int:
    """Of segments; padding counts as pairs, of which the last may have one segment."""
    return (len(row.segments.lengths) + 1) // 2


def _segment_of(row: Batch, device: torch.device) -> Tensor:
    """The segment of each token, int64 [tokens]."""
    lengths = row.segments.cu_seqlens.to(device, non_blocking=True).diff().long()
    return torch.repeat_interleave(lengths, output_size=len(row.tokens))


def _trained_before(trained: Tensor, segment: Tensor, count: int) -> Tensor:
    """How many trained tokens of its segment precede each token, int64 [tokens]."""
    before = trained.cumsum(0) - trained.long()
    start = before.new_full((count,), len(trained)).scatter_reduce_(0, segment, before, "amin")
    return before - start[segment]
