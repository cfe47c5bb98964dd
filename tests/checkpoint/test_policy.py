"""When checkpoints are written, which are kept, and what a start takes."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from internlm.checkpoint import checkpointer as checkpointer_module
from internlm.checkpoint import lease
from internlm.checkpoint.commit import commit, write_rank
from internlm.utils.errors import UserError
from tests.checkpoint.fake import FakeOptimizer, FakeRun, make_config, saved
from tests.utils.holder import held

pytestmark = pytest.mark.usefixtures("one_rank")


def run_of(folder: Path, optimizer: FakeOptimizer | None = None, timeout: float = 60.0, **keys: Any) -> FakeRun:
    return FakeRun(folder, make_config(**keys), optimizer, rank_timeout=timeout)


def test_every_and_last(tmp_path: Path) -> None:
    run = run_of(tmp_path, total_steps=7, checkpoint_every=3)
    run.train(7)
    run.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["3", "6", "7"]


def test_only_the_last_by_default_and_nothing_when_off(tmp_path: Path) -> None:
    for enabled in (True, False):
        run = run_of(tmp_path / str(enabled), total_steps=4, enable_save_ckpt=enabled)
        run.train(4)
        run.checkpointer.close()
    assert saved(tmp_path / "True/checkpoints") == ["4"]
    assert not (tmp_path / "False/checkpoints").exists()


def test_the_last_batch_saves_though_updates_failed(tmp_path: Path) -> None:
    """data.total_steps counts batches; a step is an update."""
    run = run_of(tmp_path, total_steps=5, checkpoint_every=2)
    for updated in (True, True, False, False, True):
        run.step(updated)
    run.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["2", "3"]
    assert json.loads((tmp_path / "checkpoints/2/state.json").read_text())["train"]["batch_count"] == 2
    assert json.loads((tmp_path / "checkpoints/3/state.json").read_text())["train"]["batch_count"] == 5


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path, total_steps=1)
    run.train(1)
    run.checkpointer.close()
    folder = tmp_path / "checkpoints/1"
    files = ["config.json", "model-00000.safetensors", "optimizer-00000.safetensors", "rng-00000.safetensors"]
    assert saved(folder) == sorted([*files, "manifest.json", "state.json"])
    assert json.loads((folder / "config.json").read_text())["model"]["vocab_size"] == 12
    assert json.loads((folder / "state.json").read_text())["optimizer"] == {"num_updates": 1}


def test_keep_last_removes_the_oldest(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint_every=1, keep_last=2)
    run.train(5)
    run.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["4", "5"]


def test_snapshots_replace_each_other_and_give_way_to_normal_ones(tmp_path: Path) -> None:
    run = run_of(tmp_path, total_steps=9, checkpoint_every=6, oss_snapshot_freq=2)
    run.train(8)
    run.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["6", "snapshot"]
    assert saved(tmp_path / "checkpoints/snapshot") == ["8"]
    again = run_of(tmp_path, total_steps=9)
    again.checkpointer.resume()
    assert again.state.step_count == 8 and again.optimizer.values() == {8.0}
    again.checkpointer.close()


def test_a_failing_prune_keeps_what_was_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed before the newer checkpoint is complete."""
    run = run_of(tmp_path, checkpoint_every=1, keep_last=1)
    run.train(2)
    run.checkpointer.close()
    monkeypatch.setattr(checkpointer_module, "write_rank", lambda part: None)
    again = run_of(tmp_path, checkpoint_every=1, keep_last=1, timeout=0.1)
    again.checkpointer.resume()
    again.step()
    with pytest.raises(UserError, match=r"after 0.1 s there is no file of rank 0 in .*3\.tmp-"):
        again.checkpointer.close()
    assert saved(tmp_path / "checkpoints")[0] == "2"
    monkeypatch.undo()
    third = run_of(tmp_path, checkpoint_every=1, keep_last=1)
    third.checkpointer.resume()
    third.step()
    third.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["3"]  # and the unfinished folder is gone


@pytest.mark.parametrize(("number", "stops"), [("3", True), ("-3", False)])
def test_stop_file(number: str, stops: bool, tmp_path: Path) -> None:
    path = tmp_path / "control" / "stop"
    run = run_of(tmp_path, stop_file_path=str(path))
    assert path.read_text() == "0"
    run.train(1)
    path.write_text(number)
    run.train(4)
    run.checkpointer.close()
    assert run.checkpointer.should_stop is stops
    assert run.state.step_count == (3 if stops else 5)
    assert saved(tmp_path / "checkpoints") == ["3"]


def test_nonsense_in_the_stop_file_is_ignored(tmp_path: Path) -> None:
    run = run_of(tmp_path, stop_file_path=str(tmp_path / "stop"))
    (tmp_path / "stop").write_text("soon")
    run.train(2)
    run.checkpointer.close()
    assert not run.checkpointer.should_stop and saved(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("number", "message"),
    [("9" * 25, "beyond 64 bits"), ("2", "can't stop at step 2, which is past"), ("-1", "can't save at step 1")],
)
def test_numbers_that_no_step_can_have_are_named(
    number: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, stop_file_path=str(tmp_path / "stop"))
    run.train(3)
    (tmp_path / "stop").write_text(number)
    run.train(3)
    run.checkpointer.close()
    assert not run.checkpointer.should_stop and caplog.text.count(message) == 1


def test_a_number_that_was_obeyed_is_not_past(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path, stop_file_path=str(tmp_path / "stop"))
    (tmp_path / "stop").write_text("-2")
    run.train(4)
    run.checkpointer.close()
    assert saved(tmp_path / "checkpoints") == ["2"] and "past" not in caplog.text


def test_a_stop_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ckpt.stop_file_path = '.*/file/stop' can't be written"):
        run_of(tmp_path, stop_file_path=str(tmp_path / "file/stop"))


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGTERM, True), (signal.SIGUSR1, False)])
def test_signals(number: signal.Signals, stops: bool, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    run = run_of(tmp_path)
    run.train(2)
    os.kill(os.getpid(), number)
    run.train(3)
    run.checkpointer.close()
    assert run.state.step_count == (3 if stops else 5)
    assert run.checkpointer.stop_reason == ("SIGTERM" if stops else None)
    assert saved(tmp_path / "checkpoints") == ["3"]
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_end_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun and Slurm both send SIGTERM, and the second comes while what the first asked for is written."""
    closing, ended = threading.Event(), []

    def signalled(part: Any) -> None:
        assert closing.wait(60)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        write_rank(part)

    monkeypatch.setattr(checkpointer_module, "write_rank", signalled)
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("killed"))
    try:
        run = run_of(tmp_path, total_steps=1)
        run.train(1)
        closing.set()
        run.checkpointer.close()
        assert ended == [] and saved(tmp_path / "checkpoints") == ["1"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == ["killed"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files hold the values of the moment of the save; the next save waits for this one."""
    gate = threading.Event()

    def slow(part: Any) -> None:
        gate.wait(60)
        write_rank(part)

    monkeypatch.setattr(checkpointer_module, "write_rank", slow)
    run = run_of(tmp_path, checkpoint_every=2)
    run.train(3)
    assert run.optimizer.values() == {3.0} and not (tmp_path / "checkpoints/2").exists()
    start = time.monotonic()
    threading.Timer(0.2, gate.set).start()
    run.train(1)
    assert time.monotonic() - start > 0.1 and (tmp_path / "checkpoints/2").exists()
    run.checkpointer.close()
    for step in (2, 4):
        loaded = run_of(
            tmp_path / "x", load_ckpt_info={"path": str(tmp_path / f"checkpoints/{step}"), "content": ("all",)}
        )
        loaded.checkpointer.resume()
        loaded.checkpointer.close()
        assert loaded.optimizer.values() == {float(step)}


def test_synchronous_saves_are_there_at_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint_every=1, async_upload=False)
    run.train(1)
    assert (tmp_path / "checkpoints/1/manifest.json").exists()
    run.checkpointer.close()


def test_errors_of_the_background_surface_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("internlm.checkpoint.commit.write_tensors", full)
    run = run_of(tmp_path, checkpoint_every=2)
    run.train(2)
    run.checkpointer._background.wait()
    with pytest.raises(UserError, match=r"rank 0: .*No space left on device"):
        run.train(1)
    run.checkpointer.close()  # reported once


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ckpt.save_ckpt_folder = '.*/file' can't be written"):
        run_of(tmp_path, save_ckpt_folder=str(tmp_path / "file"), total_steps=1)


def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path: Path) -> None:
    for kind, key in (("normal", "save_ckpt_folder"), ("snapshot", "snapshot_ckpt_folder")):
        live = tmp_path / kind / "4.tmp-0a1b"
        live.mkdir(parents=True)
        with held(live.parent) as other:
            with pytest.raises(UserError, match=rf"ckpt\.{key} = .* is in use by process {other.pid} on "):
                run_of(tmp_path, oss_snapshot_freq=1, **{key: str(live.parent)})
            assert live.exists()


def test_what_killed_saves_left_makes_room_at_the_start(tmp_path: Path) -> None:
    """Before anything is written: after the next save would be too late on a full disk."""
    for name in ("4.tmp-0a1b", "2.tmp-removed", "snapshot/3.tmp-0a1b", "notes.tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = run_of(tmp_path, oss_snapshot_freq=9)
    assert saved(tmp_path / "checkpoints") == ["notes.tmp-1", "snapshot"]  # what isn't ours stays
    assert saved(tmp_path / "checkpoints/snapshot") == []
    run.checkpointer.close()


def test_object_store(tmp_path: Path) -> None:
    """No rename there: the manifest is the mark, and a folder without it is an unfinished save."""
    url = "memory://bucket/ckpt"
    run = run_of(tmp_path, save_ckpt_folder=url, checkpoint_every=2, keep_last=2, oss_snapshot_freq=3)
    run.train(7)
    run.checkpointer.close()
    fs = fsspec.filesystem("memory")
    assert sorted(name.rsplit("/", 1)[-1] for name in fs.ls("/bucket/ckpt", detail=False)) == ["4", "6", "snapshot"]
    fs.rm("/bucket/ckpt/6/manifest.json")
    again = run_of(tmp_path, save_ckpt_folder=url, checkpoint_every=2, keep_last=2)
    again.checkpointer.resume()
    assert again.state.step_count == 4 and again.optimizer.values() == {4.0}
    again.train(2)  # writes 6 anew
    again.checkpointer.close()
    third = run_of(tmp_path, save_ckpt_folder=url)
    third.checkpointer.resume()
    third.checkpointer.close()
    assert third.state.step_count == 6 and third.optimizer.values() == {6.0}


def test_a_folder_of_an_object_store_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "SILENCE", 30)  # two looks at a beat are a sixtieth of it apart
    url = f"memory://{tmp_path.name}/ckpt"
    first = run_of(tmp_path, save_ckpt_folder=url, checkpoint_every=1)
    with pytest.raises(UserError, match=rf"ckpt.save_ckpt_folder = '{url}' is in use by process {os.getpid()} on "):
        run_of(tmp_path, save_ckpt_folder=url)
    first.train(1)
    (held,) = first.checkpointer._locks
    assert isinstance(held, lease.Lease)
    store = first.checkpointer.storages["normal"]
    for part in (b"", b'{"holder": "proc'):  # what HDFS shows of an object that is being written, or stays of one
        with store.writer(lease.NAME) as write:
            write(part)
        held.check()
        deadline = time.monotonic() + 60
        while held.mine["token"].encode() not in store.read(lease.NAME):
            assert time.monotonic() < deadline, "it is written again"
            time.sleep(0.01)
    first.train(1)
    first.checkpointer.wait()
    held._end.set()  # from now on it is as still as a killed run
    held._thread.join()
    monkeypatch.setattr(lease, "SILENCE", 0.1)
    second = run_of(tmp_path, save_ckpt_folder=url, checkpoint_every=1)
    second.checkpointer.resume()
    assert second.state.step_count == 2
    second.train(1)
    second.checkpointer.wait()
    before = second.checkpointer.storages["normal"].read("3/manifest.json")
    with pytest.raises(UserError, match=r"was taken by process .* leaves the folder to the other"):
        first.train(1)
    with pytest.raises(UserError, match="was taken by"):  # also while a save is under way
        write_rank(first.checkpointer._part)
        commit(first.checkpointer._part, 60, held.check)
    first.checkpointer.close()
    assert second.checkpointer.storages["normal"].read("3/manifest.json") == before
    assert lease.NAME in second.checkpointer.storages["normal"].names()
    second.checkpointer.close()
    assert second.checkpointer.storages["normal"].names() == ["1", "2", "3"]


def test_resume_restores_everything(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint_every=4)
    for updated in (True, False, True, True, True):
        run.step(updated)
    expected = torch.get_rng_state()
    run.checkpointer.close()
    torch.manual_seed(99)
    again = run_of(tmp_path)
    again.checkpointer.resume()
    again.checkpointer.close()
    assert again.state == run.state and again.optimizer.num_updates == 4
    assert again.optimizer.loaded_kinds == {"param", "master", "exp_avg", "exp_avg_sq"}
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize(
    ("content", "kinds", "step", "batch", "updates"),
    [
        (("model",), {"param"}, 0, 0, 0),
        (("model", "scheduler"), {"param"}, 3, 0, 0),
        (("model", "sampler"), {"param"}, 0, 3, 0),
        (("model", "optimizer"), {"param", "master", "exp_avg", "exp_avg_sq"}, 0, 0, 3),
        (("all",), {"param", "master", "exp_avg", "exp_avg_sq"}, 3, 3, 3),
    ],
)
def test_contents(
    content: tuple[str, ...], kinds: set[str], step: int, batch: int, updates: int, tmp_path: Path
) -> None:
    torch.manual_seed(6)
    run = run_of(tmp_path, total_steps=3)
    run.train(3)
    run.checkpointer.close()
    other = run_of(tmp_path / "new", load_ckpt_info={"path": str(tmp_path / "checkpoints/3"), "content": content})
    torch.manual_seed(7)
    before = torch.get_rng_state()
    other.checkpointer.resume()
    other.checkpointer.close()
    assert other.optimizer.loaded_kinds == kinds
    assert {kind for (_, kind), value in other.optimizer.tensors.items() if value.eq(3).all()} == kinds - {"master"}
    state = other.state
    assert (state.step_count, state.batch_count, other.optimizer.num_updates) == (step, batch, updates)
    assert state.num_consumed_tokens == batch * 8
    assert torch.equal(torch.get_rng_state(), before) is (content != ("all",))


def test_optimizer_without_model_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, load_ckpt_info={"path": str(tmp_path / "3"), "content": ("optimizer",)})
    with pytest.raises(UserError, match='"optimizer" needs "model"'):
        run.checkpointer.resume()
    run.checkpointer.close()


def test_the_folder_above_is_told_apart(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint_every=1)
    run.train(2)
    run.checkpointer.close()
    other = run_of(tmp_path / "new", load_ckpt_info={"path": str(tmp_path / "checkpoints")})
    with pytest.raises(UserError, match=r"load_ckpt_info.path: .*manifest.json is missing; .* one of them: 2, 1"):
        other.checkpointer.resume()
    other.checkpointer.close()


def test_the_folder_of_a_run_is_told_apart(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint_every=1, oss_snapshot_freq=3)
    run.train(1)
    run.checkpointer.save("snapshot")
    run.checkpointer.close()
    other = run_of(tmp_path / "new", load_ckpt_info={"path": f"{tmp_path}/"})
    message = r"manifest.json is missing; .* one of them: checkpoints/1, checkpoints/snapshot/1"
    with pytest.raises(UserError, match=message):
        other.checkpointer.resume()
    other.checkpointer.close()


def test_other_sizes_give_both_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path, total_steps=1)
    run.train(1)
    run.checkpointer.close()
    other = run_of(tmp_path, vocab_size=20)
    with pytest.raises(UserError, match=r"model.vocab_size: 12 in the checkpoint, 20 in this run"):
        other.checkpointer.resume()
    other.checkpointer.close()


def test_a_new_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path)
    with caplog.at_level(logging.INFO, logger="internlm"):
        run.checkpointer.resume()
    run.checkpointer.close()
    assert "new run: no checkpoint in" in caplog.text and run.state.step_count == 0


def test_auto_resume_off_says_what_it_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path, total_steps=2)
    run.train(2)
    run.checkpointer.close()
    other = run_of(tmp_path, auto_resume=False)
    with caplog.at_level(logging.INFO, logger="internlm"):
        other.checkpointer.resume()
    other.checkpointer.close()
    assert "holds checkpoints up to step 2" in caplog.text and other.state.step_count == 0
