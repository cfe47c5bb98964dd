"""Messages to people, against a webhook of our own; the watchdog, against a step that never ends; slow ranks."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from internlm.config.schema import Config
from internlm.monitor.alert import Alert
from internlm.monitor.monitor import Monitor
from internlm.monitor.slow_ranks import SlowRanks, trimmed_mean
from internlm.monitor.watchdog import Watchdog
from internlm.train.metrics import StepReport
from internlm.utils.errors import UserError
from tests.pool import run_ranks
from tests.train.tiny import make_config


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL, messages received)."""
    messages: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json;charset=utf-8"
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", messages
    server.shutdown()
    server.server_close()
    thread.join()


def with_alerts(url: str, **more: Any) -> Config:
    alert = {"enable_feishu_alert": True, "feishu_alert_address": url, **more}
    return make_config(JOB_NAME="seven", monitor={"enable_tb": False, "alert": alert})


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"]["post"]["zh_cn"]["content"][0][0]["text"] for message in messages]


def report(step: int, loss: float, updated: bool = True) -> StepReport:
    return StepReport(step=step, step_count=step, updated=updated, loss=loss)


def test_a_run_tells_of_its_start_a_loss_spike_a_skipped_update_and_its_end(webhook, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    url, messages = webhook
    with Monitor(with_alerts(url), tmp_path) as monitor:
        for one in (report(1, 2.0), report(2, 2.9), report(3, 4.4), report(4, 4.0, updated=False)):
            monitor.report(one)
    start, spike, skipped, end = texts(messages)
    assert start.startswith("Training in ") and start.endswith(" is starting.")
    assert "in step 3, loss value from 2.9 to 4.4" in spike
    assert "skip parameter update at step 4" in skipped
    assert end.endswith(" completed.")
    assert messages[0]["msg_type"] == "post" and messages[0]["timestamp"] > 1.7e9
    assert messages[0]["content"]["post"]["zh_cn"]["title"] == "123_seven"


def fail_on(rank: int, config: Config, folder: Path) -> None:
    with pytest.raises(ValueError), Monitor(config, folder, rank):
        raise ValueError("no such expert")


def test_an_exception_is_told_by_rank_0_alone(webhook, tmp_path):
    url, messages = webhook
    for rank in (0, 1):
        fail_on(rank, with_alerts(url), tmp_path)
    _, caught = texts(messages)
    assert "rank id 0" in caught and caught.endswith("ValueError: no such expert")


def test_with_a_file_every_rank_may_tell_and_equal_exceptions_are_told_once(webhook, tmp_path):
    url, messages = webhook
    config = with_alerts(url, alert_file_path=str(tmp_path / "told" / "alert.log"))
    for rank in (2, 1):
        fail_on(rank, config, tmp_path)
    assert ["rank id 2" in text for text in texts(messages)] == [True]
    Alert(config, 0).ended(None, None, None)  # a new run forgets what was told
    fail_on(1, config, tmp_path)
    assert "rank id 1" in texts(messages)[-1]


def test_a_file_that_can_not_be_written_does_not_hide_the_exception(webhook, tmp_path):
    url, messages = webhook
    (tmp_path / "file").write_text("")
    config = with_alerts(url, alert_file_path=str(tmp_path / "file" / "alert.log"))
    fail_on(1, config, tmp_path)
    assert messages == []
    with pytest.raises(UserError, match=r"alert_file_path = '.*file/alert.log' can't be written"):
        Alert(config, 0)


def test_a_webhook_that_is_away_costs_a_warning(tmp_path, caplog):
    with Monitor(with_alerts("http://127.0.0.1:9/hook"), tmp_path) as monitor:
        monitor.report(report(1, 2.0))
    assert "could not be sent" in caplog.text


def test_nothing_is_sent_unless_asked(webhook, tmp_path):
    url, messages = webhook
    with Monitor(with_alerts(url, enable_feishu_alert=False), tmp_path):
        pass
    assert messages == []


def test_the_watchdog_says_where_a_stuck_rank_is(caplog):
    told = threading.Event()
    dog = Watchdog(0.05, lambda text: told.set())
    with caplog.at_level(logging.WARNING):
        assert told.wait(60), "a step that doesn't end is noticed"
    dog.close()
    assert "test_the_watchdog_says_where_a_stuck_rank_is" in caplog.text


def test_the_watchdog_is_quiet_while_steps_end():
    told: list[str] = []
    dog = Watchdog(3600, told.append)
    dog.step_ended()
    dog.close()  # returns at once, though an hour isn't over
    assert told == []


def search(rank: int, world_size: int, times: list[float]) -> list[str]:
    told: list[str] = []
    config = make_config(monitor={"slow_rank_every": 2, "slow_rank_ratio": 1.2}).monitor
    ranks = SlowRanks(config, rank, dist.group.WORLD, told.append)
    for step in (1, 2):
        ranks.report(StepReport(step=step, step_count=step, fwd_bwd_time=times[rank]))
    return told


def test_a_slow_rank_is_named():
    first, second = run_ranks(2, search, [1.0, 1.6])
    assert len(first) == 1 and second == []
    assert "Rank 1 is slower than avg on fwd_bwd_time" in first[0] and "its time 1.60, avg 1.30" in first[0]
    assert run_ranks(2, search, [1.0, 1.3]) == [[], []]
    assert run_ranks(2, search, [0.1, 0.4]) == [[], []], "too short to tell from noise"


def test_the_average_of_many_ranks_leaves_out_both_ends():
    assert trimmed_mean([1.0, 9.0]) == 5.0
    assert trimmed_mean([1.0, 2.0, 3.0, 4.0, 90.0]) == 3.0
