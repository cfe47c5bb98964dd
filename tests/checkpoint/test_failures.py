"""What fails on one of two ranks: a save, or the start."""

import re
import time
from pathlib import Path

import pytest

from internlm.checkpoint.storage import Storage
from internlm.utils.errors import UserError
from tests.checkpoint.fake import FakeRun, full, make_config, saved
from tests.pool import run_ranks

RANK_TIMEOUT = 120.0  # far longer than the tests, and than any of them may take


def save_onto_a_full_disk(rank: int, world_size: int, folder: Path, full_rank: int, at_once: bool) -> tuple[str, float]:
    """The error of a save for which `full_rank` has no room, and the seconds it took, at the next step or `at_once`."""
    run = FakeRun(folder, make_config(checkpoint_every=2), rank_timeout=RANK_TIMEOUT)
    run.train(1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == full_rank:
            patch.setattr(Storage, "writer", full)
        run.step()
        if rank == full_rank:
            run.checkpointer._background.wait()
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            run.checkpointer.wait() if at_once else run.step()
        seconds = time.monotonic() - start
    run.checkpointer.close()
    return str(caught.value), seconds


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_ends_all_ranks_soon(full_rank: int, at_once: bool, tmp_path: Path) -> None:
    """Nothing of the rank reaches the disk, its report neither: rank 0 must not wait for it."""
    for text, seconds in run_ranks(2, save_onto_a_full_disk, tmp_path, full_rank, at_once):
        assert text.startswith("a checkpoint could not be saved:\n") and text.count("\n") == 1, text
        file = rf"{tmp_path}/checkpoints/2\.tmp-\w+/model-0000{full_rank}\.safetensors"
        assert re.search(rf"rank {full_rank}: {file}, which needs \d+ bytes, .* No space left on device", text), text
        assert seconds < RANK_TIMEOUT / 2
    assert saved(tmp_path / "checkpoints") == []


def start_with_rows(rank: int, world_size: int, folder: Path) -> str:
    run = FakeRun(folder, make_config())
    run.state.num_rows = (206, 205)[rank]
    with pytest.raises(UserError) as caught:
        run.checkpointer.resume()
    run.checkpointer.close()
    return str(caught.value)


def test_ranks_that_find_other_data_do_not_start(tmp_path: Path) -> None:
    """Copies on two machines, of which one lacks a file: rows would be repeated and missed without a word."""
    for told in run_ranks(2, start_with_rows, tmp_path):
        assert told.startswith("data: rank 0 finds 206 rows of training data, rank 1 205: make the files below")
