"""How a packed row is cut between the ranks of a ring, and which attention is left between their parts.

A token attends to earlier ones only, so with contiguous parts the last rank would compute most. Instead a row is cut
into 2 * ring equal chunks, of which rank r gets chunk r and chunk 2 * ring - 1 - r (zigzag): of a whole-row document
every rank computes the same, one early and one late chunk against what comes before them.

A rank's own tokens stay in the order of the row. So among them attention is what it is in any packed row: causal inside
the pieces of documents. Towards another rank's keys it is never causal and never ragged: documents are contiguous,
hence only the one that lies across the border between earlier keys and later queries counts, and its queries and its
keys are contiguous on their ranks. One rectangle per pair of ranks, or nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from internlm.ops.segments import Segments

Span = tuple[int, int]  # (start, stop) of tokens in the row


@dataclass(frozen=True)
class Rectangle:
    """All `queries`, rows of one rank's part, attend to all `keys`, rows of another rank's part."""

    queries: slice
    keys: slice


@dataclass(frozen=True)
class RingStep:
    """What a rank does in step s: it computes with keys of the rank s before it, and sends keys to the one s after."""

    compute: Rectangle | None  # None: no document spans both parts
    send: slice | None  # rows of the own part


@dataclass(eq=False)
class RingSegments(Segments):
    """Segments of the tokens on one ring rank, and its steps 1 to ring - 1."""

    steps: tuple[RingStep, ...] = ()


def spans(row_length: int, ring: int, rank: int) -> list[Span]:
    """The tokens of a row that ring rank `rank` of `ring` computes; the row divides into 2 * ring chunks."""
    if ring == 1:
        return [(0, row_length)]
    assert row_length % (2 * ring) == 0, (row_length, ring)
    chunk = row_length // (2 * ring)
    return [(index * chunk, (index + 1) * chunk) for index in (rank, 2 * ring - 1 - rank)]


def own_segments(lengths: Sequence[int], ring: int, rank: int) -> Segments:
    """Segments of a ring rank's part of a row with documents of `lengths`, on the CPU."""
    own = spans(sum(lengths), ring, rank)
    pieces = (_overlap(document, own) for document in _documents(lengths))
    here = Segments.of(tuple(piece for piece in pieces if piece))
    return RingSegments(here.cu_seqlens, here.lengths, tuple(_step(lengths, ring, rank, s) for s in range(1, ring)))


def rectangle(lengths: Sequence[int], ring: int, rank: int, peer: int) -> Rectangle | None:
    """The queries of `rank` that attend to keys of another rank `peer`, and these keys; None: there are none."""
    own, theirs = spans(sum(lengths), ring, rank), spans(sum(lengths), ring, peer)
    chunk = own[0][1] - own[0][0]
    if peer > rank:  # both chunks of the peer lie between the two of this rank
        queries, keys, border = own[1:], theirs, own[1][0]
        first_query, keys_end = chunk, 2 * chunk
    else:  # the peer's first chunk lies before all queries, its second behind them
        queries, keys, border = own, theirs[:1], theirs[0][1]
        first_query, keys_end = 0, chunk
    # Only the document that crosses the border has both: keys before it and queries behind it.
    across = next((d for d in _documents(lengths) if d[0] < border < d[1]), None)
    if across is None:
        return None
    num_queries, num_keys = _overlap(across, queries), _overlap(across, keys)
    if not (num_queries and num_keys):
        return None
    return Rectangle(slice(first_query, first_query + num_queries), slice(keys_end - num_keys, keys_end))


def _step(lengths: Sequence[int], ring: int, rank: int, step: int) -> RingStep:
    wanted = rectangle(lengths, ring, (rank + step) % ring, rank)
    return RingStep(rectangle(lengths, ring, rank, (rank - step) % ring), None if wanted is None else wanted.keys)


def _documents(lengths: Sequence[int]) -> list[Span]:
    return [(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _overlap(document: Span, parts: Sequence[Span]) -> int:
    """Tokens of a document in some parts of the row."""
    return sum(max(0, min(document[1], stop) - max(document[0], start)) for start, stop in parts)
