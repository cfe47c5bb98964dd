"""Schedules against torch's schedulers and the reference's formulas."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from internlm.config.schema import Beta2SchedulerConfig, LRSchedulerConfig
from internlm.solver.schedules import beta2_at, lr_at


def torch_cosine(base_lr: float, length: int, eta_min: float) -> list[float]:
    """Learning rates of updates 0..length-1 by torch's recursive form."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr)
    scheduler = CosineAnnealingLR(optimizer, T_max=length, eta_min=eta_min)
    rates = []
    for _ in range(length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("init_steps", "warmup_ratio", "eta_min"), [(0, 0.0, 0.0), (0, 0.1, 1e-5), (7, 0.25, 1e-5)])
def test_cosine_equals_torch_after_the_warmup(init_steps: int, warmup_ratio: float, eta_min: float) -> None:
    total, base = 200, 3e-4
    config = LRSchedulerConfig(init_steps=init_steps, warmup_ratio=warmup_ratio, eta_min=eta_min)
    warmup = int(total * warmup_ratio)
    ours = [lr_at(config, base, total, e) for e in range(total)]
    expected = [0.0] * init_steps
    expected += [base * (k + 1) / warmup for k in range(warmup)]
    expected += torch_cosine(base, total - warmup - init_steps, eta_min)
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_reference_warmup_values() -> None:
    """1e-4 with W=500 (total 50000 x 0.01): the 2023 log's first line shows 4e-07, the value after the first update."""
    config = LRSchedulerConfig(warmup_ratio=0.01)
    assert lr_at(config, 1e-4, 50_000, 0) == pytest.approx(2e-7)
    assert lr_at(config, 1e-4, 50_000, 1) == pytest.approx(4e-7)
    assert lr_at(config, 1e-4, 50_000, 499) == pytest.approx(1e-4)
    assert lr_at(config, 1e-4, 50_000, 500) == pytest.approx(1e-4)  # the cosine starts at its top


def test_the_schedule_has_its_own_length_and_ends_at_eta_min() -> None:
    config = LRSchedulerConfig(total_steps=100, warmup_ratio=0.0, eta_min=1e-6)
    assert lr_at(config, 1e-3, 5, 50) == pytest.approx((1e-3 + 1e-6) / 2)
    assert [lr_at(config, 1e-3, 5, e) for e in (100, 150, 1000)] == pytest.approx([1e-6] * 3)


def test_warmup_may_take_the_whole_run() -> None:
    config = LRSchedulerConfig(warmup_ratio=1.0)
    assert [lr_at(config, 1.0, 4, e) for e in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]


def test_wsd_is_flat_then_linear() -> None:
    config = LRSchedulerConfig(type="wsd", warmup_ratio=0.1, decay_ratio=0.2, eta_min=0.1)
    rates = [lr_at(config, 1.1, 50, e) for e in range(52)]
    assert rates[:5] == pytest.approx([0.22, 0.44, 0.66, 0.88, 1.1])
    assert rates[5:41] == pytest.approx([1.1] * 36)  # the decay's own first value is still the top
    assert rates[41:50] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert rates[50:] == pytest.approx([0.1, 0.1])


def test_wsd_decay_longer_than_what_the_warmup_leaves() -> None:
    config = LRSchedulerConfig(type="wsd", warmup_ratio=0.5, decay_ratio=0.9)
    assert [lr_at(config, 1.0, 8, e) for e in range(4, 8)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_constant() -> None:
    config = LRSchedulerConfig(type="constant", warmup_ratio=0.02)
    assert [lr_at(config, 0.5, 100, e) for e in (0, 1, 2, 99, 500)] == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_beta2_follows_the_number_of_updates() -> None:
    config = Beta2SchedulerConfig(init_beta2=0.95, c=0.8)
    assert beta2_at(config, 0.9, 0) == 0.95
    assert beta2_at(config, 0.9, 1) == 0.95  # 1 - 1/1 = 0
    assert beta2_at(config, 0.9, 10_000) == pytest.approx(1 - 1 / 10_000**0.8)
    assert beta2_at(config, 0.9, 10_000) > 0.999


def test_beta2_is_constant_without_c() -> None:
    assert beta2_at(Beta2SchedulerConfig(), 0.97, 500) == 0.97
    assert beta2_at(Beta2SchedulerConfig(init_beta2=0.9), 0.97, 500) == 0.9
