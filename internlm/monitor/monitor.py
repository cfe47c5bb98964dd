"""One listener for the loop: hands each report to console, metrics.jsonl, answers, TensorBoard and the loss curve."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch.distributed import ProcessGroup

from internlm.config.schema import Config
from internlm.monitor.alert import Alert
from internlm.monitor.console import Console
from internlm.monitor.metrics_file import AnswersFile, MetricsFile
from internlm.monitor.plot import LossPlot
from internlm.monitor.slow_ranks import SlowRanks
from internlm.monitor.tensorboard import TensorBoard
from internlm.monitor.watchdog import Watchdog
from internlm.train.metrics import StepReport
from internlm.utils.errors import UserError, writing
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


class Listener(Protocol):
    """What a new kind of output needs to be."""

    def report(self, report: StepReport) -> None: ...

    def close(self) -> None: ...


class Monitor:
    """Writes the outputs of a run into `run_dir`; a context manager that closes them, whatever happens.

    Every rank makes one to watch for a stuck run; only rank 0 writes. `start_step` is the number of
    batches done before: what the files hold beyond it is dropped. Batches that were left out have no line. `ranks`,
    where given, are searched for slow ones.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        rank: int = 0,
        start_step: int = 0,
        ranks: ProcessGroup | None = None,
    ) -> None:
        self.stop_reason: str | None = None  # of a run that ends before its last step
        self.listeners: list[Listener] = []
        self._lost: dict[str, str] = {}  # by the kind of listener, why it could not write
        self.alert = Alert(config, rank)
        stuck_after = config.monitor.stuck_after
        self.watchdog = Watchdog(stuck_after, self.alert.send) if stuck_after else None
        self.slow_ranks = None
        if ranks is not None and ranks.size() > 1:
            self.slow_ranks = SlowRanks(config.monitor, rank, ranks, self.alert.send)
        if rank != 0:
            return
        with writing(f"outputs in run_dir = {str(run_dir)!r}"):
            self._open(config, run_dir, start_step)

    def _open(self, config: Config, run_dir: Path, start_step: int) -> None:
        metrics = MetricsFile(run_dir / "metrics.jsonl", start_step)
        self.listeners = [metrics, LossPlot(run_dir / "loss.png", metrics.history)]
        if config.evaluation.prompts:
            self.listeners.append(AnswersFile(run_dir / "answers.jsonl", start_step))
        if config.monitor.enable_tb:
            folder = Path(config.monitor.tensorboard_folder or run_dir / "tensorboard")
            self.listeners.append(TensorBoard(config, folder, start_step))
        self.listeners.append(Console(config.data.total_steps, start_step))

    def report(self, report: StepReport) -> None:
        if self.watchdog is not None:
            self.watchdog.step_ended()
        if self.slow_ranks is not None:
            self.slow_ranks.report(report)
        if report.skipped and not report.is_evaluated:
            return
        self.alert.report(report)
        for listener in self.listeners:
            with self._spared(listener):
                listener.report(report)

    def close(self) -> None:
        """Close all outputs; a second call does nothing."""
        listeners, self.listeners = self.listeners, []
        for listener in reversed(listeners):
            with self._spared(listener):
                listener.close()
        if self.watchdog is not None:
            self.watchdog.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        self.alert.ended(kind, error, tb, self.stop_reason)
        if self._lost and kind is None and self.stop_reason != "SIGTERM":  # which has an exit code of its own
            raise UserError(
                f"the run came to its end, but outputs have gaps: {'; '.join(self._lost.values())}. Make room there; "
                "checkpoints are whole"
            )

    @contextmanager
    def _spared(self, listener: Listener) -> Iterator[None]:
        """A full disk loses curves; it neither ends the run nor hides the error that does."""
        try:
            yield
        except OSError as error:
            name = type(listener).__name__
            if name not in self._lost:
                logger.warning(f"{name} can't write, the run goes on: {error}")
            self._lost.setdefault(name, f"{name}: {error}")
