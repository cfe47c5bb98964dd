"""From folders to sample files: which files there are, in which order, and which source each belongs to."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from internlm.config.schema import DataConfig
from internlm.data.chat import CHAT_SUFFIXES, open_chat, recipe_of
from internlm.data.formats import MegatronFile, SampleFile, TokenizedFile, min_length_of
from internlm.data.synthetic import DummyFile, SyntheticFile
from internlm.data.text import TEXT_SUFFIXES, open_text
from internlm.utils.errors import UserError, collected
from internlm.utils.logger import get_logger

SUFFIXES: dict[str, tuple[str, ...]] = {  # of the files of data.type
    "tokenized": (".bin",),
    "megatron": (".idx",),
    "text": TEXT_SUFFIXES,
    "chat": CHAT_SUFFIXES,
    "preference": CHAT_SUFFIXES,
}
MOST_PROBLEMS = 10  # damaged files that are reported; then the rest is left unread
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

    Raises UserError for a folder that is missing or can't be listed, and for a link that leads back to one of its
    parents.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (data.train_folder, data.valid_folder).")
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders.sort()
        for name in folders:
            below = os.path.join(parent, name)
            if os.path.islink(below) and Path(parent).resolve().is_relative_to(Path(below).resolve()):
                raise UserError(f"{below}: the link leads back to {os.path.realpath(below)}, so reading never ends.")
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(suffixes))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: this folder can't be listed ({error.strerror}), so its data would be left out. Make it "
        "readable, or move it out of the data folder."
    ) from error


def data_files(data: DataConfig, key: Literal["train_folder", "valid_folder"]) -> list[Path]:
    """The files of data.type below a folder that is set. Raises UserError if there are none."""
    folder, suffixes = Path(getattr(data, key)), SUFFIXES[data.type]
    paths = list(walk(folder, suffixes))
    if not paths:
        raise UserError(f"data.{key} = {folder}: no {' or '.join(suffixes)} file below it (type={data.type}).")
    return paths


def _open_each(paths: Sequence[Path], open_file: Callable[[Path], SampleFile]) -> list[SampleFile]:
    """All files. Raises one UserError that names every damaged one, or the first of very many."""
    files: list[SampleFile] = []
    problems: list[str] = []
    for number, path in enumerate(paths, 1):
        with collected(problems):
            files.append(open_file(path))
        if len(problems) == MOST_PROBLEMS and number < len(paths):
            problems.append(f"the other {len(paths) - number} files were not looked at")
            break
    if problems:
        raise UserError("\n".join(problems))
    return files


def _opener(data: DataConfig, vocab_size: int) -> Callable[[Path, int], SampleFile]:
    """How a file of `data.type` is opened with a minimum length."""
    if data.type == "tokenized":
        return TokenizedFile
    if data.type == "megatron":
        return MegatronFile
    if data.type in ("chat", "preference"):
        recipe = recipe_of(data, vocab_size)
        return lambda path, min_length: open_chat(recipe, path, min_length)
    if not data.tokenizer_path:
        raise UserError('data.type = "text" needs data.tokenizer_path, a sentencepiece model file.')
    tokenizer = Path(data.tokenizer_path)
    return lambda path, min_length: open_text(path, tokenizer, data.text_key, min_length)


def open_train(data: DataConfig, vocab_size: int) -> Sources:
    """All training files. A source is an entry of `train_folder`; ids count all its entries, sorted by name.

    Without a folder: the 2023 dummy data, or random tokens for type="synthetic".
    """
    if data.type == "synthetic":
        return Sources([SyntheticFile(data.seq_len, vocab_size, data.seed)], [0], ["synthetic"])
    if data.train_folder is None:
        return Sources([DummyFile(data.seq_len)], [0], ["en", "cn", "code"])
    folder = Path(data.train_folder)
    paths = data_files(data, "train_folder")
    open_file = _opener(data, vocab_size)
    type_names = sorted(os.listdir(folder))
    files: list[SampleFile] = []
    type_ids: list[int] = []
    opened = _open_each(
        paths, lambda path: open_file(path, min_length_of(str(path), data.min_length, data.min_length_dict))
    )
    for path, file in zip(paths, opened, strict=True):
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
    paths = data_files(data, "valid_folder")
    open_file = _opener(data, vocab_size)
    minimum = VALID_MIN_LENGTH if data.type == "tokenized" else 0
    by_folder: dict[Path, list[SampleFile]] = {}
    for path, file in zip(paths, _open_each(paths, lambda path: open_file(path, minimum)), strict=True):
        by_folder.setdefault(path.parent, []).append(file)
    return _named(folder, by_folder, minimum)


def _named(root: Path, by_folder: dict[Path, list[SampleFile]], minimum: int) -> dict[str, list[SampleFile]]:
    base_names = [path.resolve().name if path == root else path.name for path in by_folder]
    sets: dict[str, list[SampleFile]] = {}
    for (path, files), base in zip(by_folder.items(), base_names, strict=True):
        name = base
        if base_names.count(base) > 1:
            name = path.relative_to(root).as_posix() if path != root else f"{base} (top)"
            logger.info("validation set %s is named by its path: several folders are called %s", name, base)
        if any(len(file) for file in files):
            sets[name] = files
        else:
            logger.warning("validation set %s holds no sample of %d tokens and is left out", name, minimum)
    return sets
