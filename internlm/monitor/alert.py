"""Messages to people, by the Feishu (Lark) webhook that the frameworks of 2023 posted to, with their texts."""

import fcntl
import json
import math
import socket
import time
import traceback
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

from internlm.config.schema import Config
from internlm.train.metrics import StepReport
from internlm.utils.environment import job_id
from internlm.utils.errors import writing
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

LOSS_SPIKE = 1.5  # times the loss of the step before
TIMEOUT = 30  # seconds for one message; the run doesn't wait for it
LAST_LINES = 10  # of a traceback


class Alert:
    """Rank 0 speaks for the run; with `alert_file_path` every rank reports its exception, equal ones once."""

    def __init__(self, config: Config, rank: int) -> None:
        alert = config.monitor.alert
        self.rank = rank
        self.host = socket.gethostname()
        self.title = f"{job_id()}_{config.JOB_NAME}"
        self.address = alert.feishu_alert_address if alert.enable_feishu_alert else None
        self.errors = Path(alert.alert_file_path) if self.address and alert.alert_file_path else None  # reported
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="alert")
        self._loss = math.inf
        if self.errors is not None and rank == 0:
            with writing(f"monitor.alert.alert_file_path = {str(self.errors)!r}"):
                self.errors.unlink(missing_ok=True)
        self.send(f"Training in {self.host} is starting.")

    def send(self, text: str) -> None:
        """Post a message in the name of the run, without waiting for it."""
        if self.rank == 0:
            self._post(text)

    def report(self, report: StepReport) -> None:
        """Alerts to a loss that jumps up, and to a step without an update."""
        if report.skipped:
            return
        if report.loss > LOSS_SPIKE * self._loss:
            self.send(
                f"Checking step by step: Loss spike may be happened in step {report.step}, "
                f"loss value from {self._loss} to {report.loss}, please check it."
            )
        if not report.updated:
            self.send(f"Warning: skip parameter update at step {report.step}.")
        self._loss = report.loss

    def ended(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
        stop_reason: str | None = None,
    ) -> None:
        """The run is over: well, by somebody who stopped it, or by an exception."""
        if kind is None:
            self.send(f"Training in {self.host} " + (f"was stopped ({stop_reason})." if stop_reason else "completed."))
        else:
            trace = "".join(traceback.format_exception(kind, error, tb))
            if self._is_first(trace):
                lines = "\n".join(trace.splitlines()[-LAST_LINES:])
                self._post(f"Catch Exception from {self.host} with rank id {self.rank}:\n{lines}")
        self._sender.shutdown()

    def _is_first(self, trace: str) -> bool:
        """Whether this rank is the first to report this exception."""
        if self.errors is None:
            return self.rank == 0
        try:
            self.errors.parent.mkdir(parents=True, exist_ok=True)
            with self.errors.open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                known = trace in file.read()
                if not known:
                    file.write(trace)
        except OSError as error:  # perhaps the full disk that ends the run
            logger.warning(f"monitor.alert.alert_file_path: {error}; rank 0 alone tells of exceptions")
            return self.rank == 0
        return not known

    def _post(self, text: str) -> None:
        if self.address is not None:
            self._sender.submit(_post_to, self.address, self.title, text)


def _post_to(address: str, title: str, text: str) -> None:
    post = {"title": title, "content": [[{"tag": "text", "text": text}]]}
    message = {"timestamp": int(time.time()), "msg_type": "post", "content": {"post": {"zh_cn": post}}}
    request = urllib.request.Request(
        address, json.dumps(message).encode(), {"Content-Type": "application/json;charset=utf-8"}
    )
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
    except (OSError, HTTPException) as error:
        logger.warning(f"a message could not be sent to monitor.alert.feishu_alert_address: {error}")
