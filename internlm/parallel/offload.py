"""Blocks keep their widest activation in host memory until backward needs it: `model.checkpoint="offload"`.

This tensor is the product of a block's `w13` [tokens, 2, ffn]; SwiGLU is recomputed from it (`recompute.py`), which
takes no matrix product. Copies run on a stream of their own, beside the computation:

    forward   When block i ends, the copy of its product to the host starts. Before that, the computation waits until
              the copy of block i - 1 is done and its memory is free, so at most two products are on the device.
    backward  When block i begins, it waits until its product is back, and the copy of that of block i - 1 starts.

The last block of a chunk is the first in backward, so its product stays on the device. The host's buffers are
page-locked, since only such copies run beside the computation; they are allocated when first needed and used again.

The tensor is intercepted where autograd saves it, around the block's call: there compiled code passes on what it saves
just as plain autograd does. (vDNN, Rhu et al., 2016, moved activations this way; ZeRO-Infinity, Rajbhandari et al.,
2021, moves the inputs of recomputed blocks.)
"""

import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from internlm.parallel.recompute import replace_forward
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)


def offload_blocks(chunks: Sequence[Sequence[nn.Module]]) -> None:
    """Makes the blocks of each chunk, except its last, keep the product of `w13` on the host. To be called after
    compilation, since hooks on saved tensors don't reach into compiled code."""
    transfers = Transfers()
    for blocks in chunks:
        for index, block in enumerate(blocks):
            width = prod(block.get_submodule("feed_forward.w13").out_shape)  # type: ignore[arg-type]
            place = partial(_run, transfers, block.forward, width, index == 0, index == len(blocks) - 1)
            replace_forward(block, place)
    moved = sum(len(blocks) - 1 for blocks in chunks)
    log_once(logger, f"{moved} of {sum(map(len, chunks))} blocks keep their widest activation in the host's memory")


def _run(transfers: "Transfers", forward: Callable[..., Any], width: int, first: bool, stays: bool, *args: Any) -> Any:
    if first:
        transfers.newest = None

    def keep(tensor: Tensor) -> "Tensor | Kept":
        # numbers of a byte: the weight that fp8 keeps, which may be as wide
        if tensor.shape[1:].numel() != width or not tensor.is_contiguous() or tensor.itemsize == 1:
            return tensor
        return transfers.keep(tensor, stays)

    with torch.autograd.graph.saved_tensors_hooks(keep, _give):
        return forward(*args)


def _give(kept: "Tensor | Kept") -> Tensor:
    return kept.take() if isinstance(kept, Kept) else kept


class Transfers:
    """The copies between a device and its host, one after the other, and the buffers on the host."""

    def __init__(self) -> None:
        self.buffers = HostBuffers()
        self.newest: weakref.ref[Kept] | None = None  # in the forward that is under way
        self._leaving: Copy | None = None
        self._stream: torch.cuda.Stream | None = None

    def keep(self, tensor: Tensor, stays: bool) -> "Kept":
        """Wraps `tensor` for autograd; unless it `stays`, its copy to the host starts."""
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None
        kept = Kept(self, tensor, self.newest)
        self.newest = weakref.ref(kept)
        if not stays:
            self._leaving = kept.leave()
        return kept

    def copy(self, target: Tensor, source: Tensor) -> "Copy":
        """Starts a copy, which runs after the work that is queued on the device now."""
        device = source.device if source.is_cuda else target.device
        if device.type != "cuda":
            target.copy_(source)
            return Copy(target, source, None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return Copy(target, source, self._stream.record_event())


class Copy:
    """A copy under way. Both its ends are kept until the computation has waited for it, and belong to that: so the
    allocator needs no record of the second stream, which would hold memory back."""

    def __init__(self, target: Tensor, source: Tensor, done: torch.cuda.Event | None) -> None:
        self.target, self.source, self._done = target, source, done

    def wait(self) -> Tensor:
        """The target; what the device is given from here on comes after the copy. The host waits for nothing."""
        if self._done is not None:
            self._done.wait()
        return self.target


class Kept:
    """A tensor that a block keeps of one micro batch. Autograd holds it until that block's backward is over."""

    def __init__(self, transfers: Transfers, tensor: Tensor, before: "weakref.ref[Kept] | None") -> None:
        self._transfers, self._before = transfers, before  # `before`: of the block before, which backward needs next
        self._here: Tensor | None = tensor
        self._buffer: Tensor | None = None
        self._coming: Copy | None = None
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device

    def leave(self) -> Copy:
        assert self._here is not None
        self._buffer = self._transfers.buffers.take(self._here)
        copy = self._transfers.copy(self._on_host(), self._here)
        self._here = None
        return copy

    def come(self) -> None:
        """Begins to copy it back, unless it is here."""
        if self._here is None and self._coming is None:
            target = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._coming = self._transfers.copy(target, self._on_host())

    def take(self) -> Tensor:
        """The tensor on the device; the one that backward needs next begins to come."""
        self.come()
        tensor = self._here
        if tensor is None:
            assert self._coming is not None
            tensor, self._coming = self._coming.wait(), None
        before = None if self._before is None else self._before()
        if before is not None:
            before.come()
        return tensor

    def _on_host(self) -> Tensor:
        assert self._buffer is not None
        return self._buffer.view(self._dtype).view(self._shape)

    def __del__(self) -> None:
        if self._coming is not None:  # never fetched: the backward was given up
            self._coming.wait()
        if self._buffer is not None:
            self._transfers.buffers.give_back(self._buffer)


class HostBuffers:
    """Page-locked host memory, in buffers by size. Since all copies of `Transfers` follow one another, a buffer may be
    given back, and taken for the next copy, while its last one is under way."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._count = self._size = 0

    def take(self, tensor: Tensor) -> Tensor:
        """uint8 [bytes of `tensor`]."""
        free = self._free[tensor.nbytes]
        return free.pop() if free else self._make(tensor.nbytes, lock=tensor.is_cuda)

    def give_back(self, buffer: Tensor) -> None:
        self._free[buffer.nbytes].append(buffer)
        log_once(logger, f"activations wait in {self._count} page-locked buffers, {self._size / 2**30:.1f} GiB")

    def _make(self, size: int, lock: bool) -> Tensor:
        # Not torch's own page-locked memory, which takes a power of two: up to twice as much. Whole pages, as no page
        # can be locked twice.
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        if lock:
            self._lock(buffer)
        self._count, self._size = self._count + 1, self._size + size
        return buffer

    def _lock(self, buffer: Tensor) -> None:
        runtime, address = torch.cuda.cudart(), buffer.data_ptr()
        if int(runtime.cudaHostRegister(address, buffer.nbytes, 0)):
            raise UserError(
                f'model.checkpoint = "offload": the host could not lock {buffer.nbytes / 2**30:.2f} GiB more beside '
                f"{self._size / 2**30:.1f} GiB; give it more memory (ulimit -l, the container's limit), or set "
                '"feed_forward", which computes again instead'
            )
        # Unlocked before the memory is freed; else the address would stay locked for its next owner.
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False
