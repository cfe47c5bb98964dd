"""Decides when to save, copies this rank's part to host memory and writes it in the background; resumes a run."""

import json
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from internlm.checkpoint.commit import (
    Background,
    Save,
    commit,
    discard,
    open_folder,
    remove_unfinished,
    text_of,
    write_rank,
)
from internlm.checkpoint.control import Control
from internlm.checkpoint.lease import Lease, claim_folder
from internlm.checkpoint.loading import Loader, rng_file
from internlm.checkpoint.shards import HostCopy, metadata_of
from internlm.checkpoint.storage import Storage, patiently
from internlm.checkpoint.triggers import Signals, StopFile, new_token
from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.core.random import rng_state
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.metrics import StepReport
from internlm.train.state import TrainState
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

Kind = Literal["normal", "snapshot"]
RANK_TIMEOUT = 1800.0  # seconds that rank 0 waits for the files of the slowest rank
LAST_WORDS = 10.0  # seconds that a failed save has to notice it
LAST_SAVE = 60.0  # seconds that a run which ends by an error waits for the save under way


class Checkpointer:
    """Saves and loads a run. Every rank makes one and calls the same methods in the same order.

    Args:
        config: its `ckpt` section says when and where; all of it is stored with every checkpoint.
        run_dir: holds the checkpoints when `ckpt.save_ckpt_folder` is unset.
        optimizer, state: what is saved, and what is written on a resume.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        optimizer: HybridZero,
        state: TrainState,
        mesh: Mesh,
        rank_timeout: float = RANK_TIMEOUT,
    ) -> None:
        self.config, self.optimizer, self.state, self.mesh = config, optimizer, state, mesh
        self.rank_timeout = rank_timeout
        root = config.ckpt.save_ckpt_folder or str(run_dir / "checkpoints")
        self.storages = {
            "normal": Storage(root),
            "snapshot": Storage(config.ckpt.snapshot_ckpt_folder or root.rstrip("/") + "/snapshot"),
        }
        self.control = Control()
        self._locks: list[IO[bytes] | Lease] = []  # rank 0's, on folders that it writes to
        self.stop_file = StopFile(None)
        self._claim()
        self.signals = Signals()
        self.should_stop = False
        self.stop_reason: str | None = None  # set with should_stop: "SIGTERM" or "stop file"
        self._background = Background()
        self._part: Save | None = None  # what the background writes, or wrote last
        self._host_copy = HostCopy()
        self._loader = Loader(config, optimizer, state, self.control, self.storages)
        self._saved: dict[str, int] = {}  # step of the newest checkpoint of this run, per kind

    def resume(self) -> None:
        """Puts the run where it should start: newest good checkpoint, else `ckpt.load_ckpt_info`, else as built.

        Collective. Raises:
            UserError: checkpoints exist but none verifies; `load_ckpt_info` names none that does; other sizes.
        """
        found = self._loader.resume()
        if found is not None:
            self._saved[found.manifest.kind] = found.manifest.step

    @property
    def continued(self) -> bool:
        """Whether `resume` found a checkpoint of this run, so that it is not where it first started."""
        return self._loader.continued

    def after_step(self, report: StepReport) -> None:
        """Saves if a rule of `ckpt`, a signal or the stop file asks for it; sets `should_stop`. Collective.

        Raises:
            UserError: on all ranks, when an earlier save has failed on any of them.
        """
        step, ckpt = report.step_count, self.config.ckpt
        signals, target = self.signals.take(), self.stop_file.read(step)
        failed = self._background.error is not None
        mine = [*signals, failed, max(target, 0), max(-target, 0)]
        save, stop, any_failed, stop_at, save_at = self.control.maximum(mine)
        if any_failed:
            self._raise_failures()
        stop_now = 0 < step == stop_at
        if stop or stop_now:
            self.should_stop, self.stop_reason = True, "SIGTERM" if stop else "stop file"
        last = report.step >= self.config.data.total_steps
        if not ckpt.enable_save_ckpt:
            return
        if save or stop_now or last or 0 < step == save_at or _is_due(step, ckpt.checkpoint_every):
            self._save_once("normal")
        elif _is_due(step, ckpt.oss_snapshot_freq):
            self._save_once("snapshot")

    def _save_once(self, kind: Kind) -> None:
        """A step without an update (skipped batch, overflow) leads from the checkpoint before it to the same state."""
        if self._saved.get(kind) != self.state.step_count:
            self.save(kind)

    def save(self, kind: Kind = "normal") -> None:
        """Writes a checkpoint of this moment; returns once everything is copied to host memory. Collective.

        Raises:
            UserError: the previous save failed, or this one can't begin.
        """
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start
        step, storage = self.state.step_count, self.storages[kind]
        token = self._begin(storage, step)
        part = self._part = self._collect(kind, storage, token)
        copied = time.perf_counter() - start
        self._saved[kind] = step

        def work() -> None:
            write_rank(part)
            if part.rank == 0:
                commit(part, self.rank_timeout, self._check_leases)
                logger.info("saved %s in %.1f s", storage.show(str(step)), time.perf_counter() - start)

        self._background.start(work)
        logger.info(
            "saving %s checkpoint of step %d: training paused for %.3f s, %.3f s of them for the previous save",
            *(kind, step, copied, waited),
        )
        if not self.config.ckpt.async_upload:
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed. Collective. Raises UserError on all ranks if it failed on any."""
        if self.control.rank != 0:
            self._background.wait()
        self._raise_failures()  # rank 0 hears of them before it waits for files that will never come
        self._background.wait()
        self._raise_failures()

    def _raise_failures(self) -> None:
        """Ends a save that has failed on any rank so far. Collective. Raises UserError on all ranks."""
        error = self._background.error
        texts = self.control.gather(None if error is None else text_of(error))
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if not failures:
            return
        assert self._part is not None
        self._part.abandoned.set()
        self._background.wait(LAST_WORDS)
        self.control.gather(None)  # else a rank that is still writing would leave its files behind
        self._background.error = None
        if self.control.rank == 0:
            discard(self._part)
        raise UserError("a checkpoint could not be saved:\n" + "\n".join(failures)) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Closes; after an error, which other ranks may know nothing of, the save under way is ended without them."""
        if kind is None:
            self.close()
            return
        if self._background.busy:
            logger.info("the run ends by an error; the save under way has %g s to end first", LAST_SAVE)
            self._background.wait(LAST_SAVE)
        self.signals.close()

    def close(self) -> None:
        """Waits for the last save and gives the signals back. Collective. Raises UserError if the save failed."""
        try:
            self.wait()
        finally:  # until then a second SIGTERM, which launchers send, would end the save that the first asked for
            self.signals.close()
        for lock in self._locks:
            lock.close()

    def _claim(self) -> None:
        """Makes the files that rules of `ckpt` write this run's own. Collective. Raises UserError on all ranks."""
        problem, ckpt = None, self.config.ckpt
        if self.control.rank == 0 and ckpt.enable_save_ckpt:
            try:
                self._claim_folder("normal", "ckpt.save_ckpt_folder")
                if ckpt.oss_snapshot_freq is not None:
                    self._claim_folder("snapshot", "ckpt.snapshot_ckpt_folder")
                self.stop_file = StopFile(ckpt.stop_file_path)
            except UserError as error:
                problem = str(error)
        if problem := self.control.from_first(problem):
            raise UserError(problem)

    def _claim_folder(self, kind: Kind, key: str) -> None:
        storage = self.storages[kind]
        if not storage.is_local and kind == "snapshot" and self.config.ckpt.snapshot_ckpt_folder is None:
            return  # it lies in the other one
        self._locks.append(claim_folder(storage, key))
        remove_unfinished(storage)

    def _check_leases(self) -> None:
        """Raises UserError on rank 0 if a folder in an object store isn't this run's any more."""
        for lock in self._locks:
            if isinstance(lock, Lease):
                lock.check()

    def _begin(self, storage: Storage, step: int) -> str:
        """Makes the folder of a save on rank 0; the token of the save, on all ranks."""
        token, problem = new_token(), None
        if self.control.rank == 0:
            try:
                patiently(self._check_leases)
                patiently(partial(open_folder, storage, step, token))
            except UserError as error:
                problem = str(error)
            except Exception as error:  # stores have errors of their own; all ranks wait here for this one's word
                problem = f"can't write to ckpt folder {storage.url}: {error}"
        token, problem = self.control.from_first((token, problem))
        if problem:
            raise UserError(problem)
        return token

    def _collect(self, kind: Kind, storage: Storage, token: str) -> Save:
        """Copies all that this rank writes to host memory."""
        rank, step = self.control.rank, self.state.step_count
        self.optimizer.wait()
        pieces = self.optimizer.pieces()
        tensors = self._host_copy.take(pieces, rank)
        tensors[rng_file(rank)] = rng_state()
        texts = {}
        if rank == 0:
            state = {"train": self.state.state_dict(), "optimizer": self.optimizer.state_dict()}
            texts = {"config.json": self.config.model_dump_json(indent=1), "state.json": json.dumps(state, indent=1)}
        keep = self.config.ckpt.keep_last if kind == "normal" else 1
        world = {"ranks": self.control.size, **self.mesh.sizes, **self.mesh.dense.sizes}
        metadata = metadata_of(pieces, token, step)
        spared = frozenset(self._loader.broken)
        return Save(storage, step, kind, token, rank, world, tensors, metadata, texts, keep, spared)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
