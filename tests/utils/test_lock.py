"""One run per folder."""

from pathlib import Path

import pytest

from internlm.utils.errors import UserError
from internlm.utils.lock import lock_folder
from tests.utils.holder import held


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    """A kill frees it at once, though a child of the killed process lives on."""
    for _ in range(2):  # a folder that was held before is no different
        with held(tmp_path) as other:
            for _ in range(2):
                with pytest.raises(UserError, match=rf"run_dir = '.*' is in use by process {other.pid} on \S+: wait"):
                    lock_folder(tmp_path, "run_dir")
            other.kill()
            other.wait()
            lock_folder(tmp_path, "run_dir").close()
