"""Sequence parallel: a packed row is cut between ranks, and attention still sees whole documents.

Everything in a transformer but attention treats tokens one by one. So each rank computes its own tokens of the row with
their true positions, and only around attention something is sent. Two ways, which combine:

    ulysses   all-to-all before and after attention: from "my tokens, all heads" to "all tokens, my heads" and back.
              What is sent does not grow with the number of ranks; there are at most as many as query heads.
    ring      keys and values travel to the ranks whose queries need them, see ring.py. Any number of ranks.

A row is first cut between ring ranks (zigzag.py), and each part into equal runs of tokens between ulysses ranks, which
are neighbours on a node. After the all-to-all, a ulysses rank has all tokens of its ring rank's part.

Ulysses is from DeepSpeed-Ulysses (Jacobs et al., 2023). InternLM's framework called it `isp` together with sharded
parameters, which are Hybrid ZeRO's `parallel.weight` here.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

import torch
from torch import Tensor

from internlm.core.collectives import Exchange, Group, all_reduce_
from internlm.core.mesh import Mesh
from internlm.model.attention import Attention
from internlm.model.batch import IGNORE_INDEX, Batch
from internlm.model.transformer import Transformer
from internlm.ops.attention import Backend, attention
from internlm.ops.segments import Segments
from internlm.parallel.ring import ring_attention
from internlm.parallel.zigzag import RingSegments, own_segments, spans


def own_part(row: Batch, mesh: Mesh) -> Batch:
    """The tokens of `row` that this rank computes. Segments are those of all tokens of its ring rank."""
    if mesh.sequence_size == 1:
        return row
    ring, ring_rank = mesh.sizes["ring"], mesh.coordinates["ring"]
    own = spans(len(row.tokens), ring, ring_rank)

    def cut(whole: Tensor) -> Tensor:
        part = torch.cat([whole[start:stop] for start, stop in own])
        return part.chunk(mesh.sizes["ulysses"])[mesh.coordinates["ulysses"]]

    labels = cut(row.labels)
    part = replace(
        row,
        tokens=cut(row.tokens),
        labels=labels,
        positions=cut(row.positions),
        segments=row.segments if ring == 1 else own_segments(row.segments.lengths, ring, ring_rank),
        type_ids=None if row.type_ids is None else cut(row.type_ids),
        num_trained=int((labels != IGNORE_INDEX).sum()),
    )
    return part.pin_memory() if row.tokens.is_pinned() else part


def cut_sequences(model: Transformer, mesh: Mesh) -> None:
    """Makes attention communicate, where rows are cut between ranks. Collective."""
    if mesh.sequence_size == 1:
        return
    all_reduce_(torch.zeros(1, device=mesh.device), mesh.group("ring"))  # NCCL: all ranks in a group's first transfer
    attend = SequenceAttention(mesh.group("ulysses"), mesh.group("ring"), model.config.attn_backend)
    for module in _attentions(model):
        module.attend = attend


@contextmanager
def uncut(model: Transformer, mesh: Mesh) -> Iterator[None]:
    """Inside the `with`, every rank computes whole rows."""
    modules = _attentions(model) if mesh.sequence_size > 1 else []
    cut = [module.attend for module in modules]
    for module in modules:
        module.attend = partial(attention, backend=model.config.attn_backend)
    try:
        yield
    finally:
        for module, attend in zip(modules, cut, strict=True):
            module.attend = attend


def _attentions(model: Transformer) -> list[Attention]:
    return [module for module in model.layers.modules() if isinstance(module, Attention)]


# From documents of so many tokens on, heads go to their ranks in two parts, each exchanged while attention of the other
# is computed. On two H100s that hides 73 % of what the 1.8B sends in rows of 65,536 tokens; at 4,096 tokens attention
# is too short to hide anything, and the host has twice as many transfers to launch.
OVERLAP_FROM = 16_384


@dataclass(frozen=True)
class SequenceAttention:
    """Attention of the tokens that `own_part` gives a rank."""

    ulysses: Group
    ring: Group
    backend: Backend = "auto"  # of attention between the exchanges; a ring has kernels of its own
    overlap_from: int = OVERLAP_FROM

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] of this rank's tokens -> as q."""
        if self.ulysses.size() == 1:
            return self._attend(q, k, v, segments)
        # Two parts of one key/value head would send it round a ring twice.
        alone = self.ring.size() == 1 or kv_heads_of_a_rank(k, self.ulysses) > 1
        parts = 2 if alone and segments.max_length >= self.overlap_from else 1
        leaving, returning = deque(to_heads(q, k, v, self.ulysses, parts)), []
        while leaving:
            queries, *brought = leaving.popleft().wait()
            if brought:
                k, v = brought
            returning.append(to_tokens(self._attend(queries, k, v, segments), self.ulysses))
        # [ranks, own tokens, heads of all parts, head_dim]
        arrived = torch.cat([part.wait() for part in returning], dim=2)
        return arrived.transpose(0, 1).flatten(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if self.ring.size() == 1:
            return attention(q, k, v, segments, self.backend)
        assert isinstance(segments, RingSegments)
        return ring_attention(q, k, v, segments, self.ring)


@dataclass(frozen=True)
class _Leaving:
    """Some heads on their way: of q, k and v, or of q alone where those of k and v come with the part before."""

    exchange: Exchange
    heads: list[int]  # of q, or of q, k and v

    def wait(self) -> tuple[Tensor, ...]:
        return self.exchange.wait().flatten(0, 1).split(self.heads, dim=1)


def kv_heads_of_a_rank(k: Tensor, group: Group) -> int:
    """Key/value heads that a rank computes with: one, where several ranks have query heads of the same."""
    return k.shape[1] // gcd(k.shape[1], group.size())


def to_heads(q: Tensor, k: Tensor, v: Tensor, group: Group, parts: int) -> list[_Leaving]:
    """From own tokens and all heads to the tokens of all ranks, in their order, and this rank's heads.

    These come in so many parts or less, each in one all-to-all: key/value heads with the query heads that they serve,
    or parts of the query heads where a rank has but one key/value head, which then comes with the first. Where ranks do
    not divide the key/value heads, these are repeated as often as it takes for each rank to get those of its query
    heads.
    """
    ranks, kv_heads = group.size(), kv_heads_of_a_rank(k, group)
    assert q.shape[1] % ranks == 0, (q.shape, ranks)
    repeats = ranks * kv_heads // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    # [tokens, ranks, key/value heads, their query heads, head_dim]
    queries = q.unflatten(1, (ranks, kv_heads, -1)).chunk(parts, dim=2 if kv_heads > 1 else 3)
    sent = [[part.flatten(2, 3)] for part in queries]
    keys_values = (x.unflatten(1, (ranks, -1)).chunk(parts, dim=2) for x in (k, v))
    for part, *those in zip(sent, *keys_values, strict=False):
        part += those
    # [ranks, tokens, heads, head_dim] each
    return [_Leaving(Exchange(torch.cat(p, dim=2).transpose(0, 1), group), [x.shape[2] for x in p]) for p in sent]


def to_tokens(out: Tensor, group: Group) -> Exchange:
    """From the tokens of all ranks and some of this rank's heads [tokens, heads, head_dim] to own tokens and those
    heads of all ranks [ranks, own tokens, heads, head_dim]."""
    return Exchange(out.unflatten(0, (group.size(), -1)), group)
