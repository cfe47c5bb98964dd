"""Expert parallel: the experts of a layer are dealt out to the ranks of the `expert` axis, and tokens travel to them.

All ranks of a stage, data x ring x ulysses x tensor, route different tokens. An all-to-all brings each token's rows to
the ranks that hold its experts, another one brings the outputs back; both again in backward. Ranks that hold the same
experts share them by Hybrid ZeRO, whatever the axes of the dense parameters are (core/mesh.py).

How many rows go where is known when the router has chosen, so the host waits for the device once a layer.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import Config
from internlm.core.collectives import Group, all_gather, all_reduce, all_to_all
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement, box_shape, cut
from internlm.model.moe import MoE, RowPart, permuted
from internlm.model.transformer import Transformer
from internlm.parallel.recompute import replace_forward
from internlm.parallel.zigzag import spans


def cut_experts(model: Transformer, config: Config, mesh: Mesh) -> dict[str, Placement]:
    """Deals out the experts of a model on the meta device. Returns their placements, also where each rank has all."""
    placements = {}
    for name, moe in model.named_modules():
        if not isinstance(moe, MoE):
            continue
        for key, parameter in list(moe.experts.named_parameters()):
            shape = tuple(parameter.shape)
            placement = cut(shape, 0, mesh.coordinates["expert"], mesh.sizes["expert"], "expert")
            placements[f"{name}.experts.{key}"] = placement
            part = torch.empty(box_shape(placement.box), dtype=parameter.dtype, device=parameter.device)
            # experts of a model with adapters are frozen
            setattr(moe.experts, key, nn.Parameter(part, requires_grad=parameter.requires_grad))
        if mesh.sizes["expert"] > 1:
            replace_forward(moe.experts, partial(_exchanged, mesh.group("expert"), moe.experts.forward))
    route_by(model, config.parallel.tensor.mode, mesh)
    return placements


# -- rows that lie on several ranks -----------------------------------------------------------------------------------


def route_by(model: Transformer, mode: str, mesh: Mesh) -> None:
    """In mtp tensor ranks have the same tokens and each routes its part of them; else they have different ones."""
    row = row_part(mode, mesh)
    for moe in model.modules():
        if isinstance(moe, MoE):
            moe.row = row


def row_part(mode: str, mesh: Mesh) -> RowPart:
    """How a row lies on the ranks of a mesh."""
    ring = mesh.group("ring") if mesh.sizes["ring"] > 1 else None
    groups = [mesh.group(axis) for axis in ("ulysses", "tensor") if mesh.sizes[axis] > 1]
    copies = mesh.group("tensor") if mesh.sizes["tensor"] > 1 and mode == "mtp" else None
    return CutRow(ring, groups, copies) if ring or groups else RowPart()


def row_of_sequence(mesh: Mesh) -> RowPart:
    """How the tokens that `sequence.own_part` gives a rank lie in the row."""
    return CutRow(mesh.group("ring"), [mesh.group("ulysses")], None) if mesh.sequence_size > 1 else RowPart()


class CutRow(RowPart):
    """A row between the ranks of a ring (zigzag.py), and each part of it in equal runs of tokens on the ranks of some
    groups, outermost first. Ranks of `copies` have the same tokens."""

    def __init__(self, ring: Group | None, groups: list[Group], copies: Group | None) -> None:
        self.ring, self.groups, self.copies = ring, groups, copies
        self.num_parts = prod(group.size() for group in self._all)

    @property
    def _all(self) -> list[Group]:
        return self.groups if self.ring is None else [self.ring, *self.groups]

    def enter(self, x: Tensor) -> Tensor:
        """Where the tokens don't divide (in generation), zeros make up for it, and are routed like tokens."""
        if self.copies is None:
            return x
        missing = -len(x) % self.copies.size()
        assert missing == 0 or not torch.is_grad_enabled(), f"{len(x)} tokens on {self.copies.size()} tensor ranks"
        return _OwnPart.apply(F.pad(x, (0, 0, 0, missing)) if missing else x, self.copies)

    def leave(self, y: Tensor, num_tokens: int) -> Tensor:
        return y if self.copies is None else _AllParts.apply(y, self.copies)[:num_tokens]

    def sum(self, counts: Tensor) -> Tensor:
        for group in self._all:
            counts = all_reduce(counts, group).wait()
        return counts

    def gather(self, x: Tensor) -> Tensor:
        for group in reversed(self.groups):
            x = all_gather(x, group).wait()
        if self.ring is None:
            return x
        # of each ring rank an early and a late chunk: these in order of the row, from the first rank on and back again
        chunks = all_gather(x, self.ring).wait().chunk(2 * self.ring.size())
        return torch.cat((*chunks[::2], *chunks[::-2]))

    def own(self, x: Tensor) -> Tensor:
        if self.ring is not None:
            x = torch.cat([x[start:stop] for start, stop in spans(len(x), self.ring.size(), self.ring.rank())])
        for group in self.groups:
            x = x.chunk(group.size())[group.rank()]
        return x


class _OwnPart(torch.autograd.Function):
    """This rank's part of tokens that all ranks of a group have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.size())[group.rank()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group).wait(), None


class _AllParts(torch.autograd.Function):
    """The parts of all ranks of a group, for each of them to go on with all tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(y, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


# -- experts on other ranks -------------------------------------------------------------------------------------------


def _exchanged(group: Group, compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, counts: Tensor) -> Tensor:
    """`Experts.forward` for all experts, of which each rank of the group computes its own: rows [rows, hidden] in order
    of their expert, counts int64 [experts of all ranks] -> [rows, hidden]."""
    sent = counts.view(group.size(), -1)  # [ranks, experts of each]
    received = all_to_all(sent, group)
    sends, receives = torch.stack((sent.sum(1), received.sum(1))).tolist()
    arrived = _AllToAll.apply(rows, group, sends, receives)  # by rank of origin, then by expert
    num_experts = received.shape[1]
    experts = torch.arange(num_experts, device=rows.device).repeat(group.size())
    order = experts.repeat_interleave(received.flatten(), output_size=len(arrived)).argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    outputs = compute(permuted(arrived, order, places), received.sum(0))
    return _AllToAll.apply(permuted(outputs, places, order), group, receives, sends)


class _AllToAll(torch.autograd.Function):
    """Rows [rows, hidden] to other ranks, `sends[r]` of them to rank r, and `receives[r]` from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, sends: list[int], receives: list[int]) -> Tensor:
        ctx.group, ctx.sends, ctx.receives = group, sends, receives
        return all_to_all(rows, group, sends, receives)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(grad, ctx.group, ctx.receives, ctx.sends), None, None, None
