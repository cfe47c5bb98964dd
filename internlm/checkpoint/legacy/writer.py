"""A model in the folder layout of 2023, for programs that read nothing else."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internlm.checkpoint.hf_names import native_shapes
from internlm.checkpoint.legacy.tables import EXPERTS, Family, generic, rows, shard
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import cast
from internlm.checkpoint.triggers import new_token
from internlm.config.schema import ModelConfig
from internlm.utils.device import torch_dtype
from internlm.utils.errors import UserError, writing
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


def write_legacy(
    named: Callable[[str], Tensor],
    model: ModelConfig,
    folder: str | Path,
    family: Family | None = None,
    mlp: Literal["old", "new"] = "new",
    tensor_size: int = 1,
    split_hidden: bool = True,
) -> None:
    """Writes model_tp{t}_pp0.pt for each of `tensor_size` ranks, model_moe_layer{L}_expert{E}_tp{t}.pt for its experts,
    and model_config.pt.

    `family` None: INTERNLM for a model with biases and one key/value head per query head, else INTERNLM2_PUBLIC. `mlp`:
    "old" for InternLM 0.1 to 0.2.1 (keys start with `model.`, w3 is the output), "new" for InternEvo from 0.3.3 on (no
    prefix, w2). Each rank's tensors are in memory at once, as torch.save needs it. Raises UserError; `folder` is there
    only when it is whole.
    """
    has_biases = model.qkv_bias and model.out_bias
    chosen: Family = family or ("INTERNLM" if has_biases and model.q_per_kv == 1 else "INTERNLM2_PUBLIC")
    _check(model, chosen, mlp, tensor_size)
    folder = Path(folder).expanduser().resolve()
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"target folder {folder} is {'a file' if folder.is_file() else 'not empty'}; give another one")
    if folder.is_mount():  # nothing can be renamed to it
        raise UserError(f"target folder {folder} is where a file system is mounted; give a new folder in it")
    table = rows(chosen, mlp, split_hidden, model.num_experts)
    prefix, dtype = ("model." if mlp == "old" else ""), torch_dtype(model.dtype)
    with _new_folder(folder) as save:
        for rank in range(tensor_size):
            states: dict[str, dict[str, Tensor]] = {}  # by file
            for name in native_shapes(model):
                value = named(name).detach().cpu()
                for row in table[generic(name)[0]]:
                    part = shard(row, value, rank, tensor_size)
                    if part is not None:
                        key = row.key.replace("{i}", str(generic(name)[1]))
                        file, key = _place(key, rank, mlp)
                        kept = torch.float32 if ".gate." in key else dtype  # a router is fp32 in a model of any dtype
                        states.setdefault(file, {})[prefix + key] = cast(part, kept, name).contiguous()
            for file, state in states.items():
                save(file, state)
            save(f"topo_tp{rank}_pp0.json", {})
        save("model_config.pt", _model_config(model, chosen, split_hidden))
    logger.info(f"wrote {folder} in the layout of 2023: {chosen}, tensor size {tensor_size}, {mlp} names")


@contextmanager
def _new_folder(target: Path) -> Iterator[Callable[[str, Any], None]]:
    """What saves a file in a folder that becomes `target` once all are written; nothing stays where one can't be."""
    storage, work = Storage(str(target.parent)), f"{target.name}.tmp-{new_token()}"

    def save(file: str, content: Any) -> None:
        with writing(f"{target}/{file}"), storage.writer(f"{work}/{file}") as write:
            torch.save(content, _Stream(write))  # type: ignore[arg-type]

    with storage.new_folder(work):
        yield save
        with writing(str(target)):
            storage.rename_folder(work, target.name)


class _Stream:
    """What torch.save writes to."""

    def __init__(self, write: Callable[[bytes | memoryview], None]) -> None:
        self._write = write

    def write(self, data: bytes | memoryview) -> int:
        self._write(data)
        return len(data)

    def flush(self) -> None:
        pass


def _place(key: str, rank: int, mlp: Literal["old", "new"]) -> tuple[str, str]:
    """The file of a tensor, and its key there. Experts have files of their own, and their keys had two spellings."""
    expert = re.fullmatch(rf"blocks\.(\d+)\.mlp\.{re.escape(EXPERTS['new'])}\.(\d+)\..+", key)
    if expert is None:
        return f"model_tp{rank}_pp0.pt", key
    spelled = key.replace(EXPERTS["new"], EXPERTS[mlp])
    return f"model_moe_layer{expert[1]}_expert{expert[2]}_tp{rank}.pt", spelled


def _check(model: ModelConfig, family: Family, mlp: str, tensor_size: int) -> None:
    problems = {
        "model.tie_word_embeddings=True": model.tie_word_embeddings,
        "model.qk_norm=True": model.qk_norm,
        **_moe_problems(model, family),
        f"model.head_dim={model.head_dim}": model.head_size * model.num_attention_heads != model.hidden_size,
        f"model.qkv_bias={model.qkv_bias}, model.out_bias={model.out_bias}": model.qkv_bias != model.out_bias,
        f"model.num_kv_attention_heads={model.num_kv_heads}": family == "INTERNLM" and model.q_per_kv != 1,
        "no biases": family == "INTERNLM" and not model.qkv_bias,
        "model.qk_interleaved=True": family == "INTERNLM" and model.qk_interleaved,
        "model.rope_scaling": not _is_dynamic_ntk_or_plain(model, family),
        "--version 1, which it never had": family == "INTERNLM2_PUBLIC" and mlp == "old",
    }
    if found := [text for text, wrong in problems.items() if wrong]:
        raise UserError(f"the 2023 layout of {family} has no place for {', '.join(found)}")
    sizes = {
        "key/value heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "feed-forward width": model.expert_size,
    }
    if uneven := [f"{key} {size}" for key, size in sizes.items() if size % tensor_size]:
        raise UserError(f"--tp_size {tensor_size} does not divide {', '.join(uneven)}")


def _is_dynamic_ntk_or_plain(model: ModelConfig, family: Family) -> bool:
    scaling = model.rope_scaling
    if scaling is None:
        return True
    return scaling.type == "dynamic" and scaling.factor == 1 and family != "LLAMA2"


def _moe_problems(model: ModelConfig, family: Family) -> dict[str, bool]:
    """GShard's gates of 2023: softmax scores, of one expert as they are, of two as shares of both."""
    moe = model.moe
    if model.num_experts == 1:
        return {}
    return {
        f"model.num_experts={model.num_experts}": family != "INTERNLM",
        f"model.moe.top_k={moe.top_k}": moe.top_k > 2,
        f"model.moe.score={moe.score!r}": moe.score != "softmax",
        f"model.moe.norm_topk={moe.norm_topk}": moe.normalises != (moe.top_k == 2),
        f"model.moe.bias_rate={moe.bias_rate}": moe.bias_rate > 0,
        f"model.moe.num_shared_experts={moe.num_shared_experts}, model.moe.mix_shared={moe.mix_shared}": (
            moe.num_shared_experts != int(moe.mix_shared)
        ),
    }


def _model_config(model: ModelConfig, family: Family, split_hidden: bool) -> dict[str, Any]:
    """The model section as the builders of 2023 took it."""
    config: dict[str, Any] = {
        "checkpoint": 0.0,
        "num_chunks": 1,
        "num_attention_heads": model.num_attention_heads,
        "embed_split_hidden": split_hidden,
        "vocab_size": model.vocab_size,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "mlp_ratio": model.expert_size / model.hidden_size,
        "apply_post_layer_norm": False,
        "dtype": torch_dtype(model.dtype),
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": model.layer_norm_epsilon,
        "use_flash_attn": True,
    }
    if model.rope_scaling is not None:
        config |= {"use_dynamic_ntk_rope": True, "max_position_embeddings": model.max_position_embeddings}
    if model.num_experts > 1:
        config |= {
            "num_experts": model.num_experts,
            "moe_gate_k": model.moe.top_k,
            "moe_use_residual": model.moe.mix_shared,
            "moe_type": "GShard",
        }
    if family != "INTERNLM":
        config |= {
            "num_kv_attention_heads": model.num_kv_heads,
            "no_bias": not model.qkv_bias,
            "adapt_hf": not model.qk_interleaved,
            "rope_base": model.rope_base,
            "norm_head": model.norm_head,
        }
        if family == "LLAMA2":
            del config["norm_head"]
    return config
