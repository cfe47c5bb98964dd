"""Resumed training is the same training; any layout continues any other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.runs import Chain, contents, global_tensors, random_states, resave, run_config, train
from tests.pool import run_ranks

# Pieces are cut over os ranks and loaded parameters travel over os / p; g is varied in the tests of the engine.
CHAINS: dict[int, list[Chain]] = {
    1: [(1, 1, 1)],
    2: [(1, 1, 1), (1, 1, 2), (2, 2, 2)],
    4: [(1, 1, 4), (1, 2, 2), (2, 2, 4), (4, 4, 4)],
}
LAYOUTS = [(world_size, chain) for world_size, chains in CHAINS.items() for chain in chains]
BF16, FP16, FP32 = ({"dtype": f"torch.{name}"} for name in ("bfloat16", "float16", "float32"))
PLAIN = {"master": "fp32", "moment_dtype": "torch.bfloat16"}


@pytest.mark.parametrize(
    ("world_size", "chain", "sections"),
    [
        (1, (1, 1, 1), {"model": BF16}),
        (2, (1, 1, 2), {"model": FP16}),
        (2, (2, 2, 2), {"model": BF16, "hybrid_zero_optimizer": PLAIN}),
        (4, (1, 1, 1), {}),
        (4, (1, 2, 4), {"model": BF16, "use_fp32_norm": True}),
        (4, (2, 2, 2), {"model": {**BF16, "tie_word_embeddings": True}}),
    ],
)
def test_twenty_steps_are_ten_and_ten(world_size: int, chain: Chain, sections: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(chain, world_size, ckpt={"checkpoint_every": 10}, **sections)
    whole = run_ranks(world_size, train, config, tmp_path / "whole")
    first = run_ranks(world_size, train, config, tmp_path / "parts", 15)  # what follows the checkpoint is lost
    second = run_ranks(world_size, train, config, tmp_path / "parts")
    scales = whole[0]["scales"]
    assert (len(set(scales)) > 1) is (sections.get("model") == FP16), scales  # overflows, then growth
    start = 20 - len(second[0]["losses"])  # updates are counted: with overflows, more batches than ten
    assert start == 10 if len(set(scales)) == 1 else 10 < start < 15
    for rank in range(world_size):
        assert len({tuple(rows) for rows in whole[rank]["samples"]}) == 20
        for what in ("losses", "norms", "scales", "samples"):
            values = whole[rank][what]
            assert first[rank][what] == values[:15], what
            assert second[rank][what] == values[start:], what
    last = str(max(int(path.name) for path in (tmp_path / "whole/checkpoints").glob("[!.]*")))
    assert contents(tmp_path / "parts/checkpoints" / last) == contents(tmp_path / "whole/checkpoints" / last)


def test_random_numbers_continue(tmp_path: Path) -> None:
    config = run_config((1, 1, 1), 2, ckpt={"checkpoint_every": 10})
    whole = run_ranks(2, train, config, tmp_path / "whole")
    run_ranks(2, train, config, tmp_path / "parts", 10)
    second = run_ranks(2, train, config, tmp_path / "parts")
    assert [rank["random"] for rank in second] == [rank["random"][10:] for rank in whole]
    assert random_states(tmp_path / "parts/checkpoints/20") == random_states(tmp_path / "whole/checkpoints/20")


@pytest.fixture(scope="module")
def saved_everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on each layout, saved and continued by two more."""
    folder = tmp_path_factory.mktemp("layouts")
    for world_size, chain in LAYOUTS:
        config = run_config(chain, world_size, total_steps=5, ckpt={"checkpoint_every": 3})
        seen = run_ranks(world_size, train, config, folder / name_of(world_size, chain))
        (folder / name_of(world_size, chain) / "losses.json").write_text(json.dumps(seen[0]["losses"]))
    return folder


def name_of(world_size: int, chain: Chain) -> str:
    return f"{world_size}-{'-'.join(map(str, chain))}"


def continue_all(rank: int, world_size: int, pairs: list[tuple[Chain, Path]]) -> list[list[float]]:
    """Losses of the two steps after step 3 of each source, on a chain of this world size."""
    losses = []
    for chain, source in pairs:
        load = {"path": str(source / "checkpoints/3"), "content": ("all",)}
        ckpt = {"enable_save_ckpt": False, "load_ckpt_info": load}
        config = run_config(chain, world_size, total_steps=5, ckpt=ckpt)
        losses.append(train(rank, world_size, config, source / "none")["losses"])
    return losses


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_continues_any_other(world_size: int, saved_everywhere: Path) -> None:
    """Each from three others, of which one at least has another number of ranks; what is read are boxes of whole
    tensors, whoever wrote them."""
    pairs = [
        (chain, saved_everywhere / name_of(*LAYOUTS[(number + step) % len(LAYOUTS)]))
        for number, (ranks, chain) in enumerate(LAYOUTS)
        if ranks == world_size
        for step in (1, 3, 6)
    ]
    for found in run_ranks(world_size, continue_all, pairs):
        for (chain, source), losses in zip(pairs, found, strict=True):
            expected = json.loads((source / "losses.json").read_text())[3:]
            assert losses == pytest.approx(expected, abs=1e-6), (source, chain)


@pytest.mark.parametrize("sections", [{}, {"model": BF16}, {"model": BF16, "hybrid_zero_optimizer": PLAIN}])
def test_resharding_keeps_every_bit(sections: dict[str, Any], tmp_path: Path) -> None:
    """Around the layouts and back, masters and moments included."""
    start = run_config((1, 2, 2), 2, total_steps=3, **sections)
    run_ranks(2, train, start, tmp_path / "0")
    expected = global_tensors(tmp_path / "0/checkpoints/3")
    assert all(array.size for array in expected.values())
    assert {kind for _, kind in expected} == {"param", "exp_avg", "exp_avg_sq"} | ({"master"} if sections else set())
    for hop, (world_size, chain) in enumerate([(4, (4, 4, 4)), (1, (1, 1, 1)), (4, (1, 2, 4)), (2, (2, 2, 2))]):
        config = run_config(chain, world_size, **sections)
        run_ranks(world_size, resave, config, tmp_path / f"{hop}/checkpoints/3", tmp_path / f"{hop + 1}")
        found = global_tensors(tmp_path / f"{hop + 1}/checkpoints/3")
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert np.array_equal(array, found[key]), (key, world_size, chain)


def test_other_precisions(tmp_path: Path) -> None:
    """fp32 -> bf16 with masters -> fp32 loses nothing: the master carries all bits."""
    run_ranks(1, train, run_config((1, 1, 1), 1, total_steps=3), tmp_path / "0")
    run_ranks(2, resave, run_config((1, 1, 2), 2, model=BF16), tmp_path / "0/checkpoints/3", tmp_path / "1")
    run_ranks(1, resave, run_config((1, 1, 1), 1), tmp_path / "1/checkpoints/3", tmp_path / "2")
    first, half, last = (global_tensors(tmp_path / f"{i}/checkpoints/3") for i in range(3))
    for (name, kind), array in first.items():
        assert np.array_equal(array, last[name, kind]), (name, kind)
        if kind == "param":
            assert np.array_equal(array, half[name, "master"]), name
            master, rounded = torch.from_numpy(array), torch.from_numpy(half[name, kind]).view(torch.bfloat16).float()
            tie = (master & 0xFFFF) == 0x8000  # goes away from zero, where torch rounds half to even
            master = master.view(torch.float32)
            assert torch.equal((rounded - master).abs(), (master.bfloat16().float() - master).abs()), name
            assert torch.equal(rounded[~tie], master.bfloat16().float()[~tie]), name
            assert (rounded.abs() > master.abs())[tie].all(), name


def test_model_alone_rebuilds_masters(tmp_path: Path) -> None:
    run_ranks(2, train, run_config((1, 1, 2), 2, total_steps=3, model=BF16), tmp_path / "0")
    load = {"path": str(tmp_path / "0/checkpoints/3")}
    config = run_config((2, 2, 2), 2, total_steps=1, model=BF16, ckpt={"load_ckpt_info": load}, adam={"lr": 0.0})
    run_ranks(2, train, config, tmp_path / "1")
    before, after = global_tensors(tmp_path / "0/checkpoints/3"), global_tensors(tmp_path / "1/checkpoints/1")
    for (name, kind), array in after.items():
        if kind == "param":
            assert np.array_equal(array, before[name, kind]), name
            master = torch.from_numpy(after[name, "master"]).view(torch.float32)
            assert torch.equal(master, torch.from_numpy(array).view(torch.bfloat16).float()), name


CONFIG = """
model = dict(
    num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, intermediate_size=64, dtype="torch.bfloat16"
)
data = dict(type="synthetic", seq_len=16, micro_num=2, total_steps=60, num_worker=0)
parallel = dict(zero1=dict(size=-1))
ckpt = dict(checkpoint_every=15)
"""


@contextmanager
def train_py(config: Path, run_dir: Path, root: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of train.py, as torchrun starts them: they meet in its store. Killed at the end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    command = [sys.executable, "train.py", "--config", str(config), "--run_dir", str(run_dir)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def kill_on_the_way(config: Path, run_dir: Path, root: Path) -> bool:
    """Starts train.py and kills both ranks after the first checkpoint; whether they were still training then."""
    shutil.rmtree(run_dir, ignore_errors=True)
    deadline = time.monotonic() + 600
    with train_py(config, run_dir, root) as job:
        while not (run_dir / "checkpoints/15").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
    outputs = [rank.communicate()[0] for rank in job]
    last = max((int(path.name) for path in run_dir.glob("checkpoints/*") if path.name.isdigit()), default=0)
    assert last >= 15, outputs
    return last < 60 and [rank.returncode for rank in job] == [-signal.SIGKILL] * 2


def test_kill_9_of_all_ranks(tmp_path: Path, repo_root: Path) -> None:
    """60 steps at once, and 60 steps with a SIGKILL of all ranks on the way, end in the same bits."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    # On a busy machine the kill may come too late.
    assert any(kill_on_the_way(config, tmp_path / "killed", repo_root) for _ in range(10))
    for run_dir in (tmp_path / "killed", tmp_path / "whole"):
        with train_py(config, run_dir, repo_root) as job:
            outputs = [rank.communicate(timeout=900)[0] for rank in job]
        assert [rank.returncode for rank in job] == [0, 0], outputs
    assert contents(tmp_path / "killed/checkpoints/60") == contents(tmp_path / "whole/checkpoints/60")
    losses = []
    for name in ("killed", "whole"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append({line["step"]: line["loss"] for line in lines})
    assert losses[0] == losses[1] and len(losses[0]) == 60
