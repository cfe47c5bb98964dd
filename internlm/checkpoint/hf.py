"""Models out to Hugging Face folders and in from them.

Both directions go tensor by tensor: an export holds one native parameter in memory, an import what was asked for.
config.json is written last, so a folder with one is a whole export.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.hf_config import check_same, config_json, model_of, model_section, preset_of
from internlm.checkpoint.hf_files import TensorFiles
from internlm.checkpoint.hf_names import (
    LAYOUTS,
    Entry,
    check_layout,
    default_layout,
    entries,
    native_shapes,
    normalised_rows,
    to_half_split,
    to_interleaved,
)
from internlm.checkpoint.hf_remote_code import write_remote_code
from internlm.checkpoint.hf_target import INDEX, prepare_folder
from internlm.checkpoint.hf_tokenizer import check_export, inspect_tokenizer, write_tokenizer
from internlm.checkpoint.peft_reader import PeftAdapter, is_adapter_folder
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import cast, stream_tensors
from internlm.config.schema import Config, LoraConfig, ModelConfig
from internlm.data.chat_template import ChatTemplate
from internlm.utils.errors import UserError, writing
from internlm.utils.json_files import parse_object, write_json
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "10GB", "500MiB" or a plain number. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"size {text!r} is not understood; write it like 10GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def export_hf(
    named: Callable[[str], Tensor],
    config: Config,
    folder: str | Path,
    arch: str | None = None,
    dtype: str = "auto",
    max_shard: str = "10GB",
    tokenizer: str | Path | None = None,
    force: bool = False,
    template: ChatTemplate | None = None,
) -> None:
    """Write the model as a Hugging Face folder: config.json, safetensors, generation_config.json, tokenizer files.

    `named(name)` returns a global native parameter in any dtype on any device; each is asked for once, in order.
    `arch`: a layout of `hf_names`, None for the one that transformers loads without remote code. `dtype`: "float32",
    "float16", "bfloat16", or "auto" for the model's own. `tokenizer`: a sentencepiece model or a Hugging Face folder.
    `template`: a chat template for the tokenizer.
    Raises UserError before anything is written, except where a value does not fit into float16 or the disk is full.
    """
    folder, model = Path(folder).expanduser(), config.model
    layout = arch or default_layout(model)
    check_layout(layout, model)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = model.dtype.removeprefix("torch.").replace("tf32", "float32")
    limit = parse_size(max_shard)
    source = None if tokenizer is None else inspect_tokenizer(tokenizer, model.vocab_size)
    if source is not None:
        check_export(source, folder)
    prepare_folder(folder, force)

    shapes = native_shapes(model)
    # Normalised rows serve as head only: the embedding keeps its own values.
    tied = model.tie_word_embeddings and not model.norm_head
    if not tied:
        shapes["head.weight"] = shapes["embedding.weight"]
    _write_weights(folder, entries(layout, shapes), _Native(named, model), dtype, limit)
    special_ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    generation_ids = special_ids
    if source is not None:
        special_ids = source.special_ids
        with writing(f"the tokenizer in {folder}"):
            generation_ids = write_tokenizer(source, folder, model.max_position_embeddings, template)
        if layout == "qwen2" and not source.is_folder:
            logger.warning(
                "AutoTokenizer of transformers takes its own Qwen2Tokenizer for every qwen2 folder, which splits "
                f"text otherwise than this tokenizer: load PreTrainedTokenizerFast.from_pretrained({str(folder)!r})"
            )
    else:
        logger.warning(f"{folder} gets no tokenizer files, since no tokenizer was given")
    write_json(folder / "generation_config.json", {key: i for key, i in generation_ids.items() if i is not None})
    write_remote_code(layout, folder)
    write_json(folder / "config.json", config_json(layout, model, dtype, tied, special_ids))
    logger.info(f"exported {folder} as {layout} in {dtype}")


class _Native:
    """Native parameters as an export wants them; remembers the last, from which neighbours are cut."""

    def __init__(self, named: Callable[[str], Tensor], model: ModelConfig) -> None:
        self.named, self.model = named, model
        self.name, self.value = "", torch.empty(0)

    def __call__(self, name: str) -> Tensor:
        if name != self.name:
            self.value = torch.empty(0)  # freed before the next one is read
            self.value, self.name = self._read(name), name
        return self.value

    @torch.no_grad()
    def _read(self, name: str) -> Tensor:
        tied_head = name == "head.weight" and self.model.tie_word_embeddings
        value = self.named("embedding.weight" if tied_head else name).detach().cpu()
        if self.model.norm_head and name == "head.weight":
            value = normalised_rows(value)
        return to_half_split(name, value) if self.model.qk_interleaved else value


def _write_weights(folder: Path, tensors: list[Entry], native: _Native, dtype: str, limit: int) -> None:
    """One file, or several of at most `limit` bytes each (a larger tensor gets one of its own) and their index."""
    width = DTYPES[dtype].itemsize
    shards: list[list[Entry]] = []
    room = 0
    for entry in tensors:
        size = math.prod(entry.shape) * width
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        logger.info(f"writing {folder / name}: {len(shard)} tensors")
        _write_shard(folder, name, shard, native, dtype)
    if len(shards) > 1:
        numel = sum(math.prod(entry.shape) for entry in tensors)
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        metadata = {"total_parameters": numel, "total_size": numel * width}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _write_shard(folder: Path, name: str, shard: list[Entry], native: _Native, dtype: str) -> None:
    """A safetensors file, written tensor by tensor: its header needs shapes only."""
    by_name = {entry.name: entry for entry in shard}

    def value_of(name: str) -> Tensor:
        entry = by_name[name]
        return cast(entry.cut(native(entry.native)), DTYPES[dtype], name).contiguous()

    kinds = {entry.name: (DTYPES[dtype], entry.shape) for entry in shard}
    stream_tensors(Storage(str(folder)), name, kinds, value_of, {"format": "pt"})  # transformers insists on this


class HFReader:
    """A Hugging Face folder (or fsspec URL), read as native parameters; that of an adapter stands for base and adapter.

    With `model`, the folder must hold that model, and parameters come in its conventions (qk_interleaved).
    Raises UserError for a folder that cannot be read or does not fit.
    """

    def __init__(self, folder: str | Path, model: ModelConfig | None = None) -> None:
        self.folder = self.text_folder = str(folder)
        self._storage = Storage(self.folder)
        self.adapter = PeftAdapter(self._storage) if is_adapter_folder(self._storage) else None
        if self.adapter is not None:
            has_tokenizer = not {"tokenizer.json", "tokenizer.model"}.isdisjoint(self._storage.names())
            self.folder = self.adapter.base
            self.text_folder = str(folder) if has_tokenizer else self.folder  # tokenizer and chat template
            self._storage = Storage(self.folder)
        if "config.json" not in self._storage.names():
            raise UserError(f"{self.folder} holds no config.json; give a folder in Hugging Face format")
        file = self._storage.show("config.json")
        self._hf = parse_object(self._storage.read("config.json"), file)
        section = model_section(self._hf, file)
        if model is not None:
            check_same(model, section, file)
        self._interleaved = model is not None and model.qk_interleaved
        dtype = self._hf.get("dtype") or self._hf.get("torch_dtype")
        self._section = {**section, "dtype": f"torch.{dtype}" if dtype in DTYPES else "torch.float32"}
        self._files = TensorFiles(self._storage)
        self._entries: dict[str, list[Entry]] = {}
        self._shapes = native_shapes(model_of(self._section, file))
        for entry in entries(self._hf["model_type"], self._shapes):
            self._entries.setdefault(entry.native, []).append(entry)
        self._check_names()
        if self.adapter is not None:
            self.adapter.place(self._entries, self._shapes, self._interleaved)

    @property
    def model_type(self) -> str:
        """The preset that comes nearest to the folder's model."""
        return preset_of(self._hf)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer, as transformers finds them: a chat model has more than its tokenizer's one."""
        about: dict[str, Any] = self._hf
        if "generation_config.json" in self._storage.names():
            file = "generation_config.json"
            about = parse_object(self._storage.read(file), self._storage.show(file))
        ids = about.get("eos_token_id")
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def config_model(self) -> dict[str, Any]:
        """Keys of the model section that describe the folder's model, `dtype` as its config.json says."""
        return dict(self._section)

    def holds(self, name: str) -> bool:
        """Whether the folder has a place for the native tensor `name`, one of the base or of an adapter's matrices."""
        return name in self._entries or (self.adapter is not None and self.adapter.holds(name))

    def read(self, name: str) -> Tensor:
        """The native parameter `name` on the CPU, in the dtype it is stored in; in fp32 with its adapter, if any."""
        value = self.read_apart(name)
        return value if self.adapter is None else self.adapter.merge(name, value)

    def read_apart(self, name: str) -> Tensor:
        """A parameter of the base without its adapter, or one of an adapter's matrices."""
        if self.adapter is not None and self.adapter.holds(name):
            return self.adapter.read(name)
        assert name in self._entries, f"{name} is no parameter of {self._section}"
        value: Tensor | None = None
        for entry in self._entries[name]:
            part = self._files.read(entry.name, entry.shape)
            if value is None:
                value = torch.empty(self._shapes[name], dtype=part.dtype)
            entry.paste(value, part)
        assert value is not None
        if name == "embedding.weight":
            self._check_tied_head(value)
        return to_interleaved(name, value) if self._interleaved else value

    @property
    def _copies_of_embedding(self) -> list[str]:
        """The head that some files hold beside the embedding it is tied to."""
        if not self._section["tie_word_embeddings"]:
            return []
        return [name for name, _ in LAYOUTS[self._hf["model_type"]]["head.weight"] if name in self._files.of_tensor]

    def _check_tied_head(self, embedding: Tensor) -> None:
        for name in self._copies_of_embedding:
            if not torch.equal(self._files.read(name, tuple(embedding.shape)), embedding):
                raise UserError(
                    f"{self.folder}: tie_word_embeddings is true in config.json, but {name} is not the embedding, and "
                    "transformers computes with it: set tie_word_embeddings to false"
                )

    def check_run(self, lora: LoraConfig | None) -> None:
        """Raises UserError unless a run with this lora section goes on with the folder's adapter, if it has one."""
        if self.adapter is not None:
            self.adapter.check_run(lora)

    def _check_names(self) -> None:
        expected = {entry.name for parts in self._entries.values() for entry in parts}
        missing = sorted(expected - self._files.of_tensor.keys())
        others = self._files.of_tensor.keys() - expected - set(self._copies_of_embedding)
        unknown = sorted(name for name in others if not name.endswith(".rotary_emb.inv_freq"))  # buffers of old exports
        for what, names in (("lacks", missing), ("holds tensors that its config.json does not explain:", unknown)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"{self.folder} {what} {', '.join(names[:3])}{more}")
