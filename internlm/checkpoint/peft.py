"""LoRA adapters in the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

A fused projection of ours becomes several there: each gets its rows of B, and a copy of A, which they share.
"""

import json
from pathlib import Path

from torch import Tensor

from internlm.checkpoint.hf_names import default_layout, entries, native_shapes, to_half_split
from internlm.checkpoint.native import NativeReader
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import write_bytes, write_tensors
from internlm.utils.errors import UserError, writing
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def export_adapter(reader: NativeReader, folder: str | Path, base: str = "") -> None:
    """Write the adapter of a checkpoint for `PeftModel.from_pretrained(base, folder)`.

    `base`: the base model's folder or name, written into the config. Raises UserError for a run without LoRA.
    """
    config, folder = reader.config, Path(folder).expanduser()
    lora, model = config.lora, config.model
    if lora is None:
        raise UserError(f"{reader.path} has no adapter: its run had no lora section")
    tensors: dict[str, Tensor] = {}
    modules = set()
    for entry in entries(default_layout(model), native_shapes(model)):
        place, _, kind = entry.native.rpartition(".")
        if kind != "weight" or not reader.has(f"{place}.lora_a"):
            continue
        rows = reader.read(f"{place}.lora_b")
        if model.qk_interleaved:
            rows = to_half_split(entry.native, rows)
        name = entry.name.removesuffix(".weight")
        modules.add(name.rpartition(".")[2])
        tensors[f"base_model.model.{name}.lora_A.weight"] = reader.read(f"{place}.lora_a").clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = rows[entry.index].reshape(-1, lora.rank).contiguous()
    with writing(f"target folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    storage = Storage(str(folder))
    write_tensors(storage, "adapter_model.safetensors", tensors, {"format": "pt"})
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
    write_bytes(storage, "adapter_config.json", [json.dumps(settings, indent=2).encode() + b"\n"])
    logger.info(f"exported the adapter to {folder}: {len(tensors)} tensors for {', '.join(sorted(modules))}")
