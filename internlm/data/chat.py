"""Conversations as training data: tokenised once into the text cache, with a mark on every id that is trained on.

What is trained on is decided in characters, by the template's generation marks, and carried over to ids. In the
cache an id that is fed but not trained on is stored as its bitwise complement (~id), since 0 is an ordinary id in many
vocabularies and has no negative.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internlm.config.schema import DataConfig
from internlm.data.chat_template import ChatTemplate, Written
from internlm.data.find_template import find_template, template_of, with_marks
from internlm.data.formats import Int64s, MegatronFile
from internlm.data.message import Message
from internlm.data.records import Conversation, PlainText, Record, pair_of, parse_line, record_of
from internlm.data.tables import TABLE_SUFFIXES, json_rows
from internlm.data.text import cached, content_hash
from internlm.data.tokenize import Encoded, Task, in_processes, line_number, tasks_of, texts_of
from internlm.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_files
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

CHAT_SUFFIXES = (".jsonl", ".json", *TABLE_SUFFIXES)

_EMPTY = "empty"  # counts samples that are left out
_SHARED = "shared"  # counts prompts that end inside a token

logger = get_logger(__name__)

TrainOn = Literal["answers", "last", "all"]
LongSamples = Literal["cut", "drop", "split"]


@dataclass(frozen=True)
class ChatRecipe:
    """All that the ids of a conversation depend on."""

    tokenizer: Path
    template: ChatTemplate
    train_on: TrainOn
    max_length: int
    long_samples: LongSamples | None  # None: a long sample is an error
    pairs: bool = False  # records hold a chosen and a rejected answer, which become two samples, one behind the other


class NothingToLearnError(UserError):
    """All that a sample would train on is empty."""


class ChatEncoder:
    """Records to ids. Raises UserError for a template that does not say what the assistant writes."""

    def __init__(self, recipe: ChatRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = open_tokenizer(recipe.tokenizer)
        if recipe.train_on != "all" and not recipe.template.tells_answers:
            raise UserError(
                f"chat template {recipe.template.name} has no generation marks, so it does not say which text the "
                "assistant writes. Put {% generation %} and {% endgeneration %} around that, name a built-in template "
                'that writes the same, or train on everything with data.train_on = "all".'
            )

    def encode(self, record: Record, counts: Counter[str] | None = None) -> Int64s:
        """The ids of a record, complemented where they are not trained on. Raises UserError if none is.

        A token that belongs to a text's prompt as well as to its completion is trained on, and counted.
        """
        text, spans, literal = self._plain(record) if isinstance(record, PlainText) else self._conversation(record)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"half a character (a lone surrogate), {error.object[error.start]!r}: {error}.") from error
        encoding = self.tokenizer.locate(text, literal)
        trained = encoding.inside(spans)
        if isinstance(record, PlainText) and counts is not None:
            start = spans[0][0]
            counts[_SHARED] += int(((encoding.starts < start) & (encoding.ends > start)).any())
        if not trained[1:].any():  # the first id is no target: nothing predicts it
            raise UserError("no token to train on in this sample: it has no (chosen) assistant turn, or an empty one.")
        return np.where(trained, encoding.ids, ~encoding.ids)

    def _plain(self, record: PlainText) -> Written:
        if not record.completion.strip():
            raise NothingToLearnError("an empty text, which would teach to say nothing. Leave it out.")
        begin, end = self.tokenizer.ends
        head = begin + record.prompt
        text = head + record.completion + end
        return Written(text, [(len(head), len(text))], [])

    def _conversation(self, record: Conversation) -> Written:
        template, beside = self.recipe.template, (record.tools or None, self.tokenizer.control)
        written = template.write(record.messages, False, *beside)
        everything = self.recipe.train_on == "all"
        for message in record.messages:
            if message.role != "assistant" and message.trained not in (None, everything):
                raise UserError(
                    f'"trained" (or "weight") is {json.dumps(message.trained)} in a turn of role {message.role}: only '
                    f'answers are chosen one by one, data.train_on = "{self.recipe.train_on}" decides about others.'
                )
        answers = [message for message in record.messages if message.role == "assistant"]
        by_default = [self.recipe.train_on != "last"] * len(answers)
        by_default[-1:] = [True] * len(answers[-1:])
        chosen = [
            default if message.trained is None else message.trained
            for message, default in zip(answers, by_default, strict=True)
        ]
        trained = [message for message, keep in zip(answers, chosen, strict=True) if keep]
        empty = [message for message in trained if not message.content.strip() and not message.tool_calls]
        if empty:
            error = UserError if len(empty) < len(trained) else NothingToLearnError
            raise error('an empty answer, which would teach to say nothing. Leave it out or set "trained": false.')
        if all(chosen) and (everything or template.marks_answers):
            return written._replace(answers=[(0, len(written.text))]) if everything else written
        wanted = [keep != everything for keep in chosen]
        spans = template.answers_of(record.messages, written, wanted, *beside)
        if everything:  # all but these
            borders = [0, *(border for span in spans for border in span), len(written.text)]
            spans = list(zip(borders[::2], borders[1::2], strict=True))
        return written._replace(answers=spans)

    def fitted(self, ids: Int64s, counts: Counter[str]) -> list[Int64s]:
        """The sample after `long_samples` was applied: pieces of at most `max_length` ids. Counts what was done."""
        length = self.recipe.max_length
        if len(ids) <= length:
            return [ids]
        rule = self.recipe.long_samples
        if rule is None:
            raise UserError(
                f"{len(ids)} tokens, more than data.seq_len = {length}. Say what to do with long samples: "
                'data.long_samples = "cut" (keep the beginning), "drop", or "split" (into pieces of seq_len).'
            )
        counts[rule] += 1
        pieces = {
            "cut": [ids[:length]],
            "drop": [],
            "split": [ids[start : start + length] for start in range(0, len(ids), length)],
        }[rule]
        kept = [piece for piece in pieces if (piece[1:] >= 0).any()]
        if len(kept) < len(pieces):
            counts["pieces without a trained token"] += len(pieces) - len(kept)
        return kept


class ChatFile(MegatronFile):
    """The cached samples of one file of conversations."""

    def sample(self, index: int) -> tuple[Int64s, np.ndarray]:
        ids = self.tokens(index)
        return np.where(ids >= 0, ids, ~ids), ids >= 0

    def place(self, index: int) -> str:
        return f"sample {self.documents[index]}"


def recipe_of(data: DataConfig, vocab_size: int) -> ChatRecipe:
    """How the conversations of a run are read. Raises UserError where tokenizer, template and model do not fit."""
    assert data.tokenizer_path is not None  # config/checks.py
    path = Path(data.tokenizer_path)
    tokenizer = open_tokenizer(path)
    if tokenizer.size > vocab_size:
        raise UserError(
            f"data.tokenizer_path = {path} has {tokenizer.size} ids, but model.vocab_size = {vocab_size}: it is not "
            "the tokenizer that the model was trained with, or vocab_size is too small."
        )
    if tokenizer.size < vocab_size:
        logger.info(f"tokenizer {path} has {tokenizer.size} ids, the model {vocab_size}: the rest is not used")
    template = with_marks(template_of_data(data))
    stop = template.stop[0] if template.stop else ""
    if stop and len(tokenizer.encode(stop)) != 1:
        logger.warning(
            f"chat template {template.name} ends answers with {stop}, which is not one token of {path}: "
            "check that template and tokenizer belong together"
        )
    return ChatRecipe(path, template, data.train_on, data.seq_len, data.long_samples, data.type == "preference")


def template_of_data(data: DataConfig) -> ChatTemplate:
    """How turns are written: as `data.chat_template` says, or as the tokenizer's folder does. Raises UserError."""
    if data.chat_template is not None:
        return find_template(data.chat_template)
    path = Path(data.tokenizer_path or "")
    if not path.is_dir():
        what = "is a file, which has no chat template" if path.is_file() else "is not there, nor its chat template"
        raise UserError(f"data.tokenizer_path = {path} {what}: name one as data.chat_template.")
    return template_of(path)


def prompt_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The ids of a conversation, up to where the assistant goes on. Raises UserError.

    No turn can forge another one: a mark of turns in it is text, also in an answer, which may repeat what a user wrote.
    """
    control = tokenizer.control
    written = template.write(messages, True, tools or None, control, template.turn_marks(control))
    return tokenizer.encode(written.text, written.literal)


def open_chat(recipe: ChatRecipe, path: Path, min_length: int = 0) -> ChatFile:
    """The samples of a jsonl, json, parquet or arrow file. Raises UserError naming the file and line that is broken."""
    template = recipe.template
    parts = (
        *(
            "chat, guarded and chosen turns, no nulls of tables, no equal pairs",
            *(content_hash(file) for file in tokenizer_files(recipe.tokenizer)),
        ),
        *(template.source, json.dumps(dict(template.tokens), sort_keys=True)),
        *(recipe.train_on, str(recipe.max_length), str(recipe.long_samples), str(recipe.pairs)),
    )
    entry = cached(path, parts, lambda workers: encode_chats(path, recipe, workers))
    file = ChatFile(entry, min_length)
    file.name = str(path)
    return file


def encode_chats(path: Path, recipe: ChatRecipe, num_workers: int) -> Iterator[Encoded]:
    """All samples of a file in order; what the rule for long samples did is logged at the end."""
    counts: Counter[str] = Counter()
    for encoded in in_processes(chat_tasks(path), partial(_task_encoder, recipe), num_workers):
        counts.update(encoded.counts)
        yield encoded
    if left_out := counts.pop(_EMPTY, 0):
        logger.warning(
            f"{path}: {left_out} samples are left out: their answers are empty, and would teach to say nothing"
        )
    if shared := counts.pop(_SHARED, 0):
        logger.warning(
            f"{path}: {shared} prompts end inside a token, which is trained on as a whole. A model that is given the "
            "prompt alone sees other tokens there: end prompts between two words, with the blank in the completion"
        )
    if counts:
        logger.info(f"{path}: {', '.join(f'{name}: {count}' for name, count in counts.items())} (data.long_samples)")


def chat_tasks(path: Path) -> Iterator[Task]:
    """The tasks of a file: lines, or rows of a table as JSON."""
    if path.suffix in TABLE_SUFFIXES:
        first = 0
        for texts in json_rows(path):
            yield Task(str(path), "json", texts=texts, first=first)
            first += len(texts)
    else:
        yield from tasks_of(path, None)


def _task_encoder(recipe: ChatRecipe) -> Callable[[Task], Encoded]:
    encoder = ChatEncoder(recipe)

    def encode(task: Task) -> Encoded:
        counts: Counter[str] = Counter()
        samples: list[str] = []
        for number, line in enumerate(texts_of(task, None)):
            if not line.strip():
                continue
            try:
                value = parse_line(line)
                records = pair_of(value) if recipe.pairs else (record_of(value),)
                fitted = [encoder.fitted(encoder.encode(record, counts), counts) for record in records]
            except NothingToLearnError as error:
                if recipe.pairs:
                    raise UserError(f"{task.path}, {place_in(task, number)}: {error}") from error
                counts[_EMPTY] += 1
                continue
            except UserError as error:
                raise UserError(f"{task.path}, {place_in(task, number)}: {error}") from error
            if recipe.pairs and all(fitted) and np.array_equal(fitted[0][0], fitted[1][0]):
                counts["pairs left out, equal as tokens"] += 1
            elif all(fitted):  # a pair stays or goes as a whole
                samples += [str(ids.tolist())[1:-1] for pieces in fitted for ids in pieces]
        return Encoded(samples, task.end, counts)

    return encode


def place_in(task: Task, number: int) -> str:
    """Where text `number` of a task stands in its file."""
    return f"line {line_number(task, number)}" if task.kind == "jsonl" else f"record {task.first + number + 1}"
