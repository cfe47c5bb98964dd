"""A stage's part of the model: what other stages have is taken out before there is memory.

While the model answers or is scored (`relayed`), every stage calls the whole model all the same. The hidden states that
a chunk ends with, and what the head makes of them, go from the stage that computes them to all others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.config.schema import Config
from internlm.core.collectives import Group
from internlm.core.mesh import Mesh
from internlm.model.transformer import Transformer
from internlm.ops.cross_entropy import LossOutput
from internlm.parallel.split import pipeline_layout
from internlm.utils.device import torch_dtype


class Absent(nn.Module):
    """In place of a part of the model that another stage has, so that names stay those of the whole model."""

    weight = None  # that of a tied embedding

    def forward(self, *args: object) -> Any:
        raise AssertionError("this part of the model is on another stage")


def cut_stages(model: Transformer, config: Config, mesh: Mesh) -> list[str]:
    """Takes from a model on the meta device what other stages have.

    Returns the names of parameters that first and last stage have both: the tied embedding, unless its two uses are on
    one stage.
    """
    layout, stage = pipeline_layout(config), mesh.coordinates["pipeline"]
    here = set(layout.parts_of(stage))
    copied = config.model.tie_word_embeddings and layout.stage_of[0] != layout.stage_of[-1]
    if copied and "head" in here:
        here.add("embedding")
    for index in range(len(model.layers)):
        if f"layers.{index}" not in here:
            model.layers[index] = Absent()
    for name in ("embedding", "head"):
        if name not in here:
            setattr(model, name, Absent())
    return ["embedding.weight"] if copied and "embedding" in here else []


@contextmanager
def relayed(model: Transformer, config: Config, mesh: Mesh) -> Iterator[None]:
    """Meanwhile each stage has the results of the whole model. Forward alone, and all stages call it alike."""
    layout, group = pipeline_layout(config), mesh.group("pipeline")
    dtype = torch_dtype(config.model.dtype)
    between = torch.float32 if config.model.residual_in_fp32 else dtype
    undo: list[Callable[[], None]] = []

    def relay(module: nn.Module, source: int | None, blank: Callable[..., Any]) -> None:
        """`blank` makes room for the module's result; `source`: the stage that sends it, None: nobody needs it."""
        if isinstance(module, Absent):
            module.forward = partial(_received, group, source, blank)  # type: ignore[method-assign]
            undo.append(partial(delattr, module, "forward"))
        elif source is not None:
            undo.append(module.register_forward_hook(partial(_send, group, source)).remove)

    def hidden(dtype: torch.dtype, tokens: Tensor, *_: object) -> Tensor:
        return torch.empty(len(tokens), config.model.hidden_size, dtype=dtype, device=mesh.device)

    def judged(x: Tensor, tied: Tensor | None, labels: Tensor | None = None, *_: object) -> Tensor | LossOutput:
        if labels is None:
            return x.new_empty(len(x), config.model.vocab_size // mesh.sizes["tensor"], dtype=dtype)
        losses = x.new_empty(len(x), dtype=torch.float32)
        return LossOutput(losses.sum(), losses, labels.new_empty(len(x), dtype=torch.bool))

    if mesh.sizes["pipeline"] > 1:
        relay(model.embedding, None, partial(hidden, dtype))
        ends = {layers[-1]: stage for layers, stage in zip(layout.layers[:-1], layout.stage_of, strict=False)}
        for index, layer in enumerate(model.layers):
            relay(layer, ends.get(index), partial(hidden, between) if index in ends else _same)
        relay(model.head, layout.stage_of[-1], judged)
    try:
        yield
    finally:
        for one in undo:
            one()


def _same(x: Tensor, *_: object) -> Tensor:
    return x


def _received(group: Group, source: int | None, blank: Callable[..., Any], *args: Any) -> Any:
    result = blank(*args)
    return result if source is None else _sent(group, source, result)


def _send(group: Group, source: int, module: nn.Module, args: Any, result: Any) -> Any:
    return _sent(group, source, result)


def _sent(group: Group, source: int, result: Any) -> Any:
    """`result`, a tensor or what the head says of a row, as the stage `source` has it."""
    for tensor in (result,) if isinstance(result, Tensor) else result[1:]:  # `loss_sum` is for training
        dist.broadcast(tensor, group=group, group_src=source)
    return result
