"""Draws the pictures of the documentation from the tables that the code computes with: `python tools/pictures.py`.

They are SVG files in doc/pictures/.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from rich.console import Console

from internlm.config.loader import load_config
from internlm.config.schema import ParallelConfig
from internlm.core.mesh import MODEL_AXES, ZERO_AXES, axes_of_world, coordinates_of
from internlm.data.sources import open_train
from internlm.data.tokenizer import open_tokenizer
from internlm.parallel.zigzag import own_segments, spans
from tools.inspect_data import coloured

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "doc" / "pictures"
COLOURS = ("#2a6fbb", "#e08a1e", "#3a9a5b", "#b8447a", "#6a5acd", "#8c6d31", "#178a9a", "#777777")  # of ranks
MEANING = {
    "pipeline": "stage of the model",
    "data": "which rows it reads",
    "ring": "part of a row",
    "ulysses": "part of a row",
    "tensor": "part of every matrix",
    "replica": "copy of everything",
    "optim": "shares optimizer states",
    "grad": "shares gradients as well",
    "param": "shares parameters as well",
    "expert": "which experts it holds",
}
Cell = tuple[int, int]  # (rank, step) that computes a pair of tokens


def zigzag(lengths: tuple[int, ...]) -> str:
    """Which rank of a ring of 4 computes which pairs of tokens of a row with documents of `lengths`."""
    ring, tokens, size, margin = 4, sum(lengths), 6, 60
    edge = tokens * size
    shapes = [
        f'<rect x="{margin + key * size}" y="{margin + query * size}" width="{(stop - key) * size}" height="{size}" '
        f'fill="{COLOURS[rank]}" fill-opacity="{1.0 if step == 0 else 0.55}"/>'
        for query, key, stop, (rank, step) in _runs(_pairs(lengths, ring), tokens)
    ]
    for rank in range(ring):
        for start, stop in spans(tokens, ring, rank):
            place, length = margin + start * size, (stop - start) * size
            fill = f'fill="{COLOURS[rank]}"'
            shapes.append(f'<rect x="{place}" y="{margin - 22}" width="{length - 1}" height="14" {fill}/>')
            shapes.append(f'<rect x="{margin - 22}" y="{place}" width="14" height="{length - 1}" {fill}/>')
            shapes.append(_text(place + length / 2, margin - 28, f"rank {rank}"))
            line = f'x1="{margin}" x2="{margin + edge}" y1="{place}" y2="{place}"'
            shapes.append(f'<line {line} stroke="#999" stroke-dasharray="2 3"/>')
    for end in accumulate((0, *lengths)):
        place = margin + end * size
        shapes.append(f'<line x1="{place}" x2="{place}" y1="{margin - 6}" y2="{margin}" stroke="#222"/>')
        shapes.append(f'<line y1="{place}" y2="{place}" x1="{margin - 6}" x2="{margin}" stroke="#222"/>')
    shapes.append(f'<rect x="{margin}" y="{margin}" width="{edge}" height="{edge}" fill="none" stroke="#222"/>')
    shapes.append(_text(margin + edge / 2, 16, "keys: chunks of the row and their ranks, documents between the ticks"))
    shapes.append(_text(margin + edge / 2, margin + edge + 20, "full: step 0, own tokens; pale: at most one rectangle"))
    shapes.append(_text(margin + edge / 2, margin + edge + 36, "per pair of ranks, with keys received in a later step"))
    return _svg(edge + margin + 20, edge + margin + 50, shapes)


def mesh(ranks: int, parallel: dict[str, Any]) -> str:
    """Where each rank stands on the axes of more than one rank: those of the model, and those by which Hybrid ZeRO
    shares dense and expert parameters out. Nodes have 8 ranks."""
    model, dense, expert = axes_of_world(ParallelConfig.model_validate(parallel), ranks)
    sections = [("the model", model, MODEL_AXES), ("Hybrid ZeRO of dense parameters", dense, ZERO_AXES)]
    if expert["expert"] > 1:
        sections.append(("experts, and Hybrid ZeRO of these", expert, ("expert", *ZERO_AXES)))
    left, cell, height, y = 250, 30, 20, 44
    shapes = [
        f'<rect x="{left + node * cell}" y="8" width="{cell * 8 - 4}" height="16" fill="#ddd"/>'
        + _text(left + (node + 4) * cell - 2, 20, f"node {node // 8}")
        for node in range(0, ranks, 8)
    ]
    shapes += [_text(left + rank * cell + cell / 2 - 1, y - 6, str(rank)) for rank in range(ranks)]
    for title, sizes, axes in sections:
        shapes.append(_text(8, y + 16, title, "start", "bold"))
        y += 24
        for axis in (axis for axis in axes if sizes[axis] > 1):
            shapes.append(_text(8, y + 14, f"{axis} {sizes[axis]}: {MEANING[axis]}", "start"))
            for rank in range(ranks):
                place = coordinates_of(rank, sizes)[axis]
                x, colour = left + rank * cell, COLOURS[place % len(COLOURS)]
                shapes.append(f'<rect x="{x}" y="{y}" width="{cell - 3}" height="{height - 2}" fill="{colour}"/>')
                shapes.append(_text(x + cell / 2 - 1, y + 14, str(place), fill="white"))
            y += height
    return _svg(left + ranks * cell + 8, y + 10, shapes)


def sample(config: str, number: int) -> str:
    """A sample as tools/inspect_data.py shows it."""
    data = load_config(ROOT / config).data
    file = open_train(data.model_copy(update={"train_folder": str(ROOT / str(data.train_folder))}), 1024).files[0]
    console = Console(record=True, width=96, file=StringIO(), highlight=False)
    console.print(coloured(file, number, open_tokenizer(ROOT / str(data.tokenizer_path))))
    svg = console.export_svg(title=f"tools/inspect_data.py --config {config} --sample {number}", unique_id="sample")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # nothing is fetched to look at it


def _pairs(lengths: tuple[int, ...], ring: int) -> dict[tuple[int, int], Cell]:
    """(query, key) -> who computes it when, from the tables of the ring."""
    found: dict[tuple[int, int], Cell] = {}
    parts = [[t for span in spans(sum(lengths), ring, rank) for t in range(*span)] for rank in range(ring)]
    for rank, own in enumerate(parts):
        segments = own_segments(lengths, ring, rank)
        for end, length in zip(accumulate(segments.lengths), segments.lengths, strict=True):
            places = range(end - length, end)
            found.update({(own[q], own[k]): (rank, 0) for q in places for k in places if k <= q})
        for number, step in enumerate(segments.steps, 1):
            if step.compute is not None:
                keys = parts[(rank - number) % ring][step.compute.keys]
                found.update({(q, k): (rank, number) for q in own[step.compute.queries] for k in keys})
    return found


def _runs(pairs: dict[tuple[int, int], Cell], tokens: int) -> Iterator[tuple[int, int, int, Cell]]:
    """(query, first key, end of keys, cell) of neighbours with the same cell."""
    for query in range(tokens):
        for cell, keys in groupby(range(tokens), lambda key, query=query: pairs.get((query, key))):
            run = list(keys)
            if cell is not None:
                yield query, run[0], run[-1] + 1, cell


def _text(x: float, y: float, text: str, anchor: str = "middle", weight: str = "", fill: str = "") -> str:
    style = (f' font-weight="{weight}"' if weight else "") + (f' fill="{fill}"' if fill else "")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{text}</text>'


def _svg(width: int, height: int, shapes: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([f'{head} font-size="12">', background, *shapes, "</svg>", ""])


PICTURES: dict[str, Callable[[], str]] = {
    "zigzag_whole.svg": partial(zigzag, (64,)),
    "sample.svg": partial(sample, "configs/demo_sft.py", 1),
    "zigzag_packed.svg": partial(zigzag, (9, 30, 1, 20, 4)),
    "mesh.svg": partial(
        mesh,
        16,
        {
            "pipeline": {"size": 2},
            "context": {"ulysses": 2},
            "tensor": {"size": 2},
            "weight": {"size": 2},
            "zero1": {"size": -1},
        },
    ),
    "mesh_experts.svg": partial(mesh, 16, {"tensor": {"size": 2}, "expert": {"size": 8}}),
}


def main() -> None:
    """Write all pictures."""
    argparse.ArgumentParser(description="Draws the pictures of the documentation into doc/pictures/.").parse_args()
    os.chdir(ROOT)  # where the config's own paths start
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
