"""Outputs of a run: what the files hold, after one process and after a resume."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internlm.config.schema import Config
from internlm.monitor import console, plot, tensorboard
from internlm.monitor.console import RunClock, duration, live_text, step_line
from internlm.monitor.metrics_file import MetricsFile
from internlm.monitor.monitor import Monitor
from internlm.monitor.profiler import traced
from internlm.train.metrics import StepReport, TypeMetrics, ValidReport
from internlm.utils.errors import UserError
from internlm.utils.logger import setup_logging
from tests.train.tiny import make_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder, with logging into it."""
    setup_logging(0, 1, tmp_path / "train.log")
    return tmp_path


def report(step: int, loss: float = 2.0, **more: object) -> StepReport:
    return StepReport(step=step, step_count=step, updated=True, loss=loss, **more)  # type: ignore[arg-type]


def config_with_total(steps: int) -> Config:
    return make_config(data={"total_steps": steps})


def lines_of(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalar(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


class FullDisk:
    """An output that can't be written any more."""

    def report(self, report: StepReport) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_an_output_and_neither_the_run_nor_its_error(run_dir: Path, capsys) -> None:
    with pytest.raises(ValueError, match="the error"), Monitor(config_with_total(3), run_dir) as monitor:
        monitor.listeners.insert(0, FullDisk())
        monitor.report(report(1, 3.0))
        raise ValueError("the error")
    assert [line["loss"] for line in lines_of(run_dir / "metrics.jsonl")] == [3.0]
    told = capsys.readouterr().out
    assert told.count("FullDisk can't write") == 1 and "No space left on device" in told
    gaps = r"outputs have gaps: FullDisk: .*No space left on device"
    with pytest.raises(UserError, match=gaps), Monitor(config_with_total(3), run_dir) as monitor:
        monitor.listeners.append(FullDisk())
    with pytest.raises(UserError, match=r"outputs in run_dir = '.*/train.log' can't be written"):
        Monitor(config_with_total(3), run_dir / "train.log")


def test_a_log_on_a_full_disk_says_so_once(run_dir: Path, capsys) -> None:
    setup_logging(0, 1, Path("/dev/full"))
    for number in range(3):
        logging.getLogger("internlm.test").info("line %d", number)
    told = capsys.readouterr()
    assert told.out.count("line") == 3
    assert told.err.count("/dev/full can't be written") == 1 and "Traceback" not in told.err


def test_a_run_leaves_metrics_curve_tensorboard_and_log(run_dir: Path) -> None:
    valid = ValidReport("en", 1.5, 0.25, 4.48, 100)
    with Monitor(config_with_total(3), run_dir) as monitor:
        monitor.report(report(1, 3.0, types={"cn": TypeMetrics(4.0, 1.0, 2.0)}))
        monitor.report(report(2, math.nan))
        monitor.report(StepReport(step=3, step_count=2, skipped=True))
        monitor.report(report(4, 2.5, validation=(valid,)))
    lines = lines_of(run_dir / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0), (2, None), (4, 2.5)]
    assert lines[0]["loss/cn"] == 2.0 and lines[0]["acc/cn"] == 0.5 and lines[2]["val/en_loss"] == 1.5
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert scalar(run_dir / "tensorboard", "loss")[::2] == [(1, 3.0), (4, 2.5)]
    assert scalar(run_dir / "tensorboard", "val/en_plex") == [(4, pytest.approx(4.48))]
    log = (run_dir / "train.log").read_text()
    assert "step=1 loss=3 " in log and "step=3 " not in log
    assert "Validation on en: step=4 val/en_loss=1.5000 val/en_acc=0.2500 val/en_plex=4.4800" in log


def test_a_resume_cuts_what_comes_after_the_checkpoint(run_dir: Path) -> None:
    config = config_with_total(9)
    with Monitor(config, run_dir) as monitor:
        for step in range(1, 7):
            monitor.report(report(step, 1.0))
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"step": 5, "text": "ä'.encode()[:-1])  # it died while it wrote a character
    with Monitor(config, run_dir, start_step=4) as monitor:
        monitor.report(report(5, 9.0))
    assert [(line["step"], line["loss"]) for line in lines_of(path)] == [(n, 1.0) for n in (1, 2, 3, 4)] + [(5, 9.0)]
    assert scalar(run_dir / "tensorboard", "loss") == [(n, 1.0) for n in (1, 2, 3, 4)] + [(5, 9.0)]


def test_the_curve_continues_over_a_resume(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.jsonl", 0)
    first.report(report(1, 3.0, validation=(ValidReport("en", 1.5, 0.0, 4.0, 1),)))
    first.report(report(2, 2.0))
    first.close()
    history = MetricsFile(tmp_path / "metrics.jsonl", 1).history
    picture = plot.LossPlot(tmp_path / "loss.png", history)
    assert picture._train == [(1, 3.0)] and picture._valid == {"val/en": [(1, 1.5)]}


def test_a_run_that_starts_anew_keeps_the_older_file_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        file = MetricsFile(tmp_path / "metrics.jsonl", 0)
        file.report(report(1, loss))
        file.close()
    assert [line["loss"] for line in lines_of(tmp_path / "metrics.jsonl")] == [2.0]
    assert [line["loss"] for line in lines_of(tmp_path / "metrics.previous.jsonl")] == [1.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Monitor(config_with_total(3), tmp_path, rank=1) as monitor:
        monitor.report(report(1))
    assert list(tmp_path.iterdir()) == []


def test_without_the_optional_packages_there_is_one_line_each(tmp_path: Path) -> None:
    """In a process that has neither; the run goes on and writes the rest."""
    script = f"""
import sys
sys.modules["matplotlib.figure"] = sys.modules["tensorboard"] = None
from pathlib import Path
from types import SimpleNamespace
from internlm.monitor.monitor import Monitor
from internlm.train.metrics import StepReport
from internlm.utils.logger import setup_logging
from tests.train.tiny import make_config
setup_logging(0, 1)
for _ in range(2):
    with Monitor(make_config(), Path({str(tmp_path)!r})) as monitor:
        monitor.report(StepReport(step=1, step_count=1, loss=2.0))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.count("matplotlib is not installed: no loss.png") == 1
    assert out.count("tensorboard is not installed") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.previous.jsonl"}


def test_switched_off_tensorboard_writes_nothing(tmp_path: Path) -> None:
    with Monitor(make_config(monitor={"enable_tb": False}), tmp_path) as monitor:
        monitor.report(report(1))
    assert not (tmp_path / "tensorboard").exists()


def test_a_terminal_gets_a_live_line_and_the_log_file_gets_the_lines(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = console.Terminal
    monkeypatch.setattr(console, "Terminal", lambda: terminal(force_terminal=True, width=200))
    shown = console.Console(total_steps=4, start_step=0)
    for step in (1, 2):
        shown.report(report(step, 1.25, lr=1e-4, grad_norm=0.5, tgs=4321.0, mfu=0.5))
    shown.close()
    out = capsys.readouterr().out
    assert "2/4" in out and "loss 1.2500" in out and "4,321 tok/s/gpu" in out and "mfu 50.0%" in out
    assert "step=1" not in out and "step=1 " in (run_dir / "train.log").read_text()


def test_texts_name_every_number() -> None:
    one = report(7, 1.25, lr=1e-4, grad_norm=0.5, tgs=10.0, tflops=3.0, mfu=0.25, memory=3 << 30)
    line = dict(pair.split("=") for pair in step_line(one, 61.0).split(" "))
    assert line["step"] == "7" and line["loss"] == "1.25" and line["lr"] == "0.0001" and line["eta"] == "0:01:01"
    assert line["memory"] == "3.00GiB" and line["mfu"] == "0.2500"
    for word in ("loss", "lr", "norm", "tok/s/gpu", "TFLOPS", "mfu", "GiB", "eta"):
        assert word in live_text(one, math.nan)
    assert duration(math.nan) == "?" and duration(90061) == "1 day, 1:01:01"


def test_time_left_follows_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(now)))  # of this module alone
    clock = RunClock(total_steps=10)
    assert math.isnan(clock.seconds_left(1))
    assert clock.seconds_left(2) == pytest.approx(16)
    assert clock.seconds_left(3) == pytest.approx(14)


def test_profiling_writes_one_trace_and_passes_the_reports_on(tmp_path: Path) -> None:
    reports = [report(step) for step in range(1, 9)]
    assert list(traced(iter(reports), tmp_path / "traces", rank=0)) == reports
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank0.json.gz"]
    assert list(traced(iter(reports), tmp_path / "other", rank=1)) == reports
    assert not (tmp_path / "other").exists()


def test_optional_packages_are_imported_in_one_file_each(repo_root: Path) -> None:
    for package, home in (("matplotlib", plot.__file__), ("torch.utils.tensorboard", tensorboard.__file__)):
        users = [path for path in (repo_root / "internlm").rglob("*.py") if f"from {package}" in path.read_text()]
        assert [str(path) for path in users] == [home]
