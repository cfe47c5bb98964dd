"""What a step means: losses, weights of tokens, counters, and reports, against plain torch."""

import logging
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.config.schema import Config
from internlm.data.loader import StepBatch
from internlm.model.batch import Batch
from internlm.train.metrics import StepReport, step_flops
from internlm.utils.errors import UserError
from tests.pool import run_ranks
from tests.train.tiny import (
    LR,
    NamedRows,
    make_config,
    make_row,
    make_trainer,
    parameters_of,
    reference_model,
    step_batches,
    token_losses,
)

# Four rows a step with very different numbers of trained tokens: any unweighted mean shows.
STEPS = [[make_row(10 * step + row, (5, 3), trained) for row, trained in enumerate((8, 1, 5, 2))] for step in range(3)]


def train(rank: int, world_size: int, config: Config, steps: list[list[Batch]]) -> tuple[list[StepReport], Any]:
    trainer = make_trainer(config, step_batches(steps, rank, world_size), rank, world_size)
    reports = list(trainer.steps())
    return reports, parameters_of(trainer)


def reference(config: Config, steps: list[list[Batch]]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """One process, torch's AdamW, the mean over all trained tokens of a step at once."""
    model = reference_model(config)
    adam = config.adam
    optimizer = torch.optim.AdamW(
        model.parameters(), adam.lr, (adam.adam_beta1, adam.adam_beta2), adam.adam_eps, adam.weight_decay
    )
    seen = []
    for rows in steps:
        results = [token_losses(model, row) for row in rows]
        losses = torch.cat([losses for losses, _ in results])
        right = torch.cat([right for _, right in results])
        optimizer.zero_grad()
        losses.mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        loss = float(losses.detach().mean())
        seen.append({"loss": loss, "perplexity": math.exp(loss), "acc": float(right.double().mean()), "norm": norm})
    return seen, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loss_is_the_mean_over_all_trained_tokens_of_all_ranks(world_size: int) -> None:
    """Also: two ranks of two micro batches train as one rank of four, and as one batch at once."""
    config = make_config()
    expected, weights = reference(config, STEPS)
    for reports, parameters in run_ranks(world_size, train, config, STEPS):
        assert [r.num_trained_tokens for r in reports] == [16] * 3
        for report, truth in zip(reports, expected, strict=True):
            assert report.updated and report.loss == pytest.approx(truth["loss"], abs=1e-6)
            assert report.perplexity == pytest.approx(truth["perplexity"], rel=1e-5)
            assert report.acc == pytest.approx(truth["acc"], abs=1e-9)
            assert report.grad_norm == pytest.approx(float(truth["norm"]), abs=1e-6)
        for name, value in weights.items():
            assert torch.allclose(parameters[name], value, atol=2e-6), name


def grad_norm_of_means(config: Config, rows: list[Batch]) -> float:
    model = reference_model(config)
    (sum(token_losses(model, row)[0].mean() for row in rows) / len(rows)).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def test_micro_batch_reduction_is_the_mean_of_means() -> None:
    config = make_config(loss={"reduction": "micro_batch"})
    expected = grad_norm_of_means(config, STEPS[0])
    weighted = reference(config, STEPS[:1])[0][0]
    assert abs(expected - float(weighted["norm"])) > 1e-3  # else this test could not tell
    for reports, _ in run_ranks(2, train, config, STEPS[:1]):
        assert reports[0].grad_norm == pytest.approx(expected, abs=1e-6)
        assert reports[0].loss == pytest.approx(weighted["loss"], abs=1e-6)  # the report stays token-weighted


def test_label_smoothing_is_part_of_the_loss_and_not_of_the_perplexity() -> None:
    config = make_config(loss={"label_smoothing": 0.5}, model={"out_head_init_std": 1.0})
    row = STEPS[0][0]
    model = reference_model(config)
    smoothed = float(torch.nn.functional.cross_entropy(model(row), row.labels, label_smoothing=0.5).detach())
    plain = float(token_losses(model, row)[0].detach().mean())
    ((reports, _),) = run_ranks(1, train, config, [[row]])
    assert reports[0].loss == pytest.approx(smoothed, abs=1e-6)
    assert reports[0].perplexity == pytest.approx(math.exp(plain), rel=1e-5)
    assert abs(smoothed - plain) > 5e-3


def infinite_token_0(name: str, shape: tuple[int, ...]) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    if name == "embedding.weight":
        value[0] = math.inf
    return value


def overflow(rank: int, world_size: int) -> dict[str, Any]:
    """Token 0 has an infinite embedding; only the second batch reads it. Biases of routers are no parameters."""
    model = {"num_experts": 4, "moe": {"top_k": 2, "bias_rate": 0.01}}
    config = make_config(lr_scheduler={"warmup_ratio": 1.0}, adam={"weight_decay": 0.0}, model=model)
    rows = [make_row(seed, (8,), 8, low=1) for seed in range(3)]
    rows[1].tokens[3] = 0

    trainer = make_trainer(config, step_batches([[row] for row in rows], rank, world_size), value_of=infinite_token_0)
    seen: dict[str, Any] = {"reports": [], "weights": [], "states": [], "messages": []}
    handler = logging.Handler()
    handler.emit = lambda record: seen["messages"].append((record.levelname, record.getMessage()))  # type: ignore
    logging.getLogger("internlm.train").addHandler(handler)
    for report in trainer.steps():
        seen["reports"].append(report)
        values = {**parameters_of(trainer), **trainer.optimizer.buffers}
        seen["weights"].append({k: v.clone() for k, v in values.items()})
        seen["states"].append(trainer.state.state_dict())
    logging.getLogger("internlm.train").removeHandler(handler)
    return seen


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    (seen,) = run_ranks(1, overflow)
    first, second, third = seen["reports"]
    assert (first.updated, second.updated, third.updated) == (True, False, True)
    before, after, later = seen["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    for kind in ("weight", "router.bias"):
        assert any(not torch.equal(after[name], later[name]) for name in after if name.endswith(kind))
    assert (second.step, second.step_count, second.inf_nan_skip_batches) == (2, 1, 1)
    assert [r.lr for r in seen["reports"]] == pytest.approx([LR / 10, LR * 2 / 10, LR * 2 / 10])  # no advance
    state = {"step_count": 2, "batch_count": 3, "place": 3, "num_consumed_tokens": 24, "inf_nan_skip_batches": 1}
    assert seen["states"][-1] == {**state, "num_rows": None}
    assert any(level == "WARNING" and "batch 1: the gradient norm is" in text for level, text in seen["messages"])


def stand_still(rank: int, world_size: int, most: int) -> tuple[list[bool], str]:
    """One good batch, then none whose gradients are finite; what was updated, and how it ended."""
    config = make_config(monitor={"max_skips_in_row": most})
    rows = [make_row(seed, (8,), 8, low=1) for seed in range(5)]
    for row in rows[1:]:
        row.tokens[3] = 0
    trainer = make_trainer(config, step_batches([[row] for row in rows]), value_of=infinite_token_0)
    updated: list[bool] = []
    try:
        updated.extend(report.updated for report in trainer.steps())
    except UserError as error:
        return updated, str(error)
    return updated, ""


def test_a_run_that_makes_no_updates_any_more_ends() -> None:
    ((updated, told),) = run_ranks(1, stand_still, 3)
    assert updated == [True, False, False, False]
    assert told.startswith("batches 1 to 3: no gradient norm was finite, and no update was made since step 1 (")
    ((updated, told),) = run_ranks(1, stand_still, 0)
    assert updated == [True, False, False, False, False] and told == ""


def left_out(rank: int, world_size: int) -> Any:
    rows = [[make_row(1, (8,), 8)], [make_row(2, (8,), 8)], [make_row(3, (8,), 0)]]
    batches = step_batches(rows)
    batches[1] = StepBatch(1, rows[1], num_rows=1, end=2, skipped=True)
    trainer = make_trainer(make_config(), batches)
    reports, weights = [], []
    for report in trainer.steps():
        reports.append(report)
        weights.append({k: v.clone() for k, v in parameters_of(trainer).items()})
    return reports, weights, trainer.state.state_dict()


def test_batches_that_are_skipped_or_have_nothing_to_train_are_counted_alone() -> None:
    ((reports, weights, state),) = run_ranks(1, left_out)
    assert [(r.step, r.skipped, r.updated) for r in reports] == [(1, False, True), (2, True, False), (3, True, False)]
    assert all(torch.equal(weights[0][name], later[name]) for later in weights[1:] for name in later)
    counters = {"step_count": 1, "batch_count": 3, "num_consumed_tokens": 8, "inf_nan_skip_batches": 0}
    assert state == {**counters, "place": 3, "num_rows": None}


def train_types(rank: int, world_size: int, steps: list[list[Batch]]) -> StepReport:
    batches = step_batches(steps, rank, world_size)
    trainer = make_trainer(make_config(), batches, rank, world_size, type_names=("en", "cn", "code"))
    return next(trainer.steps())


def test_metrics_per_type() -> None:
    rows = [make_row(seed, (8,), 6, types=2) for seed in range(4)]  # "code" has no token
    model = reference_model(make_config())
    losses = torch.cat([token_losses(model, row)[0] for row in rows])
    right = torch.cat([token_losses(model, row)[1] for row in rows]).double()
    types = torch.cat([row.type_ids[:6] for row in rows if row.type_ids is not None])
    for report in run_ranks(2, train_types, [rows]):
        for index, name in enumerate(("en", "cn")):
            kept = types == index
            assert report.types[name].loss == pytest.approx(float(losses[kept].detach().mean()), abs=1e-6)
            assert report.types[name].accuracy == pytest.approx(float(right[kept].mean()))
            assert report.types[name].tokens == int(kept.sum())
        assert math.isnan(report.types["code"].loss)
        assert {"loss/en", "acc/cn", "tokens/code"} <= report.scalars().keys()


VALID = [[make_row(50, (8,), 3), make_row(51, (8,), 0)], [make_row(52, (8,), 8), make_row(53, (4, 4), 7)]]


def validate(rank: int, world_size: int) -> tuple[list[StepReport], list[bool]]:
    config = make_config(data={"valid_every": 2}, adam={"lr": 0.0, "weight_decay": 0.0})
    share = [row for rows in VALID for row in rows][rank::world_size]
    loaders = {"en": NamedRows("en", share), "none": NamedRows("none", [make_row(1, (8,), 0)])}
    trainer = make_trainer(config, step_batches(STEPS, rank, world_size), rank, world_size, valid_loaders=loaders)
    reports, training = [], []
    for report in trainer.steps():
        reports.append(report)
        training.append(trainer.schedule.model.training)
    return reports, training


@pytest.mark.parametrize("world_size", [1, 2])
def test_validation_is_token_weighted_over_all_ranks(world_size: int) -> None:
    """The learning rate is 0, so the weights of step 2 are the initial ones."""
    model = reference_model(make_config())
    results = [token_losses(model, row) for rows in VALID for row in rows]
    loss = float(torch.cat([losses for losses, _ in results]).detach().mean())
    accuracy = float(torch.cat([right for _, right in results]).double().mean())
    for reports, training in run_ranks(world_size, validate):
        assert [len(report.validation) for report in reports] == [0, 2, 0]
        assert all(training)
        found, empty = reports[1].validation
        assert (found.name, found.num_tokens) == ("en", 18)
        assert found.loss == pytest.approx(loss, abs=1e-6)
        assert found.accuracy == pytest.approx(accuracy)
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert empty.num_tokens == 0 and math.isnan(empty.loss)
        assert reports[1].scalars()["val/en_loss"] == found.loss


def test_reports_have_the_keys_of_the_contract_and_add_up() -> None:
    reports, _ = run_ranks(2, train, make_config(), STEPS)[0]
    report = reports[1]
    contract = (
        "step loss grad_norm lr loss_scale tgs tflops mfu num_consumed_tokens inf_nan_skip_batches "
        "num_samples_in_batch largest_length adam_beta2 fwd_bwd_time memory"
    )
    assert set(contract.split()) <= report.scalars().keys()
    assert report.num_consumed_tokens == 2 * 4 * 8 and report.micro_num == 2
    assert (report.num_samples_in_batch, report.largest_length) == (8, 5)
    assert (report.largest_batch, report.smallest_batch) == (2, 2)
    assert report.tgs * report.step_time == pytest.approx(16)  # tokens of one rank
    assert 0 < report.fwd_bwd_time <= report.step_time
    assert report.mfu_full > report.mfu == report.hfu > 0
    assert report.memory > 1 << 20
    assert (report.lr, report.adam_beta2, report.loss_scale) == (LR, 0.95, 1.0)
    apart = {"types", "experts", "validation", "answers", "scores"}
    assert {f.name for f in fields(StepReport)} - apart <= report.scalars().keys()


def test_hardware_flops_count_the_recomputed_forwards() -> None:
    """Two blocks: per token 2 FLOP a weight forward, attention 2 * width * s^2 a segment with the causal half."""
    lengths = [5, 3]
    weights = 4 * 16 * 16 + 3 * 16 * 24
    forward = 2 * weights * sum(lengths) + 2 * 16 * sum(length**2 for length in lengths)
    for checkpoint, recomputed in ((False, 0), (0.5, 1), (True, 2)):
        flops = step_flops(make_config(model={"checkpoint": checkpoint}).model, lengths)
        assert flops.hardware - flops.causal == pytest.approx(recomputed * forward)
    flops = step_flops(make_config(model={"checkpoint": "feed_forward"}).model, lengths)
    assert flops.hardware - flops.causal == 2 * 2 * (2 * 16 * 24) * sum(lengths)
