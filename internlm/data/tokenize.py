"""Text files to token ids: the common part of `tools/tokenizer.py` and of `data.type="text"`.

The file is cut into tasks of whole lines; worker processes read, check and encode their tasks; results come back
in order. Memory does not grow with the file.
"""

import json
import multiprocessing
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from internlm.data.encoder import Encoder, Recipe
from internlm.utils.errors import UserError

PIECE_BYTES = 1 << 20  # of text per task

Kind = Literal["txt", "json", "jsonl"]


@dataclass(frozen=True)
class Task:
    """Work for one process: some whole lines of a text file, or texts that were already taken out of a json list."""

    path: str
    kind: Kind
    start: int = 0
    size: int = 0
    texts: tuple[str, ...] = ()
    first: int = 0  # number in the file of the first of `texts`, from 0

    @property
    def end(self) -> int:
        """Bytes of the file that are read once this task is."""
        return self.start + self.size


def kind_of(path: Path) -> Kind:
    """Raises UserError unless the name ends in txt, json or jsonl."""
    suffix = path.name.rsplit(".", 1)[-1]
    if suffix not in ("txt", "json", "jsonl"):
        raise UserError(f"{path}: cannot tell the format by the name; it must end in .txt, .json or .jsonl.")
    return suffix  # type: ignore[return-value]


def tasks_of(path: Path, text_key: str | None) -> Iterator[Task]:
    """The tasks of a file, in order. Raises UserError for a json file that is not a list."""
    kind = kind_of(path)
    if kind == "json":
        yield from _json_tasks(path, text_key)
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start < size:
            file.seek(start + PIECE_BYTES)
            file.readline()
            end = min(file.tell(), size)
            yield Task(str(path), kind, start, end - start)
            start = end


def texts_of(task: Task, text_key: str | None) -> list[str]:
    """The texts of a task. Raises UserError naming file and line."""
    if task.kind == "json":
        return list(task.texts)
    with open(task.path, "rb") as file:
        file.seek(task.start)
        data = file.read(task.size)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line_number(task, data[: error.start].count(b"\n"))
        raise UserError(f"{task.path}, line {number}: not UTF-8 ({error.reason}).") from error
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if task.kind == "txt":
        return [stripped for line in lines if (stripped := line.strip())]
    if text_key is None:
        return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    texts = []
    for number, line in enumerate(lines):
        if line.strip():
            value, problem = _value(line, text_key)
            if problem:
                raise UserError(f"{task.path}, line {line_number(task, number)}: {problem}")
            texts.append(value)
    return texts


def line_number(task: Task, index: int) -> int:
    """The number in the file, from 1, of line `index` of the task; read again, as it is needed for errors only."""
    before, left = 0, task.start
    with open(task.path, "rb") as file:
        while left > 0:
            data = file.read(min(left, PIECE_BYTES))
            before += data.count(b"\n")
            left -= len(data)
    return before + index + 1


def _value(line: str, text_key: str) -> tuple[str, str]:
    """The text in a jsonl line, and what is wrong with it, if anything."""
    try:
        element = json.loads(line)
    except ValueError as error:
        return "", f"broken JSON ({error}): {line.strip()[:60]}"
    if not isinstance(element, dict) or not isinstance(element.get(text_key), str):
        return "", f'expected an object with a string under "{text_key}": {line.strip()[:60]}'
    return element[text_key], _half_character(element[text_key]) if "\\u" in line else ""


def _half_character(text: str) -> str:
    """What is wrong with a text that UTF-8 can't hold, which only an escape such as \\ud800 makes; else empty."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character (a lone surrogate), {text[error.start]!r}; correct the text or leave it out."
    return ""


def _json_tasks(path: Path, text_key: str | None) -> Iterator[Task]:
    texts: list[str] = []
    weight = done = first = 0
    for number, (element, end) in enumerate(json_elements(path)):
        if text_key is None:
            texts.append(json.dumps(element))
        elif isinstance(element, dict) and isinstance(element.get(text_key), str):
            texts.append(element[text_key])
        else:
            raise UserError(f'{path}, element {number + 1}: expected an object with a string under "{text_key}".')
        if problem := _half_character(texts[-1]):
            raise UserError(f"{path}, element {number + 1}: {problem}")
        weight += len(texts[-1])
        if weight >= PIECE_BYTES:
            yield Task(str(path), "json", done, end - done, tuple(texts), first)
            texts, weight, done, first = [], 0, end, number + 1
    yield Task(str(path), "json", done, path.stat().st_size - done, tuple(texts), first)


def json_elements(path: Path) -> Iterator[tuple[Any, int]]:
    """The elements of a file that is one JSON list, one by one, with the characters read so far.

    Raises UserError if it is anything else, naming the element at which reading stopped.
    """
    decoder = json.JSONDecoder()
    skip = re.compile(r"[\s,]*")
    with path.open(encoding="utf-8") as file:
        text, place, done, number, step = _read(file, PIECE_BYTES).lstrip(), 1, 0, 0, PIECE_BYTES
        if not text.startswith("["):
            raise UserError(f"{path}: a .json file must hold one list; for one object a line use .jsonl.")
        while True:
            place = skip.match(text, place).end()  # type: ignore[union-attr]
            if text[place : place + 1] == "]":
                return
            try:
                element, end = decoder.raw_decode(text, place)
                complete = end < len(text)  # else a number may go on behind what was read
            except ValueError:
                complete = False
            if complete:
                yield element, done + end
                place, number, step = end, number + 1, PIECE_BYTES
                continue
            more = _read(file, step)
            if not more:
                raise UserError(f"{path}, element {number + 1}: broken JSON, or the closing ] is missing.")
            done, text, place, step = done + place, text[place:] + more, 0, step * 2


def _read(file: TextIO, size: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8 ({error.reason}).") from error


@dataclass(frozen=True)
class Encoded:
    """The samples of one task, in decimal ids: sample i is `ids[i]`, for example "1, 22, 333"."""

    ids: list[str]
    end: int  # bytes of the input read so far
    counts: Counter[str] = field(default_factory=Counter)  # what happened to samples on the way


def encode_file(path: Path, recipe: Recipe, num_workers: int) -> Iterator[Encoded]:
    """All samples of a text file, in order. With one worker everything happens in this process."""
    yield from in_processes(tasks_of(path, recipe.text_key), partial(_task_encoder, recipe), num_workers)


def _task_encoder(recipe: Recipe) -> Callable[[Task], Encoded]:
    encoder = Encoder(recipe)
    return lambda task: Encoded(encoder.encode(texts_of(task, recipe.text_key)), task.end)


def in_processes(
    tasks: Iterator[Task], make: Callable[[], Callable[[Task], Encoded]], num_workers: int
) -> Iterator[Encoded]:
    """Applies the function that `make` returns to each task, in order; every process calls `make` once."""
    if num_workers <= 1:
        yield from map(make(), tasks)
        return
    # A fork inherits what is loaded; beside the threads of a training process it is not safe.
    method = "spawn" if "torch" in sys.modules else "fork"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start, initargs=(make,)) as pool:
        running: deque[Future[Encoded]] = deque()
        try:
            for task in tasks:
                running.append(pool.submit(_encode_task, task))
                if len(running) >= 3 * num_workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {num_workers} tokenising processes was killed, probably as memory ran out: start fewer of them"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encode: Callable[[Task], Encoded] | None = None  # of this process


def _start(make: Callable[[], Callable[[Task], Encoded]]) -> None:
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _encode = make()


def _encode_task(task: Task) -> Encoded:
    assert _encode is not None
    return _encode(task)
