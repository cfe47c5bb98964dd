"""A checkpoint of any layout goes on, on any other, as if it had never stopped, and generates."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.apis.generate import generate, load_model
from internlm.checkpoint.checkpointer import Checkpointer
from internlm.config.schema import Config
from internlm.core.placement import Box
from internlm.model.batch import Batch, Segments
from internlm.model.transformer import build_model
from internlm.train.metrics import StepReport
from internlm.train.trainer import Trainer
from tests.parallel.layouts import DENSE, EXPERTS, LAYOUTS, Layout
from tests.parallel.oracle import build_trainer, make_config
from tests.pool import run_ranks

SAVED, END = 1, 6  # steps before the save, and in all
RELATIVE = {"torch.float32": 1e-6, "torch.bfloat16": 3e-3, "torch.float16": 3e-3}  # in 16 bits layouts round otherwise
GROWING = {"fp16": {"initial_scale": 2.0**10, "growth_interval": 2}}  # it counts good steps, across the save as well


def in_16_bits(dtype: str, *names: str) -> dict[str, Layout]:
    """Some of the layouts, with parameters and gradients in `dtype`, under names of their own."""
    found = {}
    for name in names:
        old = LAYOUTS[name]
        model = {**old.sections.get("model", {}), "dtype": f"torch.{dtype}"}
        sections = {**old.sections, "model": model, "grad_scaler": GROWING}
        found[f"{dtype}-{name}"] = replace(old, sections=sections)
    return found


def circle(names: Collection[str], step: int = 1) -> list[tuple[str, str]]:
    """Each with the one `step` places on."""
    order = list(names)
    return list(zip(order, [*order[step:], *order[:step]], strict=True))


BF16 = in_16_bits("bfloat16", "zbv-ddp", "fsp2-zero3")
FP16 = in_16_bits("float16", "dualpipev-msp2", "ring2-ulysses2")
BF16_EXPERTS = in_16_bits("bfloat16", "moe-ep2-zero3", "moe-ep2-pp2")
SIXTEEN = {**BF16, **FP16, **BF16_EXPERTS}
ALL = {**LAYOUTS, **SIXTEEN}
FP32 = [*circle(DENSE), *circle(DENSE, 3), *circle(EXPERTS)]
PAIRS = [*FP32, *(pair for some in (BF16, FP16, BF16_EXPERTS) for pair in circle(some))]

Boxes = dict[tuple[str, str], list[tuple[Box, Tensor]]]  # (name, kind) -> parts of a global tensor


@dataclass
class Part:
    """What one rank has: its parameters, gathered, and those parts of the optimizer's states that it updates."""

    parameters: dict[str, Tensor]
    states: Boxes
    losses: list[float] = field(default_factory=list)  # of the steps after
    scales: list[float] = field(default_factory=list)  # likewise, of losses


def contents(trainer: Trainer) -> Part:
    engine = trainer.optimizer
    found = {name: engine.full_parameter(name) for name in engine.parameter_names()}
    states: Boxes = defaultdict(list)
    for piece in engine.pieces():
        if piece.kind != "param":
            states[piece.name, piece.kind].append((piece.box, piece.read().clone()))
    return Part(found | {name: buffer.clone() for name, buffer in engine.buffers.items()}, dict(states))


def save(rank: int, world_size: int, config: Config, folder: Path) -> Part:
    """Trains, saves, goes on: what was saved, and the losses after."""
    trainer = build_trainer(rank, world_size, config, range(END))
    checkpointer = Checkpointer(config, folder, trainer.optimizer, trainer.state, trainer.mesh)
    steps = trainer.steps()
    for report in steps:
        if report.step == SAVED:
            checkpointer.save()
            break
    return go_on(contents(trainer), steps, checkpointer)


def load(rank: int, world_size: int, config: Config, folder: Path) -> Part:
    """Loads what `save` wrote, and goes on."""
    trainer = build_trainer(rank, world_size, config, range(SAVED, END))
    checkpointer = Checkpointer(config, folder, trainer.optimizer, trainer.state, trainer.mesh)
    checkpointer.resume()
    return go_on(contents(trainer), trainer.steps(), checkpointer)


def go_on(part: Part, steps: Iterator[StepReport], checkpointer: Checkpointer) -> Part:
    for report in steps:
        part.losses.append(report.loss)
        part.scales.append(report.loss_scale)
    checkpointer.close()
    return part


def whole(parts: list[Part]) -> tuple[dict[str, Tensor], Part]:
    """All parameters and, as "master NAME" and so on, states, from all ranks; the losses, which all tell alike."""
    first = parts[0]
    assert all((part.losses, part.scales) == (first.losses, first.scales) for part in parts)
    found = {name: value for part in parts for name, value in part.parameters.items()}
    for part in parts:
        for (name, kind), boxes in part.states.items():
            state = found.setdefault(f"{kind} {name}", torch.full(found[name].shape, torch.nan))
            for box, value in boxes:
                state[tuple(slice(*span) for span in box)] = value
    return found, first


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a layout -> (folder of its checkpoint, what was saved, what came after)."""

    @cache
    def run(name: str) -> tuple[Path, dict[str, Tensor], Part]:
        folder = tmp_path_factory.mktemp(name)
        layout = ALL[name]
        return folder, *whole(run_ranks(layout.ranks, save, make_config(layout.parallel, **layout.sections), folder))

    return run


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_goes_on(source: str, target: str, unbroken: Any) -> None:
    folder, saved, after = unbroken(source)
    layout = ALL[target]
    config = make_config(layout.parallel, **layout.sections)
    loaded, found = whole(run_ranks(layout.ranks, load, config, folder))
    assert loaded.keys() == saved.keys()
    assert {name.split()[0] for name in saved if " " in name} == (
        {"exp_avg", "exp_avg_sq"} | ({"master"} if source in SIXTEEN else set())
    )
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    assert len(found.losses) == END - SAVED
    assert found.losses == pytest.approx(after.losses, rel=RELATIVE[config.model.dtype])
    assert found.scales == after.scales


@pytest.mark.parametrize("name", LAYOUTS)
def test_generates_what_was_trained(name: str, unbroken: Any) -> None:
    """Loaded for generation, the model continues a prompt as the saved parameters do in a plain forward pass."""
    folder, saved, _ = unbroken(name)
    layout = LAYOUTS[name]
    parameters = {key: value for key, value in saved.items() if " " not in key}
    plain = build_model(make_config(None, **layout.sections), "cpu").eval()
    plain.load_state_dict(parameters)
    model, _ = load_model(folder / "checkpoints", "cpu")
    prompt = [3, 1, 4, 1, 5]
    (found,) = generate(model, [prompt], max_new_tokens=6)
    row = list(prompt)
    for _ in range(6):
        tokens = torch.tensor(row)
        batch = Batch(tokens, tokens, torch.arange(len(row)), Segments.of((len(row),)), None, 0)
        row.append(int(plain(batch)[-1].argmax()))
    assert found == row[len(prompt) :]
