"""From folders to sample files: which files there are, in which order, and which source each belongs to."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from internlm.config.schema import DataConfig
from internlm.data.chat import CHAT_SUFFIXES, open_chat, recipe_of
from internlm.data.formats import MegatronFile, SampleFile, TokenizedFile, min_length_of
from internlm.data.synthetic import DummyFile, SyntheticFile
from internlm.data.text import TEXT_SUFFIXES, open_text
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

VALID_MIN_LENGTH = 50  # tokens; the 2023 reader's own minimum, which data.min_length does not change

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sources:
    """The files of a run in reading order; `type_ids[i]` is the place of file i's source in `type_names`."""

    files: list[SampleFile]
    type_ids: list[int]
    type_names: list[str]


def walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files below `folder` that end in one of `suffixes`: depth first, names sorted, symbolic links followed.

    Raises UserError for a missing folder and for a link that leads back to one of its parents.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (data.train_folder, data.valid_folder).")
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in folders:
            below = os.path.join(parent, name)
            if os.path.islink(below) and Path(parent).resolve().is_relative_to(Path(below).resolve()):
                raise UserError(f"{below}: the link leads back to {os.path.realpath(below)}, so reading never ends.")
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(suffixes))


def _opener(data: DataConfig, vocab_size: int) -> tuple[tuple[str, ...], Callable[[Path, int], SampleFile]]:
    """What files of `data.type` end in, and how one is opened with a minimum length."""
    if data.type == "tokenized":
        return (".bin",), TokenizedFile
    if data.type == "megatron":
        return (".idx",), MegatronFile
    if data.type in ("chat", "preference"):
        recipe = recipe_of(data, vocab_size)
        return CHAT_SUFFIXES, lambda path, min_length: open_chat(recipe, path, min_length)
    if not data.tokenizer_path:
        raise UserError('data.type = "text" needs data.tokenizer_path, a sentencepiece model file.')
    tokenizer = Path(data.tokenizer_path)
    return TEXT_SUFFIXES, lambda path, min_length: open_text(path, tokenizer, data.text_key, min_length)


def open_train(data: DataConfig, vocab_size: int) -> Sources:
    """All training files. A source is an entry of `train_folder`; ids count all its entries, sorted by name.

    Without a folder: the 2023 dummy data, or random tokens for type="synthetic".
    """
    if data.type == "synthetic":
        return Sources([SyntheticFile(data.seq_len, vocab_size, data.seed)], [0], ["synthetic"])
    if data.train_folder is None:
        return Sources([DummyFile(data.seq_len)], [0], ["en", "cn", "code"])
    folder = Path(data.train_folder)
    suffixes, open_file = _opener(data, vocab_size)
    paths = list(walk(folder, suffixes))
    if not paths:
        raise UserError(f"data.train_folder = {folder}: no {' or '.join(suffixes)} file below it (type={data.type}).")
    type_names = sorted(os.listdir(folder))
    files: list[SampleFile] = []
    type_ids: list[int] = []
    for path in paths:
        file = open_file(path, min_length_of(str(path), data.min_length, data.min_length_dict))
        if len(file):  # a file with no sample long enough is passed over, as in 2023
            files.append(file)
            type_ids.append(type_names.index(path.relative_to(folder).parts[0]))
        else:
            logger.warning("%s: no sample of at least data.min_length tokens; passed over", path)
    return Sources(files, type_ids, type_names)


def open_valid(data: DataConfig, vocab_size: int) -> dict[str, list[SampleFile]]:
    """The validation sets: every folder that holds data files, named by its base name.

    Where two folders share a base name, both are named by their path below `valid_folder`. `.bin/.meta` samples under
    50 tokens are left out whatever `data.min_length` says, as in 2023, so that figures compare; other types are read
    whole.
    """
    if data.valid_folder is None:
        return {}
    if data.type == "synthetic":
        return {"synthetic": [SyntheticFile(data.seq_len, vocab_size, data.seed + 1, num_samples=64)]}
    folder = Path(data.valid_folder)
    suffixes, open_file = _opener(data, vocab_size)
    minimum = VALID_MIN_LENGTH if data.type == "tokenized" else 0
    by_folder: dict[Path, list[SampleFile]] = {}
    for path in walk(folder, suffixes):
        by_folder.setdefault(path.parent, []).append(open_file(path, minimum))
    if not by_folder:
        raise UserError(f"data.valid_folder = {folder}: no {' or '.join(suffixes)} file below it (type={data.type}).")
    return _named(folder, by_folder, minimum)


def _named(root: Path, by_folder: dict[Path, list[SampleFile]], minimum: int) -> dict[str, list[SampleFile]]:
    base_names = [path.resolve().name if path == root else path.name for path in by_folder]
    sets: dict[str, list[SampleFile]] = {}
    for (path, files), base in zip(by_folder.items(), base_names, strict=True):
        name = base
        if base_names.count(base) > 1:
            name = path.relative_to(root).as_posix() if path != root else f"{base} (top)"
            logger.info("validation set %s is named by its path: several folders are called %s", name, base)
        num_samples = sum(len(file) for file in files)
        logger.info("validation set %s: %d samples of at least %d tokens", name, num_samples, minimum)
        if num_samples:
            sets[name] = files
        else:
            logger.warning("validation set %s holds nothing long enough and is left out", name)
    return sets
