"""Files of checkpoints on a local disk or behind any fsspec URL (s3://, gs://, hdfs://, memory:// ...).

A local file is fsynced before it counts, and a folder appears by one rename. Object stores know neither: there an
object appears whole when it is closed, and the last object written is the mark that the others are complete.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from internlm.utils.errors import UserError, writing
from internlm.utils.logger import get_logger

logger = get_logger(__name__)
T = TypeVar("T")

PAUSES = (1.0, 5.0, 25.0)  # seconds before one more try
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST}
_LASTING |= {errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EINVAL}


def patiently(action: Callable[[], T]) -> T:
    """Tries again, a few times, what a network or a store failed to do; raises other errors at once."""
    for pause in PAUSES:
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            logger.warning("%s: %s; trying again in %g s", type(error).__name__, error, pause)
            time.sleep(pause)
    return action()


def _may_pass(error: Exception) -> bool:
    """An error of the system that isn't about the file itself, or one of a store's own library."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    if isinstance(cause, OSError):
        return cause.errno not in _LASTING and not isinstance(cause, FileNotFoundError | PermissionError)
    return cause is not None and type(cause).__module__.partition(".")[0] not in ("builtins", "internlm", "json")


class Storage:
    """A root folder. Paths are relative to it, with forward slashes. Safe to use from several threads.

    Raises UserError for a URL that nothing installed can reach; `key` is what the user calls it in the config.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:  # an unknown protocol; a package for it that is missing
            raise UserError(f"{key} = {url!r}: {error}" if key else f"{url}: {error}") from error
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def join(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def show(self, path: str) -> str:
        """The name of `path` in messages."""
        return f"{self.url}/{path}" if path else self.url

    def names(self, path: str = "") -> list[str]:
        """The entries of a folder, sorted; none if it does not exist."""
        if self.is_local:
            with suppress(FileNotFoundError, NotADirectoryError):
                return sorted(os.listdir(self.join(path)))
            return []
        self.fs.invalidate_cache()  # another rank may have written since the last look
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.join(path), detail=False)})
        return []

    def size(self, path: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return os.path.getsize(self.join(path)) if self.is_local else int(self.fs.size(self.join(path)))

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Bytes [start, stop) of a file; fewer where it ends earlier. Raises FileNotFoundError."""
        if not self.is_local:
            return bytearray(self.fs.cat_file(self.join(path), start=start, end=stop))
        with open(self.join(path), "rb", buffering=0) as file:
            stop = os.fstat(file.fileno()).st_size if stop is None else stop
            data = bytearray(max(0, stop - start))
            file.seek(start)
            view, length = memoryview(data), 0
            while length < len(data) and (got := file.readinto(view[length:])):  # one call moves 2 GiB at most
                length += got
            view.release()
            del data[length:]
        return data

    def chunks(self, path: str, size: int = 1 << 22) -> Iterator[bytes]:
        """The bytes of a file in order. Raises FileNotFoundError."""
        with self.fs.open(self.join(path), "rb") as file:
            while chunk := file.read(size):
                yield chunk

    @contextmanager
    def writer(self, path: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """A function that appends to a new file; the file is on disk when the `with` ends."""
        file: IO[bytes]
        if self.is_local:
            with open(self.join(path), "wb") as file:
                yield lambda data: _write_all(file, data)
                file.flush()
                os.fsync(file.fileno())
        else:
            with self.fs.open(self.join(path), "wb") as file:
                yield lambda data: _write_all(file, data)

    def make_folder(self, path: str) -> None:
        self.fs.makedirs(self.join(path), exist_ok=True)

    @contextmanager
    def new_folder(self, path: str) -> Iterator[None]:
        """Makes a folder for what the block writes there; if the block fails, the folder is removed."""
        try:
            with writing(self.show(path)):
                self.make_folder(path)
            yield
        except BaseException:
            with suppress(OSError):
                self.remove(path)
            raise

    def rename_folder(self, old: str, new: str) -> None:
        """Renames on a local disk, durably: the entries of both the folder and its parent are synced."""
        assert self.is_local, "object stores don't rename"
        _sync_folder(self.join(old))
        os.rename(self.join(old), self.join(new))
        _sync_folder(os.path.dirname(self.join(new)))

    def remove(self, path: str) -> None:
        """Removes a file, or a folder with all it holds, if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm(self.join(path), recursive=True)


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    for start in range(0, len(data), 1 << 26):  # object-store buffers copy what they are given: keep pieces small
        file.write(data[start : start + (1 << 26)])


def _sync_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
