"""Code that a model wrote, run in a child process with limits on time, memory and output.

Limits, not a jail: the child is a process of this user without its environment variables, in an empty folder that is
removed afterwards; it can read this user's files and reach the network. Where that matters, run the whole program in
a container. So nothing here happens unless a user asks for it.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

OUTPUT_LIMIT = 64 * 1024  # bytes of stdout and of stderr, each

# Runs in the child before the code: limits that can't be lifted again, then the code as the main program.
_START = """
import resource, sys
seconds, memory, output = map(int, sys.argv[1:4])
def limit(what, value):
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_CPU, seconds)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, output)
code = sys.stdin.read()
sys.argv = ["code"]
exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Result:
    """How a run ended. `error` is None after a good one; else the last line of its traceback, or the limit it hit."""

    output: str
    error: str | None


def run_python(code: str, seconds: int = 10, memory_mb: int = 512) -> Result:
    """Run `code` with at most `seconds` of time (and of processor) and `memory_mb` of address space.

    Processes that it started are ended with it, but for those that left its process group (setsid). Output beyond
    64 KB is an error in the code.
    """
    with tempfile.TemporaryDirectory(prefix="internlm-code-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        work = Path(folder, "work")
        work.mkdir()
        limits = (str(seconds), str(memory_mb << 20), str(OUTPUT_LIMIT))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, *limits],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                cwd=work,
                env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                child.communicate(code.encode(errors="replace"), timeout=seconds)
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(child)
        output = out.read_bytes()[:OUTPUT_LIMIT].decode(errors="replace")
        return Result(output, _error(child.returncode, late, err.read_text(errors="replace"), seconds))


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Ends the child and all of its process group, and waits for the child."""
    with suppress(ProcessLookupError):  # the group is gone already
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _error(returncode: int, late: bool, stderr: str, seconds: int) -> str | None:
    if late or returncode == -signal.SIGXCPU:
        return f"ended after {seconds} s"
    if returncode == 0:
        return None
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with code {returncode}"
