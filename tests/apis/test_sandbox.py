"""Model-written code: limits hold, values come back, nothing runs unasked."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from internlm.apis.chat import ChatModel
from internlm.apis.sandbox import ERROR_LIMIT, PROCESSES, run_python
from internlm.utils.errors import UserError
from tools import pal_inference
from tools.pal_inference import EXAMPLES, main, program_of, prompt_of, questions_of, solve


def test_output_and_errors() -> None:
    assert run_python("print('书', end='')").output == "书"
    failed = run_python("print(1)\nraise ValueError('no')")
    assert (failed.output, failed.error) == ("1\n", "ValueError: no")
    assert run_python("def f(:").error == "SyntaxError: invalid syntax"
    assert run_python("import os; os._exit(3)").error == "ended with code 3"
    limit = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert run_python(limit, seconds=9).output == "(9, 10)\n"  # SIGXCPU, which tells why; at the second SIGKILL


DAEMON = """
import os, time
first = os.fork()
if first == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        open("up", "w").close()
        time.sleep(60)
    os._exit(0)
os.waitpid(first, 0)
while not os.path.exists("up"):
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("more", "limits"), [("", [30]), ("time.sleep(60)", [1, 5, 25])])
def test_time_is_limited_and_no_process_outlives_the_code(more: str, limits: list[int]) -> None:
    """Not one in a session of its own either, whose parent is gone."""
    for seconds in limits:  # a busy machine may need more of them until the daemon is up
        start = time.monotonic()
        result = run_python(DAEMON + more, seconds)
        assert result.error == (f"ended after {seconds} s" if more else None) and time.monotonic() - start < 50
        if result.output:
            break
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.output), 0)


def test_nor_one_that_is_interrupted(tmp_path: Path) -> None:
    """As by Ctrl-C."""
    shown = f"import sys; sys.stdout = open({str(tmp_path / 'pid')!r}, 'w', 1)"

    def interrupt() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_python(f"{shown}\n{DAEMON}\ntime.sleep(60)", seconds=30)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_processes_are_limited() -> None:
    code = "import resource; print(*resource.getrlimit(resource.RLIMIT_NPROC))"
    soft, hard = map(int, run_python(code).output.split())
    assert PROCESSES < soft == hard < PROCESSES + 10_000
    many = "import os\nfor _ in range(500):\n    if os.fork() == 0:\n        import time; time.sleep(60)"
    if os.geteuid():  # the system lets root have as many as it likes
        assert "BlockingIOError" in (run_python(many, seconds=20).error or "")


def test_memory_and_output_are_limited() -> None:
    assert run_python("x = bytearray(300 << 20)", memory_mb=200).error == "MemoryError"
    assert run_python("x = bytearray(100 << 20)", memory_mb=200).error is None
    flood = run_python("print('x' * (1 << 20))")
    assert flood.error is not None and len(flood.output) <= 64 * 1024
    assert len(run_python("import sys; sys.exit('x' * 60_000)").error or "") == ERROR_LIMIT
    lifted = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)); x = bytearray(300 << 20)"
    assert os.geteuid() == 0 or run_python(lifted, memory_mb=200).error is not None


HUNGRY = """
import os, time
for _ in range({processes}):
    if os.fork() == 0:
        os.setsid()
        held = b"1" * (60 << 20)
        time.sleep(60)
shared = b"1" * (60 << 20)
for _ in range(4):
    if os.fork() == 0:
        time.sleep({seconds})
        os._exit(0)
for _ in range(4):
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("processes", "seconds", "error"), [(4, 60, "MemoryError"), (1, 1, None)])
def test_memory_of_all_processes_is_limited(processes: int, seconds: int, error: str | None) -> None:
    """Five may share one block of memory, and each may not have one."""
    code = HUNGRY.format(processes=processes, seconds=seconds)
    found = run_python(code, seconds=50, memory_mb=200).error
    assert found == error if error is None else found is not None and error in found


def test_variables_and_folder_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "abc")
    shown = json.loads(run_python("import os, json; print(json.dumps([os.listdir(), dict(os.environ)]))").output)
    assert shown[0] == [] and "SECRET_KEY" not in shown[1]


def test_programs_of_the_examples() -> None:
    """What the prompt shows is right itself."""
    turns = prompt_of("?")
    values = [solve(program_of(turn.content) or "", 20, 512) for turn in turns if turn.role == "assistant"]
    assert values == [(25.0, None), (120.0, None), (90.0, None)]
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("def solution(): return 'many'", "ValueError"),
        ("x = 1", "NameError"),
        ("def solution(): return 1e999", "inf"),
        ("print('value of solution(): x'); raise SystemExit", "no value"),
    ],
)
def test_programs_without_a_number(program: str, error: str) -> None:
    value, found = solve(program, 20, 512)
    assert value is None and error in (found or "")


def test_a_call_of_the_interpreter_is_a_program() -> None:
    assert program_of("<|action_start|><|interpreter|>\n```python\nx = 1\n```<|action_end|>") == "x = 1"
    assert program_of("no code") is None


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, chat: ChatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is real, its words are not: what it was asked decides what it says."""
    data, out = tmp_path / "sums.jsonl", tmp_path / "out"
    data.write_text('{"question": "2+2", "answer": "so #### 4"}\n{"question": "1,000+1", "answer": "1,002"}\n')
    command = ["hf", str(out), "--dataset", str(data)]
    assert main(command) == 2 and "--run_code" in capsys.readouterr().err and not out.exists()

    def say(turns, options):  # type: ignore[no-untyped-def]
        return [f"Sure:\n```python\ndef solution():\n    return {turns[-1].content.replace(',', '')}\n```\n"]

    monkeypatch.setattr(pal_inference, "load_with_progress", lambda *_: _Entered(chat))
    monkeypatch.setattr(chat, "reply", say)
    assert main([*command, "--run_code"]) == 0
    assert "hf: Accuracy - 0.5" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "sums.json").read_text().splitlines()]
    assert [(line["target"], line["answer"], line["score"]) for line in lines] == [(4, 4, 1), (1002, 1001, 0)]
    data.write_text(data.read_text() + '{"question": "7", "answer": 7}\n')
    assert main([*command, "--run_code", "--append"]) == 0
    assert len((out / "sums.json").read_text().splitlines()) == 3
    for broken, message in (('{"question": "3+3", "score": 1}', "answers to other questions"), ("[1]", "is broken")):
        (out / "sums.json").write_text(broken)
        assert main([*command, "--run_code", "--append"]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--time_out=0", "needs 1 s"),
        ("--memory=5", "64 megabytes"),
        ("--max_new_tokens=0", "at least 1"),
        ("--top_p=2", "top_p"),
    ],
)
def test_settings_are_looked_at_before_a_model(option: str, message: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["no model", str(tmp_path / "out"), "--run_code", option]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


class _Entered:
    def __init__(self, chat: ChatModel) -> None:
        self.chat = chat

    def __enter__(self) -> ChatModel:
        return self.chat

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answer": "nan"}', "no program can answer 'nan'"),
        (b"\xff", "no UTF-8 text"),
        (b'{"question": "a"}', "line 1: expected"),
        (b'{"question": "a", "answer": "x"}', "no number"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(line)
    with pytest.raises(UserError, match=message):
        questions_of(str(file))
