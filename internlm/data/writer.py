"""Writes the 2023 pair `NAME.bin` and `NAME.bin.meta`, any size, in constant memory."""

import os
import shutil
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

from internlm.data.formats import read_meta
from internlm.utils.errors import UserError


class BinWriter:
    """A context manager: both files appear under their names when it ends without an error, else nothing changes.

    `append`: the samples of an existing pair come first. Offsets are int64, so files may pass 2 GiB.
    """

    def __init__(self, path: Path, append: bool = False) -> None:
        self.path = path
        self._mine = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._bytes, self._tokens = array("q"), array("q")  # of each line
        if append and path.exists():
            offsets, lengths = read_meta(str(path))
            self._bytes.frombytes(np.diff(offsets, append=path.stat().st_size).astype(np.int64).tobytes())
            self._tokens.frombytes(lengths.tobytes())
            shutil.copyfile(path, self._mine)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._mine.open("ab")
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}): choose another place") from error

    @property
    def num_samples(self) -> int:
        return len(self._tokens)

    @property
    def num_tokens(self) -> int:
        return sum(self._tokens)

    def write(self, samples: list[str]) -> None:
        """Add samples given as decimal ids, such as "1, 22, -333"."""
        lines = [f'{{"tokens": [{ids}]}}\n' for ids in samples]
        self._file.write("".join(lines).encode("ascii"))
        self._bytes.extend(map(len, lines))
        self._tokens.extend(ids.count(",") + 1 if ids else 0 for ids in samples)

    def __enter__(self) -> "BinWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        meta = self._mine.with_name(f"{self._mine.name}.meta")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                self._write_meta(meta)
                # The new .bin never stands beside an old .meta: a reader sees a pair or a clear error.
                Path(f"{self.path}.meta").unlink(missing_ok=True)
                os.replace(self._mine, self.path)
                os.replace(meta, f"{self.path}.meta")
        finally:
            self._mine.unlink(missing_ok=True)
            meta.unlink(missing_ok=True)

    def _write_meta(self, path: Path) -> None:
        sizes = np.frombuffer(self._bytes, np.int64) if self._bytes else np.empty(0, np.int64)
        lengths = np.frombuffer(self._tokens, np.int64) if self._tokens else np.empty(0, np.int64)
        with path.open("wb") as file:
            np.save(file, np.stack([np.cumsum(sizes) - sizes, lengths], axis=1))
            file.flush()
            os.fsync(file.fileno())
