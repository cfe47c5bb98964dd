"""Plain text as training data: tokenised once into a cache of Megatron files, then read like any other data.

The cache is `$XDG_CACHE_HOME/internlm/text`, by default `~/.cache/internlm/text`. A file's entry is named by all that
its ids depend on: its path, size and time of change, the tokenizer's content, and the text key. One process of those
that share the folder builds an entry; the others wait for its lock file, which the kernel frees even if the builder
is killed. If the builder finds an error in the text, it leaves the message in the lock file, so that the others don't
have to read as far to find it. Ids are those of `tools/tokenizer.py` with its defaults.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from internlm.data.encoder import Recipe
from internlm.data.formats import MegatronFile
from internlm.data.tokenize import Encoded, encode_file
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
VERSION = "1"  # of what the ids depend on in this code
BYTES_PER_WORKER = 4 << 20  # a process more than this much text needs is not worth its start

logger = get_logger(__name__)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internlm" / "text"


def open_text(path: Path, tokenizer: Path, text_key: str, min_length: int = 0) -> MegatronFile:
    """The samples of a txt, jsonl or json file: one per line or list element, `text_key` where it is an object.

    Raises UserError naming file and line where the text is broken.
    """
    if not tokenizer.is_file():
        raise UserError(f"data.tokenizer_path = {tokenizer}: no such file.")
    recipe = Recipe(str(tokenizer), text_key=text_key)
    entry = cached(path, (content_hash(tokenizer), text_key), lambda workers: encode_file(path, recipe, workers))
    file = MegatronFile(entry, min_length, masks_zero=True)
    file.name = str(path)
    return file


def content_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def cached(path: Path, parts: Sequence[str], encode: Callable[[int], Iterator[Encoded]]) -> Path:
    """The cache entry of what `encode(num_workers)` yields for the file at `path`; built if it is not there.

    `parts`: whatever else the ids depend on.
    """
    facts = path.stat()
    names = (VERSION, str(path.resolve()), str(facts.st_size), str(facts.st_mtime_ns), *parts)
    key = hashlib.sha256("\0".join(names).encode()).hexdigest()[:24]
    entry = cache_folder() / f"{path.stem[:40].replace('.', '_')}-{key}"
    if not entry.with_suffix(".idx").exists():
        with _cache_errors(path):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with _locked(entry.with_suffix(".lock"), path):
                if not entry.with_suffix(".idx").exists():  # else another process built it while this one waited
                    _build(path, encode, entry)
    return entry


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the cache (full disk, missing permission) into a UserError."""
    try:
        yield
    except OSError as error:
        if str(error.filename) == str(path):  # the text itself, which the caller reports
            raise
        raise UserError(
            f"{path}: its tokens can't be stored in {cache_folder()}: {error}. Make room there, or name another folder "
            "by the environment variable XDG_CACHE_HOME"
        ) from error


@contextmanager
def _locked(lock: Path, path: Path) -> Iterator[None]:
    """Raises the UserError of the process that was waited for, if it met one."""
    with lock.open("a+", encoding="utf-8", errors="backslashreplace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
        except BlockingIOError:
            logger.info("waiting for another process to tokenise %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if problem := file.read():
                raise UserError(problem) from None
        except OSError:  # a file system without locks: several may build the same entry, each under its own name
            logger.warning("%s: file locks do not work here; every process tokenises by itself", lock.parent)
        try:
            yield
        except UserError as error:
            file.write(str(error))
            raise


def _build(path: Path, encode: Callable[[int], Iterator[Encoded]], entry: Path) -> None:
    size, start = path.stat().st_size, time.monotonic()
    num_workers = min(len(os.sched_getaffinity(0)), 1 + size // BYTES_PER_WORKER)
    logger.info("tokenising %s (%.1f MB) with %d processes into %s", path, size / 1e6, num_workers, entry.parent)
    mine = entry.with_name(f"{entry.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        lengths = _write_ids(Path(f"{mine}.bin"), encode(num_workers))
        _write_index(Path(f"{mine}.idx"), lengths)
        os.replace(f"{mine}.bin", entry.with_suffix(".bin"))
        os.replace(f"{mine}.idx", entry.with_suffix(".idx"))  # last: its presence means that the entry is whole
    finally:
        for suffix in (".bin", ".idx"):
            Path(f"{mine}{suffix}").unlink(missing_ok=True)
    logger.info("tokenised %s: %d tokens in %.0f s", path, lengths.sum(), time.monotonic() - start)


def _write_ids(path: Path, encoded: Iterator[Encoded]) -> np.ndarray:
    """Ids as int32, one after the other; returns the tokens of each sample, int32 [samples]."""
    lengths: list[np.ndarray] = []
    with path.open("wb") as file:
        for samples in encoded:
            ids = np.fromstring(", ".join(filter(None, samples.ids)), np.int32, sep=",")  # type: ignore[call-overload]
            lengths.append(np.array([text.count(",") + 1 if text else 0 for text in samples.ids], np.int32))
            file.write(ids.astype("<i4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return np.concatenate(lengths or [np.empty(0, np.int32)])


def _write_index(path: Path, lengths: np.ndarray) -> None:
    pointers = np.concatenate(([0], lengths.astype(np.int64).cumsum()))[:-1] * 4
    with path.open("wb") as file:
        file.write(MegatronFile.HEADER.pack(b"MMIDIDX\x00\x00", 1, 4, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(pointers.astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
