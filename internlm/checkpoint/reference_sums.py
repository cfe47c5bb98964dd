"""Preference tuning with `dpo.reference = "once"`: what the reference says of each pair is computed before training.

A new run asks its own model, which is the reference as long as nothing is trained. What it said, two numbers a pair,
is kept beside the checkpoints. A resumed run reads that; what is missing there, because pairs or steps were added, is
computed by the reference, which is loaded for that alone.
"""

import gc
import hashlib
import json
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from internlm.checkpoint.checkpointer import Checkpointer
from internlm.checkpoint.reference import build_reference, sums_of
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import read_header, read_tensors, write_tensors
from internlm.config.schema import Config
from internlm.core.collectives import all_reduce_
from internlm.core.mesh import Mesh
from internlm.data.formats import MegatronFile
from internlm.data.loader import TrainLoader, ValidLoader, read_row
from internlm.data.packing import WholeSamples
from internlm.data.rows import ReferenceSums, TrainRows
from internlm.model.transformer import Transformer
from internlm.parallel.parallelize import whole_answers
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.preference import AnswerSums
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

FILE = "reference.safetensors"  # beside the checkpoints
_TELL_EVERY = 60.0  # seconds


Sets = Mapping[str, TrainLoader | ValidLoader]


def give_reference(
    config: Config,
    mesh: Mesh,
    model: Transformer,
    optimizer: HybridZero,
    checkpointer: Checkpointer,
    train_loader: TrainLoader,
    valid_loaders: Mapping[str, ValidLoader],
) -> None:
    """With `dpo.reference = "once"`: gives the rows of all sets the reference's sums. Collective.

    Comes after `checkpointer.resume` and before the first step. Training rows are those that are still to be read.
    """
    if config.dpo is None or config.dpo.reference == "each_step":
        return
    state = checkpointer.state
    train_loader.seek(state.batch_count, state.place)
    sets: dict[str, TrainLoader | ValidLoader] = {"train": train_loader}
    if config.data.valid_every:
        sets |= {f"valid/{name}": loader for name, loader in valid_loaders.items()}
    kept = _Kept(config, checkpointer.storages["normal"], sets)
    resumed, first = checkpointer.continued, checkpointer.control.rank == 0
    values = checkpointer.control.from_first(kept.read() if resumed and first else kept.none())
    missing = {name: _missing(loader, values[name]) for name, loader in sets.items()}
    if count := sum(len(numbers) for numbers in missing.values()):
        logger.info("computing the log-probabilities of the reference once: %d rows", count)
        start = time.perf_counter()
        asked = build_reference(config, mesh, optimizer.lanes) if resumed else (model.eval(), optimizer)
        with whole_answers(asked[0], config, mesh):
            for name, numbers in missing.items():
                _compute(partial(sums_of, *asked, mesh), sets[name], numbers, values[name], mesh)
        del asked
        gc.collect()  # a model and its engine refer to each other
        model.train()
        logger.info("computed the log-probabilities of the reference in %.1f s", time.perf_counter() - start)
        if first and config.ckpt.enable_save_ckpt:
            kept.write(values)
    for name, loader in sets.items():
        loader.reference = ReferenceSums(loader.rows, values[name])


def _missing(loader: TrainLoader | ValidLoader, values: Tensor) -> list[int]:
    """The rows to read of which some answer has no value."""
    known = ReferenceSums(loader.rows, values)
    return [number for number in loader.rows_to_read().tolist() if known.of(number).isnan().any()]


def _compute(
    sums: AnswerSums, loader: TrainLoader | ValidLoader, numbers: list[int], values: Tensor, mesh: Mesh
) -> None:
    """Fills in the values of the rows `numbers`, which are dealt to the data ranks in turn."""
    told = time.perf_counter()
    found = torch.zeros_like(values)
    for first in range(0, len(numbers), mesh.dp_size):
        place = first + mesh.dp_rank
        number = numbers[min(place, len(numbers) - 1)]  # all ranks take part in each pass
        row = read_row(loader.rows, number)
        computed = sums(row)
        if place < len(numbers):
            samples = torch.from_numpy(loader.rows.samples_of(number))
            found[samples] = computed[: len(samples)].cpu()
        if time.perf_counter() - told > _TELL_EVERY:
            told = time.perf_counter()
            logger.info("reference: %d of %d rows", min(first + mesh.dp_size, len(numbers)), len(numbers))
    found = found.to(mesh.device)
    all_reduce_(found, mesh.group("data"))
    for number in numbers:
        samples = torch.from_numpy(loader.rows.samples_of(number))
        values[samples] = found[samples.to(mesh.device)].cpu()


class _Kept:
    """The file of values, of one start and one content of each set: a set that has changed is not in it."""

    def __init__(self, config: Config, storage: Storage, sets: Sets) -> None:
        self.storage, self.sets = storage, sets
        load = config.ckpt.load_ckpt_info
        assert load is not None  # config/checks.py
        lora = config.lora and config.lora.model_dump(mode="json")
        self.start = json.dumps([load.path, load.ckpt_type, config.model.dtype, lora])

    def none(self) -> dict[str, Tensor]:
        """Values of which none is known."""
        return {
            name: torch.full((loader.rows.num_samples,), torch.nan, dtype=torch.float64)
            for name, loader in self.sets.items()
        }

    def read(self) -> dict[str, Tensor]:
        """The values that are known; none if the file is damaged or of another start."""
        values = self.none()
        if FILE not in self.storage.names():
            return values
        try:
            about, tensors = read_header(self.storage, FILE)[1], read_tensors(self.storage, FILE)
        except (ValueError, KeyError) as error:
            logger.warning(f"{self.storage.show(FILE)} is damaged, and made again ({error})")
            return values
        for name, digest in self._digests().items():
            if about.get("start") == self.start and about.get(name) == _marks(digest, tensors.get(name)):
                values[name] = tensors[name]
            else:
                logger.info("%s holds no values of this start and these pairs: %s", self.storage.show(FILE), name)
        return values

    def write(self, values: dict[str, Tensor]) -> None:
        about = {name: _marks(digest, values[name]) for name, digest in self._digests().items()}
        self.storage.make_folder("")
        write_tensors(self.storage, FILE, values, {"start": self.start, **about})

    def _digests(self) -> dict[str, str]:
        """What the samples of each set are."""
        return {name: _digest(loader.rows) for name, loader in self.sets.items()}


def _digest(rows: TrainRows | WholeSamples) -> str:
    """Of lengths and tokens of all samples."""
    digest = hashlib.sha256()
    for file in rows.files if isinstance(rows, WholeSamples) else [part.file for part in rows.files]:
        assert isinstance(file, MegatronFile)  # data.type = preference
        digest.update(file.lengths.tobytes())
        with open(file.path, "rb") as tokens:
            digest.update(hashlib.file_digest(tokens, "sha256").digest())
    return digest.hexdigest()


def _marks(digest: str, values: Tensor | None) -> str:
    """Samples and values, neither of which may change."""
    return "" if values is None else f"{digest} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"
