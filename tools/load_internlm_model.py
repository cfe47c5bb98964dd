"""A model of 2023 in one call, and text from it while it is generated; the functions of InternLM's helper of that name.

    model = initialize_internlm_model("INTERNLM", "local:llm_ckpts/40000", dict(num_layers=32, ...))
    for text in internlm_interactive_generation(model, tokenizer, "<|User|>:hello<eoh>\\n<|Bot|>:", config):
        print(text)

One process holds the whole model, however many ranks wrote it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from internlm.apis.generate import longest_text, open_model, read_model, stream
from internlm.apis.sampling import Sampling
from internlm.checkpoint.legacy.reader import LegacyReader, modern_section
from internlm.checkpoint.legacy.resume import newest_legacy_folder
from internlm.config.legacy import Refused, plain_path
from internlm.config.schema import Config
from internlm.model.transformer import Transformer
from internlm.utils.device import default_device
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger, log_once

logger = get_logger("load_internlm_model")

_TOP_K = 40  # as in 2023


def initialize_internlm_model(
    model_type: str,
    ckpt_dir: str,
    model_config: Mapping[str, Any],
    del_model_prefix: bool = False,
    param_dtype: torch.dtype | str = torch.bfloat16,
    training: bool = False,
    seed: int = 1024,
) -> Transformer:
    """The model of a folder of 2023 (or of ours, or of a Hugging Face folder) on the GPU, if there is one.

    `model_config` is the model section of 2023, needed where the folder has no model_config.pt. A `model.` before keys
    is found out by itself, so `del_model_prefix` changes nothing. `param_dtype` may be a text, "torch.tf32" for fp32
    parameters whose products are rounded. `training`: parameters get gradients. Raises UserError.
    """
    torch.manual_seed(seed)
    try:
        path = plain_path(ckpt_dir)
    except Refused as refusal:
        raise UserError(f"ckpt_dir = {ckpt_dir!r}: {refusal}") from refusal
    name = param_dtype if isinstance(param_dtype, str) else str(param_dtype)
    legacy = newest_legacy_folder(path)
    if legacy is None:
        reader: Any = open_model(path)
    else:
        section = modern_section("model_config", dict(model_config), model_type)
        data = {"seq_len": section.get("max_position_embeddings", 2048), "total_steps": 1}
        run = Config.model_validate({"model_type": model_type, "model": {**section, "dtype": name}, "data": data})
        reader = LegacyReader(legacy, run=run)
    dtype = torch.float32 if name == "torch.tf32" else getattr(torch, name.removeprefix("torch."))
    if name == "torch.tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    model = read_model(reader, default_device(), dtype)
    return model.requires_grad_(training).train(training)


def get_model_device(model: torch.nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def internlm_interactive_generation(
    model: Transformer,
    tokenizer: Any,
    prompt: str,
    generation_config: Any,
    additional_eos_token_list: Sequence[int] | None = None,
) -> Iterator[str]:
    """The answer so far, after each new token.

    `tokenizer` is a sentencepiece processor or one of transformers; `generation_config` has max_length (the prompt's
    tokens included; at most what the model was made for), do_sample, temperature, top_p and repetition_penalty. Ends
    at eos or an additional id.
    """
    is_sentencepiece = callable(getattr(tokenizer, "eos_id", None))
    ids = [tokenizer.bos_id(), *tokenizer.encode(prompt)] if is_sentencepiece else list(tokenizer.encode(prompt))
    eos = tokenizer.eos_id() if is_sentencepiece else tokenizer.eos_token_id
    options = generation_config
    limit = int(min(options.max_length, longest_text(model.config)))
    if limit < options.max_length:
        log_once(logger, f"max_length = {options.max_length}: the model was made for {limit}, an answer ends there")
    room = limit - len(ids)
    if room < 1:
        raise UserError(f"the prompt has {len(ids)} tokens, the limit of {limit} leaves none for an answer")
    penalty = options.repetition_penalty
    greedy, sampled = (
        Sampling(repetition_penalty=penalty),
        Sampling(options.temperature, _TOP_K, options.top_p, penalty),
    )
    stops = {eos, *(additional_eos_token_list or ())}
    answer: list[int] = []
    for (token,) in stream(model, [ids], room, sampled if options.do_sample else greedy, sorted(stops)):
        if token is None or token in stops:
            return
        answer.append(token)
        yield tokenizer.decode(answer)
