"""Opens all that a run reads before it touches a process group, a GPU or memory, and reports all mistakes together."""

import json
from dataclasses import replace

from internlm.checkpoint.compare import check_model
from internlm.checkpoint.hf import HFReader
from internlm.checkpoint.legacy.resume import check_legacy, newest_legacy_folder
from internlm.checkpoint.loading import place_of, refusal
from internlm.checkpoint.manifest import BrokenCheckpointError, read_manifest
from internlm.checkpoint.storage import Storage
from internlm.config.checks import ConfigError
from internlm.config.output_sections import LoadConfig
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import data_place
from internlm.data.checks import TOKENISED_ON_THE_FLY, find_name_problems
from internlm.data.loader import TrainLoader, ValidLoader, build_train_loader, build_valid_loaders
from internlm.utils.errors import collected

Loaders = tuple[TrainLoader, dict[str, ValidLoader]]


def open_files(config: Config, world: World) -> Loaders:
    """The loaders of this rank. Text is tokenised here, if the cache doesn't hold it yet.

    Tokenizer and checkpoints are checked first, and by rank 0 alone, so that a thousand ranks don't ask one file system
    for the same; when rank 0 finds a mistake, the launcher ends the other ranks.

    Raises ConfigError with every mistake in data, tokenizer, `ckpt.load_ckpt_info` and folders of checkpoints.
    """
    problems = _find_cheap_problems(config) if world.rank == 0 else []
    loaders = None
    if not (problems and config.data.type in TOKENISED_ON_THE_FLY):
        loaders = _open_data(config, world, problems)
    _refuse(config, problems)
    assert loaders is not None
    return loaders


def check_files(config: Config, world: World) -> None:
    """Raises ConfigError as `open_files` on rank 0 does, as far as mistakes are known without tokenising text."""
    problems = _find_cheap_problems(config)
    if config.data.type not in TOKENISED_ON_THE_FLY:
        _open_data(config, replace(world, rank=0), problems)
    _refuse(config, problems)


def _find_cheap_problems(config: Config) -> list[str]:
    """Names and headers are read, no weights and no text."""
    return find_name_problems(config) + find_checkpoint_problems(config)


def _open_data(config: Config, world: World, problems: list[str]) -> Loaders | None:
    place, count = data_place(config.parallel, world), len(problems)
    with collected(problems):
        train_loader = build_train_loader(config, *place)
    with collected(problems):
        valid_loaders = build_valid_loaders(config, *place)
    return (train_loader, valid_loaders) if len(problems) == count else None


def _refuse(config: Config, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"files of {config.JOB_NAME}", problems)


def find_checkpoint_problems(config: Config) -> list[str]:
    """What is wrong with the checkpoint to start from, and with the places of those to write."""
    ckpt = config.ckpt
    problems: list[str] = []
    for key in ("save_ckpt_folder", "snapshot_ckpt_folder"):
        if (url := getattr(ckpt, key)) is not None:
            with collected(problems):
                Storage(url, f"ckpt.{key}")
    if ckpt.load_ckpt_info is not None:
        with collected(problems):
            _check_start(ckpt.load_ckpt_info, config)
    return problems


def _check_start(info: LoadConfig, config: Config) -> None:
    """Raises UserError unless a checkpoint of the named kind lies there, and of this run's model."""
    Storage(info.path, "ckpt.load_ckpt_info.path")
    if info.ckpt_type == "hf":
        HFReader(info.path, config.model).check_run(config.lora)
    elif (legacy := newest_legacy_folder(info.path)) is not None:
        if Storage(legacy).is_local:  # where files are mapped; from elsewhere they would be fetched whole
            check_legacy(legacy, info.content, config)
    else:
        storage, folder = place_of(info.path)
        try:
            read_manifest(storage, folder)
        except BrokenCheckpointError as error:
            raise refusal(info.path, f"{info.path}: {error}") from error
        check_model(json.loads(storage.read(f"{folder}/config.json")), config, info.path)
