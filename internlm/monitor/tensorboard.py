"""TensorBoard files. The only file that imports tensorboard, which is optional."""

from pathlib import Path
from typing import Any

from internlm.config.schema import Config
from internlm.train.metrics import StepReport
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)


class TensorBoard:
    """Every number of a report as a scalar of the same name, over the step; answers and the config as texts."""

    def __init__(self, config: Config, folder: Path, start_step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log_once(logger, "tensorboard is not installed: no TensorBoard files (pip install tensorboard)")
            return
        # What an earlier process wrote beyond the step this one continues from is hidden.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("job_name", config.JOB_NAME, start_step)
        self._writer.add_text("config", f"```\n{config.model_dump_json(indent=2)}\n```", start_step)

    def report(self, report: StepReport) -> None:
        if self._writer is None:
            return
        for name, value in report.scalars().items():
            if not isinstance(value, bool):
                self._writer.add_scalar(name, value, report.step)
        for number, answer in enumerate(report.answers):
            self._writer.add_text(f"answers/{number}", f"{answer.prompt}\n\n{answer.text}", report.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
