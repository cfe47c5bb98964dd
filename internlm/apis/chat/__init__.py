"""Conversations with a trained model: `python -m internlm.apis.chat PATH` talks in the terminal.

A conversation is written as text by the model's chat template, answered token by token, and the answer's text comes
out as soon as it is certain.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internlm.apis.batching import Batcher
from internlm.apis.generate import Progress, check_length, model_config, open_model, read_model, tokenizer_of
from internlm.apis.sampling import Sampling
from internlm.apis.text_stream import TextStream
from internlm.apis.tool_calls import parse_tool_calls
from internlm.checkpoint.hf import HFReader
from internlm.checkpoint.native import CheckpointReader
from internlm.data.chat import prompt_ids, template_of_data
from internlm.data.chat_template import ChatTemplate
from internlm.data.find_template import find_template, template_of
from internlm.data.message import Message, ToolCall
from internlm.data.tokenizer import Tokenizer, check_tokenizer, open_tokenizer
from internlm.utils.device import find_device
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

MAX_LENGTH = 4096  # tokens of a conversation, where the model allows as many and nothing else is said
_ROOM = 4  # a conversation keeps at least a quarter of the length free for the answer
_NATIVE_TEMPLATES = {"INTERNLM": "internlm1.1", "INTERNLM2_PUBLIC": "internlm2", "QWEN2": "qwen2", "QWEN3": "qwen2"}


@dataclass(frozen=True)
class ReplyOptions:
    """How an answer is made. The defaults are those of InternLM's chat of 2023."""

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.8))
    max_new_tokens: int = 1024  # fewer where the length doesn't allow as many
    seed: int | None = None  # None: another each time
    stop: tuple[str, ...] = ()  # texts that end the answer, beside those of the template
    tools: tuple[Mapping[str, Any], ...] = ()  # functions that the model may call, in the OpenAI form

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must fit in 64 bits: from -2**63 to 2**63 - 1")


class Reply:
    """One answer: iterate over it for its text, piece by piece; afterwards it says how it ended.

    Breaking off the loop leaves a reply that can be closed, with the text so far.
    """

    def __init__(self, tokens: Iterator[int], num_prompt_tokens: int, stream: TextStream, stop_ids: Sequence[int]):
        self.text = ""
        self.num_prompt_tokens, self.num_new_tokens = num_prompt_tokens, 0
        self.finish_reason: str | None = None  # "stop", or "length" where a limit ended it; None while it goes on
        self._tokens, self._stream, self._stop_ids = tokens, stream, frozenset(stop_ids)

    def __iter__(self) -> Iterator[str]:
        try:
            for token in self._tokens:
                self.num_new_tokens += 1
                if token in self._stop_ids:
                    self.finish_reason = "stop"
                    break
                if piece := self._stream.add(token):
                    self.text += piece
                    yield piece
                if self._stream.stopped:
                    self.finish_reason = "stop"
                    break
            if piece := self._stream.finish():
                self.text += piece
                yield piece
            self.finish_reason = self.finish_reason or "length"
        finally:
            self.close()

    def close(self) -> None:
        """Stop generating."""
        close = getattr(self._tokens, "close", None)
        if close is not None:
            close()

    @property
    def message(self) -> Message:
        """The answer as a turn, its function calls read."""
        content, calls = parse_tool_calls(self.text)
        return Message("assistant", content, tool_calls=calls)


class ChatModel:
    """A model, its tokenizer and its template; answers requests from any thread, `num_rows` of them together."""

    def __init__(self, batcher: Batcher, tokenizer: Tokenizer, template: ChatTemplate, name: str = "internlm") -> None:
        self.batcher, self.tokenizer, self.template, self.name = batcher, tokenizer, template, name
        self.max_length = batcher.max_length
        ids = {text: tokenizer.id_of(text) for text in template.stop}
        self.stop_ids = tuple(index for index in ids.values() if index is not None)
        self._stop_texts = tuple(text for text, index in ids.items() if index is None)
        if self._stop_texts:
            logger.warning(
                f"the tokenizer has no token {', '.join(self._stop_texts)}, with which chat template {template.name} "
                "ends a turn: it is written in ordinary pieces, as a model must have been trained to do"
            )

    def prompt_of(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of a conversation, up to where the assistant goes on. Raises UserError."""
        return prompt_ids(self.tokenizer, self.template, messages, tools)

    def reply(self, messages: Sequence[Message], options: ReplyOptions | None = None) -> Reply:
        """The assistant's next turn. Raises UserError where the conversation doesn't fit, BusyError."""
        options = options or ReplyOptions()
        prompt = self.prompt_of(messages, options.tools)
        room = self.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the limit is {self.max_length} with the answer: "
                "shorten it, or begin a new one"
            )
        seed = secrets.randbits(63) if options.seed is None else options.seed
        tokens = self.batcher.stream(prompt, min(options.max_new_tokens, room), options.sampling, self.stop_ids, seed)
        stream = TextStream(self.tokenizer, (*self._stop_texts, *options.stop))
        return Reply(tokens, len(prompt), stream, self.stop_ids)

    def close(self) -> None:
        self.batcher.close()

    def __enter__(self) -> "ChatModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Conversation:
    """Turns so far, and how to go on.

    The text of an answer stays, even if it was broken off. A question that raises UserError does not. Another question,
    also from another thread (a page open twice), ends an answer that is under way.
    """

    def __init__(self, chat: ChatModel, system: str = "") -> None:
        self.chat, self.system = chat, system
        self.messages: list[Message] = []  # without the system text, so that it can be changed at any time
        self.num_forgotten = 0  # oldest turns that the last prompt had no room for
        self._reply: Reply | None = None  # the one that may write its text into `messages`

    def ask(self, text: str, options: ReplyOptions | None = None) -> Iterator[str]:
        """Adds a turn of the user; yields the answer piece by piece and keeps it."""
        return self._answer([*self.messages, Message("user", text)], options or ReplyOptions())

    def again(self, options: ReplyOptions | None = None) -> Iterator[str]:
        """Another answer in place of the last one. Raises UserError when nothing was asked."""
        return self._answer(self.asked(), options or ReplyOptions())

    def asked(self) -> list[Message]:
        """The turns up to the last question. Raises UserError when nothing was asked."""
        asked = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise UserError("nothing was asked yet")
        return self.messages[: asked[-1] + 1]

    def clear(self) -> None:
        """Forgets all turns, also one that is under way; the system text stays."""
        self._break_off()
        self.messages, self.num_forgotten = [], 0

    @property
    def last_calls(self) -> tuple[ToolCall, ...]:
        """What the last answer wants called."""
        answered = bool(self.messages) and self.messages[-1].role == "assistant"
        return parse_tool_calls(self.messages[-1].content)[1] if answered else ()

    def as_json(self) -> str:
        """One line in the form that fine-tuning reads: {"messages": [...]}."""
        turns = [message.as_dict() for message in (*self._head, *self.messages)]
        return json.dumps({"messages": turns}, ensure_ascii=False)

    @property
    def _head(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []

    def _answer(self, messages: list[Message], options: ReplyOptions) -> Iterator[str]:
        self._break_off()
        before = self.messages, self.num_forgotten
        self.messages = messages
        try:
            reply = self.chat.reply(self._fitting(options), options)
        except UserError:
            self.messages, self.num_forgotten = before
            raise
        self._reply = reply
        try:
            for piece in reply:
                if self._reply is not reply:
                    return
                self.messages = [*messages, Message("assistant", reply.text)]
                yield piece
        finally:
            reply.close()

    def _break_off(self) -> None:
        if self._reply is not None:
            self._reply.close()
        self._reply = None

    def _fitting(self, options: ReplyOptions) -> list[Message]:
        """System text and the newest turns, as many as leave room for an answer; the last question stays always."""
        head = self._head
        starts = [index for index, message in enumerate(self.messages) if message.role == "user"]
        limit = self.chat.max_length - min(options.max_new_tokens, self.chat.max_length // _ROOM)
        for start in starts:
            self.num_forgotten = start
            if len(self.chat.prompt_of([*head, *self.messages[start:]], options.tools)) <= limit:
                break
        return [*head, *self.messages[self.num_forgotten :]]


def load_chat(
    folder: str | Path,
    tokenizer: str | Path | None = None,
    template: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    num_rows: int = 1,
    max_waiting: int = 64,
    progress: Progress | None = None,
) -> ChatModel:
    """A chat with the model of a native checkpoint or a Hugging Face folder, or with an adapter on such a folder.

    `tokenizer` None: the folder's own, or the one that the run was trained with. `template` is a built-in name, a
    Jinja file or a Hugging Face folder; None: the folder's own, that of the run's data, or that of its model type.
    `max_length` None: what the model was made for, at most 4096. Raises UserError, for all but damaged tensors
    before they are read.
    """
    if num_rows < 1 or max_waiting < 0:
        raise UserError(f"num_rows={num_rows} must be at least 1 and max_waiting={max_waiting} not negative")
    device = find_device(device)
    reader = open_model(folder)
    words = tokenizer_of(reader, folder) if tokenizer is None else open_tokenizer(tokenizer)
    chat_template = template_of_model(reader, folder) if template is None else find_template(template)
    config = model_config(reader)
    check_tokenizer(words, config)
    if words.size < config.vocab_size:
        logger.info(f"the tokenizer has {words.size} ids, the model {config.vocab_size}: the rest has no text")
    if max_length is not None:
        if max_length < 2:
            raise UserError(f"max_length {max_length}: a prompt and an answer are 2 tokens at least")
        check_length(max_length, config, f"max_length {max_length}")
    model = read_model(reader, device, dtype, progress)
    length = max_length or min(config.max_position_embeddings, MAX_LENGTH)
    batcher = Batcher(model, num_rows, length, max_waiting)
    logger.info(
        f"{folder} on {batcher.device}: {length} tokens a conversation, {num_rows} at a time "
        f"({batcher.cache_bytes / 1e6:.1f} MB of keys and values), chat template {chat_template.name}"
    )
    return ChatModel(batcher, words, chat_template, Path(folder).resolve().name)


def template_of_model(reader: HFReader | CheckpointReader, folder: str | Path) -> ChatTemplate:
    """The chat template of an opened folder, that of the run's data, or that of its model type. Raises UserError."""
    if isinstance(reader, HFReader):
        return template_of(reader.text_folder)
    if reader.config.data.type in ("chat", "preference"):
        return template_of_data(reader.config.data)
    name = _NATIVE_TEMPLATES.get(reader.config.model_type)
    if name is None:
        raise UserError(f"{folder}: model_type {reader.config.model_type} has no chat template of its own; name one")
    return find_template(name)
