"""One unit's memory on one rank, and the collectives that keep it whole.

Every buffer is a part of the same line of elements, cut ever finer along the axes of the mesh:

    full    [size]       all parameters; the model's parameters are views of it. Allocated only while in use when the
                         param axis has more than one rank, or the shard is packed
    shard   [size / p]   what this rank keeps of it; frozen ones may be packed in 4 bits, once they were loaded
    grads   [size / g]   accumulated gradients
    owned   [size / os]  what this rank updates: a view of `shard`, beside it masters and moments of the same length

The param axis cuts first, then grad, then optim. So a reduce-scatter along each axis in turn arrives at the owned part,
and an all-gather along each axis in reverse returns from it, always in place. Ranks outside these axes that hold copies
of the unit add their gradients to the owned part at the end.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from internlm.core.collectives import (
    Group,
    add_other_end_,
    all_gather_,
    all_gather_into,
    all_reduce_,
    own_chunk,
    reduce_scatter_,
)
from internlm.core.mesh import Axes
from internlm.ops.adamw import join_master, round_to, split_master
from internlm.ops.nf4 import Packed, pack, require_nf4, unpack
from internlm.solver.buckets import Slot, UnitLayout


def owned_interval(size: int, axes: Axes) -> tuple[int, int]:
    """(start, stop) of what a rank updates of a unit's line of `size` elements."""
    start, length = 0, size
    for axis in ("param", "grad", "optim"):
        length //= axes.sizes[axis]
        start += axes.coordinates[axis] * length
    return start, start + length


class Unit:
    """The buffers of a unit. `parameters` become views of them; what they held is dropped."""

    def __init__(
        self,
        layout: UnitLayout,
        parameters: dict[str, nn.Parameter],
        axes: Axes,
        device: torch.device,
        *,
        copies: Sequence[Group],
        ends: Group | None,
        grad_dtype: torch.dtype,
        moment_dtype: torch.dtype,
        split: bool,
    ) -> None:
        if layout.packed:
            require_nf4()
        self.layout = layout
        self.parameters = parameters
        self.param_group, self.grad_group = axes.group("param"), axes.group("grad")
        self.optim_group = axes.group("optim")
        self.copies = (axes.group("replica"), *copies)  # who updates the same part of the same parameters
        self.ends = ends  # a pipeline's ranks, of which first and last have copies
        holders = (*self.copies, *([ends] if ends else []))
        self.counts = all(group.rank() == 0 for group in holders)  # the one that norms and checkpoints count
        p, g = axes.sizes["param"], axes.sizes["param"] * axes.sizes["grad"]
        self.sharded = p > 1 or layout.packed  # `full` is made for each use, from the shards or from 4 bits
        self.grads_sharded = g > 1
        self.grad_dtype = grad_dtype

        self.full = torch.zeros(layout.size, dtype=layout.dtype, device=device)
        self.shard = torch.zeros(layout.size // p, dtype=layout.dtype, device=device) if self.sharded else self.full
        self.owned = own_chunk(own_chunk(self.shard, self.grad_group), self.optim_group)
        self.owned_start, _ = owned_interval(layout.size, axes)
        trainable = layout.trainable
        self.grads = torch.zeros(layout.size // g if trainable else 0, dtype=grad_dtype, device=device)

        count = self.owned.numel() if trainable else 0
        is_fp32 = layout.dtype == torch.float32
        has_master = trainable and not is_fp32
        self.remainder = torch.zeros(count, dtype=torch.int16, device=device) if split and has_master else None
        self.master = torch.zeros(count, device=device) if not split and has_master else None
        self.exp_avg = torch.zeros(count, dtype=moment_dtype, device=device)
        self.exp_avg_sq = torch.zeros(count, dtype=moment_dtype, device=device)

        # Gradients of the running micro batch: `grads` itself, or a whole buffer that lives until it is reduced.
        self.incoming: Tensor | None = None if self.grads_sharded else self.grads
        self.missing: set[str] = set()
        self.modules = frozenset(layout.modules)
        self.num_passes = 0  # backward passes of this step: one per micro batch, where all gradients come at once
        self.num_complete = 0  # passes of this step whose gradients are all in
        self.num_ended = 0  # passes of this step that are over
        self.pending: list[Callable[[], None]] = []  # transfers to wait for before the parameters are read
        self.present = not self.sharded
        self.nf4: Packed | None = None  # the shard, which has no memory then
        self.stale = False  # parameters of others were updated, and have not been gathered yet
        for slot in layout.slots:
            parameters[slot.name].data = self.view(self.full, slot)

    @staticmethod
    def view(buffer: Tensor, slot: Slot) -> Tensor:
        """A parameter in a whole buffer [size] of its unit."""
        return buffer[slot.start : slot.stop].view(slot.shape)

    # -- parameters ---------------------------------------------------------------------------------------------

    def fill(self, slot: Slot, value: Tensor) -> None:
        """Takes a parameter's value (fp32) [slot.shape]: this rank's part of it, and of its master."""
        flat = value.reshape(-1)
        shard_start = self.shard.numel() * self.param_group.rank()
        for buffer, start in (
            (self.shard, shard_start),
            (self.master, self.owned_start),
            (self.remainder, self.owned_start),
        ):
            if buffer is None:
                continue
            low, high = max(slot.start, start), min(slot.stop, start + buffer.numel())
            if low >= high:
                continue
            part = flat[low - slot.start : high - slot.start].to(buffer.device, torch.float32)
            if buffer is self.remainder:
                buffer[low - start : high - start] = split_master(part.contiguous())[1]
            else:
                buffer[low - start : high - start] = round_to(part, buffer.dtype)

    def gather_updates(self) -> None:
        """All-gather over optim and grad: the shard becomes whole again after an update. Once a step."""
        all_gather_(own_chunk(self.shard, self.grad_group), self.optim_group)
        all_gather_(self.shard, self.grad_group)

    def pack(self) -> None:
        """Turns the shard into 4 bits, for good: nothing is written to it from here on."""
        if self.layout.packed and self.nf4 is None:
            if self.stale:
                self.gather_updates()
                self.stale = False
            self.nf4 = pack(self.shard)
            self.shard.untyped_storage().resize_(0)

    def read_owned(self) -> Tensor:
        """The owned parameters [size / os], unpacked if need be."""
        if self.nf4 is None:
            return self.owned
        return own_chunk(own_chunk(unpack(self.nf4), self.grad_group), self.optim_group)

    def allocate(self) -> None:
        """Gives `full` its memory back, before it is gathered."""
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())

    def gather(self) -> None:
        """All-gather over param: shard -> full. At each use; the first after an update makes the shard whole before."""
        if self.nf4 is not None:
            own_chunk(self.full.data, self.param_group).copy_(unpack(self.nf4))
            all_gather_(self.full.data, self.param_group)
            return
        if self.stale:
            self.gather_updates()
            self.stale = False
        # `.data`: autograd must not take the arrival of values for a change of them
        all_gather_into(self.full.data, self.shard, self.param_group)

    def free(self) -> None:
        """Drops `full` after use. The parameters stay views of it."""
        self.full.untyped_storage().resize_(0)
        self.present = False

    # -- gradients ----------------------------------------------------------------------------------------------

    @property
    def first(self) -> bool:
        """Whether the gradients that arrive now are of the step's first micro batch."""
        return self.num_complete == 0

    def accumulate(self, slot: Slot, grad: Tensor) -> None:
        """Adds a parameter's gradient of this micro batch."""
        if self.incoming is None:
            self.incoming = torch.zeros(self.layout.size, dtype=self.grad_dtype, device=grad.device)
        if slot.placement.grad_scale != 1:
            grad = grad * slot.placement.grad_scale
        target = self.view(self.incoming, slot)
        if self.first or self.grads_sharded:
            target.copy_(grad)
        else:
            target.add_(grad)

    def clear_missing(self) -> None:
        """Parameters that this micro batch did not use: their gradient is zero, not that of the step before."""
        if self.first and not self.grads_sharded:
            for slot in self.layout.slots:
                if slot.name in self.missing:
                    self.view(self.grads, slot).zero_()
        if self.incoming is None:
            self.incoming = torch.zeros(self.layout.size, dtype=self.grad_dtype, device=self.grads.device)
        self.missing.clear()

    def reduce(self, incoming: Tensor, first: bool, last: bool) -> None:
        """Reduce-scatter over param and grad each micro batch; over optim, then sum over all copies, on the last."""
        if self.grads_sharded:
            part = reduce_scatter_(reduce_scatter_(incoming, self.param_group), self.grad_group)
            if first:
                self.grads.copy_(part)
            else:
                self.grads.add_(part)
        if last:
            owned = reduce_scatter_(self.grads, self.optim_group)
            for group in self.copies:
                all_reduce_(owned, group)

    def add_other_end(self) -> None:
        """Sums over the copies on the first and the last stage of a pipeline.

        Apart from `reduce`, where the last stage would wait for the first, whose gradients come later.
        """
        if self.ends is not None and self.layout.trainable:
            add_other_end_(self.owned_grad, self.ends)

    @property
    def owned_grad(self) -> Tensor:
        """The reduced gradient of the owned part [size / os]."""
        return own_chunk(self.grads, self.optim_group)

    # -- masters ------------------------------------------------------------------------------------------------

    def read_master(self, start: int, stop: int) -> Tensor:
        """fp32 master of owned elements [start, stop)."""
        if self.remainder is not None:
            return join_master(self.owned[start:stop], self.remainder[start:stop])
        return (self.owned if self.master is None else self.master)[start:stop]

    def write_master(self, start: int, stop: int, value: Tensor) -> None:
        """Sets masters and the parameters that are their rounded copies."""
        if self.remainder is not None:
            self.owned[start:stop], self.remainder[start:stop] = split_master(value)
            return
        if self.master is not None:
            self.master[start:stop] = value
        self.owned[start:stop] = round_to(value, self.owned.dtype)

    def reset_master(self) -> None:
        """Masters from the parameters alone."""
        if self.remainder is not None:
            self.remainder.zero_()
        if self.master is not None:
            self.master.copy_(self.owned)

    def memory(self) -> dict[str, int]:
        """Bytes that stay allocated on this rank, by class."""

        def size(*tensors: Tensor | None) -> int:
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

        return {
            "parameters": size(self.shard) if self.nf4 is None else self.nf4.num_bytes,
            "gradients": size(self.grads),
            "masters": size(self.master, self.remainder),
            "moments": size(self.exp_avg, self.exp_avg_sq),
        }
