"""The experts of tiny folders of 2023, for `folders_2023`: their tensors, keys and files, from the format alone.

A model is given under GraniteMoE's names, the one family of transformers with biases beside experts; what that lacks, a
dense layer beside the experts, has names of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def random_experts(g: Any, layer: str, hidden: int, ffn: int, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The feed-forward tensors of a layer with experts."""
    moe = f"{layer}.block_sparse_moe"
    weights = {
        f"{moe}.router.layer.weight": normal(g.num_experts, hidden),
        f"{moe}.input_linear.weight": normal(g.num_experts, 2 * ffn, hidden),  # gate, up
        f"{moe}.output_linear.weight": normal(g.num_experts, hidden, ffn),
    }
    if g.residual:
        weights |= {f"{layer}.residual.{name}": normal(ffn, hidden) for name in ("gate", "up")}
        weights[f"{layer}.residual.down"] = normal(hidden, ffn)
        weights |= {f"{layer}.coefficient.weight": normal(2, hidden), f"{layer}.coefficient.bias": normal(2)}
    return weights


def moe_tensors(
    g: Any,
    layer: str,
    whole: dict[str, Tensor],
    experts: Iterable[int],
    column: Callable[[Tensor], Tensor],
    row: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What the feed-forward module of a tensor rank held of these experts, in the order of its modules."""
    moe = f"{layer}.block_sparse_moe"
    state = {"moe_layer.gate.wg.weight": whole[f"{moe}.router.layer.weight"]}
    for e in experts:
        gate, up = whole[f"{moe}.input_linear.weight"][e].chunk(2)
        down = whole[f"{moe}.output_linear.weight"][e]
        name = f"moe_layer.experts.{'wrapped_experts' if g.wrapped else 'experts'}.{e}"
        state |= {f"{name}.{key}": value for key, value in _mlp(g, column(gate), column(up), row(down)).items()}
    if g.residual:
        gate, up, down = (whole[f"{layer}.residual.{name}"] for name in ("gate", "up", "down"))
        mlp = _mlp(g, column(gate), column(up), row(down))
        state |= {f"residual_mlp.{key}": value for key, value in mlp.items()}
        state |= {f"coefficient.{kind}": whole[f"{layer}.coefficient.{kind}"] for kind in ("weight", "bias")}
    return state


def _mlp(g: Any, gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    names = ("w1", "w2", "w3") if g.old_mlp else ("w1", "w3", "w2")
    return dict(sorted((f"{name}.weight", value) for name, value in zip(names, (gate, up, down), strict=True)))


def split_files(
    state: "OrderedDict[str, Tensor]",
) -> tuple[dict[str, Tensor], dict[tuple[str, int], dict[str, Tensor]]]:
    """A rank's state dict without its experts, and (block, expert) -> the tensors of one expert."""
    dense: dict[str, Tensor] = OrderedDict()
    experts: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, value in state.items():
        block, _, rest = key.partition(".mlp.moe_layer.experts.")
        if rest:
            experts.setdefault((block, int(rest.split(".")[1])), {})[key] = value
        else:
            dense[key] = value
    return dense, experts


def write_experts(
    folder: Path, experts: dict[tuple[str, int], dict[str, Tensor]], first: int, t: int, dtype: torch.dtype
) -> None:
    """One file for each; `first`: the number of the stage's first layer in the model."""
    blocks = list(dict.fromkeys(block for block, _ in experts))
    for (block, expert), tensors in experts.items():
        name = f"model_moe_layer{first + blocks.index(block)}_expert{expert}_tp{t}.pt"
        torch.save({key: value.to(dtype) for key, value in tensors.items()}, folder / name)
