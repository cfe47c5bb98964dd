"""Which checkpoint a run starts from, and what is taken from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from internlm.checkpoint.compare import check_model, check_rows, tell_changes
from internlm.checkpoint.control import Control
from internlm.checkpoint.hf import HFReader
from internlm.checkpoint.legacy.folder import is_legacy_folder
from internlm.checkpoint.legacy.resume import load_legacy, marked_step, newest_legacy_folder
from internlm.checkpoint.manifest import (
    PLACES,
    BrokenCheckpointError,
    Manifest,
    check_files,
    list_checkpoints,
    read_manifest,
)
from internlm.checkpoint.native import is_hf_folder
from internlm.checkpoint.shards import ShardIndex
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import read_tensors
from internlm.config.output_sections import LoadConfig
from internlm.config.schema import Config
from internlm.core.random import set_rng_state
from internlm.model.lora import is_adapter
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.state import TrainState
from internlm.utils.errors import UserError
from internlm.utils.logger import common_warning, get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint on storage whose files were all verified."""

    storage: Storage
    folder: str
    manifest: Manifest

    def __str__(self) -> str:
        return self.storage.show(self.folder)

    def text(self, name: str) -> Any:
        return json.loads(self.storage.read(f"{self.folder}/{name}"))


class Candidate(NamedTuple):
    """What looks like a checkpoint of this run."""

    step: int
    kind: str
    folder: str
    is_legacy: bool  # of the 2023 framework


class Loader:
    """Finds, verifies and loads checkpoints. All methods are collective."""

    def __init__(
        self,
        config: Config,
        optimizer: HybridZero,
        state: TrainState,
        control: Control,
        storages: Mapping[str, Storage],
    ) -> None:
        self.config, self.optimizer, self.state = config, optimizer, state
        self.control, self.storages = control, storages
        self.broken: set[str] = set()  # normal checkpoints that did not verify
        self.continued = False  # whether the run goes on from a checkpoint of its own

    def resume(self) -> Found | None:
        """Newest good checkpoint, else `ckpt.load_ckpt_info`, else nothing. Returns the checkpoint that is continued.

        Raises:
            UserError: checkpoints exist but none verifies; `load_ckpt_info` names none that does; other sizes; ranks
                that read other data.
        """
        self._check_same_rows()
        ckpt = self.config.ckpt
        candidates = self.control.from_first(self._candidates() if self.control.rank == 0 else [])
        self.continued = bool(ckpt.auto_resume and candidates)
        if self.continued and candidates[0].is_legacy:
            path = self.storages[candidates[0].kind].show(candidates[0].folder)
            load_legacy(path, ("all",), self.config, self.optimizer, self.state, self.control)
            return None
        if self.continued:
            found = self._newest_good([candidate for candidate in candidates if not candidate.is_legacy])
            self._load(found, ("all",))
            logger.info("resumed from %s at step %d", found, self.state.step_count)
            return found
        if candidates:
            common_warning(
                logger,
                f"ckpt.auto_resume is off, but {self.storages['normal'].url} holds checkpoints up to step "
                f"{candidates[0].step}, which a later resume would prefer",
            )
        if ckpt.load_ckpt_info is None:
            logger.info("new run: no checkpoint in %s and no ckpt.load_ckpt_info", self.storages["normal"].url)
        elif ckpt.load_ckpt_info.ckpt_type == "hf":
            self._load_hf(ckpt.load_ckpt_info)
        else:
            self._load_named(ckpt.load_ckpt_info)
        return None

    def _check_same_rows(self) -> None:
        """Each rank shuffles the rows that it finds: with other files they would repeat some rows and miss others."""
        counts = self.control.gather(self.state.num_rows)
        for rank, count in enumerate(counts):
            if count != counts[0]:
                raise UserError(
                    f"data: rank 0 finds {counts[0]} rows of training data, rank {rank} {count}: make the files below "
                    "data.train_folder the same on all machines"
                )

    def _candidates(self) -> list[Candidate]:
        """All that look like checkpoints, newest first, normal ones before snapshots."""
        found = []
        for kind, root in self.storages.items():
            for step, folder in list_checkpoints(root):
                if not is_legacy_folder(root, folder):
                    found.append(Candidate(step, kind, folder, False))
                elif (marked := marked_step(root, folder)) is not None:
                    found.append(Candidate(marked, kind, folder, True))
                else:
                    common_warning(
                        logger,
                        f"passing over {root.show(folder)}: a folder of 2023 without a .step file may be incomplete; "
                        "ckpt.load_ckpt_info can name it",
                    )
        return sorted(found, key=lambda candidate: -candidate.step)

    def _newest_good(self, candidates: Sequence[Candidate]) -> Found:
        reasons = []
        for _, kind, folder, _ in candidates:
            try:
                return self._verified(self.storages[kind], folder)
            except BrokenCheckpointError as error:
                reasons.append(str(error))
                common_warning(logger, f"passing over a broken checkpoint: {error}")
                if kind == "normal":
                    self.broken.add(folder)
        raise UserError(
            "there are checkpoints, but none is whole:\n"
            + "\n".join(reasons)
            + "\nRepair them, move them away, or start a new run with another ckpt.save_ckpt_folder "
            "(or ckpt.auto_resume=False)."
        )

    def _verified(self, storage: Storage, folder: str) -> Found:
        """Checks all files of a checkpoint, each rank its share. Raises BrokenCheckpointError on all ranks alike."""
        mine_first = _try_manifest(storage, folder) if self.control.rank == 0 else (None, [])
        manifest, problems = self.control.from_first(mine_first)
        if manifest is not None:
            by_size = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
            mine = check_files(storage, folder, manifest, by_size[self.control.rank :: self.control.size])
            problems = [problem for part in self.control.gather(mine) for problem in part]
        if manifest is None or problems:
            raise BrokenCheckpointError(f"{storage.show(folder)}: {'; '.join(problems[:4])}")
        return Found(storage, folder, manifest)

    def _load_named(self, info: LoadConfig) -> None:
        """Loads the checkpoint that `ckpt.load_ckpt_info` names."""
        storage, folder = place_of(info.path)
        if "optimizer" in info.content and "model" not in info.content:
            raise UserError('ckpt.load_ckpt_info.content: "optimizer" needs "model": masters and parameters are one')
        legacy = newest_legacy_folder(info.path) if self.control.rank == 0 else None
        if (legacy := self.control.from_first(legacy)) is not None:
            load_legacy(legacy, info.content, self.config, self.optimizer, self.state, self.control)
            return
        try:
            found = self._verified(storage, folder)
        except BrokenCheckpointError as error:
            raise refusal(storage.show(folder), str(error)) from error
        self._load(found, info.content)
        logger.info("loaded %s from %s", ", ".join(info.content), found)

    def _load(self, found: Found, content: Sequence[str]) -> None:
        config, saved = found.text("config.json"), found.text("state.json")
        check_model(config, self.config, str(found))
        everything = "all" in content
        if (everything or "sampler" in content) and saved["train"]["batch_count"]:
            check_rows(config, saved["train"].get("num_rows"), self.config, self.state.num_rows, str(found))
        if everything:
            tell_changes(config, self.config, str(found))
        kinds = {"param"} if everything or "model" in content else set()
        if everything or "optimizer" in content:
            kinds |= {"master", "exp_avg", "exp_avg_sq"}
            self.optimizer.load_state_dict(saved["optimizer"])
        if kinds:
            self._load_tensors(found, kinds, new_adapters=not everything)
        state = self.state.state_dict()
        for key, value in {"place": None, **saved["train"]}.items():
            part = "scheduler" if key == "step_count" else "sampler"
            if everything or part in content:
                state[key] = value
        state["num_rows"] = self.state.num_rows  # which may not have been known then
        self.state.load_state_dict(state)
        if everything:
            self._load_rng(found)

    def _load_tensors(self, found: Found, kinds: set[str], new_adapters: bool) -> None:
        """Fills this rank's pieces; all ranks learn of a rank that lacks something, so that none waits for ever."""
        problem = None
        try:
            shards = [name for name in found.manifest.files if name.startswith(("model-", "optimizer-"))]
            index = ShardIndex(found.storage, [f"{found.folder}/{name}" for name in shards])
            for piece in self.optimizer.pieces():
                if is_adapter(piece.name) and new_adapters and piece.name not in index.shapes:
                    continue
                if piece.kind in kinds:
                    piece.write(index.read(piece))
        except UserError as error:
            problem = str(error)
        problems = [text for text in self.control.gather(problem) if text]
        if problems:
            raise UserError(f"{found}: {problems[0]}")
        self.optimizer.loaded(kinds)

    def _load_rng(self, found: Found) -> None:
        saved_ranks = found.manifest.world["ranks"]
        if saved_ranks == self.control.size:
            set_rng_state(read_tensors(found.storage, f"{found.folder}/{rng_file(self.control.rank)}"))
        else:
            logger.info(
                "random states start afresh: %d rank(s) wrote the checkpoint, %d read it",
                saved_ranks,
                self.control.size,
            )

    def _load_hf(self, info: LoadConfig) -> None:
        """Takes the parameters from a Hugging Face folder; there is nothing else in it."""
        others = sorted(set(info.content) - {"model"})
        if others:
            raise UserError(
                f"ckpt.load_ckpt_info.content: {', '.join(others)} can't come from Hugging Face folder {info.path}, "
                'which holds nothing but the model: use content=("model",)'
            )
        reader = HFReader(info.path, self.config.model)
        reader.check_run(self.config.lora)
        name, value = "", None
        for piece in self.optimizer.pieces():
            if piece.kind != "param" or not reader.holds(piece.name):  # a router's bias keeps its first value
                continue
            if piece.name != name:
                name, value = piece.name, reader.read_apart(piece.name)
            assert value is not None
            piece.write(value[tuple(slice(start, stop) for start, stop in piece.box)])
        self.optimizer.loaded({"param"})
        logger.info("loaded the model from Hugging Face folder %s", info.path)


def rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _try_manifest(storage: Storage, folder: str) -> tuple[Manifest | None, list[str]]:
    try:
        return read_manifest(storage, folder), []
    except BrokenCheckpointError as error:
        return None, [str(error)]


def place_of(path: str) -> tuple[Storage, str]:
    """The folder above a checkpoint, and its name there."""
    parent, _, folder = path.rstrip("/").rpartition("/")
    return Storage(parent or ("/" if path.startswith("/") else ".")), folder


def refusal(url: str, reason: str) -> UserError:
    """The error for a `ckpt.load_ckpt_info.path` that is no intact checkpoint; names checkpoints found below it."""
    if is_hf_folder(url):
        return UserError(f"ckpt.load_ckpt_info: {url} is a Hugging Face folder: set ckpt.load_ckpt_info.ckpt_type=hf")
    found = [(step, place + name) for place in PLACES for step, name in list_checkpoints(Storage(f"{url}/{place}"))]
    names = [name for _, name in sorted(found, key=lambda item: -item[0])]
    hint = f"; it holds checkpoints, name one of them: {', '.join(names[:8])}" if names else ""
    return UserError(f"ckpt.load_ckpt_info.path: {reason}{hint}")
