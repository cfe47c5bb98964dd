"""A checkpoint of any layout goes on, on any other, as if it had never stopped, and generates."""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.apis.generate import generate, load_model
from internlm.checkpoint.checkpointer import Checkpointer
from internlm.config.schema import Config
from internlm.model.batch import Batch, Segments
from internlm.model.transformer import build_model
from internlm.train.trainer import Trainer
from tests.parallel.layouts import DENSE, EXPERTS, LAYOUTS
from tests.parallel.oracle import build_trainer, make_config
from tests.pool import run_ranks

SAVED, END = 1, 6  # steps before the save, and in all
RELATIVE = 1e-6


def circle(names: Collection[str], step: int) -> list[tuple[str, str]]:
    """Each with the one that is so many places further on."""
    order = list(names)
    return [(name, order[(index + step) % len(order)]) for index, name in enumerate(order)]


# Neighbours in a circle, and some that are further apart.
PAIRS = [*circle(DENSE, 1), *circle(DENSE, 3)[::2], *circle(EXPERTS, 1), *circle(EXPERTS, 2)[1:]]


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    engine = trainer.optimizer
    found = {name: engine.full_parameter(name) for name in engine.parameter_names()}
    return found | {name: buffer.clone() for name, buffer in engine.buffers.items()}


def save(rank: int, world_size: int, config: Config, folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Trains, saves, goes on: the parameters that were saved, and the losses after."""
    trainer = build_trainer(rank, world_size, config, range(END))
    checkpointer = Checkpointer(config, folder, trainer.optimizer, trainer.state, trainer.mesh)
    saved, losses = {}, []
    for report in trainer.steps():
        if report.step == SAVED:
            checkpointer.save()
            saved = parameters(trainer)
        elif report.step > SAVED:
            losses.append(report.loss)
    checkpointer.close()
    return saved, losses


def load(rank: int, world_size: int, config: Config, folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Loads what `save` wrote: the parameters, and the next losses."""
    trainer = build_trainer(rank, world_size, config, range(SAVED, END))
    checkpointer = Checkpointer(config, folder, trainer.optimizer, trainer.state, trainer.mesh)
    checkpointer.resume()
    loaded = parameters(trainer)
    losses = [report.loss for report in trainer.steps()]
    checkpointer.close()
    return loaded, losses


def whole(results: list[tuple[dict[str, Tensor], list[float]]]) -> tuple[dict[str, Tensor], list[float]]:
    """All parameters, from all ranks; the losses, which all ranks tell alike."""
    assert all(losses == results[0][1] for _, losses in results)
    return {name: value for part, _ in results for name, value in part.items()}, results[0][1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a layout -> (folder of its checkpoint, what was saved, the losses after)."""

    @cache
    def run(name: str) -> tuple[Path, dict[str, Tensor], list[float]]:
        folder = tmp_path_factory.mktemp(name)
        layout = LAYOUTS[name]
        return folder, *whole(run_ranks(layout.ranks, save, make_config(layout.parallel, **layout.sections), folder))

    return run


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_goes_on(source: str, target: str, unbroken: Any) -> None:
    folder, saved, losses = unbroken(source)
    layout = LAYOUTS[target]
    config = make_config(layout.parallel, **layout.sections)
    loaded, next_losses = whole(run_ranks(layout.ranks, load, config, folder))
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    assert len(next_losses) == END - SAVED
    assert next_losses == pytest.approx(losses, rel=RELATIVE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_generates_what_was_trained(name: str, unbroken: Any) -> None:
    """Loaded for generation, the model continues a prompt as the saved parameters do in a plain forward pass."""
    folder, saved, _ = unbroken(name)
    layout = LAYOUTS[name]
    plain = build_model(make_config(None, **layout.sections), "cpu").eval()
    plain.load_state_dict(saved)
    model, _ = load_model(folder / "checkpoints", "cpu")
    prompt = [3, 1, 4, 1, 5]
    (found,) = generate(model, [prompt], max_new_tokens=6)
    row = list(prompt)
    for _ in range(6):
        tokens = torch.tensor(row)
        batch = Batch(tokens, tokens, torch.arange(len(row)), Segments.of((len(row),)), None, 0)
        row.append(int(plain(batch)[-1].argmax()))
    assert found == row[len(prompt) :]
