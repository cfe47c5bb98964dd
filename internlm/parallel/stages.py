"""A stage's part of the model: the parts of other stages are removed before the model has memory.

While a model in training answers prompts or is scored (`relayed`), every stage calls the whole model nevertheless. The
hidden states at the end of each chunk and the results of the head are sent from the stage that has them to the others.
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
from internlm.parallel.pipeline_layout import pipeline_layout
from internlm.utils.device import torch_dtype


class Absent(nn.Module):
    """Stands for a part of the model that another stage has, so that names stay those of the whole model."""

    weight = None  # that of a tied embedding

    def forward(self, *args: object) -> Any:
        raise AssertionError("this part of the model is on another stage")


def cut_stages(model: Transformer, config: Config, mesh: Mesh) -> list[str]:
    """Removes from a model on the meta device the parts of other stages.

    Returns the names of the parameters that both the first and the last stage have: the tied embedding, unless its two
    uses are on one stage.
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
    """Inside the `with`, each stage gets the results of the whole model. Forward only; all stages call it alike."""
    layout, group = pipeline_layout(config), mesh.group("pipeline")
    dtype = torch_dtype(config.model.dtype)
    between = torch.float32 if config.model.residual_in_fp32 else dtype
    undo: list[Callable[[], None]] = []

    def relay(module: nn.Module, source: int | None, blank: Callable[..., Any]) -> None:
        """`blank` makes memory for the module's result; `source`: the stage that sends it, None if it isn't needed."""
        if isinstance(module, Absent):
            module.forward = partial(_received, group, source, blank)  # type: ignore[method-assign]
            undo.append(partial(delattr, module, "forward"))
        elif source is not None:
            undo.append(module.register_forward_hook(partial(_send, group, source)).remove)

    def hidden(dtype: torch.dtype, tokens: Tensor, *_: object) -> Tensor:
        return torch.empty(len(tokens), config.model.hidden_size, dtype=dtype, device=mesh.device)

    def head_result(x: Tensor, tied: Tensor | None, labels: Tensor | None = None, *_: object) -> Tensor | LossOutput:
        if labels is None:
            return x.new_empty(len(x), config.model.vocab_size // mesh.sizes["tensor"], dtype=dtype)
        losses = x.new_empty(len(x), dtype=torch.float32)
        return LossOutput(losses.sum(), losses, labels.new_empty(len(x), dtype=torch.bool))

    if mesh.sizes["pipeline"] > 1:
        relay(model.embedding, None, partial(hidden, dtype))
        ends = {layers[-1]: stage for layers, stage in zip(layout.layers[:-1], layout.stage_of, strict=False)}
        for index, layer in enumerate(model.layers):
            relay(layer, ends.get(index), partial(hidden, between) if index in ends else _same)
        relay(model.head, layout.stage_of[-1], head_result)
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
    """`result`, a tensor or a `LossOutput`, with the values of the stage `source`."""
    for tensor in (result,) if isinstance(result, Tensor) else result[1:]:  # `loss_sum` is for training
        dist.broadcast(tensor, group=group, group_src=source)
    return result
