"""Old spellings: every key that InternLM and InternEvo of 2023 and 2024 accepted and that the schema spells otherwise.

One table. Each row renames a key, converts its values, or drops it with the reason; a value that cannot be honoured is
refused with the reason and the fix. `modernise.py` applies the rows, one log line each. The facts come from the
published sources of those frameworks (tags v0.1.0 to v0.2.1dev20240102, InternEvo to 0.5.2).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]
Rewrite = Callable[[Any, Tree], Tree]  # (value, its section) -> {new key: new value}
Test = Callable[[Any], bool]
NOT_YET = "is not available yet"


class Refused(Exception):
    """Raised by a row whose value cannot be honoured; the text says why and what to do."""


@dataclass(frozen=True)
class OldSpelling:
    """One row: a key, what becomes of it (for log and documentation), and how."""

    key: str
    becomes: str
    rewrite: Rewrite
    applies: Test = lambda value: True


def dropped(key: str, reason: str, keep: Test = lambda value: True, refusal: str = "") -> OldSpelling:
    """A key without effect here; values that `keep` rejects asked for something else and are refused."""

    def rewrite(value: Any, section: Tree) -> Tree:
        if not keep(value):
            raise Refused(refusal)
        return {}

    only = "" if not refusal else f"; otherwise refused: {refusal}"
    return OldSpelling(key, f"dropped: {reason}{only}", rewrite)


def renamed(key: str, new: str, convert: Callable[[Any], Any] = lambda value: value, note: str = "") -> OldSpelling:
    return OldSpelling(key, f"`{new}`{note}", lambda value, section: {new: convert(value)})


def respelled(key: str, becomes: str, applies: Test, convert: Callable[[Any], Any]) -> OldSpelling:
    """The key stays, some of its values are written otherwise."""
    return OldSpelling(key, becomes, lambda value, section: {key: convert(value)}, applies)


def _is(*values: Any) -> Test:
    return lambda value: any(value == allowed and type(value) is type(allowed) for allowed in values)


def _switched_on(*names: str) -> Test:
    return lambda value: isinstance(value, dict) and any(value.get(name) for name in names)


def _none_of(test: Test) -> Test:
    return lambda value: not test(value)


def _falsy(value: Any) -> bool:
    return not value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number_below(limit: float) -> Test:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value < limit


# ---- conversions that need more than a value -------------------------------------------------------------------------


# The last form, without "boto3:", was accepted too and is told from a plain S3 URL by the address in the bucket's name.
_PREFIX = r"local:|boto3:|volc:|oss2:|vc:|ali:|s3://[^./]+\.\d+\.\d+\.\d+\.\d+(/|$)"


def plain_path(value: str) -> str:
    """A path without the back-end prefix of 2023. Raises Refused for object stores, naming what to write instead."""
    if not _has_prefix(value):
        return value
    prefix, _, rest = value.partition(":")
    if prefix == "local":
        return rest
    stores = {"boto3": "s3", "volc": "vc", "oss2": "ali", "s3": "s3", "vc": "vc", "ali": "ali"}
    location = rest.removeprefix(f"{stores[prefix]}://").removeprefix("//")
    host, _, key = location.partition("/")
    bucket, _, endpoint = host.partition(".")
    if stores[prefix] == "ali":
        fix = f'"oss://{bucket}/{key}" and set OSS_ENDPOINT={endpoint}'
    else:
        scheme = "http" if stores[prefix] == "s3" else "https"
        fix = f'"s3://{bucket}/{key}" and set AWS_ENDPOINT_URL={scheme}://{endpoint}'
    raise Refused(f"object stores are fsspec URLs here and their endpoint is an environment variable; write {fix}")


def _has_prefix(value: Any) -> bool:
    return isinstance(value, str) and re.match(_PREFIX, value) is not None


def _path(key: str) -> OldSpelling:
    return respelled(
        key,
        "`local:` is cut off; `boto3:`, `volc:`, `oss2:` are refused with the URL to write instead",
        _has_prefix,
        plain_path,
    )


def _model_only(value: Any, section: Tree) -> Tree:
    if not value or section.get("load_ckpt_info"):
        return {}
    return {"ckpt.load_ckpt_info": {"path": plain_path(value), "content": ("model",)}}


def _resume_folder(value: Any, section: Tree) -> Tree:
    if not value or section.get("load_ckpt_info"):
        return {}
    if isinstance(value, dict):  # InternEvo's documentation shows this form
        return {"ckpt.load_ckpt_info": dict(value)}
    with_optimizer = section.get("load_optimizer", True)
    content = ("model", "sampler", "optimizer") if with_optimizer else ("model", "sampler")
    return {"ckpt.load_ckpt_info": {"path": plain_path(value), "content": content}}


def _ckpt_type(value: str) -> str:
    if value == "llama":
        raise Refused('folders of Meta\'s llama files are not read; convert them to Hugging Face and use "hf"')
    return "hf" if value == "hf_llama" else "internlm"


def _accumulation(value: Any, section: Tree) -> Tree:
    if value not in (None, section.get("micro_num", value)):
        raise Refused(f"micro_num is {section['micro_num']} and means the same; set data.micro_num alone")
    return {"data.micro_num": value} if "micro_num" not in section and value is not None else {}


def _fsdp(value: Any, section: Tree) -> Tree:
    if not value:
        return {}
    size = section.get("size", -1)
    return {"parallel.weight.size": size, "parallel.gradient.size": size}


def _zero1_size(value: int) -> int:
    if value == 0:
        raise Refused(
            "0 meant all data ranks in InternLM 0.1 and 0.2 but no sharding in InternEvo; write -1 for all data ranks "
            "or 1 for no sharding"
        )
    return max(value, -1)


def _drop_tokens(value: Any, section: Tree) -> Tree:
    if value:
        return {}
    for key in ("capacity_factor", "moe_capacity_factor"):  # without dropping it had no effect
        section.pop(key, None)
    return {"model.moe.capacity_factor": None}


def _experts(prefix: str) -> tuple[OldSpelling, ...]:
    """The gate's keys: `moe_*` in the model section of 0.2.1, a section of their own in InternEvo."""
    return (
        OldSpelling(f"{prefix}drop_tokens", "False: `model.moe.capacity_factor=None`; True: dropped", _drop_tokens),
        renamed(f"{prefix}top_k" if prefix == "moe." else f"{prefix}gate_k", "model.moe.top_k"),
        renamed(f"{prefix}capacity_factor", "model.moe.capacity_factor"),
        renamed(f"{prefix}min_capacity", "model.moe.min_capacity"),
        dropped(f"{prefix}eval_capacity_factor", "evaluation drops no tokens"),
        dropped(f"{prefix}use_rts", "over capacity, tokens of the lowest score are dropped"),
        dropped(
            f"{prefix}noisy_gate_policy",
            "off by default",
            _is(None),
            "random numbers would differ between layouts; remove the key and balance by loss.moe_loss_coeff",
        ),
    )


# ---- the table -------------------------------------------------------------------------------------------------------

_AUTOMATIC = "the fastest way is chosen where it runs"
_DERIVED = "computed by the program"

TABLE: tuple[OldSpelling, ...] = (
    # top level
    respelled("model_type", "`INTERNLM2` is `INTERNLM2_PUBLIC`", _is("INTERNLM2"), lambda value: "INTERNLM2_PUBLIC"),
    renamed("enable_tb", "monitor.enable_tb"),
    renamed("tensorboard_folder", "monitor.tensorboard_folder"),
    dropped("resume_tb_folder", "a resumed run goes on in the same run_dir and its TensorBoard folder"),
    dropped("tensorboard", "the writer's queue has its default length"),
    dropped("monitor.tensorboard", "the writer's queue has its default length"),
    dropped("cudnn_benchmark", "cuDNN has no part in a transformer"),
    dropped("cudnn_deterministic", "cuDNN has no part in a transformer"),
    dropped("gradient_handler", "shared gradients are summed by the engine"),
    dropped("output_tf32", "off by default", _falsy, f"an fp32 head {NOT_YET}; remove the key"),
    dropped("metric_dtype", "metrics are always computed in fp32"),
    dropped("only_load_lr", "off by default", _falsy, "the rate always comes from adam.lr; remove the key"),
    dropped("batch_count", _DERIVED),
    *_experts("moe."),
    dropped("moe.parallel_mode", "experts are dealt out by `parallel.expert.size`"),
    dropped("moe", "its keys are those of `model.moe`", _falsy, "see model.moe.* for what there is"),
    dropped(
        "grad_profiling",
        "off by default",
        _none_of(_switched_on("grad_norm_profiling", "zero_grad_profiling")),
        f"per-layer gradient profiling {NOT_YET}; remove the section",
    ),
    dropped("alert_address", "no effect since 0.2.1"),
    dropped("monitor.alert.light_monitor_address", "the package of that heartbeat server is gone"),
    # ckpt
    renamed("ckpt.enable_ckpt", "ckpt.enable_save_ckpt"),
    OldSpelling(
        "ckpt.load_model_only_folder",
        '`ckpt.load_ckpt_info` with content ("model",), unless that is given',
        _model_only,
    ),
    OldSpelling(
        "ckpt.load_ckpt_folder",
        '`ckpt.load_ckpt_info` with content ("model", "sampler", "optimizer"), unless that is given',
        _resume_folder,
    ),
    dropped("ckpt.load_optimizer", "part of the content of `ckpt.load_ckpt_info` made from `load_ckpt_folder`"),
    renamed("ckpt.load_given_ckpt", "ckpt.auto_resume", lambda value: not value, " = not value"),
    dropped("ckpt.async_upload_tmp_folder", "a checkpoint is written in place under a temporary name"),
    respelled(
        "ckpt.load_ckpt_info",
        "without a path: None",
        lambda v: isinstance(v, dict) and not v.get("path", "the schema asks for it"),
        lambda value: None,
    ),
    _path("ckpt.load_ckpt_info.path"),
    respelled(
        "ckpt.load_ckpt_info.content",
        "a string is a list of one, words in lower case",
        lambda v: isinstance(v, str) or (isinstance(v, list | tuple) and list(v) != [str(x).lower() for x in v]),
        lambda v: tuple(str(x).lower() for x in ([v] if isinstance(v, str) else v)),
    ),
    respelled(
        "ckpt.load_ckpt_info.ckpt_type",
        "`internevo`, `internlm_test`, `normal` are `internlm`; `hf_llama` is `hf`",
        _is("internevo", "internlm_test", "normal", "hf_llama", "llama"),
        _ckpt_type,
    ),
    _path("ckpt.save_ckpt_folder"),
    _path("ckpt.snapshot_ckpt_folder"),
    _path("ckpt.stop_file_path"),
    respelled(
        "ckpt.checkpoint_every",
        "0, negative or infinite: None",
        lambda v: _number_below(1)(v) or v == float("inf"),
        lambda value: None,
    ),
    respelled(
        "ckpt.oss_snapshot_freq",
        "1, 0, negative or infinite: None",
        lambda v: _number_below(2)(v) or v == float("inf"),
        lambda value: None,
    ),
    # data
    dropped("data.packed_length", "always seq_len * micro_bsz"),
    dropped("data.batch_size", "always micro_num"),
    OldSpelling("data.gradient_accumulation", "`data.micro_num`, which it must equal", _accumulation),
    respelled("data.train_folder", "an empty string is None", _is(""), lambda value: None),
    respelled("data.valid_folder", "an empty string is None", _is(""), lambda value: None),
    respelled("data.rampup_batch_size", "None is an empty string", _is(None), lambda value: ""),
    respelled("data.skip_batches", "None is an empty string", _is(None), lambda value: ""),
    respelled("data.min_length_dict", "None is an empty dict", _is(None), lambda value: {}),
    renamed(
        "data.empty_cache_and_diag_interval",
        "monitor.slow_rank_every",
        lambda value: value if value > 0 else 50,
        "; the allocator needs no emptying",
    ),
    renamed("data.diag_outlier_ratio", "monitor.slow_rank_ratio", lambda value: max(1.0, float(value))),
    OldSpelling(
        "data.use_packed_dataset",
        '`data.packing` = "unpacked" for False, dropped for True',
        lambda value, section: {} if value else {"data.packing": "unpacked"},
    ),
    dropped("data.fixed_random_dataset_seqlen", "off by default", _falsy, 'set data.type="synthetic" for full rows'),
    dropped("data.is_multimodal", "off by default", _falsy, f"image input {NOT_YET}; set False"),
    dropped("data.image_size", "no effect on text"),
    dropped("data.patch_size", "no effect on text"),
    # hybrid_zero_optimizer, loss, schedules
    renamed("hybrid_zero_optimizer.zero_overlap_communication", "hybrid_zero_optimizer.overlap_sync_grad"),
    dropped("hybrid_zero_optimizer.reduce_bucket_size", "a bucket is a unit: a block, the embedding, the head"),
    respelled("hybrid_zero_optimizer.clip_grad_norm", "negative: 0, no clipping", _number_below(0), lambda value: 0.0),
    dropped("adam.adam_beta2_c", "only `beta2_scheduler.c` was ever read"),
    dropped(
        "lr_scheduler.last_epoch",
        "the schedule is a function of the step",
        _is(-1, None),
        "a schedule starts at 0 or where its checkpoint says; remove the key",
    ),
    dropped(
        "beta2_scheduler.cur_iter",
        "the schedule is a function of the step",
        _is(-1, None),
        "a schedule starts at 0 or where its checkpoint says; remove the key",
    ),
    # model
    respelled("model.dtype", "`torch.half` is `torch.float16`", _is("torch.half"), lambda value: "torch.float16"),
    OldSpelling(
        "model.no_bias",
        "`model.qkv_bias`, `model.out_bias` = not value",
        lambda value, section: {"model.qkv_bias": not value, "model.out_bias": not value},
    ),
    renamed("model.adapt_hf", "model.qk_interleaved", lambda value: not value, " = not value"),
    dropped("model.embed_split_hidden", "tensor ranks share the embedding by its vocabulary"),
    dropped("model.parallel_output", "tensor ranks never gather logits"),
    dropped("model.sequence_parallel", "was ignored"),
    dropped("model.use_flash_attn", f"{_AUTOMATIC}; rows are packed either way"),
    dropped("model.mlp_layer_fusion", "always on"),
    dropped("model.dropout_selective_checkpoint", "no dropout"),
    dropped("model.drop_rate", "no dropout", _is(0, 0.0), "there is no dropout; set 0"),
    dropped("model.attn_drop_rate", "no dropout", _is(0, 0.0), "there is no dropout; set 0"),
    dropped("model.norm_type", "always rmsnorm", _is("rmsnorm"), 'only RMSNorm is built; set "rmsnorm"'),
    dropped("model.use_swiglu", "always on", bool, "only SwiGLU feed-forwards are built; set True"),
    dropped(
        "model.apply_post_layer_norm",
        "blocks are pre-norm",
        _falsy,
        "blocks are pre-norm; set False (INTERNLM ignored the key)",
    ),
    OldSpelling(
        "model.use_dynamic_ntk_rope",
        'True: `model.rope_scaling` of type "dynamic" and factor 1; False: dropped',
        lambda v, section: {"model.rope_scaling": {"type": "dynamic", "factor": 1.0}} if v else {},
    ),
    dropped("model.is_reward", "off by default", _falsy, f"reward heads {NOT_YET}; set False"),
    dropped("model.deepnorm", "off by default", _falsy, "InternLM2 refused it too; set False"),
    *_experts("model.moe_"),
    OldSpelling(
        "model.moe_use_residual",
        "True: `model.moe.num_shared_experts=1` and `model.moe.mix_shared=True`; False: dropped",
        lambda v, section: {"model.moe.num_shared_experts": 1, "model.moe.mix_shared": True} if v else {},
    ),
    OldSpelling(
        "model.moe_type",
        "`MegaBlock-D`: `model.moe.capacity_factor=None`; others: dropped (grouped GEMMs either way)",
        lambda v, section: {"model.moe.capacity_factor": None} if v == "MegaBlock-D" else {},
    ),
    # parallel
    respelled(
        "parallel.zero1", "an int is the size; below 0: -1; 0 is refused", _is_int, lambda v: {"size": _zero1_size(v)}
    ),
    respelled(
        "parallel.zero1.size",
        "below -1: -1; 0 is refused",
        lambda v: _is_int(v) and (v == 0 or v < -1),
        _zero1_size,
    ),
    OldSpelling(
        "parallel.zero1.fsdp",
        "True: `parallel.weight.size`, `parallel.gradient.size` = zero1 size (ZeRO-3); False: dropped",
        _fsdp,
    ),
    respelled("parallel.tensor", "an int is the size", _is_int, lambda value: {"size": value}),
    respelled("parallel.pipeline", "an int is the size", _is_int, lambda value: {"size": value}),
    respelled("parallel.weight", "an int is the size", _is_int, lambda value: {"size": value}),
    respelled("parallel.gradient", "an int is the size", _is_int, lambda value: {"size": value}),
    dropped("parallel.pipeline.interleaved_overlap", "transfers always overlap; `model.num_chunks` decides"),
    dropped("parallel.weight.memory_pool", "memory of gathered parameters is always used again"),
    dropped("parallel.sequence_parallel", '`parallel.tensor.mode` says it: "msp" cuts the tokens, "mtp" does not'),
    dropped("parallel.gqa", "grouped heads need no group of their own"),
)

# What the frameworks of 2023 assumed for a model section that is silent on biases and rotary order. The families of
# presets.py are the published models instead, so these apply only to a file that uses old keys in its model section.
OLD_FAMILIES: dict[str, Tree] = {
    "INTERNLM2_PUBLIC": {"qkv_bias": True, "out_bias": True},
    "LLAMA2": {"qkv_bias": True, "out_bias": True, "qk_interleaved": True},
}
UNBUILT_FAMILIES = {"LLAVA": "image input"}
