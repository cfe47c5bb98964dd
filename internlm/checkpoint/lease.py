"""One run per folder of an object store, where no file can be locked.

The run that has the folder keeps an object there with its name and a number, which it raises every BEAT seconds. A run
that finds such an object watches it for SILENCE seconds. If it changes, its run is alive and the newcomer is refused;
if not, that run was killed and the folder is free. So no two clocks are compared. A run that was paused for longer
than that finds another's name in its place, and saves no more; so does the earlier of two that came at the same moment.
All this needs of a store is that a read sees the last write, as those of S3, Google and Azure do.
"""

import atexit
import json
import threading
import time
from pathlib import Path
from typing import IO, Any

from internlm.checkpoint.storage import Storage
from internlm.checkpoint.triggers import new_token
from internlm.utils.errors import UserError, writing
from internlm.utils.lock import NAME, lock_folder, this_process
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

BEAT, SILENCE = 15.0, 60.0  # seconds


def claim_folder(storage: Storage, key: str) -> "IO[bytes] | Lease":
    """Makes the folder of `storage` and takes it for this process, until what is returned is closed.

    `key` is the setting that names the folder. Raises UserError: another has it, or nothing can be written there.
    """
    with writing(f"{key} = {storage.url!r}"):
        storage.make_folder("")
        return lock_folder(Path(storage.root), key) if storage.is_local else Lease(storage, key)


class Lease:
    """Takes the folder of `storage` until `close`, or until the process ends by itself.

    `key` is the setting that names the folder. Raises UserError: another run has it, or nothing can be written there.
    """

    def __init__(self, storage: Storage, key: str) -> None:
        self.storage, self.what = storage, f"{key} = {storage.url!r}"
        self.mine = {"holder": this_process(), "token": new_token()}
        self._await_silence()
        self._beats = 0
        self._write()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def check(self) -> None:
        """Raises UserError if another run has taken the folder."""
        if (other := self._other()) is not None:
            raise UserError(
                f"{self.what} was taken by {other}: this run was paused for too long, or both started at the "
                "same moment. It ends here and leaves the folder to the other; choose another folder for one of them"
            )

    def close(self) -> None:
        """Frees the folder."""
        atexit.unregister(self.close)
        self._end.set()
        self._thread.join()
        try:
            if self._other() is None:
                self.storage.remove(NAME)
        except Exception as error:  # a store has errors of its own; what is left there only costs the next run a wait
            logger.warning(f"{self.storage.show(NAME)} can't be removed: {error}")

    def _await_silence(self) -> None:
        first = self._read()
        if first is None:
            return
        logger.info(f"{self.what} was last used by {_holder(first)}: looking for {SILENCE:g} s whether that is alive")
        deadline = time.monotonic() + SILENCE
        while (now := self._read()) == first and time.monotonic() < deadline:
            time.sleep(SILENCE / 60)
        if now is not None and now != first:
            raise UserError(
                f"{self.what} is in use by {_holder(now)}: wait until that has ended, or choose another folder"
            )

    def _keep(self) -> None:
        while not self._end.wait(BEAT):
            try:
                if self._other() is None:
                    self._write()
            except Exception as error:  # the network comes and goes; `check` reports a renewal that came too late
                logger.warning(f"{self.storage.show(NAME)} can't be renewed: {error}")

    def _other(self) -> str | None:
        """Who has the folder instead of this run.

        None for an object that can't be parsed: stores like HDFS show an object while it is being written, and keep a
        part of it when the network fails during the write.
        """
        about = _parsed(self._read())
        return None if about is None or about["token"] == self.mine["token"] else str(about["holder"])

    def _read(self) -> bytes | None:
        try:
            return bytes(self.storage.read(NAME))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._beats += 1
        with self.storage.writer(NAME) as write:
            write(json.dumps({**self.mine, "beats": self._beats}).encode())


def _parsed(found: bytes | None) -> dict[str, Any] | None:
    """What the object says; None for one that isn't there, or not whole."""
    try:
        about = json.loads(found or b"")
        return about if {"holder", "token"} <= about.keys() else None
    except (ValueError, AttributeError):
        return None


def _holder(found: bytes) -> str:
    about = _parsed(found)
    return "another process" if about is None else str(about["holder"])
