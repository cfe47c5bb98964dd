"""cuDNN's fused attention over ragged segments, by graphs of its frontend (nvidia-cudnn-frontend).

Tokens lie as [tokens, heads, head_dim]; "ragged offsets", counted in elements, say where each segment begins. A graph
is built once per shape and kept. The number of segments and the longest length are rounded up to powers of two (the
added segments are empty), so a run needs few graphs. Layouts are those of cuDNN's documentation of ragged tensors.
`max_total_seq_len_q` bounds the workspace by the total number of tokens; cuDNN honours it from 9.6 on.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import cudnn
import torch
from torch import Tensor

_DTYPES = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}


@dataclass(frozen=True)
class Shape:
    """What a graph is built for."""

    segments: int
    longest: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    strides: tuple[tuple[int, int], ...]  # (token, head) of q, k, v
    dtype: torch.dtype
    device: int


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Output as q, log-sum-exp fp32 [tokens, heads], of q [tokens, heads, head_dim], k, v [tokens, kv_heads, head_dim].

    `cu_seqlens` int32 [count + 1]; `longest` on the host.
    """
    shape = _shape(q, k, v, count, longest)
    plan = _forward_plan(shape)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    plan.run({"q": q, "k": k, "v": v, "out": out, "stats": lse, **_offsets(shape, cu_seqlens)})
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    count: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    shape = _shape(q, k, v, count, longest)
    plan = _backward_plan(shape)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    named = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    plan.run({"q": q, "k": k, "v": v, "out": out, "grad": grad, "stats": lse, **named, **_offsets(shape, cu_seqlens)})
    return grads[0], grads[1], grads[2]


def _shape(q: Tensor, k: Tensor, v: Tensor, count: int, longest: int) -> Shape:
    tokens, heads, head_dim = q.shape
    strides = tuple((x.stride(0), x.stride(1)) for x in (q, k, v))
    assert all(x.stride(2) == 1 for x in (q, k, v))
    longest = min(_power_of_two(max(longest, 128)), -(-tokens // 128) * 128)
    return Shape(_power_of_two(count), longest, tokens, heads, k.shape[1], head_dim, strides, q.dtype, q.device.index)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _offsets(shape: Shape, cu_seqlens: Tensor) -> dict[str, Tensor]:
    """Lengths int32 [segments], and starts of segments in elements, int64 [segments + 1], of each tensor's layout."""
    ends = cu_seqlens.new_empty(shape.segments + 1)
    ends[: len(cu_seqlens)] = cu_seqlens
    ends[len(cu_seqlens) :] = shape.tokens
    ends = ends.long()
    offsets = {f"at_{stride}": ends * stride for stride in _token_strides(shape)}
    return {"lengths": ends.diff().int(), **offsets}


def _token_strides(shape: Shape) -> set[int]:
    contiguous = {shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.heads}
    return contiguous | {token for token, _ in shape.strides}


class _Plan:
    """A graph that is ready to run, its tensors by name."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tensors: dict[str, Any] = {}
        self.handle = _handle(shape.device)
        self.graph = cudnn.pygraph(
            io_data_type=_DTYPES[shape.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self.handle,
        )
        self.lengths = self.add("lengths", (shape.segments, 1, 1, 1), (1, 1, 1, 1), cudnn.data_type.INT32)
        self.workspace = 0

    def add(self, name: str, dim: tuple[int, ...], stride: tuple[int, ...], dtype: Any) -> Any:
        self.tensors[name] = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=dtype)
        return self.tensors[name]

    def layout(self, heads: int, size: int, strides: tuple[int, int] | None = None) -> tuple[Any, ...]:
        """dim, stride [segments, heads, longest, size] and ragged offset of a tensor [tokens, heads, size]."""
        token, head = strides or (heads * size, size)
        shape = self.shape
        dim, stride = (shape.segments, heads, shape.longest, size), (shape.longest * token, head, token, 1)
        if f"at_{token}" not in self.tensors:
            self.add(f"at_{token}", (shape.segments + 1, 1, 1, 1), (1, 1, 1, 1), cudnn.data_type.INT64)
        return dim, stride, self.tensors[f"at_{token}"]

    def ragged(self, name: str, heads: int, strides: tuple[int, int] | None = None) -> Any:
        """An input [tokens, heads, head_dim]."""
        dim, stride, offset = self.layout(heads, self.shape.head_dim, strides)
        return self.add(name, dim, stride, _DTYPES[self.shape.dtype]).set_ragged_offset(offset)

    def output(self, name: str, tensor: Any, heads: int, size: int, dtype: Any) -> None:
        dim, stride, offset = self.layout(heads, size)
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_ragged_offset(offset).set_data_type(dtype)
        self.tensors[name] = tensor

    def build(self) -> "_Plan":
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace = self.graph.get_workspace_size()
        return self

    def run(self, values: dict[str, Tensor]) -> None:
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=f"cuda:{self.shape.device}")
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = {tensor: values[name].detach() for name, tensor in self.tensors.items()}
        self.graph.execute(pack, workspace, handle=self.handle)


@cache
def _handle(device: int) -> Any:
    return cudnn.create_handle()


@cache
def _forward_plan(shape: Shape) -> _Plan:
    plan = _Plan(shape)
    heads, dtype = (shape.heads, shape.kv_heads, shape.kv_heads), _DTYPES[shape.dtype]
    q, k, v = (plan.ragged(name, h, s) for name, h, s in zip("qkv", heads, shape.strides, strict=True))
    out, stats = plan.graph.sdpa(q=q, k=k, v=v, is_inference=False, **_options(plan))
    plan.output("out", out, shape.heads, shape.head_dim, dtype)
    plan.output("stats", stats, shape.heads, 1, cudnn.data_type.FLOAT)
    return plan.build()


@cache
def _backward_plan(shape: Shape) -> _Plan:
    plan = _Plan(shape)
    heads, dtype = (shape.heads, shape.kv_heads, shape.kv_heads), _DTYPES[shape.dtype]
    q, k, v = (plan.ragged(name, h, s) for name, h, s in zip("qkv", heads, shape.strides, strict=True))
    out, grad = plan.ragged("out", shape.heads), plan.ragged("grad", shape.heads)
    dim, stride, offset = plan.layout(shape.heads, 1)
    stats = plan.add("stats", dim, stride, cudnn.data_type.FLOAT).set_ragged_offset(offset)
    grads = plan.graph.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=out,
        dO=grad,
        stats=stats,
        max_total_seq_len_q=shape.tokens,
        max_total_seq_len_kv=shape.tokens,
        **_options(plan),
    )
    for name, tensor, h in zip(("dq", "dk", "dv"), grads, heads, strict=True):
        plan.output(name, tensor, h, shape.head_dim, dtype)
    return plan.build()


def _options(plan: _Plan) -> dict[str, Any]:
    return {
        "attn_scale": plan.shape.head_dim**-0.5,
        "use_causal_mask": True,
        "use_padding_mask": True,
        "seq_len_q": plan.lengths,
        "seq_len_kv": plan.lengths,
    }
