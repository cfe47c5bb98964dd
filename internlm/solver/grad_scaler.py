"""The dynamic loss scale of float16 training; a constant 1 for other dtypes."""

from internlm.config.schema import GradScalerConfig


class GradScaler:
    """Falls after `hysteresis` overflows, grows after `growth_interval` good steps in a row.

    The rule is that of the 2023 framework, with one difference: a nan counts as an overflow, where it once counted as a
    good step.
    """

    def __init__(self, config: GradScalerConfig, enabled: bool) -> None:
        self.config = config
        self.enabled = enabled
        self.scale = config.fp16.initial_scale if enabled else 1.0
        self.good_steps = 0
        self.overflows = 0

    def update(self, ok: bool) -> None:
        """Counts a step; `ok` is False when its gradients were not finite."""
        if not self.enabled:
            return
        if ok:
            self.good_steps += 1
            if self.good_steps == self.config.fp16.growth_interval:
                self.scale = min(self.scale * self.config.growth_factor, self.config.max_scale or float("inf"))
                self.good_steps = self.overflows = 0
            return
        self.good_steps = 0
        self.overflows += 1
        if self.overflows >= self.config.hysteresis:
            self.scale = max(self.scale * self.config.backoff_factor, self.config.fp16.min_scale or 0.0)

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Does nothing when scaling is off, so that a float16 checkpoint continues in bfloat16 or float32."""
        if self.enabled:
            self.scale = float(state["scale"])
            self.good_steps, self.overflows = int(state["good_steps"]), int(state["overflows"])
