"""Experts of 2023: one file for each, layer, number and tensor rank in its name, its keys counted like the stage's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internlm.utils.errors import UserError

_FILE = re.compile(r"model_moe_layer(?P<layer>\d+)_expert(?P<expert>\d+)_tp(?P<tp>\d+)\.pt")
_KEY = re.compile(r"(?P<block>.*)mlp\.moe_layer\.experts\.(?:wrapped_)?experts\.(?P<expert>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Block:
    """A transformer block in the files of a stage."""

    layer: int  # global
    chunk: int
    stage: int
    prefix: str  # of its keys, such as "model.blocks.0."


def expert_files(names: Sequence[str]) -> dict[tuple[int, int], dict[int, str]]:
    """(layer, expert) -> tensor rank -> file, by the layers' numbers in the names."""
    found: dict[tuple[int, int], dict[int, str]] = {}
    for name in names:
        if match := _FILE.fullmatch(name):
            found.setdefault((int(match["layer"]), int(match["expert"])), {})[int(match["tp"])] = name
    return found


def check_complete(
    files: Mapping[tuple[int, int], Mapping[int, str]], num_layers: int, num_experts: int, ranks: int, path: str
) -> None:
    """Raises UserError naming a file that is missing, or one of an expert that the model doesn't have."""
    for (layer, expert), by_rank in files.items():
        if layer >= num_layers or expert >= num_experts:
            raise UserError(
                f"{path} holds {next(iter(by_rank.values()))}, but its model files are of {num_layers} layers with "
                f"{num_experts} experts; the file is of another run"
            )
    for layer in range(num_layers):
        for expert in range(num_experts):
            missing = set(range(ranks)) - files.get((layer, expert), {}).keys()
            if missing:
                raise UserError(f"{path} lacks model_moe_layer{layer}_expert{expert}_tp{min(missing)}.pt")


def number_blocks(blocks: Sequence[Block], keys: Sequence[tuple[int, str]], path: str) -> dict[int, Block]:
    """The block that each number in the names of expert files means. `keys`: that number and a key of each file.

    The numbers are those of the layers in the model; with interleaved chunks InternEvo counted through a stage first.
    The chunk in the keys tells which. Raises UserError where neither fits.
    """
    for order in (blocks, sorted(blocks, key=lambda block: (block.stage, block.chunk, block.layer))):
        if all(_block_of(key) == order[number].prefix for number, key in keys):
            return dict(enumerate(order))
    number, key = next((n, key) for n, key in keys if _block_of(key) != blocks[n].prefix)
    raise UserError(
        f"{path}: a file of experts of layer {number} holds {key}, where model files have "
        f"{blocks[number].prefix}*; they are of different runs"
    )


def _block_of(key: str) -> str:
    match = _KEY.fullmatch(key)
    return match["block"] if match else ""


def parse_key(key: str) -> tuple[int, str] | None:
    """(1, "w2.weight") of an expert's key; None for any other."""
    match = _KEY.fullmatch(key)
    return (int(match["expert"]), match["rest"]) if match else None
