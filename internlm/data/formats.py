"""Readers of token files: every one is a list of samples with known lengths and random access.

`TokenizedFile` is the 2023 pair `NAME.bin` (one JSON object a line) and `NAME.bin.meta` (byte offset and length of
every line); `MegatronFile` is Megatron-LM's pair `NAME.bin` (raw ids) and `NAME.idx`. Made-up data is in
`synthetic.py`, plain text in `text.py`; `sources.py` walks the folders.
"""

import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

Int64s = NDArray[np.int64]

logger = get_logger(__name__)


class SampleFile(ABC):
    """Samples of one file. A token -t (only in `.bin/.meta`) means: feed t, do not train on predicting it.

    Safe to use in forked and spawned loader workers: what a process opens, it opens for itself.
    """

    name: str  # the file, for messages
    lengths: Int64s  # [samples], tokens of each sample
    masks_zero: bool = True  # id 0 is never a target: the 2023 rule "trained if value > 0"

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def tokens(self, index: int) -> Int64s:
        """The ids of sample `index`, [lengths[index]], signs kept. Raises UserError on a damaged file."""

    def sample(self, index: int) -> tuple[Int64s, NDArray[np.bool_]]:
        """Ids to feed, and which of them are trained on, [lengths[index]] each."""
        ids = self.tokens(index)
        return np.abs(ids), (ids > 0 if self.masks_zero else ids >= 0)

    def place(self, index: int) -> str:
        """Where sample `index` stands in the file, as a user would look it up."""
        return f"sample {index}"


def _opened(path: str, inode: int) -> BinaryIO:
    """The file, opened once per process: a handle shared over a fork would also share its read position."""
    return _handles(path, inode, os.getpid())


@lru_cache(maxsize=128)  # a folder may hold more files than a process may open
def _handles(path: str, inode: int, pid: int) -> BinaryIO:
    """`inode`: a file that was replaced since is another file."""
    return open(path, "rb")


class TokenizedFile(SampleFile):
    """`NAME.bin` and `NAME.bin.meta`; samples shorter than `min_length` are left out and the rest renumbered.

    The meta is a saved numpy array [samples, >= 2], int32 or int64: the first column is the byte offset of the line,
    the last one its number of tokens. Offsets that overflowed int32 (files past 2 GiB) are unwrapped.
    Raises UserError for a missing or unreadable meta and for one that does not fit the file.
    """

    def __init__(self, path: str | Path, min_length: int = 0) -> None:
        self.path = self.name = str(path)
        offsets, lengths = read_meta(self.path)
        self._inode = os.stat(self.path).st_ino
        self.lines = np.flatnonzero(lengths >= min_length)
        self.offsets = offsets[self.lines]
        self.lengths = lengths[self.lines]
        self.num_short = len(lengths) - len(self.lines)
        if len(self):
            self.tokens(len(self) - 1)  # a meta of another file, or a truncated file, is noticed at the start

    def place(self, index: int) -> str:
        return f"line {self.lines[index] + 1} (byte {self.offsets[index]})"

    def tokens(self, index: int) -> Int64s:
        file = _opened(self.path, self._inode)
        file.seek(self.offsets[index])
        line = file.readline()
        ids = _parse_plain(line, int(self.lengths[index]))
        if ids is None:
            ids = _parse_json(line, f"{self.path}, {self.place(index)}")
        if len(ids) != self.lengths[index]:
            raise UserError(
                f"{self.path}, {self.place(index)}: the line holds {len(ids)} tokens, its .meta says "
                f"{self.lengths[index]}. The two files do not belong together: copy or write both again."
            )
        return ids


def _parse_plain(line: bytes, length: int) -> Int64s | None:
    """The ids of a line written as `{"tokens": [1, 2]}`, four times as fast as json; None: leave it to json."""
    numbers = line[12:-3]
    if not line.startswith(b'{"tokens": [') or line[-3:] != b"]}\n" or numbers.translate(None, b"0123456789, -"):
        return None
    try:
        ids = np.fromstring(numbers, dtype=np.int64, sep=",")  # type: ignore[call-overload]
    except ValueError:  # of newer numpy; older ones return what they could read
        return None
    # As many numbers as announced, and as many commas as these need: nothing was skipped or left over.
    return ids if len(ids) == length > 0 and numbers.count(b",") == length - 1 else None


def _parse_json(line: bytes, where: str) -> Int64s:
    """The value of "tokens" in any JSON object. Raises UserError naming `where`."""
    try:
        values = json.loads(line)["tokens"]
        ids = np.array(values, dtype=np.int64) if all(type(value) is int for value in values) else None
    except (ValueError, TypeError, KeyError, OverflowError):
        ids = None
    if ids is None:
        shown = line[:60].decode("utf-8", "replace").strip()
        raise UserError(
            f'{where}: not a JSON object with a list of integers under "tokens": "{shown}..." '
            "(file truncated, or not written by tools/tokenizer.py?)"
        )
    return ids


def read_meta(path: str) -> tuple[Int64s, Int64s]:
    """Offsets and lengths of all lines, as int64 [samples] each."""
    meta_path = path + ".meta"
    if not os.path.exists(meta_path):
        raise UserError(
            f"{meta_path}: no such file. Every .bin needs its .meta (offset and length of each line), which "
            "tools/tokenizer.py writes beside it."
        )
    try:
        with open(meta_path, "rb") as file:  # numpy would append .npy to a bare name when writing, so files both ways
            meta = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{meta_path}: not a numpy array file ({error}); write it again.") from error
    if not isinstance(meta, np.ndarray):  # an .npz under another name
        raise UserError(f"{meta_path}: holds several arrays, expected one (numpy.save, not savez); write it again.")
    if meta.size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if meta.ndim != 2 or meta.shape[1] < 2 or meta.dtype.kind not in "iu":
        raise UserError(f"{meta_path}: holds {meta.dtype} {list(meta.shape)}, expected integers [samples, 2].")
    size = os.path.getsize(path)
    offsets, lengths = meta[:, 0].astype(np.int64), meta[:, -1].astype(np.int64)
    if meta.dtype.itemsize == 4 and size > 2**31 and (offsets.min() < 0 or (np.diff(offsets) < 0).any()):
        offsets = _unwrap(path, offsets)
    if offsets.min() < 0 or offsets.max() >= size or lengths.min() < 0:
        row = int(np.flatnonzero((offsets < 0) | (offsets >= size) | (lengths < 0))[0])
        raise UserError(
            f"{meta_path}: row {row} says {lengths[row]} tokens at byte {offsets[row]}, but {path} has {size} bytes. "
            "The .bin is truncated or the .meta belongs to another file: copy or write both again."
        )
    return offsets, lengths


def _unwrap(path: str, offsets: Int64s) -> Int64s:
    """Undo int32 overflow: lines ascend, so each fall means that 2^32 was lost.

    Accepted only if every line that starts just after a lost multiple, and the last one, really starts a line.
    """
    low = offsets % 2**32
    falls = np.flatnonzero(np.diff(low) < 0) + 1
    turns = np.zeros(len(low), np.int64)
    turns[falls] = 1
    whole = low + (turns.cumsum() << 32)
    with open(path, "rb") as file:
        for row in (*falls, len(whole) - 1):
            file.seek(max(int(whole[row]) - 1, 0))
            if whole[row] > 0 and file.read(1) != b"\n":
                raise UserError(
                    f"{path}.meta: its int32 offsets overflowed (the file has {os.path.getsize(path)} bytes) and row "
                    f"{row} can't be repaired. Write the file again with tools/tokenizer.py, which uses int64."
                )
    logger.warning("%s.meta: int32 offsets overflowed past 2 GiB; repaired, since lines ascend", path)
    return whole


class MegatronFile(SampleFile):
    """Megatron-LM's indexed data set, `NAME.bin` and `NAME.idx`; a sample is one document.

    The index (facts from Megatron-LM's documentation and files): magic `MMIDIDX` and two zero bytes; version 1 as
    uint64; dtype code as uint8; number of sequences and of document bounds as uint64; then the sequence lengths
    (int32), their byte offsets in the .bin (int64) and the document bounds as sequence numbers (int64).
    Ids are never negative there and id 0 is an ordinary token. `path` may end in .bin, .idx or neither.
    """

    masks_zero = False
    DTYPES: ClassVar = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
    HEADER = struct.Struct("<9sQBQQ")

    def __init__(self, path: str | Path, min_length: int = 0, masks_zero: bool = False) -> None:
        prefix = str(path).removesuffix(".bin").removesuffix(".idx")
        self.path = self.name = prefix + ".bin"
        self.masks_zero = masks_zero
        dtype, sizes, pointers, bounds = self._read_index(prefix + ".idx")
        self._inode = os.stat(self.path).st_ino
        self.dtype = np.dtype(dtype)
        cumulative = np.concatenate(([0], sizes.cumsum()))
        lengths = np.diff(cumulative[bounds])
        self.documents = np.flatnonzero(lengths >= min_length)
        self.lengths = lengths[self.documents]
        self.num_short = len(lengths) - len(self.documents)
        self._sizes, self._pointers, self._bounds = sizes, pointers, bounds

    def _read_index(self, path: str) -> tuple[type, Int64s, Int64s, Int64s]:
        """dtype, and as int64: sequence lengths [sequences], offsets [sequences], document bounds [documents + 1]."""
        for name in (path, self.path):
            if not os.path.exists(name):
                raise UserError(f"{name}: no such file. A Megatron data set is a pair NAME.bin and NAME.idx.")
        data = Path(path).read_bytes()
        if len(data) < self.HEADER.size or not data.startswith(b"MMIDIDX\x00\x00"):
            raise UserError(f"{path}: not a Megatron index (the file must begin with MMIDIDX).")
        _, version, code, num_sequences, num_bounds = self.HEADER.unpack_from(data)
        if version != 1 or code not in self.DTYPES:
            raise UserError(
                f"{path}: version {version}, dtype code {code}; readable are version 1, {list(self.DTYPES)}."
            )
        place, columns = self.HEADER.size, []
        for dtype, count in (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_bounds)):
            if place + count * int(dtype[2]) > len(data):
                raise UserError(f"{path}: truncated ({len(data)} bytes announce {num_sequences} sequences).")
            columns.append(np.frombuffer(data, dtype, count, place).astype(np.int64))
            place += count * int(dtype[2])
        sizes, pointers, bounds = columns
        self._check(path, sizes, pointers, bounds, np.dtype(self.DTYPES[code]).itemsize)
        return self.DTYPES[code], sizes, pointers, bounds

    def _check(self, path: str, sizes: Int64s, pointers: Int64s, bounds: Int64s, itemsize: int) -> None:
        size = os.path.getsize(self.path)
        if len(sizes) and (sizes.min() < 0 or pointers.min() < 0 or (pointers + sizes * itemsize).max() > size):
            need = (pointers + sizes * itemsize).max()
            raise UserError(f"{self.path}: {size} bytes, {path} needs {need}; the file is truncated or not its pair.")
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] > len(sizes) or (np.diff(bounds) < 0).any():
            raise UserError(f"{path}: document bounds must ascend from 0 to at most {len(sizes)} sequences.")

    def place(self, index: int) -> str:
        return f"document {self.documents[index]}"

    def tokens(self, index: int) -> Int64s:
        document = self.documents[index]
        first, last = self._bounds[document], self._bounds[document + 1]
        return np.concatenate([self._sequence(i) for i in range(first, last)] or [np.empty(0, np.int64)])

    def _sequence(self, index: int) -> Int64s:
        file = _opened(self.path, self._inode)
        file.seek(self._pointers[index])
        size = int(self._sizes[index]) * self.dtype.itemsize
        data = file.read(size)
        if len(data) != size:
            raise UserError(
                f"{self.path}, sequence {index}: {len(data)} of its {size} bytes are there. The file was truncated "
                "while it was in use: copy it again, and start again"
            )
        return np.frombuffer(data, self.dtype.newbyteorder("<")).astype(np.int64)


def check_vocabulary(ids: Int64s, vocab_size: int, file: SampleFile, index: int) -> None:
    """Raise UserError if an id of sample `index` has no embedding row: on a GPU that would be a nameless crash."""
    if len(ids) == 0 or (ids.max() < vocab_size and ids.min() > -vocab_size):
        return
    wrong = ids[(ids >= vocab_size) | (ids <= -vocab_size)][0]
    raise UserError(
        f"{file.name}, {file.place(index)}: token id {wrong}, but model.vocab_size = {vocab_size} allows ids below "
        f"{vocab_size}. The data was made with another tokenizer, or vocab_size is too small."
    )


def min_length_of(path: str, min_length: int, by_name: dict[str, int]) -> int:
    """The minimum for the file at `path`: that of the one key of `by_name` its path contains, else `min_length`."""
    found: Sequence[str] = [key for key in by_name if key in path]
    if len(found) > 1:
        raise UserError(f"data.min_length_dict: {path} contains several of its keys ({', '.join(found)}).")
    return by_name[found[0]] if found else min_length
