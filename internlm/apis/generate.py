"""Token generation with a key/value cache, for a batch of prompts of any lengths."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from internlm.apis.sampling import Sampling
from internlm.checkpoint.hf import HFReader
from internlm.checkpoint.native import CheckpointReader, is_hf_folder, open_checkpoint
from internlm.config.schema import ModelConfig
from internlm.data.tokenizer import Tokenizer, open_tokenizer
from internlm.model.attention import KVCache
from internlm.model.transformer import Transformer
from internlm.utils.device import find_device
from internlm.utils.errors import UserError

Progress = Callable[[int, int], None]  # called with (tensors read, tensors) while a model is read

_PREFILL = 512  # prompt tokens per row and call: bounds the attention scores of a long prompt


def load_model(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Transformer, ModelConfig]:
    """The model of a native checkpoint (or a folder of them: the newest good one), of a Hugging Face folder, or of
    an adapter in PEFT's files with the base that they name.

    `device` None: the GPU if there is one. `dtype` None: that of the folder. Raises UserError.
    """
    reader = open_model(folder)
    model = read_model(reader, device, dtype)
    return model, model.config


def open_model(folder: str | Path) -> HFReader | CheckpointReader:
    """What a folder holds, before its tensors are read."""
    return HFReader(folder) if is_hf_folder(folder) else open_checkpoint(folder)


def model_config(reader: HFReader | CheckpointReader) -> ModelConfig:
    """The model section of an opened folder, `dtype` as it is stored."""
    return ModelConfig(**reader.config_model()) if isinstance(reader, HFReader) else reader.config.model


def tokenizer_of(reader: HFReader | CheckpointReader, folder: str | Path) -> Tokenizer:
    """The tokenizer of an opened folder: its own, or the one that the run was trained with. Raises UserError."""
    if isinstance(reader, HFReader):
        return open_tokenizer(reader.text_folder)
    path = reader.config.data.tokenizer_path
    if not path:
        raise UserError(f"{folder}: the run names no tokenizer (data.tokenizer_path); give the one of its data")
    return open_tokenizer(path)


def read_model(
    reader: HFReader | CheckpointReader,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """The model of an opened folder; see `load_model`."""
    target = find_device(device)
    config = model_config(reader)
    fp32_norm = not isinstance(reader, HFReader) and reader.config.use_fp32_norm
    if dtype is not None:
        config = config.model_copy(update={"dtype": str(dtype)})
    with torch.device("meta"):
        model = Transformer(config, fp32_norm)
    model = model.to_empty(device=target).requires_grad_(False).eval()
    parameters = [*model.named_parameters(), *model.named_buffers()]
    for number, (name, parameter) in enumerate(parameters, 1):
        parameter.copy_(reader.read(name))
        if progress is not None:
            progress(number, len(parameters))
    return model


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and including the first of `stop_ids`.

    `prompts` are token ids, with the bos token if the model expects one. Sampling draws from a generator of its own,
    seeded by `seed`. Raises UserError for empty prompts, ids beyond the vocabulary, and where a prompt and
    `max_new_tokens` are more than the model was made for.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, sampling, stop_ids, seed):
        for output, token in zip(outputs, tokens, strict=True):
            if token is not None:
                output.append(token)
    return outputs


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Like `generate`, one step at a time: the next token of each prompt, None for those that have ended."""
    _check(model, prompts, max_new_tokens)
    return _stream(model, prompts, max_new_tokens, sampling or Sampling(), stop_ids, seed)


def _stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int,
) -> Iterator[list[int | None]]:
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    # Rows are padded with their own last token, so that padding marks nothing as seen.
    tokens = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]).to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    room, heads = longest + max_new_tokens, model.num_kv_heads
    cache = KVCache(model.config, len(prompts), room, device, model.dtype, heads)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    seen.scatter_(1, tokens, True)
    generator = torch.Generator(device).manual_seed(seed)
    stops = set(stop_ids)

    logits = prefill(model, cache, tokens, lengths)
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = sampling.choose(logits, seen, generator)
        step_tokens = chosen.tolist()  # the one wait for the device
        yield [token if alive else None for token, alive in zip(step_tokens, running, strict=True)]
        running = [alive and token not in stops for token, alive in zip(step_tokens, running, strict=True)]
        if step + 1 == max_new_tokens or not any(running):
            return
        seen.scatter_(1, chosen[:, None], True)
        num_new = torch.tensor(running, dtype=torch.int64).to(device, non_blocking=True)
        logits = model.decode(chosen[:, None], cache, num_new)


def prefill(model: Transformer, cache: KVCache, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Feed right-padded prompts [batch, longest]; the logits [batch, vocab] behind each row's last token."""
    last = torch.empty(0)
    for start in range(0, tokens.shape[1], _PREFILL):
        chunk = tokens[:, start : start + _PREFILL]
        num_new = (lengths - start).clamp(0, chunk.shape[1])
        here = model.decode(chunk, cache, num_new)
        last = here if start == 0 else torch.where(num_new[:, None] > 0, here, last)
    return last


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts:
        raise UserError("there is no prompt")
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, max_new_tokens, model.config, f"prompt {number}")


def check_prompt(prompt: Sequence[int], max_new_tokens: int, config: ModelConfig, name: str = "the prompt") -> None:
    """Raises UserError for an empty prompt, ids beyond the vocabulary, and no room for the answer."""
    if not len(prompt):
        raise UserError(f"{name} is empty; begin it with the bos token")
    wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
    if wrong:
        raise UserError(f"{name} holds token id {wrong[0]}, the model has ids 0 to {config.vocab_size - 1}")
    check_length(
        len(prompt) + max_new_tokens, config, f"{name} has {len(prompt)} tokens, its answer {max_new_tokens} at most"
    )


def check_length(length: int, config: ModelConfig, what: str) -> None:
    """Raises UserError, beginning with `what`, for a text of more tokens than the model was made for."""
    limit = longest_text(config)
    if length > limit:
        raise UserError(f"{what}: the model was made for {limit} (max_position_embeddings); make it shorter")


def longest_text(config: ModelConfig) -> float:
    """Tokens that the model was made for; endless with dynamic scaling of the rotary embedding, which stretches."""
    stretches = config.rope_scaling is not None and config.rope_scaling.type == "dynamic"
    return math.inf if stretches else config.max_position_embeddings
