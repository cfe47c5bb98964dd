"""Tensor parallel: every matrix of a block is cut between the ranks of a tensor group, which compute the same tokens.

The table `CUTS` says along which dim each parameter is cut. A projection into a cut region (`wqkv`, `w13`, the head) is
cut by its outputs, one out of it (`wo`, `w2`) by its inputs; the embedding and the head are cut by the vocabulary. What
is sent where tokens enter and leave such a region depends on the mode, with the names of InternLM's 2023 framework:

    mode  enter, forward / backward       leave, forward / backward     between the regions, each rank has
    mtp   nothing / all-reduce            all-reduce / nothing          all tokens
    msp   all-gather / reduce-scatter     reduce-scatter / all-gather   its part of the tokens
    fsp   as msp, but the gathered tokens aren't kept for backward: they are gathered again

mtp is Megatron-LM's tensor parallel (Shoeybi et al., 2019), msp adds its sequence parallel (Korthikanti et al., 2022).
The gradient that leaves a region backward travels while the weight's gradient is computed; what enters a region travels
with the product of it, where the device can (ops/spread_matmul.py).

An adapter is cut as its projection is: into a region B by its outputs, out of one A by its inputs. Of its tokens only
the `rank` numbers between A and B enter or leave.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import Config
from internlm.core.collectives import Group, Sent, all_gather, all_reduce, reduce_scatter
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement, box_shape, cut, whole
from internlm.model.layers import Embedding, Head, Linear, RMSNorm, scale_gradient
from internlm.model.lora import adapted
from internlm.model.transformer import Transformer
from internlm.ops.cross_entropy import linear_cross_entropy
from internlm.ops.spread_matmul import gather_matmul, matmul_scatter
from internlm.parallel.recompute import replace_forward

Mode = Literal["mtp", "msp", "fsp"]

# Pattern of a parameter's name -> the dim along which it is cut. All families share these names.
CUTS: tuple[tuple[str, int], ...] = (
    (r"embedding\.weight", 0),  # [vocab, hidden]
    (r"layers\.\d+\.attention\.wqkv\.(weight|bias|lora_b)", 0),  # [kv_heads, q_per_kv + 2, head_dim, in]: by kv head
    (r"layers\.\d+\.attention\.wo\.(weight|lora_a)", 1),  # [hidden, heads * head_dim]
    (r"layers\.\d+\.feed_forward\.(shared\.)?w13\.(weight|lora_b)", 1),  # [2, ffn, hidden]
    (r"layers\.\d+\.feed_forward\.(shared\.)?w2\.(weight|lora_a)", 1),  # [hidden, ffn]
    (r"head\.weight", 0),  # [vocab, hidden]
)
# Not cut, but used by each rank for its own heads or its own tokens: gradients are parts of a sum in every mode.
PARTIAL = r"layers\.\d+\.(attention\.[qk]_norm|feed_forward\.router)\.weight"


def cut_tensors(model: Transformer, config: Config, mesh: Mesh) -> dict[str, Placement]:
    """Cuts a model on the meta device between the tensor ranks. Returns placements of its dense parameters."""
    ranks = mesh.sizes["tensor"]
    if ranks == 1:
        return {}
    mode: Any = config.parallel.tensor.mode
    placements = {}
    for name, parameter in list(model.named_parameters()):
        shape, dim = tuple(parameter.shape), _cut_dim(name)
        if dim is not None:
            placements[name] = cut(shape, dim, mesh.coordinates["tensor"], ranks, "tensor")
            _shrink(model, name, box_shape(placements[name].box))
        else:  # in mtp, all ranks compute the whole gradient of what is not cut
            identical = mode == "mtp" and not re.fullmatch(PARTIAL, name)
            placements[name] = whole(shape, grad_scale=1 / ranks if identical else 1.0)
    attach(model, config, mesh, mode)
    return placements


def _cut_dim(name: str) -> int | None:
    return next((dim for pattern, dim in CUTS if re.fullmatch(pattern, name)), None)


def _shrink(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Replaces a parameter on the meta device by one of this rank's shape."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    old = getattr(module, attribute)
    new = torch.empty(shape, dtype=old.dtype, device="meta")
    setattr(module, attribute, nn.Parameter(new, old.requires_grad))
    if isinstance(module, Linear) and attribute == "weight":
        module.out_shape = shape[:-1]


def attach(model: Transformer, config: Config, mesh: Mesh, mode: Mode) -> None:
    """Puts communication where tokens enter and leave a cut region, replacing any that was there."""
    group, lora = mesh.group("tensor"), config.lora
    leave = partial(_Leave.apply, group, mode)
    if isinstance(model.embedding, Embedding):
        replace_forward(model.embedding, partial(_embed, model.embedding, mesh.coordinates["tensor"], leave))
    for name, module in model.layers.named_modules():
        if isinstance(module, Linear):
            enters = name.endswith(("wqkv", "w13"))
            project = partial(_project_in if enters else _project_out, module, group, mode)
            if lora is not None and hasattr(module, "lora_a"):
                carry = partial(_Enter.apply, group, mode) if enters else leave
                project = partial(adapted, module, lora, project, carry)
            replace_forward(module, project)
    if isinstance(model.head, Head):
        replace_forward(model.head.norm, partial(_normed, model.head.norm, group, mode))
        model.head.cross_entropy = partial(linear_cross_entropy, group=group)


def _embed(embedding: Embedding, rank: int, leave: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Rows of this rank's part of the vocabulary, zeros for the other tokens; the sum over the ranks is whole."""
    rows = len(embedding.weight)
    local = tokens - rank * rows
    absent = (local < 0) | (local >= rows)
    x = F.embedding(local.masked_fill(absent, 0), embedding.weight).masked_fill(absent[:, None], 0)
    return scale_gradient(leave(x), embedding.grad_scale)


def _normed(norm: RMSNorm, group: Group, mode: Mode, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Into the head, a cut region."""
    return _Enter.apply(group, mode, RMSNorm.forward(norm, x, dtype))


def _project_in(linear: Linear, group: Group, mode: Mode, x: Tensor) -> Tensor:
    """Into a cut region: this rank's outputs for all tokens of the group."""
    weight = linear.weight.view(-1, linear.weight.shape[-1])
    bias = None if linear.bias is None else linear.bias.view(-1)
    return _ProjectIn.apply(group, mode, x, weight, bias).unflatten(-1, linear.out_shape)


def _project_out(linear: Linear, group: Group, mode: Mode, x: Tensor) -> Tensor:
    """Out of a cut region: this rank's inputs make a part of the sum; the bias, which is whole, is added once."""
    y = _ProjectOut.apply(group, mode, x, linear.weight)
    return y if linear.bias is None else y + linear.bias


class _ProjectIn(torch.autograd.Function):
    """x [tokens here, in], weight [out here, in] -> [tokens of the group, out here]."""

    @staticmethod
    def forward(ctx: Any, group: Group, mode: Mode, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.group, ctx.mode = group, mode
        entered, y = (x, x @ weight.T) if mode == "mtp" else gather_matmul(x, weight.T, group)
        kept = x if mode == "fsp" else entered
        ctx.save_for_backward(kept if ctx.needs_input_grad[3] else None, weight)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        gathering = all_gather(kept, ctx.group) if ctx.mode == "fsp" and kept is not None else None
        grad_x = grad @ weight
        sending = _send_back(grad_x, ctx.group, ctx.mode)
        entered = kept if gathering is None else gathering.wait()
        grad_weight = None if entered is None else grad.T @ entered
        grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
        return None, None, sending.wait(), grad_weight, grad_bias


def _send_back(grad: Tensor, group: Group, mode: Mode) -> Sent:
    """Sums the gradient of tokens that entered a region: for all of them, or for this rank's part."""
    return all_reduce(grad, group) if mode == "mtp" else reduce_scatter(grad, group)


class _ProjectOut(torch.autograd.Function):
    """x [tokens of the group, in here], weight [out, in here] -> [tokens here, out], summed over the group."""

    @staticmethod
    def forward(ctx: Any, group: Group, mode: Mode, x: Tensor, weight: Tensor) -> Tensor:
        ctx.group, ctx.mode = group, mode
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight)
        return all_reduce(x @ weight.T, group).wait() if mode == "mtp" else matmul_scatter(x, weight.T, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x = (grad, grad @ weight) if ctx.mode == "mtp" else gather_matmul(grad, weight, ctx.group)
        return None, None, grad_x, None if x is None else grad.T @ x


class _Enter(torch.autograd.Function):
    """Tokens enter a cut region where no projection follows at once."""

    @staticmethod
    def forward(ctx: Any, group: Group, mode: Mode, x: Tensor) -> Tensor:
        ctx.group, ctx.mode = group, mode
        return x.view_as(x) if mode == "mtp" else all_gather(x, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _send_back(grad.contiguous(), ctx.group, ctx.mode).wait()


class _Leave(torch.autograd.Function):
    """Parts of a sum leave a cut region."""

    @staticmethod
    def forward(ctx: Any, group: Group, mode: Mode, x: Tensor) -> Tensor:
        ctx.group, ctx.mode = group, mode
        return (all_reduce(x, group) if mode == "mtp" else reduce_scatter(x, group)).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, grad if ctx.mode == "mtp" else all_gather(grad.contiguous(), ctx.group).wait()
