"""Does a checkpoint fit this run: its model, and the place in its data?"""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from internlm.config.schema import Config, LoraConfig, ModelConfig
from internlm.utils.errors import UserError
from internlm.utils.logger import common_warning, get_logger

logger = get_logger(__name__)

# What the same weights compute depends on these as well, though they fit in any case.
_MEANING = ("qk_interleaved", "rope_base", "rope_scaling", "layer_norm_epsilon", "norm_head")
_MOE_MEANING = ("top_k", "score", "normalises")

# What is in the rows of a run, and their order, follows from these; how many rows a batch takes does not matter.
_ROWS = (
    *("type", "text_key", "chat_template", "train_on", "long_samples"),
    *("seq_len", "micro_bsz", "packing", "pack_sample_into_one", "min_length", "min_length_dict"),
    *("mixture", "seed"),
)
# What may change between two parts of a run, and then changes how it goes on.
_TRAINING = ("adam", "lr_scheduler", "beta2_scheduler", "grad_scaler", "hybrid_zero_optimizer", "loss")
_BATCHES = ("total_steps", "micro_num", "rampup_batch_size", "skip_batches")

_FILES = ("train_folder", "tokenizer_path")  # which may have moved: then there are as many rows as before


def sizes_of(model: ModelConfig) -> dict[str, int | bool]:
    """The settings that decide names and shapes of all parameters."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_attention_heads": model.num_attention_heads,
        "num_kv_attention_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size if model.num_experts == 1 else model.expert_size,
        "num_experts": model.num_experts,
        "moe.num_shared_experts": model.moe.num_shared_experts,
        "moe.mix_shared": model.moe.mix_shared,
        "qkv_bias": model.qkv_bias,
        "out_bias": model.out_bias,
        "qk_norm": model.qk_norm,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def check_model(saved: dict[str, Any], config: Config, what: str) -> None:
    """Compares the model and lora sections of a checkpoint's config.json with those of this run.

    Sections of other versions may have other keys: those that this program doesn't know are left out.

    Raises:
        UserError: other sizes, or adapters that this run would lose or read otherwise; differences with both values.
    """
    _check_adapters(saved.get("lora"), config.lora, what)
    known = {key: value for key, value in saved["model"].items() if key in ModelConfig.model_fields}
    try:
        model = ModelConfig.model_validate(known)
    except ValidationError as error:
        common_warning(logger, f"{what}: its model section can't be read, so tensors are compared one by one ({error})")
        return
    theirs, ours = sizes_of(model), sizes_of(config.model)
    differences = [f"model.{key}: {theirs[key]} in the checkpoint, {ours[key]} in this run" for key in ours]
    differences = [line for line, key in zip(differences, ours, strict=True) if theirs[key] != ours[key]]
    if differences:
        raise UserError(
            f"{what} holds another model:\n" + "\n".join(differences) + "\nGive the model section the checkpoint's "
            "sizes, or start in another ckpt.save_ckpt_folder."
        )
    meanings = [(key, getattr(model, key), getattr(config.model, key)) for key in _MEANING]
    if model.num_experts > 1:
        meanings += [(f"moe.{key}", getattr(model.moe, key), getattr(config.model.moe, key)) for key in _MOE_MEANING]
    for key, old, new in meanings:
        if old != new:
            common_warning(logger, f"{what} was trained with model.{key}={old}, this run has {new}")


def check_rows(saved: dict[str, Any], saved_rows: int | None, config: Config, num_rows: int | None, what: str) -> None:
    """Does the place in the order of rows mean the same in this run? The sizes of batches may differ.

    `saved` is the checkpoint's config.json; `saved_rows` and `num_rows` are the rows of the training data then and now,
    None where they aren't known. Data that has moved is taken for the same if it makes as many rows.

    Raises:
        UserError: it does not; differences with both values.
    """
    then, now = saved["data"], config.data.model_dump(mode="json")

    def differences(keys: Sequence[str]) -> list[str]:
        pairs = {key: (then[key], now[key]) for key in keys if key in then}
        line = "data.{}: {} in the checkpoint, {} in this run"
        return [line.format(key, old, new) for key, (old, new) in pairs.items() if old != new]

    found, moved = differences(_ROWS), differences(_FILES)
    if saved_rows is None or num_rows is None:
        found += moved
    elif saved_rows != num_rows:
        found += [*moved, f"rows of the training data: {saved_rows} in the checkpoint, {num_rows} in this run"]
    elif moved and not found:
        common_warning(logger, f"taken for the same data, since it makes {num_rows} rows: {'; '.join(moved)}")
    if found:
        raise UserError(
            f"{what}: its place in the data means nothing in this run, which reads other rows, or in another order:\n"
            + "\n".join(found)
            + f"\nGo on with the data as it was; or {begin_anew(config, what)}"
        )


def tell_changes(saved: dict[str, Any], config: Config, what: str) -> None:
    """Logs what a resumed run does in another way from here on, so that a forgotten override is noticed.

    `saved` is the checkpoint's config.json. Keys that only one of the two versions of the program knows are left out.
    """
    now = config.model_dump(mode="json")
    then = {name: saved.get(name) for name in _TRAINING} | {"data": saved["data"]}
    old, new = (dict(_leaves(tree)) for tree in (then, {name: now[name] for name in then}))
    wanted = [key for key in old if key in new and (not key.startswith("data.") or key.partition(".")[2] in _BATCHES)]
    changes = [f"{key}: {old[key]} -> {new[key]}" for key in wanted if old[key] != new[key]]
    if changes:
        logger.info("%s was written with other settings, which change from here on: %s", what, "; ".join(changes))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def begin_anew(config: Config, what: str) -> str:
    """How a run leaves the place in the data behind: in folders without checkpoints, which it would resume from."""
    folders = [key for key in ("save_ckpt_folder", "snapshot_ckpt_folder") if getattr(config.ckpt, key) is not None]
    load = "ckpt.load_ckpt_info"
    arguments = [*(f"ckpt.{key}=OTHER_{key.upper()}" for key in folders), f"{load}.path={what}"]
    arguments += [f"{load}.ckpt_type=internlm", f"{load}.content=('model', 'optimizer', 'scheduler')"]
    return f"begin this data, with the same model and schedule: --run_dir OTHER {shlex.join(arguments)}"


def _check_adapters(saved: dict[str, Any] | None, lora: LoraConfig | None, what: str) -> None:
    """A checkpoint without adapters is a base to put new ones beside."""
    if saved is None:
        return
    theirs = {key: saved.get(key) for key in ("rank", "alpha", "target")}
    ours = lora and {"rank": lora.rank, "alpha": lora.alpha, "target": list(lora.target)}
    if ours != theirs:
        raise UserError(
            f"{what} holds adapters: its lora section is {theirs}, that of this run {ours}. Set the same, or start "
            "from the merged model, which tools/convert2hf.py writes."
        )
