"""The memory that a rank will need, computed without allocating it.

Parameters, gradients and optimizer states are exact: the engine's own plan of buffers, on a model without memory, on
one rank of a simulated world. Activations and short-lived buffers are estimates by the formulas below, which a test
compares with autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from internlm.config.schema import Config, ModelConfig
from internlm.core.launch import simulated_world
from internlm.core.mesh import Axes, Mesh, build_mesh
from internlm.model.transformer import build_model
from internlm.ops.cross_entropy import CHUNK_ELEMENTS
from internlm.ops.nf4 import BITS
from internlm.parallel.compile import RECOMPUTES_NORMS, why_not_compiled
from internlm.parallel.parallelize import parallelize
from internlm.parallel.pipeline_layout import pipeline_layout
from internlm.parallel.recompute import num_recomputed
from internlm.parallel.timetable import compute_table
from internlm.solver.buckets import UnitLayout, plan_units
from internlm.utils.device import torch_dtype


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by class."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    gathered: int  # whole units that live while they are computed or reduced
    activations: int
    head: int  # the loss: gradient of the head's weight, a chunk of logits
    host: int  # activations that wait in the host's memory (model.checkpoint="offload")

    @property
    def total(self) -> int:
        """On the device."""
        return sum(vars(self).values()) - self.host


def memory_per_rank(config: Config, world_size: int) -> Memory:
    """Memory of the fullest rank. Ranks of one pipeline stage hold equal shares."""
    stages = config.parallel.pipeline.size
    return max(
        (_memory_of(config, stage * (world_size // stages), world_size) for stage in range(stages)),
        key=lambda memory: memory.total,
    )


def layouts_of(config: Config, mesh: Mesh) -> list[UnitLayout]:
    """The engine's plan for one rank."""
    model = build_model(config, device="meta")
    return plan_units(model, config, mesh, parallelize(model, config, mesh))


def _memory_of(config: Config, rank: int, world_size: int) -> Memory:
    with simulated_world(rank, world_size) as world:
        mesh = build_mesh(config.parallel, world)
        layouts = layouts_of(config, mesh)
    sizes = [_unit_bytes(config, layout, mesh.expert if layout.kind == "expert" else mesh.dense) for layout in layouts]
    parameters, gradients, masters, moments = (sum(column) for column in zip(*sizes, strict=True))
    if config.dpo is not None and config.dpo.reference == "each_step":
        parameters *= 2  # the reference's
    p, g, _ = shares(mesh.dense)
    largest = max(layouts, key=lambda layout: layout.size)
    # The unit at work and the next one, fetched ahead; a gradient before it is reduced.
    num_gathered = 2 if config.parallel.weight.overlap else 1
    made_for_use = (layout.size * layout.dtype.itemsize for layout in layouts if p > 1 or layout.packed)
    gathered = num_gathered * max(made_for_use, default=0)
    gathered += largest.size * _grad_dtype(config, largest).itemsize if g > 1 else 0
    activations = _activations(config, mesh)
    head = _head(config, mesh) if "head" in {name for layout in layouts for name in layout.modules} else 0
    host = _offloaded(config, mesh) if config.model.checkpoint == "offload" else 0
    return Memory(parameters, gradients, masters, moments, gathered, activations, head, host)


def shares(axes: Axes) -> tuple[int, int, int]:
    """(p, g, os): into how many parts parameters, gradients and optimizer states are cut."""
    p = axes.sizes["param"]
    g = p * axes.sizes["grad"]
    return p, g, g * axes.sizes["optim"]


def _grad_dtype(config: Config, layout: UnitLayout) -> torch.dtype:
    return torch.float32 if config.hybrid_zero_optimizer.grad_dtype == "torch.float32" else layout.dtype


def _unit_bytes(config: Config, layout: UnitLayout, axes: Axes) -> tuple[int, int, int, int]:
    """(parameters, gradients, masters, moments) in bytes that one rank keeps of a unit."""
    p, g, os = shares(axes)
    engine = config.hybrid_zero_optimizer
    master = 2 if engine.master == "split" else 4
    if layout.dtype == torch.float32:
        master = 0  # the parameters themselves
    moment = torch_dtype(engine.moment_dtype).itemsize
    if layout.packed:
        return int(layout.size // p * BITS / 8), 0, 0, 0
    if not layout.trainable:
        return layout.size // p * layout.dtype.itemsize, 0, 0, 0
    return (
        layout.size // p * layout.dtype.itemsize,
        layout.size // g * _grad_dtype(config, layout).itemsize,
        layout.size // os * master,
        layout.size // os * 2 * moment,
    )


def saved_per_token(model: ModelConfig, tensor: int = 1, mode: str = "mtp") -> float:
    """Bytes that autograd keeps of one token of a row in one block that is not recomputed, on one of `tensor` ranks."""
    saved = around_feed_forward(model, tensor, mode) + inside_feed_forward(model, tensor, mode) / tensor
    if _dense_width(model):
        return saved
    # nothing but the router keeps a layer's input, which is counted there; experts keep their rows of it
    return saved - model.hidden_size * torch_dtype(model.dtype).itemsize / (tensor if mode == "fsp" else 1)


def around_feed_forward(model: ModelConfig, tensor: int = 1, mode: str = "mtp") -> float:
    """Likewise where the inside of the feed-forward layer is computed again from its input."""
    item = torch_dtype(model.dtype).itemsize
    residual = 4 if model.residual_in_fp32 else item
    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_size
    key_value = 2 * model.num_kv_heads * model.head_size
    streams = 2 * hidden * residual  # inputs of both norms
    normed = normed_per_token(model)
    attention = (query + key_value) * item  # rotated queries and keys, values
    attention += query * item + model.num_attention_heads * 4  # output (input of wo) and log-sum-exp
    outside = streams / (1 if mode == "mtp" else tensor) + normed / (tensor if mode == "fsp" else 1)
    return outside + attention / tensor


def normed_per_token(model: ModelConfig) -> int:
    """Inputs of wqkv and of the feed-forward layer."""
    return 2 * model.hidden_size * torch_dtype(model.dtype).itemsize


def inside_feed_forward(model: ModelConfig, tensor: int = 1, mode: str = "mtp") -> int:
    """Bytes that autograd keeps of one token inside a feed-forward layer, on all of `tensor` ranks together: gate, up
    and product of the dense part, and what routed experts need."""
    item = torch_dtype(model.dtype).itemsize
    return 3 * _dense_width(model) * item + _routed_per_token(model, item, tensor, mode)


def _dense_width(model: ModelConfig) -> int:
    """Width of the feed-forward layer, or of the shared experts: of the part that sees every token."""
    return model.ffn_size if model.num_experts == 1 else model.moe.num_shared_experts * model.expert_size


def _routed_per_token(model: ModelConfig, item: int, tensor: int, mode: str) -> int:
    """What autograd keeps of a token that goes to experts; each is routed on one of the tensor ranks."""
    if model.num_experts == 1:
        return 0
    hidden, top_k = model.hidden_size, model.moe.top_k
    router = 2 * model.num_experts * 4 + _router_input(model, item, tensor, mode)  # logits and scores
    choices = top_k * (3 * 8 + 3 * 4)  # experts and places, weights
    return router + choices + top_k * (2 * hidden + 3 * model.expert_size) * item  # rows in and out, gate, up, product


def _router_input(model: ModelConfig, item: int, tensor: int, mode: str) -> int:
    """What the router keeps of its input for itself."""
    if item < 4 and model.moe.router_fp32:
        return model.hidden_size * 4  # a copy
    if model.moe.num_shared_experts and (mode != "msp" or tensor == 1):
        return 0  # shared experts keep the same; in msp theirs is gathered
    # in mtp each rank's part of the tokens is a view, which keeps those of all
    return model.hidden_size * item * (tensor if mode == "mtp" else 1)


def selected_per_token(model: ModelConfig, tensor: int = 1, mode: str = "mtp", ring: int = 1) -> float:
    """Likewise where results of matrix products and attention are kept alone (model.checkpoint="selective"); in a ring,
    those of all its steps, each of which has on average three quarters of the queries in rows of one document."""
    item = torch_dtype(model.dtype).itemsize
    query = model.num_attention_heads * model.head_size
    key_value = 2 * model.num_kv_heads * model.head_size
    outside = model.hidden_size * ((4 if model.residual_in_fp32 else item) + item)  # block's input, wo
    outside += model.hidden_size * item if _dense_width(model) else 0  # w2
    attended = (1 + 0.75 * (ring - 1)) * (query * item + model.num_attention_heads * 4)
    inside = (query + key_value + 2 * _dense_width(model)) * item + attended
    if model.num_experts > 1:
        inside += model.num_experts * (4 if model.moe.router_fp32 else item)  # logits
        inside += model.moe.top_k * (2 * model.expert_size + model.hidden_size) * item  # experts' products
    return outside / (1 if mode == "mtp" else tensor) + inside / tensor


def _activations(config: Config, mesh: Mesh) -> int:
    """Saved for backward by all micro batches that are under way; one recomputed block is whole again while it is
    differentiated, and of the one after it in backward an offloaded product is back already."""
    model, tensor, mode = config.model, mesh.sizes["tensor"], config.parallel.tensor.mode
    item = 4 if model.residual_in_fp32 else torch_dtype(model.dtype).itemsize
    block = saved_per_token(model, tensor, mode)
    stream = model.hidden_size * item / (1 if mode == "mtp" else tensor)
    selected = selected_per_token(model, tensor, mode, mesh.sizes["ring"])

    around, inside = around_feed_forward(model, tensor, mode), inside_feed_forward(model, tensor, mode) / tensor
    compiled = why_not_compiled(config, mesh, "cuda") is None  # on a GPU, whatever this machine is
    if compiled and model.checkpoint in RECOMPUTES_NORMS:
        around -= normed_per_token(model)

    def of_chunk(num_blocks: int) -> float:
        if model.checkpoint == "feed_forward":
            return num_blocks * around
        if model.checkpoint == "offload":
            return num_blocks * around + inside * 2 / 3  # the product of the last one stays
        if model.checkpoint == "selective":
            return num_blocks * selected
        recomputed = num_recomputed(num_blocks, model.recompute_fraction)
        return (num_blocks - recomputed) * block + recomputed * stream

    again = block if model.checkpoint else 0
    if model.checkpoint in ("feed_forward", "offload"):
        again = inside
    return int(_tokens(config, mesh) * (most_kept(config, mesh.coordinates["pipeline"], of_chunk) + again))


def _offloaded(config: Config, mesh: Mesh) -> int:
    """Gate and up of all blocks but the last of a chunk, of all micro batches that are under way."""
    of_block = inside_feed_forward(config.model) * 2 / 3 / mesh.sizes["tensor"]
    kept = most_kept(config, mesh.coordinates["pipeline"], lambda num_blocks: (num_blocks - 1) * of_block)
    return int(_tokens(config, mesh) * kept)


def most_kept(config: Config, stage: int, of_chunk: Callable[[int], float]) -> float:
    """The largest sum of `of_chunk(blocks of a chunk)` over what a stage has begun and not ended in a step: a micro
    batch is kept from a chunk's forward until the gradients of its weights are there."""
    layout, kept, most = pipeline_layout(config), 0.0, 0.0
    for action in compute_table(layout, config.data.micro_num)[stage]:
        size = of_chunk(len(layout.layers[action.chunk]))
        kept += {"F": size, "B": -size, "I": 0.0, "W": -size}[action.kind]
        most = max(most, kept)
    return most


def _head(config: Config, mesh: Mesh) -> int:
    """fp32 gradient of the head's weight from forward to backward, and a chunk of logits with its gradient."""
    model, tokens = config.model, _tokens(config, mesh)
    item, vocabulary = torch_dtype(model.dtype).itemsize, model.vocab_size // mesh.sizes["tensor"]
    chunk = min(CHUNK_ELEMENTS["cuda"], tokens * vocabulary)
    return vocabulary * model.hidden_size * 4 + chunk * (4 + item) + 2 * tokens * model.hidden_size * item


def _tokens(config: Config, mesh: Mesh) -> int:
    """Of a micro batch, between attention's exchanges."""
    return config.data.seq_len * config.data.micro_bsz // mesh.sequence_size
