"""Rows cut between ranks: attention against each document on its own, and training against one rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internlm.core import collectives
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.flops import model_flops
from internlm.model.transformer import build_model
from internlm.ops.attention import attention, attention_reference
from internlm.parallel import ring, sequence
from internlm.parallel.expert import row_part
from internlm.parallel.sequence import OVERLAP_FROM, SequenceAttention, cut_sequences, own_part
from internlm.train.metrics import StepReport
from tests.parallel.oracle import CPU, compare, make_config
from tests.parallel.test_zigzag import random_lengths
from tests.pool import run_ranks
from tests.train.tiny import NamedRows, make_row, make_trainer, step_batches
from tests.train.tiny import make_config as make_tiny_config

ROW = 48  # divides by 6, 8 and 16
LAYOUTS = [(1, 4), (2, 1), (4, 1), (2, 2)]  # (ring, ulysses)
# The whole row, tokens alone, and two at random
DOCUMENTS = [(ROW,), (1,) * ROW, random_lengths(ROW, 2), random_lengths(ROW, 4), (ROW - 1, 1), (1, ROW - 1)]


def row_of(lengths: tuple[int, ...], *sizes: tuple[int, int]) -> tuple[Batch, list[Tensor]]:
    """A row, whose tokens are their places in it, and a random tensor [tokens, heads, head_dim] for each of `sizes`."""
    generator = torch.Generator().manual_seed(len(lengths))
    places = torch.arange(ROW)
    labels = torch.where(places % 3 == 0, IGNORE_INDEX, places)
    positions = torch.cat([torch.arange(length) for length in lengths])
    batch = Batch(places, labels, positions, Segments.of(lengths), places % 2, int((places % 3 != 0).sum()))
    return batch, [torch.randn(ROW, *size, generator=generator, dtype=torch.float64) for size in sizes]


def inputs_of(index: int) -> tuple[Batch, list[Tensor]]:
    """A row with the documents of that number, a gradient, q, k and v; key/value heads are 4, 2 or 1."""
    kv_heads = (4, 2, 1)[index % 3]
    return row_of(DOCUMENTS[index], (4, 8), (4, 8), (kv_heads, 8), (kv_heads, 8))


def attention_on_rank(
    rank: int, world_size: int, ring_ranks: int, ulysses: int, dtype: torch.dtype, overlap_from: int = OVERLAP_FROM
) -> list[tuple[Batch, list[Tensor]]]:
    """This rank's part of each row, with attention and the gradients of q, k and v for its tokens."""
    config = make_config({"context": {"ring": ring_ranks, "ulysses": ulysses}})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    attend = SequenceAttention(mesh.group("ulysses"), mesh.group("ring"), overlap_from=overlap_from)
    results = []
    for index in range(len(DOCUMENTS)):
        row, (grad, *whole) = inputs_of(index)
        part = own_part(row, mesh)
        experts_row, places = row_part(config.parallel.tensor.mode, mesh), torch.arange(ROW)
        assert torch.equal(experts_row.gather(part.tokens), places)  # ties between tokens are broken by their places
        assert torch.equal(experts_row.own(places), part.tokens)
        own = [x[part.tokens].to(dtype).requires_grad_() for x in whole]
        out = checkpoint(attend, *own, part.segments, use_reentrant=False)
        out.backward(grad[part.tokens].to(dtype))
        results.append((part, [out.detach(), *(x.grad for x in own if x.grad is not None)]))
    return results


def each_document_alone(index: int) -> tuple[Batch, list[Tensor]]:
    """The row, and attention of its documents one by one with the gradients of q, k and v."""
    row, (grad, *whole) = inputs_of(index)
    q, k, v = (x.requires_grad_() for x in whole)
    documents = zip(*(x.split(row.segments.lengths) for x in (q, k, v)), strict=True)
    out = torch.cat([attention_reference(*document, Segments.of((len(document[0]),))) for document in documents])
    out.backward(grad)
    return row, [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


# From documents of one token on, heads go in two parts where they can.
@pytest.mark.parametrize(
    ("ring_ranks", "ulysses", "overlap_from"), [(1, 2, 1), *((*sizes, ROW + 1) for sizes in LAYOUTS), (2, 2, 1)]
)
def test_packed_on_ranks_is_each_document_alone(ring_ranks: int, ulysses: int, overlap_from: int) -> None:
    ranks = run_ranks(ring_ranks * ulysses, attention_on_rank, ring_ranks, ulysses, torch.float64, overlap_from)
    for index in range(len(DOCUMENTS)):
        row, expected = each_document_alone(index)
        seen: list[int] = []
        for results in ranks:
            part, found = results[index]
            seen += part.tokens.tolist()
            assert torch.equal(part.labels, row.labels[part.tokens])
            assert torch.equal(part.positions, row.positions[part.tokens])
            assert part.type_ids is not None and torch.equal(part.type_ids, part.tokens % 2)
            assert part.num_trained == int((part.labels != IGNORE_INDEX).sum())
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs[part.tokens])
        assert sorted(seen) == list(range(ROW))


def test_sixteen_bits() -> None:
    """Errors of the rounding of inputs and of what is sent, and no more."""
    ranks = run_ranks(4, attention_on_rank, 2, 2, torch.bfloat16)
    for index in range(len(DOCUMENTS)):
        _, expected = each_document_alone(index)
        for results in ranks:
            part, found = results[index]
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == torch.bfloat16
                torch.testing.assert_close(ours.double(), theirs[part.tokens], rtol=3e-2, atol=6e-2)


# (ranks, parallel, model)
TRAINED: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 2, "overlap": True}}, {"checkpoint": True}),
    (4, {"context": {"ulysses": 4}, "zero1": {"size": 2}}, {"num_kv_attention_heads": 2}),
    (4, {"context": {"ring": 2}, "zero1": {"size": 2}}, {"qk_norm": True, "checkpoint": "feed_forward"}),
    (4, {"context": {"ulysses": 2}, "weight": {"size": 2}}, {"checkpoint": "selective"}),
    (4, {"context": {"ulysses": 2}, "pipeline": {"size": 2}}, {"checkpoint": "selective"}),
    (4, {"context": {"ring": 4}, "weight": {"size": 2}, "gradient": {"size": 4}}, {"checkpoint": True}),
    (4, {"context": {"ring": 2, "ulysses": 2}, "zero1": {"size": 1}}, {"num_kv_attention_heads": 1}),
    (4, {"context": {"ulysses": 2}, "tensor": {"size": 2, "mode": "msp"}}, {"checkpoint": 0.5}),
    (4, {"context": {"ring": 2}, "tensor": {"size": 2}}, {"num_kv_attention_heads": 2}),
    (4, {"context": {"ring": 2}, "pipeline": {"size": 2, "schedule": "zbv"}}, {}),
]


@pytest.mark.parametrize(("world_size", "parallel", "model"), TRAINED)
def test_trains_as_one_rank(world_size: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
    compare(world_size, parallel, model=model, loss={"label_smoothing": 0.1, "z_loss": 1e-2})


def test_the_rule_of_2023() -> None:
    """The mean over micro batches of each one's mean, of which every rank sees but a part."""
    compare(2, {"context": {"ring": 2}}, loss={"reduction": "micro_batch"})


REPORTED = [make_row(seed, lengths, trained=5) for seed, lengths in enumerate([(8,), (3, 5), (1, 7), (2, 2, 4)])]


def report_of_rank(rank: int, world_size: int, parallel: dict[str, Any]) -> StepReport:
    """Two rows trained and two evaluated, all by every rank."""
    loaders = {"en": NamedRows("en", REPORTED[2:])}
    config = make_tiny_config(data={"valid_every": 1}, parallel=parallel)
    trainer = make_trainer(config, step_batches([REPORTED[:2]]), rank, world_size, valid_loaders=loaders)
    return next(trainer.steps())


@pytest.mark.parametrize("context", [{"ring": 2}, {"ulysses": 2}])
def test_reports_and_evaluation(context: dict[str, int]) -> None:
    """Tokens and documents are counted once, and the work is what two ranks share."""
    alone = run_ranks(1, report_of_rank, {})[0]
    flops = model_flops(make_tiny_config().model, [n for row in REPORTED[:2] for n in row.segments.lengths])
    for report in run_ranks(2, report_of_rank, {"context": context}):
        for key in ("loss", "acc", "perplexity", "grad_norm", "num_consumed_tokens", "num_samples_in_batch"):
            assert getattr(report, key) == pytest.approx(getattr(alone, key), rel=1e-5), key
        assert report.tflops * 1e12 * report.step_time == pytest.approx(flops.causal / 2)
        (found,), (expected,) = report.validation, alone.validation
        assert found.num_tokens == expected.num_tokens == 10
        assert (found.loss, found.accuracy) == pytest.approx((expected.loss, expected.accuracy), rel=1e-5)


def order_on_rank(rank: int, world_size: int) -> list[str]:
    """When transfers start and when attention is computed, in a ring that shares one document."""
    events: list[str] = []

    def noted(function: Callable[..., Any], text: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(text(*args))
            return function(*args)

        return call

    config = make_config({"context": {"ring": world_size}})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    row, (grad, *whole) = row_of((ROW,), (4, 8), (4, 8), (4, 8), (4, 8))
    part = own_part(row, mesh)
    q, k, v = (x[part.tokens].requires_grad_() for x in whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "shift", noted(ring.shift, lambda out, into, distance, group: f"send {distance}"))
        for name in ("part_attention", "part_attention_backward"):
            patch.setattr(ring, name, noted(getattr(ring, name), lambda *args: "own" if args[-1] else "part"))
        out = SequenceAttention(mesh.group("ulysses"), mesh.group("ring"))(q, k, v, part.segments)
        events.append("|")
        out.backward(grad[part.tokens])
    return events


def test_keys_travel_while_attention_is_computed() -> None:
    """The transfer of a step starts before the attention of the step before; gradients return at once."""
    forward = "send 1, own, send 2, part, part"
    backward = "send 1, own, send 2, part, send -1, part, send -2"
    for events in run_ranks(3, order_on_rank):
        assert ", ".join(events) == f"{forward}, |, {backward}"


def exchanges_on_rank(rank: int, world_size: int, kv_heads: int) -> list[str]:
    """When exchanges of so many heads start and end, and attention is computed, with heads in two parts."""
    events: list[str] = []

    def noted(function: Callable[..., Any], text: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(text + (f" {args[1].shape[2]}" if text == "begin" else ""))
            return function(*args)

        return call

    def chosen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: Any) -> Tensor:
        events.append(f"attention by {backend}")
        return attention(q, k, v, segments, backend)

    config = make_config({"context": {"ulysses": world_size}}, model={"attn_backend": "sdpa"})
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, CPU))
    model = build_model(config)
    cut_sequences(model, mesh)
    attend = replace(model.layers[0].get_submodule("attention").attend, overlap_from=1)  # type: ignore[type-var]
    row, (grad, *whole) = row_of((ROW,), (4, 8), (4, 8), (kv_heads, 8), (kv_heads, 8))
    part = own_part(row, mesh)
    q, k, v = (x[part.tokens].requires_grad_() for x in whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives._Way, "begin", noted(collectives._Way.begin, "begin"))
        patch.setattr(collectives._Way, "end", noted(collectives._Way.end, "end"))
        patch.setattr(sequence, "attention", chosen)
        out = attend(q, k, v, part.segments)
        events.append("|")
        out.backward(grad[part.tokens])
    return events


@pytest.mark.parametrize(("kv_heads", "first", "second"), [(4, 3, 3), (1, 3, 1)])
def test_heads_travel_while_attention_of_others_is_computed(kv_heads: int, first: int, second: int) -> None:
    """An exchange is under way whenever attention is computed; in backward, of whose attention no event tells, too.
    Of two query heads of a rank each is a part, with a key and a value head; one that serves both is sent once."""
    for events in run_ranks(2, exchanges_on_rank, kv_heads):
        forward = (
            f"begin {first}, begin {second}, end, attention by sdpa, begin 1, end, attention by sdpa, begin 1, end, end"
        )
        backward = f"begin 1, begin 1, end, begin {second}, end, begin {first}, end, end"
        assert ", ".join(events) == f"{forward}, |, {backward}"
