"""The tables of the zigzag split, against the definition of attention in a packed row."""

import pytest
import torch

from internlm.parallel.zigzag import RingSegments, own_segments, rectangle, spans


def random_lengths(row_length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := row_length - sum(lengths)) > 0:
        longest = (2, row_length // 4, 2 * row_length)[seed % 3]
        lengths.append(min(left, int(torch.randint(1, longest + 1, (), generator=generator))))
    return tuple(lengths)


def pairs_in_row(lengths: tuple[int, ...]) -> torch.Tensor:
    """bool [tokens, tokens]: which key each query attends to."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(document))
    return (document[:, None] == document) & (place[:, None] >= place)


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_each_pair_of_tokens_is_computed_once(ring: int, seed: int) -> None:
    lengths = (48,) if seed == 11 else random_lengths(48, seed)
    tokens = [torch.cat([torch.arange(*span) for span in spans(48, ring, rank)]) for rank in range(ring)]
    assert torch.equal(torch.cat(tokens).sort().values, torch.arange(48))
    computed = torch.zeros(48, 48, dtype=torch.int64)
    for rank in range(ring):
        segments = own_segments(lengths, ring, rank)
        assert isinstance(segments, RingSegments) and sum(segments.lengths) == 48 // ring
        computed[tokens[rank][:, None], tokens[rank]] += pairs_in_row(segments.lengths)
        for number, step in enumerate(segments.steps, 1):
            peer = (rank - number) % ring
            sent = own_segments(lengths, ring, peer).steps[number - 1].send
            assert step.compute == rectangle(lengths, ring, rank, peer)
            assert sent == (None if step.compute is None else step.compute.keys)
            if step.compute is not None:
                computed[tokens[rank][step.compute.queries, None], tokens[peer][step.compute.keys]] += 1
    assert torch.equal(computed, pairs_in_row(lengths).long())


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_a_whole_row_document_loads_all_ranks_alike(ring: int) -> None:
    row = 64 * ring
    work = []
    for rank in range(ring):
        own = row // ring
        steps = own_segments((row,), ring, rank).steps
        rectangles = [step.compute for step in steps if step.compute is not None]
        assert len(rectangles) == ring - 1
        areas = [(r.queries.stop - r.queries.start) * (r.keys.stop - r.keys.start) for r in rectangles]
        work.append(own * (own + 1) // 2 + sum(areas))
    assert len(set(work)) == 1
    assert sum(work) == row * (row + 1) // 2
