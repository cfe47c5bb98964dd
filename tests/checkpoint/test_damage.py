"""Damaged checkpoints: named, passed over, and never taken for a fresh start."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm.checkpoint.manifest import BrokenCheckpointError, read_manifest
from internlm.checkpoint.storage import Storage
from internlm.utils.errors import UserError
from tests.checkpoint.fake import FakeRun, make_config, saved

pytestmark = pytest.mark.usefixtures("one_rank")

FILES = (
    "config.json",
    "manifest.json",
    "model-00000.safetensors",
    "optimizer-00000.safetensors",
    "rng-00000.safetensors",
    "state.json",
)
Damage = Callable[[Path], None]


def flip_first(path: Path) -> None:
    _flip(path, 0)


def flip_middle(path: Path) -> None:
    _flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    _flip(path, path.stat().st_size - 1)


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def take_from_other_step(path: Path) -> None:
    """Every rank's file has the same name and often the same size in all checkpoints."""
    shutil.copy(path.parent.parent / "2" / path.name, path)


DAMAGES = (flip_first, flip_middle, flip_last, truncate, empty, remove, take_from_other_step)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4."""
    run = FakeRun(tmp_path, make_config(checkpoint_every=2))
    run.train(4)
    run.checkpointer.close()
    return tmp_path


CASES = [(name, damage) for name in FILES for damage in DAMAGES]
CASES.remove(("config.json", take_from_other_step))  # all steps have the same


@pytest.mark.parametrize(("name", "damage"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_falls_back_and_names_the_file(
    name: str, damage: Damage, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(trained / "checkpoints/4" / name)
    run = FakeRun(trained, make_config())
    with caplog.at_level(logging.INFO, logger="internlm"):
        run.checkpointer.resume()
    run.checkpointer.close()
    assert run.state.step_count == 2 and run.optimizer.values() == {2.0}
    assert f"checkpoints/4: {name}" in caplog.text and "resumed from" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_never_from_zero(name: str, trained: Path) -> None:
    """With all broken the run ends, even if load_ckpt_info would offer another start."""
    for step in (2, 4):
        flip_middle(trained / "checkpoints" / str(step) / name)
    start = {"path": str(trained / "checkpoints/2")}
    run = FakeRun(trained, make_config(load_ckpt_info=start))
    with pytest.raises(UserError, match=rf"(?s)none is whole.*checkpoints/4: {name}.*checkpoints/2: {name}"):
        run.checkpointer.resume()
    run.checkpointer.close()
    assert run.optimizer.values() == {0.0} and run.state.step_count == 0


def test_a_named_checkpoint_is_an_error(trained: Path) -> None:
    truncate(trained / "checkpoints/4/model-00000.safetensors")
    start = {"path": str(trained / "checkpoints/4")}
    run = FakeRun(trained / "new", make_config(load_ckpt_info=start))
    with pytest.raises(UserError, match=r"load_ckpt_info.path: .*model-00000.safetensors has \d+ bytes .*truncated"):
        run.checkpointer.resume()
    run.checkpointer.close()


def test_a_foreign_shard_beside_the_listed_ones(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = trained / "checkpoints"
    shutil.copy(folder / "2/model-00000.safetensors", folder / "4/model-00001.safetensors")
    run = FakeRun(trained, make_config())
    with caplog.at_level(logging.INFO, logger="internlm"):
        run.checkpointer.resume()
    run.checkpointer.close()
    assert run.state.step_count == 2 and "model-00001.safetensors is foreign" in caplog.text


def test_a_foreign_shard_in_a_forged_manifest(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sizes and hashes of another save, copied with its files: the token in the header gives it away."""
    storage, name = Storage(str(trained / "checkpoints")), "optimizer-00000.safetensors"
    old, new = read_manifest(storage, "2"), read_manifest(storage, "4")
    shutil.copy(trained / "checkpoints/2" / name, trained / "checkpoints/4" / name)
    new.files[name] = old.files[name]
    (trained / "checkpoints/4/manifest.json").write_bytes(new.render())
    run = FakeRun(trained, make_config())
    with caplog.at_level(logging.INFO, logger="internlm"):
        run.checkpointer.resume()
    run.checkpointer.close()
    assert run.state.step_count == 2 and f"{name} is foreign: it belongs to save {old.token}" in caplog.text


def test_a_renamed_folder(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    (trained / "checkpoints/2").rename(trained / "checkpoints/9")
    run = FakeRun(trained, make_config())
    with caplog.at_level(logging.INFO, logger="internlm"):
        run.checkpointer.resume()
    run.checkpointer.close()
    assert run.state.step_count == 4 and "is of step 2, not of step 9" in caplog.text


def test_every_bit_of_the_manifest_counts(trained: Path) -> None:
    storage, path = Storage(str(trained / "checkpoints")), trained / "checkpoints/4/manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(BrokenCheckpointError, match=r"manifest\.json"):
            read_manifest(storage, "4")


def test_a_newer_format_is_said_to_be_one(trained: Path) -> None:
    path = trained / "checkpoints/4/manifest.json"
    about = json.loads(path.read_text().rstrip("\n").rpartition("\n")[0])
    path.write_text(json.dumps({**about, "version": 2}) + "\n{}\n")
    with pytest.raises(BrokenCheckpointError, match="format version 2, this program reads 1"):
        read_manifest(Storage(str(trained / "checkpoints")), "4")


def test_the_broken_step_is_written_anew(trained: Path) -> None:
    """After a fall back the same step comes again; pruning never counts the broken one."""
    flip_last(trained / "checkpoints/4/model-00000.safetensors")
    run = FakeRun(trained, make_config(checkpoint_every=1, keep_last=2))
    run.checkpointer.resume()
    run.step()
    run.checkpointer.wait()
    assert saved(trained / "checkpoints") == ["2", "3", "4"]
    run.step()
    run.checkpointer.close()
    assert saved(trained / "checkpoints") == ["3", "4"]
    again = FakeRun(trained, make_config())
    again.checkpointer.resume()
    again.checkpointer.close()
    assert again.optimizer.values() == {4.0}
