"""One process per folder, for as long as that process lives."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

NAME = ".lock"


def lock_folder(folder: Path, key: str) -> IO[bytes]:
    """Takes `folder`, which exists, for this process, until the file that is returned is closed.

    A kill ends it as well. It is a record lock, since flock's would stay with forked data workers, which outlive a
    killed parent by some seconds. `key` is the setting that names the folder.

    Raises:
        UserError: another process has it.
        OSError: nothing can be written there.
    """
    file = (folder / NAME).open("a+b", buffering=0)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            logger.warning("%s: file locks do not work here; see to it that no other run writes there", folder)
            return file
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise UserError(
            f"{key} = {str(folder)!r} is in use by {holder}: wait until that has ended, or choose another folder"
        ) from error
    file.truncate(0)
    file.write(f"{this_process()}\n".encode())
    return file


def this_process() -> str:
    """The text by which a lock names its holder to other processes."""
    return f"process {os.getpid()} on {socket.gethostname()}"
