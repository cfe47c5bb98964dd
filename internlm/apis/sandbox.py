"""Code that a model wrote, run in a child process with limits on time, memory, processes and output.

Limits, not a jail: the child is a process of this user without its environment variables, in an empty folder that is
removed afterwards; it can read this user's files, reach the network, and see the variables of other processes (/proc).
Where that matters, run the whole program in a container. So nothing here happens unless a user asks for it.

Between this program and the code stands a supervisor. On Linux it adopts whatever the code leaves behind
(PR_SET_CHILD_SUBREAPER), in sessions of its own too, and ends it with the code. Code that is out to harm can end the
supervisor first.
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
ERROR_LIMIT = 500  # characters of an error
PROCESSES = 64  # processes and threads beside those that the user has; root may have as many as it likes
PATIENCE = 5  # seconds that the supervisor may take to end everything

# Runs in the child. Its fork sets limits that can't be lifted again and becomes the code as the main program; the child
# itself supervises that, and ends as it ended, by SIGXCPU when time is up, or by SIGTERM when it received that.
_START = """
import ctypes, os, resource, signal, sys, time
seconds, memory, output, processes, patience = map(int, sys.argv[1:6])
LOOK = 0.2  # seconds between looks at the memory of all processes together
OUT_OF_MEMORY = -1  # no process ends like this
code = sys.stdin.read()

def limit(what, value, more=0):
    hard = resource.getrlimit(what)[1]
    most = value + more if hard == resource.RLIM_INFINITY else min(value + more, hard)
    resource.setrlimit(what, (min(value, most), most))

def tasks_of_user():
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += len(os.listdir(f"/proc/{pid}/task")) if os.stat(f"/proc/{pid}").st_uid == os.getuid() else 0
        except OSError:
            pass
    return count

def family():
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parents[int(pid)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            pass
    found, last = [], {os.getpid()}
    while last := {pid for pid, parent in parents.items() if parent in last}:
        found += last
    return found

def held_by(pid):
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("Pss:", "SwapPss:")))
    except OSError:
        return 0

def wait(main):
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        told = signal.sigtimedwait(WATCHED, min(left, LOOK))
        if told and told.si_signo == signal.SIGTERM:
            return signal.SIGTERM
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == main:
                return ended[1]
        if on_linux and sum(map(held_by, family())) > memory:
            return OUT_OF_MEMORY
    return signal.SIGXCPU

def end_all():
    end = time.monotonic() + patience
    while time.monotonic() < end:  # some may just be starting others
        for pid in family():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return

limit(resource.RLIMIT_CORE, 0)
on_linux = sys.platform == "linux"
if on_linux:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
WATCHED = {signal.SIGCHLD, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
main = os.fork()
if main:
    status = wait(main)
    if on_linux:
        end_all()
    if status == OUT_OF_MEMORY:
        sys.exit("\\nMemoryError: of all processes together")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))
signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
if on_linux:
    limit(resource.RLIMIT_NPROC, tasks_of_user() + processes)
limit(resource.RLIMIT_CPU, seconds, 1)  # SIGXCPU, which says what it is for; a second later SIGKILL
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, output)
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

    On Linux, `memory_mb` is also a limit on what all its processes hold together. They are ended with it. Output
    beyond 64 KB is an error in the code.
    """
    with tempfile.TemporaryDirectory(prefix="internlm-code-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        work = Path(folder, "work")
        work.mkdir()
        limits = map(str, (seconds, memory_mb << 20, OUTPUT_LIMIT, PROCESSES, PATIENCE))
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
                child.communicate(code.encode(errors="replace"), timeout=seconds + 2 * PATIENCE)
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(child)
        output = out.read_bytes()[:OUTPUT_LIMIT].decode(errors="replace")
        return Result(output, _error(child.returncode, late, err.read_text(errors="replace"), seconds))


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Has the supervisor end everything, if it still runs; then ends what is left of its process group."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(2 * PATIENCE)
    with suppress(ProcessLookupError):  # the group is gone already
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _error(returncode: int, late: bool, stderr: str, seconds: int) -> str | None:
    if late or returncode == -signal.SIGXCPU:
        return f"ended after {seconds} s"
    if returncode == 0:
        return None
    lines = stderr.strip().splitlines()
    return lines[-1][:ERROR_LIMIT] if lines else f"ended with code {returncode}"
