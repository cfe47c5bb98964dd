"""metrics.jsonl, one JSON object a step, and answers.jsonl, one an answer, appended as it happens."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm.train.metrics import StepReport
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


class LinesFile:
    """Appends objects with a "step" to `path`, so that one run has its lines once, however often it was resumed.

    Lines after `start_step` were written by a process that died after the checkpoint this one continues from: they are
    cut off. A run that starts anew (`start_step` 0) puts an older file aside as `*.previous.jsonl`.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.history: list[dict[str, Any]] = []  # the lines kept, as far as a run's curves need them
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and start_step == 0:
            aside = path.with_suffix(f".previous{path.suffix}")
            path.replace(aside)
            logger.info(f"this run starts anew: {path} of an earlier one is now {aside.name}")
        elif path.exists():
            self.history = _cut(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsFile(LinesFile):
    """The numbers of each step."""

    def report(self, report: StepReport) -> None:
        self.write({key: _jsonable(value) for key, value in report.scalars().items()})


class AnswersFile(LinesFile):
    """What the model said, and when."""

    def report(self, report: StepReport) -> None:
        for answer in report.answers:
            self.write({"step": report.step, "prompt": answer.prompt, "text": answer.text})


def _jsonable(value: float) -> float | None:
    """JSON has no word for inf and nan; null says that there is no number."""
    return value if math.isfinite(value) else None


def _cut(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the lines after `last_step`, and a last one that was written in part; returns those kept, loss keys only."""
    kept: list[dict[str, Any]] = []
    aside = path.with_name(path.name + ".tmp")
    # a crash may end the file inside a character
    with path.open(encoding="utf-8", errors="replace") as old, aside.open("w", encoding="utf-8") as new:
        for text in old:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["step"] <= last_step:
                new.write(text)
                kept.append({k: v for k, v in line.items() if k in ("step", "loss") or k.startswith("val/")})
        new.flush()
        os.fsync(new.fileno())
    aside.replace(path)
    return kept
