"""Adapters that Hugging Face's PEFT wrote, or `export_adapter`, in the place of their base's native projections.

Where PEFT has several projections (q, k, v), ours is one with one A. If theirs are not equal, they are put one below
the other: with blocks of B that are zero elsewhere, rank n r computes what n adapters of rank r do. All adapters of a
run have one rank, so the others get rows and columns of zeros, which no gradient ever changes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.hf_names import Entry, to_interleaved
from internlm.checkpoint.hf_target import ADAPTER_FILES
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import read_tensors
from internlm.config.schema import LoraConfig
from internlm.model.lora import NAMES, is_adapter, merged
from internlm.utils.errors import UserError
from internlm.utils.json_files import parse_object

_TENSORS, _CONFIG = ADAPTER_FILES
_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")
# Keys of adapter_config.json that are read here, or change nothing of what trained adapters compute: the tensors say
# themselves which layers have some. Any other key that is set is a feature that we don't compute.
_READ = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights")
_HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config"),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights
_PROJECTION = re.compile(r"layers\.\d+\.(attention|feed_forward)\.(shared\.)?w\w+\.weight")


def is_adapter_folder(storage: Storage) -> bool:
    return _CONFIG in storage.names()


class PeftAdapter:
    """The adapter in a folder. Raises UserError for one that is damaged or does what we don't compute."""

    def __init__(self, storage: Storage) -> None:
        self.folder = storage.url
        if "model.safetensors" in storage.names():
            raise UserError(f"{self.folder} holds both a model and an adapter: move one of them to another folder")
        self._file = storage.show(_TENSORS)
        config = parse_object(storage.read(_CONFIG), storage.show(_CONFIG))
        self._check(config, storage.show(_CONFIG))
        self.base = str(config.get("base_model_name_or_path") or "")
        rank = self._rank = config["r"]
        self.scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if "config.json" not in Storage(self.base or ".").names() or not self.base:
            raise UserError(
                f"{storage.show(_CONFIG)} names {self.base or 'no model'} as base (base_model_name_or_path), which is "
                "no folder with a config.json here: write there where the base lies, as a Hugging Face folder"
            )
        if _TENSORS not in storage.names():
            raise UserError(f"{self._file} is missing; in pickles (adapter_model.bin): save it anew with today's PEFT")
        try:
            self._tensors = read_tensors(storage, _TENSORS)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self._file} is damaged or no safetensors file we can read: {error}") from error
        self._members: dict[str, list[tuple[Entry, str]]] = {}  # by the native projection
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._interleaved = False
        self.rank = rank

    def _check(self, config: Mapping[str, Any], file: str) -> None:
        if config.get("peft_type") != "LORA":
            raise UserError(f"{file}: peft_type = {config.get('peft_type')!r}; adapters of LORA alone are read")
        problems = [key for key in config if key not in (*_READ, *_HARMLESS) and config[key]]
        problems += ["bias"] if config.get("bias") not in (None, "none") else []
        problems += ["init_lora_weights"] if config.get("init_lora_weights") not in _PLAIN_STARTS else []
        if problems:
            said = ", ".join(f"{key} = {config[key]!r}" for key in problems)
            raise UserError(
                f"{file}: {said}: not computed here. Merge the adapter into its base with PEFT (merge_and_unload), and "
                "give the folder of that model"
            )
        for key in ("r", "lora_alpha"):
            if not isinstance(config.get(key), int | float) or not config[key] > 0:
                raise UserError(f"{file}: {key} = {config.get(key)!r}; expected a positive number")

    def place(self, entries: Mapping[str, Sequence[Entry]], shapes: Mapping[str, tuple[int, ...]], swap: bool) -> None:
        """Finds the projections of the base that the tensors belong to; `swap`: the model has qk_interleaved.

        Raises UserError for a tensor that belongs to none.
        """
        self._shapes, self._interleaved = shapes, swap
        left = set(self._tensors)
        for native in filter(_PROJECTION.fullmatch, shapes):
            for entry in entries[native]:
                module = _PREFIX + entry.name.removesuffix(".weight")
                found = [module + part in left for part in _PARTS]
                if all(found):
                    self._check_shapes(module, entry)
                    self._members.setdefault(native, []).append((entry, module))
                    left -= {module + part for part in _PARTS}
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UserError(
                f"{self._file} holds {', '.join(sorted(left)[:3])}{more}, which belong to no projection of attention "
                f"and feed-forward layers in {self.base}, or lack their other half. Merge the adapter into its base "
                "with PEFT (merge_and_unload), and give the folder of that model"
            )
        self.rank = self._rank * max((len(self._starts(native)) for native in self._members), default=1)

    def _check_shapes(self, module: str, entry: Entry) -> None:
        rows, columns = entry.shape
        for part, expected in zip(_PARTS, ((self._rank, columns), (rows, self._rank)), strict=True):
            found = tuple(self._tensors[module + part].shape)
            if found != expected:
                raise UserError(f"{self._file}: {module}{part} is {list(found)}, expected {list(expected)}")

    def _starts(self, native: str) -> list[str]:
        """The modules of a projection whose A differ."""
        found: list[str] = []
        for _, module in self._members[native]:
            if all(not torch.equal(self._a(module), self._a(other)) for other in found):
                found.append(module)
        return found

    def _a(self, module: str) -> Tensor:
        return self._tensors[module + _PARTS[0]]

    def holds(self, name: str) -> bool:
        """Whether `name` is that of a native matrix of the adapter: ".lora_a" or ".lora_b" of a projection."""
        return is_adapter(name) and f"{name.rpartition('.')[0]}.weight" in self._members

    def read(self, name: str) -> Tensor:
        """The matrix `name`, fp32."""
        place, _, kind = name.rpartition(".")
        return self._pair(f"{place}.weight")[NAMES.index(kind)]

    def merge(self, name: str, value: Tensor) -> Tensor:
        """The base's parameter `name` with its adapter, if it has one."""
        return merged(value, *self._pair(name), self.scale) if name in self._members else value

    def _pair(self, native: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [*out, rank] of the projection whose weight is `native`, fp32."""
        *out, columns = self._shapes[native]
        a, b = torch.zeros(self.rank, columns), torch.zeros(*out, self.rank)
        starts = self._starts(native)
        for entry, module in self._members[native]:
            number = next(i for i, other in enumerate(starts) if torch.equal(self._a(module), self._a(other)))
            block = slice(number * self._rank, (number + 1) * self._rank)
            a[block] = self._a(module)
            part = b[..., block][entry.index]
            part.copy_(self._tensors[module + _PARTS[1]].reshape(part.shape))
        return a, to_interleaved(native, b) if self._interleaved else b

    def check_run(self, lora: LoraConfig | None) -> None:
        """Raises UserError unless a run's lora section is that of this adapter."""
        places = {native.removesuffix(".weight") for native in self._members}
        all_places = [name.removesuffix(".weight") for name in filter(_PROJECTION.fullmatch, self._shapes)]
        kinds = {name.split(".", 2)[2] for name in places}
        covered = {name for name in all_places if name.split(".", 2)[2] in kinds}
        target = tuple(f"*.{kind}" for kind in sorted(kinds)) if covered == places else tuple(sorted(places))
        wanted = {"rank": self.rank, "alpha": round(self.scale * self.rank, 9), "target": target}
        if lora is None:
            raise UserError(
                f"ckpt.load_ckpt_info.path: {self.folder} holds an adapter: train on with lora={wanted}, or start from "
                "the merged model, which tools/convert2hf.py writes"
            )
        asked = {name for name in all_places if any(fnmatch(name, pattern) for pattern in lora.target)}
        if lora.rank != self.rank or not math.isclose(lora.scale, self.scale, rel_tol=1e-6) or asked != places:
            ours = {"rank": lora.rank, "alpha": lora.alpha, "target": lora.target}
            raise UserError(
                f"ckpt.load_ckpt_info.path: the adapter in {self.folder} is that of lora={wanted}; this run has "
                f"{ours}. Set the same, or start from the merged model, which tools/convert2hf.py writes"
            )
