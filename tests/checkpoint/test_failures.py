"""What fails: a save or the start on one of two ranks, a store for a while, the run during a save."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from internlm.checkpoint import checkpointer, storage
from internlm.checkpoint.commit import write_rank
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


class SlowDownError(Exception):
    """Of a store's own library, as botocore's: no OSError."""


@pytest.mark.usefixtures("one_rank")
def test_a_store_that_comes_back_costs_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is refused at first, to be written and to be read."""
    keys: Any = {"save_ckpt_folder": f"memory://{tmp_path.name}/ckpt", "checkpoint_every": 2}
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    run = FakeRun(tmp_path, make_config(**keys))
    refused: set[tuple[str, str]] = set()
    kind = type(fsspec.filesystem("memory"))
    really = kind.open

    def flaky(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if (path, mode) not in refused:
            refused.add((path, mode))
            raise SlowDownError(path) if len(refused) % 2 else ConnectionResetError(path)
        return really(self, path, mode, **options)

    monkeypatch.setattr(kind, "open", flaky)
    run.train(3)
    run.checkpointer.wait()
    for lock in run.checkpointer._locks:
        lock.close()
    again = FakeRun(tmp_path, make_config(**keys, enable_save_ckpt=False))
    again.checkpointer.resume()
    assert again.state.step_count == 2 and len(refused) >= 2 * 6


@pytest.mark.usefixtures("one_rank")
def test_an_old_checkpoint_that_stays_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a folder is not empty as long as somebody reads a file that was in it."""
    remove = Storage.remove

    def busy(self: Storage, path: str) -> None:
        if "removed" in path:
            raise OSError(39, "Directory not empty", path)
        remove(self, path)

    monkeypatch.setattr(Storage, "remove", busy)
    run = FakeRun(tmp_path, make_config(checkpoint_every=1, keep_last=1))
    run.train(3)
    run.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["3", "1.tmp-removed", "2.tmp-removed"]
    assert caplog.text.count("can't all be removed: OSError: [Errno 39] Directory not empty") == 2
    monkeypatch.undo()
    FakeRun(tmp_path, make_config()).checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["3"]


@pytest.mark.usefixtures("one_rank")
def test_an_error_of_the_run_lets_the_save_under_way_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(checkpointer, "write_rank", lambda part: gate.wait(10) and write_rank(part))
    run = FakeRun(tmp_path, make_config(checkpoint_every=2))
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(ZeroDivisionError), run.checkpointer:
        run.train(3)
        raise ZeroDivisionError
    assert saved(tmp_path / "checkpoints") == ["2"]
