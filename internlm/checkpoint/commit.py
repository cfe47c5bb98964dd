"""From copies in memory to a committed checkpoint, on a background thread and without any collective.

Every rank writes its files into `{step}.tmp-{token}`, then `rank-{r}.json` with their sizes and hashes. Rank 0 waits
for the JSON of all ranks, writes the manifest and renames the folder: until then no reader takes it for a checkpoint.
Object stores can't rename, so there the files go to `{step}` itself and the manifest, written last, is the mark.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial

from torch import Tensor

from internlm.checkpoint.manifest import MANIFEST, Manifest, list_checkpoints
from internlm.checkpoint.storage import Storage, patiently
from internlm.checkpoint.tensor_file import FileRecord, write_bytes, write_tensors
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

_FIRST_POLL, _SLOWEST_POLL = 0.005, 1.0  # seconds
_UNFINISHED = re.compile(r"\d+(\.replaced-\w+)?\.tmp-\w+")


@dataclass(frozen=True)
class Save:
    """One rank's part of one checkpoint, in host memory."""

    storage: Storage
    step: int
    kind: str
    token: str
    rank: int
    world: dict[str, int]  # "ranks", and the sizes of the axes
    tensors: dict[str, dict[str, Tensor]]  # by file and key
    metadata: dict[str, str]
    texts: dict[str, str]  # JSON files by name
    keep: int | None  # committed checkpoints that stay, this one included; None: all
    spared: frozenset[str]  # folders known to be broken: neither counted nor removed
    abandoned: threading.Event = field(default_factory=threading.Event)  # set once it is known to have failed

    @property
    def folder(self) -> str:
        """Where the files are written."""
        return work_folder(self.storage, self.step, self.token)


def work_folder(storage: Storage, step: int, token: str) -> str:
    return f"{step}.tmp-{token}" if storage.is_local else str(step)


def open_folder(storage: Storage, step: int, token: str) -> None:
    """Makes the folder of a save, before any rank writes. Object store: what an earlier save left there is removed."""
    folder = work_folder(storage, step, token)
    if not storage.is_local:
        storage.remove(f"{folder}/{MANIFEST}")  # first: a half-removed checkpoint must not look like one
        storage.remove(folder)
    storage.make_folder(folder)


def remove_unfinished(storage: Storage) -> None:
    """Removes what killed saves have left on a disk. Only for a caller who knows that no save is running there."""
    for folder in filter(_UNFINISHED.fullmatch, storage.names() if storage.is_local else []):
        try:
            storage.remove(folder)
        except OSError as error:
            logger.warning("%s, which was never finished, can't be removed: %s", storage.show(folder), error)
        else:
            logger.info("removed %s, which was never finished", storage.show(folder))


def write_rank(save: Save) -> None:
    """Writes this rank's files. An error is also left for rank 0, which would wait for it in vain."""
    try:
        files: dict[str, FileRecord] = {}
        for name, tensors in save.tensors.items():
            files[name] = patiently(
                partial(write_tensors, save.storage, f"{save.folder}/{name}", tensors, save.metadata)
            )
        for name, text in save.texts.items():
            files[name] = patiently(partial(write_bytes, save.storage, f"{save.folder}/{name}", [text.encode()]))
    except Exception as error:
        with suppress(Exception):  # where the disk is full there is no room for it: then `Save.abandoned` is set
            _write_report(save, {"error": text_of(error)})
        raise
    _write_report(save, {"files": {name: asdict(record) for name, record in files.items()}})


def text_of(error: BaseException) -> str:
    """An error in one line; a UserError by its message alone."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def commit(save: Save, timeout: float, check: Callable[[], None] = lambda: None) -> None:
    """Rank 0: waits for all ranks, makes the checkpoint visible, then removes what it replaces.

    `check` is called before any of that becomes visible.

    Raises:
        UserError: ranks that failed, or that wrote nothing within `timeout` seconds; the save was abandoned; what
            `check` raises.
    """
    storage, final = save.storage, str(save.step)
    files = patiently(partial(_collect, save, timeout))
    patiently(check)
    saved_at = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(save.step, save.kind, save.token, saved_at, save.world, dict(sorted(files.items())))
    for rank in range(save.world["ranks"]):
        patiently(partial(storage.remove, f"{save.folder}/{_report_name(rank)}"))
    patiently(partial(write_bytes, storage, f"{save.folder}/{MANIFEST}", [manifest.render()]))
    if storage.is_local:
        _rename(storage, save.folder, final, save.token)
    try:
        _prune(save)
    except Exception as error:  # the new checkpoint is safe; a reader of an old one may be in the way, as on NFS
        logger.warning("older checkpoints in %s can't all be removed: %s", storage.url, text_of(error))


def discard(save: Save) -> None:
    """Rank 0, after a failure: makes room on the disk. Object stores keep the parts until the step comes again."""
    if save.storage.is_local:
        with suppress(OSError):  # a rank may still write; the next start removes the rest
            save.storage.remove(save.folder)


def _report_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _write_report(save: Save, outcome: dict[str, object]) -> None:
    report = {"token": save.token, **outcome}
    path = f"{save.folder}/{_report_name(save.rank)}"
    patiently(partial(write_bytes, save.storage, path, [json.dumps(report).encode()]))


def _collect(save: Save, timeout: float) -> dict[str, FileRecord]:
    """The files of all ranks, as their reports list them."""
    files: dict[str, FileRecord] = {}
    missing = set(range(save.world["ranks"]))
    deadline, pause = time.monotonic() + timeout, _FIRST_POLL
    while True:
        present = set(save.storage.names(save.folder))
        for rank in sorted(missing):
            report = _read_report(save, rank) if _report_name(rank) in present else None
            if report is None:
                continue
            if "error" in report:
                raise UserError(f"saving step {save.step} failed on rank {rank}: {report['error']}")
            files.update((name, FileRecord(**record)) for name, record in report["files"].items())
            missing.remove(rank)
        if not missing:
            return files
        if save.abandoned.is_set():
            raise UserError(f"saving step {save.step} was abandoned")
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)[:16])) + (", ..." if len(missing) > 16 else "")
            raise UserError(
                f"saving step {save.step}: after {timeout:g} s there is no file of rank {ranks} in "
                f"{save.storage.show(save.folder)}; every rank must see the same ckpt.save_ckpt_folder"
            )
        time.sleep(pause)
        pause = min(2 * pause, _SLOWEST_POLL)


def _read_report(save: Save, rank: int) -> dict | None:
    """A rank's report; None while it is being written, or if an earlier save left it."""
    try:
        report = json.loads(save.storage.read(f"{save.folder}/{_report_name(rank)}"))
    except (OSError, ValueError):
        return None
    return report if report.get("token") == save.token else None


def _rename(storage: Storage, work: str, final: str, token: str) -> None:
    replaced = None
    if storage.names(final):
        # The same step again, after a fall back: the old folder stays findable until the new one is in place.
        replaced = f"{final}.replaced-{token}"
        storage.rename_folder(final, replaced)
    storage.rename_folder(work, final)
    if replaced is not None and MANIFEST in storage.names(replaced):  # other folders aren't ours to remove
        storage.remove(replaced)


def _prune(save: Save) -> None:
    """Removes older checkpoints beyond those to keep."""
    storage = save.storage
    older = [
        folder
        for step, folder in list_checkpoints(storage)
        if step < save.step and folder not in save.spared and MANIFEST in storage.names(folder)
    ]
    surplus = older[save.keep - 1 :] if save.keep else []
    for folder in surplus:  # half-removed, it must not look like a checkpoint
        if storage.is_local:
            storage.rename_folder(folder, f"{folder}.tmp-removed")
            storage.remove(f"{folder}.tmp-removed")
        else:
            storage.remove(f"{folder}/{MANIFEST}")
            storage.remove(folder)
        logger.info("removed %s: ckpt.keep_last", storage.show(folder))


class Background:
    """Runs one piece of work at a time on a thread, and keeps its error until somebody asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        assert not self.busy, "wait() first"

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error

        # A daemon: a crashed job ends at once and leaves a temporary folder, as a killed one does.
        self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the work is done, or after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None if not self._thread.is_alive() else self._thread
