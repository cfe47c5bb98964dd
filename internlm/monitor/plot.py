"""loss.png. The only file that imports matplotlib, which is optional: without it there is no picture."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from internlm.train.metrics import StepReport
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

REDRAW_SECONDS = 120.0


class LossPlot:
    """Draws training and validation loss over the steps: after each validation, every two minutes, and at the end."""

    def __init__(self, path: Path, history: Iterable[dict[str, Any]]) -> None:
        self.path = path
        self._train: list[tuple[int, float]] = []
        self._valid: dict[str, list[tuple[int, float]]] = {}
        self._drawn = time.monotonic()
        self._new_figure: Callable[..., Any] | None = None
        try:  # here, since the import takes a second that ranks and runs without a picture need not wait
            from matplotlib.figure import Figure

            self._new_figure = Figure
        except ImportError:
            log_once(logger, "matplotlib is not installed: no loss.png (pip install matplotlib)")
        for line in history:
            self._add(line)

    def report(self, report: StepReport) -> None:
        self._add(report.scalars())
        if report.validation or time.monotonic() - self._drawn > REDRAW_SECONDS:
            self.draw()

    def close(self) -> None:
        self.draw()

    def _add(self, line: dict[str, Any]) -> None:
        if line.get("loss") is not None:
            self._train.append((line["step"], line["loss"]))
        for key, value in line.items():
            if key.startswith("val/") and key.endswith("_loss") and value is not None:
                self._valid.setdefault(key.removesuffix("_loss"), []).append((line["step"], value))

    def draw(self) -> None:
        """Write the picture beside its old version and rename it, so that a viewer never sees half of one."""
        self._drawn = time.monotonic()
        if self._new_figure is None or not self._train:
            return
        figure = self._new_figure(figsize=(8, 5), layout="constrained")  # without pyplot: needs no display
        axes = figure.add_subplot()
        thinned = self._train[:: max(1, len(self._train) // 5000)]
        axes.plot(*zip(*thinned, strict=True), linewidth=1, label="train")
        for name, points in self._valid.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        aside = self.path.with_name(self.path.name + ".tmp")
        figure.savefig(aside, format="png", dpi=120)
        aside.replace(self.path)
