"""Problems that span several keys or touch the machine's files, found before a process group or a GPU is touched.

Every check is a pure function of the config (and the world size, where known) that yields one line a problem: the
keys, their values, the arithmetic, and what to change.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from internlm.config.batch_texts import parse_batches, parse_ramp
from internlm.config.layout_checks import Problems, divisors, find_layout_problems, not_divided
from internlm.config.schema import V_SCHEDULES, Config, LoraConfig, ModelConfig
from internlm.utils.errors import UserError, collected


class ConfigError(UserError):
    """All that is wrong with a config, at once."""

    def __init__(self, title: str, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{title}: {count}", *(f"  - {problem}" for problem in problems)]))


def check(config: Config, world_size: int | None = None) -> None:
    """Raises ConfigError with every problem of `config`; sizes against the number of ranks only when it is given."""
    problems = find_problems(config, world_size)
    if problems:
        raise ConfigError(f"config of {config.JOB_NAME}", problems)


def find_problems(config: Config, world_size: int | None = None) -> list[str]:
    """All problems, one line each; see `check`."""
    found = [problem for one in CHECKS for problem in one(config)]
    return found + find_layout_problems(config, world_size)


def is_local(path: str) -> bool:
    """Whether a path lies on this machine rather than behind a URL."""
    return "://" not in path


def heads(config: Config) -> Problems:
    """Heads divide the width, have an even size, and are shared out evenly among key/value heads."""
    model = config.model
    hidden, query = model.hidden_size, model.num_attention_heads
    kv = model.num_kv_heads
    if model.head_dim is None and hidden % query:
        what = not_divided("model.hidden_size", hidden, "model.num_attention_heads", query)
        yield f"{what}; change one, or set model.head_dim"
    elif model.head_size % 2:
        origin = (
            "model.head_dim" if model.head_dim else f"model.hidden_size / model.num_attention_heads = {hidden}/{query}"
        )
        yield f"{origin} = {model.head_size}: rotary turns pairs of elements; set model.head_dim to an even number"
    if query % kv:
        what = not_divided("model.num_attention_heads", query, "model.num_kv_attention_heads", kv)
        yield f"{what}; each key/value head serves as many query heads. Set the latter to one of {divisors(query)}"


def rotary(config: Config) -> Problems:
    """Dynamic scaling is for inference; rows of training must fit the model."""
    model, seq_len = config.model, config.data.seq_len
    scaling = model.rope_scaling
    if scaling is None or scaling.type != "dynamic" or seq_len <= model.max_position_embeddings:
        return
    yield (
        f"model.rope_scaling.type = 'dynamic' stretches texts longer than model.max_position_embeddings = "
        f"{model.max_position_embeddings} in inference, and data.seq_len = {seq_len} would train on them: raise "
        "model.max_position_embeddings, or choose linear, yarn or llama3"
    )


def experts(config: Config) -> Problems:
    """Tokens choose among the experts that there are."""
    model, moe = config.model, config.model.moe
    if model.num_experts == 1:
        return
    if moe.top_k > model.num_experts:
        yield (
            f"model.moe.top_k = {moe.top_k} exceeds model.num_experts = {model.num_experts}, and a token goes to "
            f"different ones; set model.moe.top_k to {model.num_experts} or less"
        )
    if moe.mix_shared and moe.num_shared_experts != 1:
        yield (
            f"model.moe.mix_shared weighs one shared expert against the routed ones, but model.moe.num_shared_experts "
            f"= {moe.num_shared_experts}; set it to 1"
        )


def precision(config: Config) -> Problems:
    """A split master needs bfloat16."""
    engine = config.hybrid_zero_optimizer
    if engine.master == "split" and config.model.dtype == "torch.float16":
        yield (
            'hybrid_zero_optimizer.master = "split" needs model.dtype = "torch.bfloat16", whose bits are the upper '
            'half of float32; with "torch.float16" set master="fp32"'
        )


def batches(config: Config) -> Problems:
    """The texts about batches can be read, and `data.type` has what it needs."""
    data = config.data
    problems: list[str] = []
    with collected(problems):
        ramp = parse_ramp(data.rampup_batch_size)
        if ramp is not None and ramp.start > data.micro_num:
            problems.append(
                f"data.rampup_batch_size = {data.rampup_batch_size!r} starts with {ramp.start} micro batches, above "
                f"data.micro_num = {data.micro_num}; start with {data.micro_num} or fewer"
            )
    with collected(problems):
        parse_batches(data.skip_batches)
    yield from problems
    if data.type in ("text", "chat", "preference") and data.tokenizer_path is None:
        folder = "" if data.type == "text" else ", or a Hugging Face folder"
        yield f'data.type = "{data.type}" needs data.tokenizer_path; give that of a sentencepiece model{folder}'
    if data.pack_sample_into_one and data.packing not in (None, "cut"):
        yield f'data.pack_sample_into_one = True joins samples, data.packing = "{data.packing}" parts them; keep one'
    if data.type in ("text", "chat", "preference", "megatron") and data.train_folder is None:
        yield f'data.type = "{data.type}" needs data.train_folder; give it'


def adapters(config: Config) -> Problems:
    """Adapters have a base, projections to sit on, and a dropout that backward can repeat."""
    if config.lora is None:
        return
    yield from _adapted(config.lora, config.model)
    tensor = config.parallel.tensor
    if tensor.size > 1 and tensor.mode == "mtp" and config.lora.dropout:
        yield (
            f'lora.dropout = {config.lora.dropout} with parallel.tensor.size = {tensor.size} in mode "mtp": each rank '
            'would leave out others of the inputs that they share; set lora.dropout = 0 or parallel.tensor.mode = "msp"'
        )
    if config.ckpt.load_ckpt_info is None:
        yield "lora: the frozen weights are those of ckpt.load_ckpt_info, which is not set, so they are random; set it"
    if config.lora.dropout and config.model.checkpoint:
        yield (
            f"lora.dropout = {config.lora.dropout} with model.checkpoint = {config.model.checkpoint}: a recomputed "
            "block would draw other numbers; set one of them to 0"
        )


def _adapted(lora: LoraConfig, model: ModelConfig) -> Problems:
    """Every pattern must match a projection; experts, which are no projections, take no adapters."""
    kinds = ["attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"]
    if model.num_experts > 1:
        shared = ["feed_forward.shared.w13", "feed_forward.shared.w2"]
        kinds = kinds[:2] + (shared if model.moe.num_shared_experts else [])
    names = [f"layers.{layer}.{kind}" for layer in range(model.num_layers) for kind in kinds]
    for pattern in lora.target:
        if not any(fnmatch(name, pattern) for name in names):
            yield (
                f"lora.target: {pattern} matches no projection of model.num_layers = {model.num_layers} and "
                f"model.num_experts = {model.num_experts}; leave it out, or name some of {', '.join(kinds)} as in "
                '"*.attention.w*"'
            )


def offloading(config: Config) -> Problems:
    """Only dense feed-forward layers are offloaded, and backward fetches them once."""
    if config.model.checkpoint != "offload":
        return
    if config.model.num_experts > 1:
        yield (
            f"model.checkpoint = 'offload' with model.num_experts = {config.model.num_experts}: how many rows an "
            "expert computes changes from row to row, so no buffers are made for them; set 'feed_forward' or True"
        )
    if config.parallel.pipeline.size > 1 and config.pipeline_schedule in V_SCHEDULES:
        yield (
            f"model.checkpoint = 'offload' with parallel.pipeline.schedule = {config.pipeline_schedule}: its backward "
            "has two parts, and both would fetch what was offloaded; set 'feed_forward', or the schedule '1f1b'"
        )


def preference(config: Config) -> Problems:
    """Rows hold whole pairs on one rank, and there is a reference."""
    data, parallel = config.data, config.parallel
    if (config.dpo is None) != (data.type != "preference"):
        there = "no" if config.dpo is None else "a"
        yield f'data.type = "{data.type}" with {there} dpo section: "preference" goes with one; set both or neither'
    if config.dpo is None:
        return
    if data.micro_bsz < 2:
        yield f"data.micro_bsz = {data.micro_bsz}: a row holds whole pairs of samples up to seq_len; set 2 or more"
    if data.long_samples == "split" or data.packing is not None or data.min_length:
        yield "dpo: long_samples = split, packing and min_length do not go with pairs; leave them out"
    if config.loss.label_smoothing or config.loss.z_loss or config.loss.reduction != "token":
        yield "dpo: loss.label_smoothing, z_loss and reduction do not apply to pairs; leave them out"
    if config.ckpt.load_ckpt_info is None:
        yield "dpo: the reference is the model of ckpt.load_ckpt_info, which is not set; set it"
    if parallel.pipeline.size > 1 and config.dpo.reference == "each_step":
        yield (
            f'dpo.reference = "each_step" with parallel.pipeline.size = {parallel.pipeline.size}: the reference would '
            'pass through the stages at every step; set dpo.reference = "once"'
        )


def evaluation(config: Config) -> Problems:
    """There is something to evaluate, and a tokenizer to read it."""
    asked = config.evaluation
    if (asked.every > 0) != bool(asked.prompts or asked.tasks):
        yield f"evaluation.every = {asked.every}: it goes with evaluation.prompts or tasks; give both or neither"
    if not asked.every:
        return
    if config.data.tokenizer_path is None:
        yield "evaluation: texts need data.tokenizer_path, which is not set; set it"


def schedule(config: Config) -> Problems:
    """The phases of the learning rate fit into the run."""
    lr = config.lr_scheduler
    total = lr.total_steps or config.data.total_steps
    source = "lr_scheduler.total_steps" if lr.total_steps else "data.total_steps"
    warmup = int(total * lr.warmup_ratio)
    decay = int(total * lr.decay_ratio) if lr.type == "wsd" else 0
    if lr.init_steps + warmup + decay > total:
        terms = [f"lr_scheduler.init_steps {lr.init_steps}", f"warm-up {warmup} (warmup_ratio {lr.warmup_ratio})"]
        terms += [f"decay {decay} (decay_ratio {lr.decay_ratio})"] if decay else []
        steps = f"{' + '.join(terms)} = {lr.init_steps + warmup + decay} steps"
        yield f"{steps}, more than {source} = {total}; lower one of them"
    if lr.type != "constant" and lr.eta_min > config.adam.lr:
        yield f"lr_scheduler.eta_min = {lr.eta_min} is above the peak adam.lr = {config.adam.lr}; lower it"
    beta2 = config.beta2_scheduler
    if config.adam.adam_beta1 == 1 or config.adam.adam_beta2 == 1 or beta2.init_beta2 == 1:
        yield "adam.adam_beta1, adam.adam_beta2 and beta2_scheduler.init_beta2 must be below 1"


def checkpoints(config: Config) -> Problems:
    """The checkpoint to start from is there and has what is asked of it."""
    ckpt = config.ckpt
    if ckpt.stop_file_path and not ckpt.enable_save_ckpt:
        yield "ckpt.stop_file_path asks for saves on demand, but ckpt.enable_save_ckpt = False; set it True"
    load = ckpt.load_ckpt_info
    if load is None:
        return
    if not load.content:
        yield "ckpt.load_ckpt_info.content is empty: name what to take, or set load_ckpt_info=None"
    if load.ckpt_type == "hf" and set(load.content) - {"model"}:
        yield f'ckpt.load_ckpt_info.content = {load.content}: a Hugging Face folder holds a model alone; set ("model",)'
    if is_local(load.path):
        yield from _folder("ckpt.load_ckpt_info.path", load.path)
        files = [Path(load.path, name) for name in ("config.json", "adapter_config.json")]
        if load.ckpt_type == "hf" and Path(load.path).is_dir() and not any(file.exists() for file in files):
            yield f"ckpt.load_ckpt_info.path = {load.path!r}: no config.json in it; name a Hugging Face folder"


def files(config: Config) -> Problems:
    """Folders and files of data exist, and outputs go to folders."""
    data = config.data
    if data.type != "synthetic":
        for key in ("train_folder", "valid_folder"):
            path = getattr(data, key)
            if path is not None and is_local(path):
                yield from _folder(f"data.{key}", path)
        yield from _mixture(config)
    tokenizer = data.tokenizer_path
    folder_allowed = data.type in ("chat", "preference")
    if tokenizer is not None and is_local(tokenizer) and not _is_there(Path(tokenizer), folder_allowed):
        yield f"data.tokenizer_path = {data.tokenizer_path!r}: no such file; name one that is there"
    for key, folder in (("run_dir", config.run_dir), ("ckpt.save_ckpt_folder", config.ckpt.save_ckpt_folder)):
        if folder is not None and is_local(folder) and Path(folder).is_file():
            yield f"{key} = {folder!r} is a file; name a folder, to be written there"


def _is_there(path: Path, folder_allowed: bool) -> bool:
    return path.is_file() or (folder_allowed and path.is_dir())


def _folder(key: str, text: str) -> Problems:
    """The folder must exist; if not, how far the path goes."""
    path = Path(text)
    if path.is_dir():
        return
    if path.exists():
        yield f"{key} = {text!r} is a file; name the folder"
        return
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    start = "" if path.is_absolute() else f"; relative paths start at {Path.cwd()}"
    yield f"{key} = {text!r}: no such folder ({parent} is the last part that exists{start}); name one that is there"


def _mixture(config: Config) -> Problems:
    data = config.data
    if not data.mixture:
        return
    if sum(data.mixture.values()) == 0:
        yield f"data.mixture = {data.mixture}: all weights are 0; set one above"
    if data.train_folder is None:
        yield "data.mixture weighs the entries of data.train_folder, which is not set; set it"
    elif Path(data.train_folder).is_dir():
        entries = {entry.name for entry in Path(data.train_folder).iterdir()}
        known = entries | {name.split(".")[0] for name in entries}
        for name in data.mixture:
            if name not in known:
                has = ", ".join(sorted(entries)) or "none"
                yield f"data.mixture.{name}: no such entry in {data.train_folder}; name one of {has}"


def alerts(config: Config) -> Problems:
    """Alerts have a URL to go to."""
    alert = config.monitor.alert
    address = alert.feishu_alert_address
    if alert.enable_feishu_alert and not (address or "").startswith(("http://", "https://")):
        yield (
            f"monitor.alert.enable_feishu_alert = True, but monitor.alert.feishu_alert_address = {address!r} is no "
            "http(s) URL; give the webhook's, or set enable_feishu_alert=False"
        )


CHECKS: tuple[Callable[[Config], Problems], ...] = (
    heads,
    rotary,
    experts,
    precision,
    adapters,
    offloading,
    preference,
    evaluation,
    batches,
    schedule,
    checkpoints,
    files,
    alerts,
)
