"""Whole native parameters, masters and moments out of a folder of 2023."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from internlm.checkpoint.compare import check_model
from internlm.checkpoint.hf_names import native_shapes, to_half_split, to_interleaved
from internlm.checkpoint.legacy.facts import Facts
from internlm.checkpoint.legacy.folder import LegacyFolder, ModelFile
from internlm.checkpoint.legacy.optimizer import LegacyOptimizer
from internlm.checkpoint.legacy.tables import Row, join
from internlm.checkpoint.storage import Storage
from internlm.config.legacy import OLD_FAMILIES
from internlm.config.loader import merge
from internlm.config.modernise import Report, modernise
from internlm.config.presets import PRESETS
from internlm.config.schema import Config, ModelConfig
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

# Of model_config.pt: how the model was trained and cut up, not what it computes.
_OF_TRAINING = (
    *("checkpoint", "num_chunks", "parallel_output", "embed_split_hidden", "use_flash_attn", "sequence_parallel"),
    *("drop_rate", "attn_drop_rate", "dropout_selective_checkpoint", "mlp_layer_fusion", "dtype", "device"),
)


class LegacyReader:
    """`folder`: path or fsspec URL. `run`: the config that the tensors are read for; export and generation have none,
    and take `config` from the folder. `mlp`: see `LegacyFolder`. `top_k`: experts that compute a token, where neither
    run nor folder says. Raises UserError.
    """

    def __init__(
        self,
        folder: str | Path,
        run: Config | None = None,
        mlp: Literal["old", "new"] | None = None,
        top_k: int | None = None,
    ) -> None:
        url = str(Path(folder).expanduser()) if "://" not in str(folder) else str(folder)
        self.folder = LegacyFolder(Storage(url), "", mlp)
        self.path = self.folder.path
        section = _section(self.folder, run, top_k)
        self._rearrange = False
        if run is not None:
            self._rearrange = section["qk_interleaved"] != run.model.qk_interleaved
            if self._rearrange:
                logger.info(
                    f"{self.path} has qk_interleaved={section['qk_interleaved']}: its query and key rows are put into "
                    f"the order of this run (model.qk_interleaved={run.model.qk_interleaved})"
                )
            check_model({"model": {**section, "qk_interleaved": run.model.qk_interleaved}}, run, self.path)
            self.config = run
        else:
            self.config = _config(self.folder.facts.model_type, section, self._has_fp32_norms(), self.path)
        self._interleaved = bool(section["qk_interleaved"])
        self._shapes = native_shapes(self.config.model)
        self._optimizer: LegacyOptimizer | None = None

    @property
    def optimizer(self) -> LegacyOptimizer:
        """The folder's optimizer files; looked at when they are first asked for."""
        if self._optimizer is None:
            self._optimizer = LegacyOptimizer(self.folder)
        return self._optimizer

    def holds(self, name: str) -> bool:
        """Whether 2023 had the parameter: not what a run adds, such as adapters or a router's bias."""
        return name in self._shapes

    def read(self, name: str, kind: str = "param") -> Tensor:
        """The global parameter `name` on the CPU in its saved dtype, or its fp32 master, exp_avg or exp_avg_sq."""
        shape = self._shapes.get(name)
        if shape is None:
            raise UserError(f"{self.path} has no parameter {name}")
        value: Tensor | None = None
        for row, files, key in self.folder.locate(name):
            shards = [self._shard(file, key, kind, by_tensor=not row.in_block) for file in files]
            if value is None:
                value = torch.empty(shape, dtype=shards[0].dtype)
            self._paste(value, row, self._join(row, shards, key), key)
        assert value is not None
        if self._rearrange:
            return (to_half_split if self._interleaved else to_interleaved)(name, value)
        return value

    def _shard(self, file: ModelFile, key: str, kind: str, by_tensor: bool) -> Tensor:
        """One rank's part. A master must round to the parameter, which was made from it: an order of the flat tensor
        that was read wrongly, or an optimizer file of another step, would show here and nowhere else.
        """
        if kind == "param":
            return self.folder.shard(file, key)
        value = self.optimizer.tensor(file, key, kind, by_tensor)
        if kind == "master":
            rounded = self.folder.shard(file, key)
            spacing = torch.finfo(rounded.dtype).eps
            same = torch.isclose(value, rounded.float(), rtol=2 * spacing, atol=1e-7, equal_nan=True)
            if not bool(same.all()):
                place = int((~same).flatten().nonzero()[0])
                raise UserError(
                    f"{self.path}: the fp32 master of {key} is not what {file.name} holds in {rounded.dtype}: "
                    f"{int((~same).sum())} of {same.numel()} elements differ, element {place} is "
                    f"{float(value.flatten()[place]):.6g} and {float(rounded.flatten()[place]):.6g}; model and "
                    'optimizer files are of different steps: leave "optimizer" out of ckpt.load_ckpt_info.content '
                    "(and set ckpt.auto_resume=False)"
                )
        return value

    def _join(self, row: Row, shards: list[Tensor], key: str) -> list[Tensor]:
        """`join`, for shards that may be damaged."""
        dtypes = {str(shard.dtype) for shard in shards}
        if len(dtypes) > 1:
            raise UserError(f"{self.path}: {key} is {' and '.join(sorted(dtypes))} on different ranks")
        try:
            return join(row, shards, self.folder.is_isp)
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = ", ".join(str(list(shard.shape)) for shard in shards)
            raise UserError(f"{self.path}: {key} has shapes on its ranks that don't join: {shapes}") from error

    def _paste(self, value: Tensor, row: Row, pieces: list[Tensor], key: str) -> None:
        for index, piece in zip(row.pieces, pieces, strict=True):
            part = value[index]
            if part.numel() != piece.numel() or (piece.dim() == 2 and piece.shape[-1] != part.shape[-1]):
                raise UserError(
                    f"{self.path}: {key}, joined from all ranks, is {list(piece.shape)}, which does not make the "
                    f"{list(part.shape)} of the model; are files of a rank missing?"
                )
            part.copy_(piece.reshape(part.shape))

    def _has_fp32_norms(self) -> bool:
        return self._dtype_of("head.norm.weight") != self._dtype_of("layers.0.attention.wqkv.weight")

    def _dtype_of(self, name: str) -> torch.dtype:
        _, files, key = self.folder.locate(name)[0]
        return self.folder.shard(files[0], key).dtype


def _section(folder: LegacyFolder, run: Config | None, top_k: int | None) -> dict[str, Any]:
    """The model section: what tensors say, and for the rest model_config.pt or, without that, the run."""
    facts, raw = folder.facts, folder.model_config
    if raw is None and run is None:
        raise UserError(
            f"{folder.path} has no model_config.pt, and tensors don't say how many heads they are for: copy that file "
            "from another checkpoint of the run"
        )
    if raw is None:
        assert run is not None
        logger.info(f"{folder.path} has no model_config.pt: heads and rotary order are taken from this run's config")
        section = run.model.model_dump()
    else:
        _compare(folder.path, raw, facts)
        section = modern_section(folder.path, raw, facts.model_type)
    if facts.num_experts > 1:
        section["moe"] = _moe_section(folder, run, section["moe"], top_k)
    _, files, key = folder.locate("layers.0.attention.wqkv.weight")[0]
    return {
        **section,
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "intermediate_size": facts.intermediate_size,
        "num_experts": facts.num_experts,
        "qkv_bias": facts.qkv_bias,
        "out_bias": facts.out_bias,
        "tie_word_embeddings": False,
        "qk_norm": False,
        "dtype": str(folder.shard(files[0], key).dtype),
    }


def _moe_section(folder: LegacyFolder, run: Config | None, moe: dict[str, Any], top_k: int | None) -> dict[str, Any]:
    """InternLM 0.2.1 kept the gate's keys in model_config.pt; InternEvo had them in a section that it didn't save."""
    if "moe_gate_k" in (folder.model_config or {}):
        top_k = moe["top_k"]
    elif run is not None:
        top_k = run.model.moe.top_k
    if top_k is None:
        raise UserError(
            f"{folder.path} doesn't say how many experts compute a token: model_config.pt has no moe_gate_k. It is "
            "top_k of the moe section of the run's config: tools/convert_from_hf.py --top_k NUMBER makes a checkpoint "
            "that knows it"
        )
    shared = {"num_shared_experts": int(folder.facts.has_shared), "mix_shared": folder.facts.has_shared}
    return {**moe, "top_k": top_k, "intermediate_size": None, **shared}


def _compare(path: str, raw: dict[str, Any], facts: Facts) -> None:
    """Tensors and model_config.pt must be of one model."""
    for name in ("num_layers", "hidden_size", "vocab_size", "num_experts"):
        if name in raw and raw[name] != getattr(facts, name):
            raise UserError(
                f"{path}: model_config.pt says {name}={raw[name]}, its tensors say {getattr(facts, name)}; files of a "
                "rank or stage are missing, or belong to another run"
            )


def modern_section(path: str, raw: dict[str, Any], family: str) -> dict[str, Any]:
    """The model section of 2023 in today's spelling, with what `family` assumed then. `path` is for messages.

    Keys that mean nothing here are left out with a warning. Raises UserError for what can't be built.
    """
    report = Report()
    model = {key: value for key, value in raw.items() if key not in _OF_TRAINING}
    tree = modernise({"model_type": family, "model": model}, f"{path}/model_config.pt", report)
    if report.problems:
        raise UserError("\n".join([f"{path} holds a model that can't be built:", *report.problems]))
    unknown = sorted(key for key in tree["model"] if key not in ModelConfig.model_fields)
    if unknown:
        logger.warning(f"{path}/model_config.pt: {', '.join(unknown)} mean nothing here and are left out")
    known = {key: value for key, value in tree["model"].items() if key not in unknown}
    return merge({"qk_interleaved": False, **PRESETS[family], **OLD_FAMILIES.get(family, {})}, known)


def _config(family: str, section: dict[str, Any], fp32_norms: bool, path: str) -> Config:
    """A config around the model, for those who only need the model."""
    try:
        model = ModelConfig.model_validate(section)
    except ValidationError as error:
        raise UserError(f"{path}/model_config.pt does not describe a model: {error}") from error
    return Config.model_validate(
        {
            "model_type": family,
            "use_fp32_norm": fp32_norms,
            "model": model,
            "data": {"seq_len": model.max_position_embeddings, "total_steps": 1},
        }
    )
