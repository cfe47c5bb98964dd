"""Learning rate and beta2 as pure functions of the number of successful updates so far.

`num_updates` counts updates done before the one in question: the first update of a run is made with
`lr_at(..., num_updates=0)`. Skipped updates do not advance a schedule. (InternLM's 2023 log printed the value of the
*next* update; ours reports the value used.)
"""

import math

from internlm.config.schema import Beta2SchedulerConfig, LRSchedulerConfig


def lr_at(config: LRSchedulerConfig, base_lr: float, total_steps: int, num_updates: int) -> float:
    """The learning rate of update `num_updates`, counted from 0.

    Zero for `init_steps`, then a linear warm-up whose first value is base_lr / W and whose last is base_lr, W being
    int(total * warmup_ratio); then the form of `config.type`, which reaches `eta_min` at update `total` (one past the
    last) and stays there. `total` is `config.total_steps`, or `total_steps` where that is None.
    """
    total = config.total_steps or total_steps
    warmup = int(total * config.warmup_ratio)
    if num_updates < config.init_steps:
        return 0.0
    step = num_updates - config.init_steps
    if step < warmup:
        return base_lr * (step + 1) / warmup
    done, length = step - warmup, total - warmup - config.init_steps
    if config.type == "constant":
        return base_lr
    if config.type == "wsd":
        decay = min(int(total * config.decay_ratio), length)
        return config.eta_min + (base_lr - config.eta_min) * _remaining(done - (length - decay), decay)
    return config.eta_min + (base_lr - config.eta_min) * (1 + math.cos(math.pi * (1 - _remaining(done, length)))) / 2


def _remaining(done: int, length: int) -> float:
    """What is left of a decay of `length` updates after `done` of them: 1 before its start, 0 from its end on."""
    if done >= length:
        return 0.0
    return 1 - max(done, 0) / length


def beta2_at(config: Beta2SchedulerConfig, adam_beta2: float, num_updates: int) -> float:
    """Adam's beta2 for update `num_updates`, counted from 0.

    c <= 0: constant. Else max(init_beta2, 1 - n^-c) with n = `num_updates`, init_beta2 for the first update.
    """
    initial = adam_beta2 if config.init_beta2 is None else config.init_beta2
    if config.c <= 0 or num_updates == 0:
        return initial
    return max(initial, 1 - num_updates**-config.c)
