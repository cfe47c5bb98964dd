"""train.py as a user starts it: outputs, exit codes, messages."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from internlm.monitor.alert import Alert
from internlm.train import cli
from internlm.train.cli import parse_arguments, user_errors
from tests.data.helpers import train_tokenizer, write_bin
from tests.utils.holder import held

CONFIG = """
JOB_NAME = "tiny"
model_type = "INTERNLM"
model = dict(
    num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, mlp_ratio=2.0, multiple_of=16,
    dtype="torch.float32",
)
data = dict(type="synthetic", seq_len=16, micro_bsz=2, micro_num=2, total_steps=5, num_worker=0)
adam = dict(lr=1e-2)
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def run_main(*arguments: object) -> int:
    """The exit code of train.py in this process."""
    try:
        with user_errors():
            return train.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_five_steps_leave_all_outputs(tmp_path: Path, config_file: Path, repo_root: Path) -> None:
    """In a process of its own, by the 2023 dummy data."""
    run_dir = tmp_path / "run"
    command = [sys.executable, str(repo_root / "train.py"), "--config", str(config_file), "--launcher", "torch"]
    command += ["--run_dir", str(run_dir), "--seed", "7", "--backend", "nccl", "--profiling"]
    command += ["data.type=tokenized", "model.vocab_size=103168", "model.hidden_size=16", "data.total_steps=6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {"config.json", "metrics.jsonl", "train.log", "loss.png", "tensorboard", "checkpoints", "traces"}
    assert expected <= {path.name for path in run_dir.iterdir()}
    lines = lines_of(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["updated"] and line["loss"] > 0 for line in lines)
    assert lines[-1]["num_consumed_tokens"] == 6 * 2 * 32
    resolved = json.loads((run_dir / "config.json").read_text())
    assert (resolved["seed"], resolved["model"]["vocab_size"], resolved["data"]["total_steps"]) == (7, 103168, 6)
    log = (run_dir / "train.log").read_text()
    assert "training data: " in log and "step=6 loss=" in log and log.count('"JOB_NAME": "tiny"') == 1
    assert "--backend has no effect" in done.stdout
    assert [path.name for path in (run_dir / "traces").iterdir()] == ["rank0.json.gz"]


def test_the_loss_falls_and_a_second_start_has_nothing_to_do(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ("--config", config_file, "--run_dir", run_dir, "monitor.enable_tb=False")
    assert run_main(*arguments) == 0
    lines = lines_of(run_dir)
    assert len(lines) == 5
    assert "nothing to do" not in capsys.readouterr().out
    assert run_main(*arguments, "--world_size", 3) == 0
    told = capsys.readouterr().out
    assert "nothing to do: 5 batches are done, data.total_steps = 5" in told
    assert "--world_size has no effect without --dry_run: the launcher started 1 rank(s)" in told
    assert lines_of(run_dir) == lines


def test_a_longer_run_continues_the_same_file(tmp_path: Path, config_file: Path) -> None:
    arguments = ("--config", config_file, "monitor.enable_tb=False", "lr_scheduler.total_steps=8")
    assert run_main(*arguments, "--run_dir", tmp_path / "one", "data.total_steps=4") == 0
    assert run_main(*arguments, "--run_dir", tmp_path / "one", "data.total_steps=8") == 0
    assert run_main(*arguments, "--run_dir", tmp_path / "two", "data.total_steps=8") == 0
    continued, whole = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert [line["step"] for line in continued] == list(range(1, 9))
    for key in ("step", "loss", "grad_norm", "lr", "num_consumed_tokens"):
        assert [line[key] for line in continued] == [line[key] for line in whole], key


def test_a_resume_takes_batches_of_any_size_but_no_other_rows(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bin(tmp_path / "data/a.bin", [[5] * 60] * 20)  # 37 rows of 32 tokens
    run, folder = ("--run_dir", tmp_path / "run"), f"data.train_folder={tmp_path}/data"
    arguments = ("--config", config_file, "monitor.enable_tb=False", "data.type=tokenized")
    arguments += (f"ckpt.save_ckpt_folder={tmp_path}/saved here",)
    assert run_main(*arguments, *run, folder, "data.total_steps=2") == 0
    assert run_main(*arguments, *run, folder, "data.total_steps=3", "data.micro_num=5", "adam.lr=0.5") == 0
    told = capsys.readouterr().out
    assert "batch 2 is next, behind 4 rows (37 an epoch)" in told
    changes = told.partition("which change from here on: ")[2].splitlines()[0].split("; ")
    assert sorted(changes) == ["adam.lr: 0.01 -> 0.5", "data.micro_num: 2 -> 5", "data.total_steps: 2 -> 3"]
    state = json.loads((tmp_path / "saved here/3/state.json").read_text())
    assert state["train"]["place"] == 9

    changes = ("data.seq_len=8", "data.seed=5", "data.total_steps=4")
    assert run_main(*arguments, *run, folder, *changes) == 2
    told = capsys.readouterr().err
    for key, then, now in (("data.seq_len", 16, 8), ("data.seed", 1024, 5), ("rows of the training data", 37, 75)):
        assert f"{key}: {then} in the checkpoint, {now} in this run" in told
    (tmp_path / "data").rename(tmp_path / "moved")
    folder = f"data.train_folder={tmp_path}/moved"
    assert run_main(*arguments, *run, folder, "data.total_steps=4") == 0
    assert "taken for the same data, since it makes 37 rows: data.train_folder: " in capsys.readouterr().out
    write_bin(tmp_path / "moved/b.bin", [[5] * 64])
    assert run_main(*arguments, *run, folder, "data.total_steps=5") == 2
    told = capsys.readouterr().err
    assert "training data: 37 in the checkpoint, 39 in this run" in told
    remedy = shlex.split(told.partition("--run_dir OTHER ")[2].replace("OTHER_SAVE_CKPT_FOLDER", f"{tmp_path}/new"))
    assert "ckpt.load_ckpt_info.ckpt_type=internlm" in remedy  # the run may have begun with a Hugging Face folder
    assert run_main(*arguments, "--run_dir", tmp_path / "other", folder, *remedy) == 0
    lines = lines_of(tmp_path / "other")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and lines[0]["step_count"] == 5


def test_a_bad_config_ends_with_code_2_and_one_screen(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_main("--config", config_file, "--run_dir", tmp_path / "run", "model.num_layer=3", "data.seq_len=abc")
    error = capsys.readouterr().err
    assert code == 2
    assert "model.num_layer" in error and "did you mean model.num_layers" in error and "data.seq_len" in error
    assert "Traceback" not in error and len(error.splitlines()) < 24
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/a.bin", "train/b.bin", "valid/c.bin"):
        write_bin(tmp_path / name, [[1] * 60])
    (tmp_path / "train/a.bin.meta").unlink()
    with (tmp_path / "valid/c.bin").open("r+b") as file:
        file.truncate(30)
    (tmp_path / "tokenizer.model").write_bytes(b"not one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny.py").write_text(
        f"""
model = dict(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=64)
data = dict(train_folder="{tmp_path}/train", valid_folder="{tmp_path}/valid", seq_len=16, total_steps=2)
data["tokenizer_path"] = "{tmp_path}/tokenizer.model"
evaluation = dict(every=1, prompts=["x"])
ckpt = dict(save_ckpt_folder="foo://b/x", load_ckpt_info=dict(path="{tmp_path}/empty"))
"""
    )
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("launched"))
    expected = [
        "5 problems",
        "train/a.bin.meta: no such file",
        "valid/c.bin, line 1 (byte 0): not a JSON object",
        "tokenizer.model: not a sentencepiece model",
        "ckpt.save_ckpt_folder = 'foo://b/x': Protocol not known: foo",
        f"ckpt.load_ckpt_info.path: {tmp_path}/empty: manifest.json is missing",
    ]
    for arguments in ((), ("--dry_run", "--world_size", 2)):
        code = run_main("--config", tmp_path / "tiny.py", "--run_dir", tmp_path / "run", *arguments)
        told = capsys.readouterr().err
        assert code == 2 and [line for line in expected if line not in told] == []
        assert not (tmp_path / "run").exists()


def test_text_is_read_before_anything_starts(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken lines and too few rows, by every rank alike; a dry run doesn't tokenise."""
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid/b.jsonl").write_text('{"text": "abc"}\n\n{"text": 5}\n')
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text("abc\n" * 20)
    tokenizer = train_tokenizer(tmp_path, vocab_size=300)
    arguments = [f"data.{name}_folder={tmp_path / name}" for name in ("train", "valid")]
    arguments += ["--config", config_file, "--run_dir", tmp_path / "run", f"data.tokenizer_path={tokenizer}"]
    arguments += ["data.type=text", "model.vocab_size=300", "data.micro_num=8"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=lambda seconds: None))
    for rank in "01":
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert run_main(*arguments, "--dry_run") == 0
        assert run_main(*arguments) == 2
        told = capsys.readouterr().err
        assert "2 problems" in told and "data ranks = 16 rows" in told
        assert f"{tmp_path}/valid/b.jsonl, line 3: expected an object" in told
    assert not (tmp_path / "run").exists()
    (tmp_path / "tiny.model").write_bytes(b"not one")
    assert run_main(*arguments) == 2
    monkeypatch.setenv("RANK", "0")
    assert run_main(*arguments) == 2
    told = capsys.readouterr().err
    assert "1 problem\n" in told and "not a sentencepiece model" in told  # nothing is read for long in vain


def test_a_user_mistake_has_no_traceback_in_a_process(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "train.py"), "--config", str(tmp_path / "missing.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("missing.py") == 1 and "Traceback" not in done.stdout + done.stderr


def test_no_memory_says_what_to_lower_and_an_interrupt_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("... DefaultCPUAllocator: can't allocate memory: ...")):
        with pytest.raises(type(error)) as caught, user_errors():
            raise error
        assert "data.micro_bsz" in caught.value.__notes__[0]
    with pytest.raises(SystemExit) as ended, user_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from the newest checkpoint\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.num_layers=2"], "--config"),
        (["--config", "x.py", "model.num_layers"], "expected section.key=value, got model.num_layers"),
        (["--config", "x.py", "--launcher", "mpi"], "mpi"),
        (["--config", "x.py", "--sed", "3"], "--sed"),
        (["--config", "x.py", "--dry_run", "--world_size", "-4"], "'-4' is no number of ranks"),
        (["--config", "x.py", "--dry_run", "--world_size", "0"], "'0' is no number of ranks"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*arguments) == 2
    assert message in capsys.readouterr().err


def test_the_flags_of_2023_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    flags = "--host h --port 9 --world_size 8 --rank 0 --local_rank 0 --backend nccl --seed 1 --disable_volc_topology"
    args = parse_arguments(["a.b=1", *flags.split(), "--config", "c.py", "c.d=x"])
    assert (args.config, args.port, args.world_size, args.launcher) == (Path("c.py"), 9, 8, "torch")
    assert args.overrides == ("a.b=1", "c.d=x") and args.top_level == {"seed": 1, "run_dir": None}
    assert args.ignored == ("host", "rank", "local_rank", "backend", "disable_volc_topology")


def test_under_srun_the_launcher_is_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.delenv("RANK", raising=False)
    assert parse_arguments(["--config", "c.py"]).launcher == "slurm"
    assert parse_arguments(["--config", "c.py", "--launcher", "torch"]).launcher == "torch"
    monkeypatch.setenv("RANK", "3")  # torchrun inside an allocation
    assert parse_arguments(["--config", "c.py"]).launcher == "torch"


def test_help_lists_options_and_config_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--help") == 0
    out = capsys.readouterr().out
    for text in ("--profiling", "--run_dir", "section.key=value", "warmup_ratio", "clip_grad_norm", "num_layers"):
        assert text in out


def test_dry_run_prints_and_touches_nothing(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main("--config", config_file, "--dry_run", "--world_size", 8, "parallel.zero1.size=8") == 0
    out = capsys.readouterr().out
    assert "model.num_layers = 2" in out and "memory per rank on 8 ranks" in out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]
    assert run_main("--config", config_file, "--dry_run", "--world_size", 6, "parallel.zero1.size=4") == 2
    assert "parallel.zero1.size = 4 does not divide" in capsys.readouterr().err


def test_two_runs_can_not_share_a_folder(tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path) as other:
        assert run_main("--config", config_file, "--run_dir", tmp_path) == 2
    assert f"is in use by process {other.pid} on" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "tiny.py"}  # nothing of the first run was touched


def test_what_all_ranks_would_say_is_said_once(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run_main("--config", config_file, "--dry_run") == 0
    assert capsys.readouterr().out == ""
    said_before = []
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=lambda s: said_before.append((s, capsys.readouterr().err))))
    assert run_main("--config", config_file, "model.num_layer=3") == 2
    assert said_before == [(cli.PATIENCE, "")]  # in which the launcher ends it, since rank 0 met the same
    assert "model.num_layer" in capsys.readouterr().err  # it alone knew


def test_an_unwritable_run_dir_is_a_user_mistake(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_main("--config", config_file, "--run_dir", tmp_path / "file" / "run") == 2
    assert "run_dir" in capsys.readouterr().err


@pytest.mark.parametrize(("how", "code"), [("stop file", 0), ("SIGTERM", 143)])
def test_a_run_that_is_stopped_says_so(
    how: str, code: int, tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only after its last save, which might have failed."""
    stop, run_dir, told = tmp_path / "stop", tmp_path / "run", []
    report = train.Monitor.report

    def stop_at_two(self: Any, one: Any) -> None:
        report(self, one)
        if how == "stop file":
            stop.write_text("2")
        elif one.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Monitor, "report", stop_at_two)
    saved = run_dir / "checkpoints/2/manifest.json"
    monkeypatch.setattr(Alert, "send", lambda self, text: told.append((text, saved.exists())))
    assert run_main("--config", config_file, "--run_dir", run_dir, f"ckpt.stop_file_path={stop}") == code
    assert len(lines_of(run_dir)) == 2
    assert told[-1] == (f"Training in {socket.gethostname()} was stopped ({how}).", True)


def test_sigterm_saves_and_ends_with_143(tmp_path: Path, config_file: Path, repo_root: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, str(repo_root / "train.py"), "--config", str(config_file), "--run_dir", str(run_dir)]
    command += ["data.total_steps=100000", "monitor.enable_tb=False"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=600) == 143
    finally:
        process.kill()
    done = len(lines_of(run_dir))
    assert done >= 3 and (run_dir / "checkpoints" / str(done)).is_dir()


def test_our_own_mistakes_keep_their_traceback_and_code_1(tmp_path: Path, config_file: Path, repo_root: Path) -> None:
    script = (
        "import sys, train, internlm.train.trainer as t\n"
        "t.count_batch = lambda *a: 1 / 0\n"
        "with train.user_errors():\n"
        f"    sys.exit(train.main(['--config', {str(config_file)!r}, '--run_dir', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=repo_root)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1 and "ZeroDivisionError" in done.stderr
    assert "ZeroDivisionError" in (tmp_path / "run" / "train.log").read_text()
