"""LoRA adapters in the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

A fused projection of ours becomes several there: each gets its rows of B, and a copy of A, which they share.
"""

import json
from pathlib import Path

from torch import Tensor

from internlm.checkpoint.hf_names import check_layout, default_layout, entries, native_shapes, to_half_split
from internlm.checkpoint.hf_target import ADAPTER_FILES, prepare_folder
from internlm.checkpoint.native import NativeReader, is_hf_folder
from internlm.checkpoint.peft_reader import PeftAdapter, is_adapter_folder
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import write_tensors
from internlm.utils.errors import UserError
from internlm.utils.json_files import write_json
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


def export_adapter(reader: NativeReader, folder: str | Path, base: str = "", force: bool = False) -> None:
    """Write the adapter of a checkpoint for `PeftModel.from_pretrained(base, folder)`.

    `base`: where the run started, a model's folder or that of an adapter on it. It is written into the config if its
    layers have the names that the adapter is for, those of `default_layout`. `force`: replace an earlier export.
    Raises UserError for a run without LoRA, and for a model that no layout of transformers holds.
    """
    config, folder = reader.config, Path(folder).expanduser()
    lora, model = config.lora, config.model
    if lora is None:
        raise UserError(f"{reader.path} has no adapter: its run had no lora section")
    layout = default_layout(model)
    check_layout(layout, model)
    tensors: dict[str, Tensor] = {}
    modules, others = set(), set()
    for entry in entries(layout, native_shapes(model)):
        place, _, kind = entry.native.rpartition(".")
        name = entry.name.removesuffix(".weight")
        if kind != "weight" or not reader.has(f"{place}.lora_a"):
            others.add(name)
            continue
        rows = reader.read(f"{place}.lora_b")
        if model.qk_interleaved:
            rows = to_half_split(entry.native, rows)
        modules.add(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = reader.read(f"{place}.lora_a").clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = rows[entry.index].reshape(-1, lora.rank).contiguous()
    kinds = {_kind(name) for name in modules}
    if kinds.isdisjoint(map(_kind, others)):  # else PEFT would put untrained adapters there as well
        modules = kinds
    if base and is_adapter_folder(Storage(base)):
        base = PeftAdapter(Storage(base)).base
    if not _has_layout(base, layout):
        logger.warning(
            f"base_model_name_or_path stays empty: {base or 'the base'} has other names of layers. Load the adapter on "
            f"the base's own export in the layout {layout} (tools/convert2hf.py --arch {layout})"
        )
        base = ""
    prepare_folder(folder, force)
    tensor_file, config_file = ADAPTER_FILES
    write_tensors(Storage(str(folder)), tensor_file, tensors, {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / config_file, settings)
    logger.info(f"exported the adapter to {folder}: {len(tensors)} tensors for {', '.join(sorted(modules))}")


def _kind(name: str) -> str:
    """What PEFT finds modules of all layers by: "q_proj"."""
    return name.rpartition(".")[2]


def _has_layout(base: str, layout: str) -> bool:
    """Whether `base` is a folder that transformers opens with the names of `layout`."""
    if not base or not is_hf_folder(base):
        return False
    return bool(json.loads(Storage(base).read("config.json")).get("model_type") == layout)
