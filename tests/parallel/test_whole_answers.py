"""A model in training answers every rank as the whole model would, prompts of any length, and then trains on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.apis.generate import prefill
from internlm.config.schema import Config
from internlm.core.collectives import all_gather
from internlm.model.attention import KVCache
from internlm.model.batch import Batch, Segments
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import whole_answers
from tests.parallel.layouts import FOUR, MOE, MOE_FOUR, Layout, context, experts, pipeline, tensor, zero
from tests.parallel.oracle import CPU, build_trainer, make_config
from tests.pool import run_ranks

SHARED: dict[str, Any] = {**MOE, "model": {**MOE["model"], "moe": {**MOE["model"]["moe"], "num_shared_experts": 1}}}
LAYOUTS: dict[str, Layout] = {
    "P-T zbv fsp": Layout(4, {**pipeline(2, "zbv"), **tensor(2, "fsp")}, FOUR),
    "R-U zero3": Layout(4, {**context(2, 2), **zero(4, 4, 4)}),
    "T-E mtp": Layout(2, {**tensor(2), **experts(2)}, SHARED),
    "T-E msp": Layout(2, {**tensor(2, "msp"), **experts(2)}, SHARED),
    "P-E dualpipev zero3": Layout(4, {**pipeline(2, "dualpipev"), **experts(2), **zero(2, 2, 2)}, MOE_FOUR),
    "R-E": Layout(2, {**context(ring=2), **experts(2)}, MOE),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8]]  # two tensor ranks can't share the first two equally


def row_of(prompt: list[int]) -> Batch:
    tokens = torch.tensor(prompt)
    return Batch(tokens, tokens, torch.arange(len(prompt)), Segments.of((len(prompt),)), None, 0)


def answered(rank: int, world_size: int, config: Config) -> tuple[list[Tensor], dict[str, Tensor], list[float]]:
    """Logits after a step, the parameters that this rank knows, and the losses of both steps."""
    trainer = build_trainer(rank, world_size, config, range(2), rows=8)
    engine, model, mesh = trainer.optimizer, trainer.schedule.model, trainer.mesh
    steps, losses, logits = trainer.steps(), [], []
    losses.append(next(steps).loss)
    model.eval()
    with whole_answers(model, config, mesh), torch.no_grad():
        for prompt in PROMPTS:
            cache = KVCache(model.config, 1, len(prompt), CPU, model.dtype, model.num_kv_heads)
            part = prefill(model, cache, torch.tensor([prompt]), torch.tensor([len(prompt)]))
            whole = part if mesh.sizes["tensor"] == 1 else all_gather(part.T, mesh.group("tensor")).wait().T
            logits.append(whole.clone())
    model.train()
    engine.wait()
    parameters = {name: engine.full_parameter(name) for name in engine.parameter_names()}
    parameters |= {name: buffer.clone() for name, buffer in engine.buffers.items()}
    losses.append(next(steps).loss)
    return logits, parameters, losses


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_the_logits_of_the_whole_model(name: str) -> None:
    layout = LAYOUTS[name]
    results = run_ranks(layout.ranks, answered, make_config(layout.parallel, **layout.sections))
    alone = make_config(None, **layout.sections)
    plain = build_model(alone, "cpu").eval()
    plain.load_state_dict({key: value for _, parameters, _ in results for key, value in parameters.items()})
    ((_, _, losses),) = run_ranks(1, answered, alone)
    for logits, _, found in results:
        for prompt, ours in zip(PROMPTS, logits, strict=True):
            torch.testing.assert_close(ours, plain(row_of(prompt))[-1:].detach(), rtol=1e-5, atol=1e-6)
        assert found == pytest.approx(losses, rel=1e-5)
