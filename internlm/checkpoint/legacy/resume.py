"""A run that starts from a folder of 2023: parameters, masters, moments and counters, on any layout."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.compare import begin_anew
from internlm.checkpoint.control import Control
from internlm.checkpoint.legacy.folder import is_legacy_folder
from internlm.checkpoint.legacy.reader import LegacyReader
from internlm.checkpoint.storage import Storage
from internlm.config.schema import Config
from internlm.core.mesh import axes_of_world
from internlm.solver.hybrid_zero import HybridZero
from internlm.solver.pieces import Piece
from internlm.train.state import TrainState
from internlm.utils.errors import UserError
from internlm.utils.logger import common_warning, get_logger

logger = get_logger(__name__)

_MARK = re.compile(r"(\d+)\.step")


def marked_step(storage: Storage, folder: str) -> int | None:
    """The step of a complete folder of 2023: its `{step}.step`, which was written last (from version 0.2.0 on)."""
    marks = [int(match[1]) for name in storage.names(folder) if (match := _MARK.fullmatch(name))]
    return max(marks, default=None)


def newest_legacy_folder(url: str) -> str | None:
    """`url` if it is a folder of 2023; else the newest complete one in it or in its snapshots; None: there is none."""
    here = Storage(url)
    if is_legacy_folder(here, ""):
        return url
    found: list[tuple[int, str]] = []
    for root in (here, Storage(f"{url.rstrip('/')}/snapshot")):
        for name in root.names():
            if not name.isdecimal() or not is_legacy_folder(root, name):
                continue
            step = marked_step(root, name)
            if step is None:
                logger.warning(f"passing over {root.show(name)}: it has no .step file, so it may be incomplete")
            else:
                found.append((step, root.show(name)))
    return max(found)[1] if found else None


def check_legacy(path: str, content: Sequence[str], config: Config) -> None:
    """Raises UserError for what `load_legacy` would refuse, as far as names, shapes and plans tell it."""
    reader = LegacyReader(path, run=config)
    if {"all", "optimizer"} & set(content) and config.lora is None:
        _ = reader.optimizer


def load_legacy(
    path: str, content: Sequence[str], config: Config, optimizer: HybridZero, state: TrainState, control: Control
) -> None:
    """Fills a run from the folder of 2023 at `path`. `content` as in ckpt.load_ckpt_info. Collective.

    Raises UserError on all ranks when any of them lacks something.
    """
    everything = "all" in content
    kinds = {"param"} if everything or "model" in content else set()
    if everything or "optimizer" in content:
        kinds |= {"master", "exp_avg", "exp_avg_sq"}
    problem = None
    try:
        reader = LegacyReader(path, run=config)
        if config.lora is not None and len(kinds) > 1:
            raise UserError(
                f"{path} has no optimizer states for the adapters of this run (lora): with "
                'ckpt.load_ckpt_info.content=("model",) they begin beside its model'
            )
        _fill(reader, optimizer, kinds)
        if "exp_avg" in kinds:
            _load_scalars(reader, optimizer)
        _load_counters(reader, content, config, state, axes_of_world(config.parallel, control.size)[0]["data"])
    except UserError as error:
        problem = str(error)
    problems = [text for text in control.gather(problem) if text]
    if problems:
        raise UserError(problems[0])
    if kinds:
        optimizer.loaded(kinds)
    logger.info("loaded %s from %s, a checkpoint of the 2023 framework", ", ".join(content), path)


def _fill(reader: LegacyReader, optimizer: HybridZero, kinds: set[str]) -> None:
    """Writes this rank's pieces; those of one parameter are neighbours, so it stays in memory until the next."""
    last: dict[str, tuple[str, Tensor]] = {}
    for piece in optimizer.pieces():
        if piece.kind not in kinds or not reader.holds(piece.name):  # adapters are new
            continue
        kind = _saved_kind(piece, kinds)
        if kind not in last or last[kind][0] != piece.name:
            last.pop(kind, None)
            last[kind] = piece.name, reader.read(piece.name, kind)
        piece.write(last[kind][1][tuple(slice(*span) for span in piece.box)])


def _saved_kind(piece: Piece, kinds: set[str]) -> str:
    """An fp32 parameter comes from its master, as the frameworks of 2023 refreshed parameters from masters."""
    return (
        "master" if piece.kind == "param" and "master" in kinds and piece.read().dtype == torch.float32 else piece.kind
    )


def _load_scalars(reader: LegacyReader, optimizer: HybridZero) -> None:
    num_updates, scaler = reader.optimizer.scalars()
    scaler_state = {
        "scale": float(scaler["_scale"]),
        "good_steps": int(scaler["_growth_step"]),
        "overflows": int(scaler["_hysteresis_step"]),
    }
    optimizer.load_state_dict({"num_updates": num_updates, "grad_scaler": scaler_state})


def _load_counters(
    reader: LegacyReader, content: Sequence[str], config: Config, state: TrainState, readers: int
) -> None:
    """context.pt into the run's counters; what schedule and sampler files say is compared with the config."""
    everything = "all" in content
    wanted = {part for part in ("scheduler", "sampler") if everything or part in content}
    if not wanted:
        return
    names = reader.folder.names
    if "context.pt" not in names:
        raise UserError(
            f"{reader.path} has no context.pt, which holds the step and the place in the data: leave "
            f"{' and '.join(sorted(wanted))} out of ckpt.load_ckpt_info.content (and set ckpt.auto_resume=False)"
        )
    saved: dict[str, Any] = reader.folder.read_file("context.pt")

    def number(key: str) -> int:
        return int(reader.folder.part("context.pt", saved, key, (int, float)))

    done = number("batch_count") + 1  # it was the index of the last batch
    counters = state.state_dict()
    if "scheduler" in wanted:
        is_first_version = (
            "config_file.pt" not in names and marked_step(reader.folder.storage, reader.folder.folder) is None
        )
        counters["step_count"] = done
        if "step_count" in saved:
            counters["step_count"] = number("step_count") + is_first_version  # 0.1 counted behind
        _compare_schedule(reader, config)
    if "sampler" in wanted:
        counters["batch_count"], counters["place"] = done, None
        for key in ("num_consumed_tokens", "inf_nan_skip_batches"):
            counters[key] = number(key)
        check_batches(reader, config, readers)
    state.load_state_dict(counters)


def _compare_schedule(reader: LegacyReader, config: Config) -> None:
    """The schedule here is a function of the step and the config; a file of another one is named."""
    if "schedulder.pt" not in reader.folder.names:  # the spelling of 2023
        return
    saved = reader.folder.read_file("schedulder.pt")
    lr = config.lr_scheduler
    total = lr.total_steps or config.data.total_steps
    ours = {
        "base_lrs": [config.adam.lr],
        "_init_steps": lr.init_steps,
        "_warmup_steps": int(total * lr.warmup_ratio),
    }
    for key, value in ours.items():
        theirs = saved.get(key, value)
        theirs = sorted(set(theirs)) if isinstance(theirs, list) else theirs
        if theirs != value:
            common_warning(
                logger, f"{reader.path}: its schedule has {key} = {theirs}, this run's {value}, which is used"
            )


def check_batches(reader: LegacyReader, config: Config, readers: int) -> None:
    """Which samples come next is a function of the seed and the batch; it is theirs if seed and batch sizes agree.

    Raises UserError if they don't; 2023 refused other seeds, ramps and data ranks as well.
    """
    if "sampler.pt" not in reader.folder.names:
        return
    saved = reader.folder.read_file("sampler.pt")
    has_rows = {"batch_size", "data_world_size"} <= saved.keys()
    rows = saved["batch_size"] * saved["data_world_size"] if has_rows else None
    ours = {
        "data.seed": (saved.get("seed"), config.data.seed),
        "rows of a batch (data.micro_num * data ranks)": (
            rows,
            config.data.micro_num * readers,
        ),
        "data.rampup_batch_size": (
            saved["raw_rampup_batch_size"] or "" if "raw_rampup_batch_size" in saved else None,  # None or "": no ramp
            config.data.rampup_batch_size,
        ),
    }
    different = [
        f"{key}: {old!r} in the checkpoint, {new!r} in this run"
        for key, (old, new) in ours.items()
        if old is not None and (old or "") != (new or "")
    ]
    if different:
        raise UserError(
            f"{reader.path}: its place in the data means nothing in this run:\n"
            + "\n".join(different)
            + f"\nSet the same, or {begin_anew(config, reader.path)}"
        )
