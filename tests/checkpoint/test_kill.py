"""SIGKILL at random moments of saves: the newest checkpoint always loads and is never a mixture.

A warm process forks the victims, so that each costs milliseconds; the files are read back with the safetensors library.
Every fourth time there are two ranks: one dies, and the other soon after or by the loss of the first.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import safetensors.numpy
import torch
import torch.distributed as dist

from internlm.checkpoint.manifest import check_files, list_checkpoints, read_manifest
from internlm.checkpoint.storage import Storage
from tests.checkpoint.fake import FakeOptimizer, FakeRun, make_config

KILLS = 100
SHAPES = {f"layers.{i}.weight": (256, 256) for i in range(4)}  # 3 MiB a checkpoint


def victim(folder: Path, ready: int, parent: int, rank: int, ranks: int, store: Path) -> None:
    """Resumes, then saves as fast as it can until it is killed (or its parent is)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    config = make_config(10**9, checkpoint_every=1, keep_last=2, oss_snapshot_freq=3)
    run = FakeRun(folder, config, FakeOptimizer(SHAPES, rank, ranks))
    run.checkpointer.resume()
    values = run.optimizer.values()
    assert values == {float(run.state.step_count)}, values
    os.write(ready, b"r")
    while os.getppid() == parent:
        run.step()


def kill_once(folder: Path, ranks: int, store: Path, generator: random.Random, longest: float) -> None:
    """Forks the ranks of a run and kills them in a random order, one within `longest` seconds, the other soon after."""
    reader, writer = os.pipe()
    parent, children = os.getpid(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                victim(folder, writer, parent, rank, ranks, store)
            finally:
                os._exit(1)
        children.append(child)
    os.close(writer)
    for _ in children:
        assert os.read(reader, 1) == b"r", "the victim could not resume"
    os.close(reader)
    generator.shuffle(children)
    for child, pause in zip(children, (longest, longest / 2), strict=False):
        time.sleep(generator.uniform(0.0, pause))
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without any; checks that it is whole and not mixed."""
    storage = Storage(str(folder))
    listed = list_checkpoints(storage)
    if not listed:
        return 0
    step, name = listed[0]
    manifest = read_manifest(storage, name)
    assert check_files(storage, name, manifest, list(manifest.files)) == []
    values = set()
    for file in manifest.files:
        if file.startswith(("model-", "optimizer-")):
            for array in safetensors.numpy.load_file(folder / name / file).values():
                values |= {float(array.min()), float(array.max())}
    assert values == {float(step)}, (name, values)
    assert json.loads((folder / name / "state.json").read_text())["train"]["step_count"] == step
    return step


def main(folder: Path) -> None:
    """Kills `KILLS` runs one after another. Prints how often a save was cut, by the number of ranks."""
    generator, step, cut, longest = random.Random(0), 0, {1: 0, 2: 0}, 0.1
    for number in range(KILLS):
        ranks = 2 if number % 4 == 0 else 1
        kill_once(folder, ranks, folder / f"store{number}", generator, longest)
        now = newest(folder / "checkpoints")
        assert now >= step, (now, step)
        longest = 0.1 if now > step else 2 * longest  # where the disk is slow, a save sometimes gets the time it needs
        step = now
        cut[ranks] += any(".tmp-" in path.name for path in (folder / "checkpoints").iterdir())
    print(json.dumps({"step": step, "cut": cut}))


def test_one_hundred_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.test_kill", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["cut"]["1"] >= KILLS // 5 and result["cut"]["2"] >= KILLS // 20 and result["step"] >= 5, result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
