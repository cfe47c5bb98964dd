"""Mistakes in all that a run starts from, found together before a process group, a GPU or memory is touched."""

import json

from internlm.checkpoint.compare import check_model
from internlm.checkpoint.hf import HFReader
from internlm.checkpoint.legacy.resume import newest_legacy_folder
from internlm.checkpoint.loading import place_of, refusal
from internlm.checkpoint.manifest import BrokenCheckpointError, read_manifest
from internlm.checkpoint.storage import Storage
from internlm.config.checks import ConfigError
from internlm.config.output_sections import LoadConfig
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import axes_of_world
from internlm.data.checks import find_data_problems
from internlm.utils.errors import collected


def check_files(config: Config, world: World, world_size: int) -> None:
    """Raises ConfigError with every mistake in data, tokenizer, `ckpt.load_ckpt_info` and folders of checkpoints.

    Names, lengths and headers are read, no weights. Rank 0 looks for all `world_size` ranks, since it may be a
    thousand of them that would ask one file system the same; the launcher ends the others.
    """
    if world.rank > 0:
        return
    num_readers = axes_of_world(config.parallel, world_size)[0]["data"]
    problems = find_data_problems(config, num_readers) + find_checkpoint_problems(config)
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
            _look_at(ckpt.load_ckpt_info, config)
    return problems


def _look_at(info: LoadConfig, config: Config) -> None:
    """Raises UserError unless a checkpoint of the named kind lies there, and of this run's model."""
    Storage(info.path, "ckpt.load_ckpt_info.path")
    if info.ckpt_type == "hf":
        HFReader(info.path, config.model)
    elif newest_legacy_folder(info.path) is None:
        storage, folder = place_of(info.path)
        try:
            read_manifest(storage, folder)
        except BrokenCheckpointError as error:
            raise refusal(info.path, f"{info.path}: {error}") from error
        check_model(json.loads(storage.read(f"{folder}/config.json")), config, info.path)
