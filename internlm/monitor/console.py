"""The live progress line of a terminal; a log line a step everywhere else and in train.log."""

import math
import time
from datetime import timedelta

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from internlm.train.metrics import StepReport, ValidReport
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)


class Console:
    """Shows step, loss, lr, gradient norm, speed, memory and the time left."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.total_steps = total_steps
        self._clock = RunClock(total_steps)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        terminal = Terminal()
        if not terminal.is_terminal:
            log_once(logger, "the output is not a terminal: one line a step instead of a progress bar")
            return
        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=terminal, refresh_per_second=4)
        self._task = self._progress.add_task("first step ...", total=total_steps, completed=start_step)
        self._progress.start()

    def report(self, report: StepReport) -> None:
        left = self._clock.seconds_left(report.step)
        if self._progress is not None:
            self._progress.update(self._task, completed=report.step, description=live_text(report, left))
        if not report.skipped:
            logger.info(step_line(report, left), extra={"file_only": self._progress is not None})
        for valid in report.validation:
            logger.info(validation_line(valid, report.step))
        for answer in report.answers:
            logger.info(f"step={report.step} {answer.prompt!r} -> {answer.text!r}")
        if report.scores:
            logger.info(" ".join([f"step={report.step}", *(f"eval/{k}={v:.4f}" for k, v in report.scores.items())]))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class RunClock:
    """Time left, by a moving average of the wall time between reports: saving and validating are part of it."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._last: float | None = None
        self._seconds: float | None = None

    def seconds_left(self, step: int) -> float:
        """nan until two reports are known."""
        now = time.monotonic()
        if self._last is not None:
            passed = now - self._last
            self._seconds = passed if self._seconds is None else 0.95 * self._seconds + 0.05 * passed
        self._last = now
        return math.nan if self._seconds is None else self._seconds * (self.total_steps - step)


def live_text(report: StepReport, seconds_left: float) -> str:
    """The numbers beside the progress bar."""
    return (
        f"loss {report.loss:.4f}  lr {report.lr:.2e}  norm {report.grad_norm:.3f}  {report.tgs:,.0f} tok/s/gpu  "
        f"{report.tflops:.3g} TFLOPS  mfu {report.mfu:.1%}  {report.memory / 2**30:.1f} GiB  "
        f"eta {duration(seconds_left)}"
    )


def step_line(report: StepReport, seconds_left: float) -> str:
    """`key=value` pairs, as scripts that read the 2023 log expect them."""
    values = {
        "step": report.step,
        "loss": f"{report.loss:.6g}",
        "tgs": f"{report.tgs:.2f}",
        "tflops": f"{report.tflops:.4g}",
        "mfu": f"{report.mfu:.4f}",
        "lr": f"{report.lr:.4g}",
        "loss_scale": f"{report.loss_scale:g}",
        "grad_norm": f"{report.grad_norm:.5g}",
        "micro_num": report.micro_num,
        "num_consumed_tokens": report.num_consumed_tokens,
        "inf_nan_skip_batches": report.inf_nan_skip_batches,
        "num_samples_in_batch": report.num_samples_in_batch,
        "largest_length": report.largest_length,
        "adam_beta2": f"{report.adam_beta2:.6g}",
        "fwd_bwd_time": f"{report.fwd_bwd_time:.3f}",
        "acc": f"{report.acc:.4f}",
        "perplexity": f"{report.perplexity:.4f}",
        "memory": f"{report.memory / 2**30:.2f}GiB",
        "eta": duration(seconds_left),
    }
    if report.experts is not None:
        values |= {"moe_loss": f"{report.experts.balance_loss:.4g}", "load/max": f"{report.experts.largest:.3f}"}
    values |= {f"loss/{name}": f"{metrics.loss:.4f}" for name, metrics in report.types.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def validation_line(valid: ValidReport, step: int) -> str:
    return f"Validation on {valid.name}: step={step} " + " ".join(f"{k}={v:.4f}" for k, v in valid.scalars().items())


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front when there are any; "?" for nan."""
    return "?" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))
