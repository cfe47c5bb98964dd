"""A folder of 2023: which files it has, which generation wrote them, and where each tensor lies.

Everything is found from names, keys and shapes, said in the log, and refused where it could mean two things.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from internlm.checkpoint.legacy.experts import Block, check_complete, expert_files, number_blocks, parse_key
from internlm.checkpoint.legacy.facts import detect
from internlm.checkpoint.legacy.pickles import read_pickle
from internlm.checkpoint.legacy.tables import EXPERTS, MLP_NAMES, Row, generic, rows
from internlm.checkpoint.storage import Storage
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

MODEL_FILE = re.compile(r"model_tp(?P<tp>\d+)(?:_wp(?P<wp>\d+))?_pp(?P<pp>\d+)\.pt")
_FSDP_FILE = re.compile(r"model_tp\d+(?:_wp\d+)?_pp\d+_dp\d+\.pt")
_KEY = re.compile(r"(?P<prefix>(?:(?P<chunk>\d+)\.)?(?:model\.)?)(?P<name>.+)")
_LAYER = re.compile(r"((?:blocks|layers)\.)(\d+)(\..+)")
_BUFFER = re.compile(r".*\.(inv_freq|cos_cached|sin_cached)")


def is_legacy_folder(storage: Storage, folder: str) -> bool:
    """Whether files of the 2023 framework lie there."""
    return any(name.startswith("model_tp") and name.endswith(".pt") for name in storage.names(folder))


@dataclass(frozen=True)
class ModelFile:
    """One rank's model file."""

    name: str
    tp: int
    wp: int
    pp: int


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its stage and its key in the files there. An expert has files of its own."""

    stage: int
    key: str
    files: tuple[ModelFile, ...] = ()  # of an expert, by tensor rank


class LegacyFolder:
    """`folder` below `storage`. `mlp` settles which of w2 and w3 is the output where shapes can't. Raises UserError."""

    def __init__(self, storage: Storage, folder: str, mlp: Literal["old", "new"] | None = None) -> None:
        self.storage, self.folder = storage, folder
        self.path = storage.show(folder)
        self.names = storage.names(folder)
        self.files = self._model_files()
        self.is_isp = "_wp" in self.files[0].name
        self.tensor_size, self.weight_size, self.num_stages = self._sizes()
        self._places: dict[str, Place] = {}  # by key with global layer number
        self._blocks: list[Block] = []  # by layer
        self.num_layers, self.prefix = self._scan()
        self.num_experts = self._scan_experts()
        cut = self.weight_size if self.is_isp else self.tensor_size
        self.facts = detect(
            self._places, self._shape, self.num_layers, self.num_experts, self.tensor_size, cut, mlp, self.path
        )
        self.table = rows(self.facts.family, self.facts.mlp, self.facts.split_hidden, self.num_experts)
        self._check_all_known()
        self._report()

    # -- files --------------------------------------------------------------------------------------------------

    def _model_files(self) -> list[ModelFile]:
        found = []
        for name in self.names:
            if match := MODEL_FILE.fullmatch(name):
                found.append(ModelFile(name, int(match["tp"]), int(match["wp"] or 0), int(match["pp"])))
        if fsdp := [name for name in self.names if _FSDP_FILE.fullmatch(name)]:
            raise UserError(
                f"{self.path} holds {fsdp[0]}, a part of a model that PyTorch's FSDP cut up in 2023; only its own "
                "program can join those: resume there without fsdp and save again"
            )
        if not found:
            raise UserError(f"{self.path} holds no model_tp*_pp*.pt: it is no checkpoint of the 2023 framework")
        if len({"_wp" in file.name for file in found}) > 1:
            raise UserError(f"{self.path} mixes model files with and without _wp: those are of two checkpoints")
        return sorted(found, key=lambda file: (file.pp, file.wp, file.tp))

    def _sizes(self) -> tuple[int, int, int]:
        """Tensor, weight and pipeline sizes; every rank's file must be there."""
        sizes = [1 + max(getattr(file, axis) for file in self.files) for axis in ("tp", "wp", "pp")]
        for stage in range(sizes[2]):
            here = [file for file in self.files if file.pp == stage]
            missing = [f"tp{t}" for t in range(sizes[0]) if not any(file.tp == t for file in here)] + [
                f"wp{w}" for w in range(sizes[1]) if not any(file.wp == w for file in here)
            ]
            if missing:
                raise UserError(f"{self.path} lacks the model file of {', '.join(missing)} of pipeline stage {stage}")
        return sizes[0], sizes[1], sizes[2]

    def read_file(self, name: str) -> Any:
        """The content of one file of the folder: a dict, but for a plan, which is a list."""
        content = read_pickle(self.storage, f"{self.folder}/{name}" if self.folder else name)
        if not isinstance(content, list if name.startswith("gpus-") else dict):
            raise UserError(
                f"{self.path}/{name} holds a {type(content).__name__}, which no version of 2023 wrote there"
            )
        if isinstance(content, dict) and name.startswith(("model_tp", "model_moe")):
            for key, value in content.items():
                if not isinstance(key, str) or not isinstance(value, Tensor):
                    raise UserError(
                        f"{self.path}/{name} holds {key!r}: a {type(value).__name__}, where names of tensors and "
                        "tensors belong; the file is damaged, or another program wrote it"
                    )
        return content

    def part(self, file: str, content: dict[str, Any], key: str, kind: Any) -> Any:
        """What a file holds under `key`, of the type (or one of the types) `kind`. Raises UserError."""
        value = content.get(key)
        if not isinstance(value, kind):
            found = f"is a {type(value).__name__}" if key in content else "is missing"
            raise UserError(
                f"{self.path}/{file}: {key} {found}, which no version of 2023 wrote; the file is damaged, fetch it "
                "again, or leave what it holds out of ckpt.load_ckpt_info.content"
            )
        return value

    # -- keys ---------------------------------------------------------------------------------------------------

    def _scan(self) -> tuple[int, str]:
        """Gives every layer its global number: by chunk, then by stage. Returns (layers, prefix of keys)."""
        layers: dict[tuple[int, int], set[int]] = {}  # (chunk, stage) -> local numbers
        found: list[tuple[int, int, str, str]] = []  # chunk, stage, name, key
        prefixes: dict[str, str] = {}  # without chunk number -> a key
        for stage in range(self.num_stages):
            for key in self.read_file(self._shard_files(stage, False)[0].name):
                match = _KEY.fullmatch(key)
                assert match is not None
                chunk = int(match["chunk"] or 0)
                prefixes.setdefault(re.sub(r"\d+", "0", match["prefix"]), key)
                found.append((chunk, stage, match["name"], key))
                if layer := _LAYER.fullmatch(match["name"]):
                    layers.setdefault((chunk, stage), set()).add(int(layer[2]))
        if len(prefixes) > 1:
            raise UserError(f"{self.path} mixes keys such as {' and '.join(prefixes.values())}: of two generations")
        first: dict[tuple[int, int], int] = {}
        total = 0
        for place in sorted(layers):
            numbers = layers[place]
            if numbers != set(range(len(numbers))):
                raise UserError(
                    f"{self.path}: stage {place[1]} holds layers {sorted(numbers)}, a checkpoint of 2023 counts them "
                    "from 0 in each stage"
                )
            first[place] = total
            total += len(numbers)
        blocks: dict[int, Block] = {}
        for chunk, stage, name, key in found:
            whole = name
            if layer := _LAYER.fullmatch(name):
                number = int(layer[2]) + first[chunk, stage]
                blocks[number] = Block(number, chunk, stage, key.removesuffix(layer[3]) + ".")
                whole = f"{layer[1]}{number}{layer[3]}"
            if whole in self._places:
                raise UserError(f"{self.path}: {key} is in the files of two stages")
            self._places[whole] = Place(stage, key)
        self._blocks = [blocks[number] for number in range(total)]
        return total, next(iter(prefixes), "")

    def _scan_experts(self) -> int:
        """Finds the places of experts' tensors. Returns how many experts a layer has; 1: it is dense."""
        files, gate = expert_files(self.names), "blocks.0.mlp.moe_layer.gate.wg.weight"
        if gate not in self._places:
            if files:
                one = next(iter(next(iter(files.values())).values()))
                raise UserError(
                    f"{self.path} holds {one}, but its model files have no {gate}: they are of a dense model"
                )
            return 1
        if self.is_isp:
            raise UserError(f"{self.path}: experts that isp cut between weight ranks are not read")
        num_experts = self._shape(gate)[0]
        check_complete(files, self.num_layers, num_experts, self.tensor_size, self.path)
        keys = {place: list(self.read_file(files[place][0])) for place in sorted(files)}
        blocks = number_blocks(self._blocks, [(n, inside[0]) for (n, _), inside in keys.items() if inside], self.path)
        for (number, expert), inside in keys.items():
            block, by_rank = blocks[number], files[number, expert]
            of_ranks = tuple(ModelFile(by_rank[tp], tp, 0, block.stage) for tp in sorted(by_rank))
            for key in inside:
                parsed = parse_key(key)
                if parsed is None or parsed[0] != expert:
                    raise UserError(f"{self.path}/{by_rank[0]} holds {key}, which is not of expert {expert}")
                whole = f"blocks.{block.layer}.mlp.{EXPERTS['new']}.{expert}.{parsed[1]}"
                self._places[whole] = Place(block.stage, key, of_ranks)
        return num_experts

    def _shape(self, key: str) -> tuple[int, ...]:
        """Of the first rank's part of a tensor."""
        if key not in self._places:
            raise UserError(f"{self.path} lacks {key}: files of a stage are missing, or another program wrote them")
        place = self._places[key]
        file = self._files_of(place, False)[0]
        shape, num_dims = tuple(self.shard(file, place.key).shape), 1 if key == "norm.weight" else 2
        if len(shape) != num_dims:
            raise UserError(f"{self.path}/{file.name}: {place.key} is {list(shape)}, it needs {num_dims} dimension(s)")
        return shape

    def _check_all_known(self) -> None:
        known = {
            row.key.replace("{i}", str(i))
            for rows_ in self.table.values()
            for row in rows_
            for i in range(self.num_layers)
        }
        unknown = [key for key in self._places if key not in known and not _BUFFER.fullmatch(key)]
        if unknown:
            raise UserError(f"{self.path} holds {unknown[0]}, which is no part of {self.facts.family}")

    def _report(self) -> None:
        facts, names = self.facts, MLP_NAMES[self.facts.mlp]
        log_once(  # the folder is opened before ranks start, and again to be loaded
            logger,
            f"{self.path}: {facts.model_type} of 2023, {facts.num_layers} layers of {facts.hidden_size}"
            f"{f' with {self.num_experts} experts' if self.num_experts > 1 else ''}, tensor size {self.tensor_size}, "
            f"weight size {self.weight_size}, {self.num_stages} stage(s); detected: keys start "
            f"with {self.prefix!r}, gate {names['gate']}, up {names['up']}, down {names['down']}, embedding cut along "
            f"its {'columns' if facts.split_hidden else 'rows'}",
        )

    # -- tensors ------------------------------------------------------------------------------------------------

    @cached_property
    def model_config(self) -> dict[str, Any] | None:
        """model_config.pt: the model section of the run; None where the file is missing."""
        return self.read_file("model_config.pt") if "model_config.pt" in self.names else None

    def _shard_files(self, stage: int, by_tensor: bool) -> list[ModelFile]:
        """One file per shard of a stage: isp cuts blocks by weight rank, all else is cut by tensor rank."""
        axis = "wp" if self.is_isp and not by_tensor else "tp"
        first: dict[int, ModelFile] = {}
        for file in self.files:
            if file.pp == stage:
                first.setdefault(getattr(file, axis), file)
        return [first[rank] for rank in sorted(first)]

    def _files_of(self, place: Place, by_tensor: bool) -> list[ModelFile]:
        return list(place.files) or self._shard_files(place.stage, by_tensor)

    def experts_of(self, stage: int, tp: int) -> list[tuple[int, str, tuple[int, ...]]]:
        """(expert, key, shape) of a tensor rank's parts of a stage's experts, in the order of the model."""
        found = []
        for place in self._places.values():
            if place.files and place.stage == stage:
                parsed = parse_key(place.key)
                assert parsed is not None
                found.append((parsed[0], place.key, tuple(self.shard(place.files[tp], place.key).shape)))
        return found

    def locate(self, native: str) -> list[tuple[Row, list[ModelFile], str]]:
        """Per tensor of 2023 that a native parameter is made of: its row, the files of all its shards, its key there.

        Raises UserError where the folder has no such tensor.
        """
        name, layer = generic(native)
        located = []
        for row in self.table[name]:
            key = row.key if layer is None else row.key.replace("{i}", str(layer))
            if key not in self._places:
                raise UserError(f"{self.path} lacks {key}, which {native} needs")
            place = self._places[key]
            files = self._files_of(place, by_tensor=not row.in_block)
            alone = row.cut == "whole" or (row.cut == "first" and not self.is_isp)
            located.append((row, files[:1] if alone else files, place.key))
        return located

    def shard(self, file: ModelFile, key: str) -> Tensor:
        """One rank's part of a tensor. The file is mapped anew each time, so that its pages don't add up in memory."""
        tensors = self.read_file(file.name)
        if key not in tensors:
            raise UserError(f"{self.storage.show(f'{self.folder}/{file.name}')} lacks {key}, which other ranks have")
        return tensors[key]
