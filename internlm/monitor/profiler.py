"""Traces of a few steps, for `--profiling`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from internlm.train.metrics import StepReport
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

SKIP, WARMUP, ACTIVE = 3, 1, 2  # steps: compilation and allocator growth, the profiler's own start, the trace


def traced(reports: Iterable[StepReport], folder: Path, rank: int) -> Iterator[StepReport]:
    """Passes `reports` on, tracing steps 5 and 6 of this process into `folder`/rank{rank}.json.gz on rank 0.

    The file opens in chrome://tracing, Perfetto and TensorBoard's trace viewer.
    """
    if rank != 0:  # ranks do the same; one trace of gigabytes is enough
        yield from reports
        return
    folder.mkdir(parents=True, exist_ok=True)

    def save(profiler: profile) -> None:
        path = folder / f"rank{rank}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info(f"trace of {ACTIVE} steps written to {path}")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    window = schedule(skip_first=SKIP, wait=0, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=window, on_trace_ready=save, record_shapes=True) as profiler:
        for report in reports:
            profiler.step()
            yield report
