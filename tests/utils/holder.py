"""Another process that has a folder."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Its child lives on after a kill, as a data worker may.
HOLDER = """
import os, sys, time
from pathlib import Path
from internlm.utils.lock import lock_folder
lock = lock_folder(Path(sys.argv[1]), "run_dir")
if child := os.fork():
    print(child, flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that holds `folder`, until it is killed: at the end, or before."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline(), "the holder did not start"
        yield process
        process.kill()
