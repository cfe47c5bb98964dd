"""Finds ranks that hold the others up: their own part of a step takes longer than the average of all."""

import socket
from collections.abc import Callable

import torch.distributed as dist

from internlm.config.schema import MonitorConfig
from internlm.train.metrics import StepReport
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

SHORTEST = 0.5  # seconds: in shorter steps a slow rank can't be told from noise


class SlowRanks:
    """Every `slow_rank_every` steps the ranks compare how long forward and backward took (the test of 2023).

    Where ranks wait for each other inside a layer (tensor parallel, sharded parameters), their times are alike and say
    nothing; without, the one whose GPU is throttled or whose host is busy stands out. Collective.
    """

    def __init__(self, config: MonitorConfig, rank: int, group: dist.ProcessGroup, tell: Callable[[str], None]) -> None:
        self.every, self.ratio = config.slow_rank_every, config.slow_rank_ratio
        self.rank, self.group, self._tell = rank, group, tell
        self._host = socket.gethostname()

    def report(self, report: StepReport) -> None:
        if report.skipped or not self.every or report.step % self.every:
            return
        found: list[tuple[float, str]] = [(0.0, "")] * self.group.size()
        dist.all_gather_object(found, (report.fwd_bwd_time, self._host), self.group)
        if self.rank != 0:
            return
        average = trimmed_mean([seconds for seconds, _ in found])
        for rank, (seconds, host) in enumerate(found):
            if average >= SHORTEST and seconds > average * self.ratio:
                text = (
                    f"Rank {rank} is slower than avg on fwd_bwd_time, Hostname {host}, its time {seconds:.2f}, "
                    f"avg {average:.2f}"
                )
                logger.warning(text)
                self._tell(text)


def trimmed_mean(times: list[float]) -> float:
    """The mean without the largest and the smallest; of four times or fewer, of all."""
    if len(times) > 4:
        times = sorted(times)[1:-1]
    return sum(times) / len(times)
