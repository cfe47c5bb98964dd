"""Matrix products of tokens that are spread over the ranks of a group: gathered before, or summed and dealt out after.

Two paths with the same result up to the order of sums: a collective beside a GEMM; and, for large products between GPUs
of one node that reach each other's memory, torch's symmetric-memory operators, which send chunk by chunk while they
multiply.
"""

import importlib
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.collectives import Group, all_gather, reduce_scatter
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

# FLOP of a product from which on symmetric memory is used. Alone, products of 0.4 TFLOP and more became 7 to 17 %
# faster by it between two H100s; whole steps did not: of the 1.8B, with products of 0.07 to 0.27 TFLOP, a quarter
# slower, of the 7B, with 0.27 to 0.74, 1 % slower (benchmarks/LOG.md).
WORTHWHILE = 1e12


def gather_matmul(x: Tensor, b: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """x [n, in] of every rank, one after the other [n * ranks, in], and its product with b [in, out]."""
    if _is_fused(x, b, group, copies=group.size()):
        gathered, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), [b], 0, group.group_name)
        return gathered, y
    gathered = all_gather(x, group).wait()
    return gathered, gathered @ b


def matmul_scatter(x: Tensor, b: Tensor, group: Group) -> Tensor:
    """x [n * ranks, in] @ b [in, out], summed over the ranks, of which this rank gets its part [n, out]."""
    if _is_fused(x, b, group):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), b, "sum", 0, group.group_name)
    return reduce_scatter(x @ b, group).wait()


def _is_fused(x: Tensor, b: Tensor, group: Group, copies: int = 1) -> bool:
    """Whether the product of `copies` of x and b goes by symmetric memory: where it can, and is large enough."""
    if not x.is_cuda or not _has_peers(group):
        return False
    flop = 2 * copies * x.shape[0] * b.numel()
    fused = flop >= WORTHWHILE
    path = "symmetric memory" if fused else "a collective, too small for symmetric memory"
    log_once(logger, f"products of {flop / 1e12:.2f} TFLOP between {group.size()} ranks: {path}")
    return fused


@cache
def _has_peers(group: Group) -> bool:
    """Whether the group's GPUs can read each other's memory: all in this node, with a peer path between them."""
    here = torch.cuda.device_count()  # one rank a GPU, nodes in order
    ranks = dist.get_process_group_ranks(group)
    own = torch.cuda.current_device()
    peers = {rank % here for rank in ranks} - {own}
    found = len({rank // here for rank in ranks}) == 1 and all(
        torch.cuda.can_device_access_peer(own, peer) for peer in peers
    )
    if found:
        importlib.import_module("torch.distributed._symmetric_memory")  # registers the operators
    logger.info("symmetric memory between %d ranks: %s", len(ranks), "yes" if found else "no, plain collectives")
    return found
