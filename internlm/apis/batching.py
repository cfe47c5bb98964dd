"""Many requests at one model: each step decodes all that are being answered; others join and leave between steps.

A request waits until one of `num_rows` rows of the key/value cache is free. Its prompt is then fed alone, and its keys
and values are put into that row; from there on it is decoded together with the other rows. Each request has its own
sampling, seed, stop ids and limit, and gets the tokens that it would get alone.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from internlm.apis.generate import check_prompt, prefill
from internlm.apis.sampling import Sampling
from internlm.model.attention import KVCache
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


class BusyError(Exception):
    """Too many requests wait."""


@dataclass
class _Request:
    """What was asked for, and what has come out so far."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    generator: torch.Generator
    seen: Tensor  # bool [1, vocab], of the prompt and the output
    tokens: SimpleQueue[int | Exception | None] = field(default_factory=SimpleQueue)  # None: the end
    num_new: int = 0
    cancelled: bool = False  # set by the reader, read by the worker

    def add(self, logits: Tensor) -> int:
        """Choose the next token by its logits [1, vocab] and hand it to the reader."""
        chosen = self.sampling.choose(logits, self.seen, self.generator)
        self.seen.scatter_(1, chosen[:, None], True)
        token = int(chosen)
        self.num_new += 1
        self.tokens.put(token)
        return token

    def is_done(self, token: int) -> bool:
        return self.cancelled or token in self.stop_ids or self.num_new >= self.max_new_tokens


class Batcher:
    """Answers requests from any thread with one worker thread; a context manager that ends the worker.

    `max_length` bounds prompt and answer of one request together, in tokens. The cache is allocated at once:
    see `cache_bytes`.
    """

    def __init__(self, model: Transformer, num_rows: int = 1, max_length: int = 2048, max_waiting: int = 64) -> None:
        weight = model.embedding.weight
        self.model, self.device = model, weight.device
        self.max_length, self.max_waiting = max_length, max_waiting
        self._cache = KVCache(model.config, num_rows, max_length, weight.device, weight.dtype)
        self._rows: list[_Request | None] = [None] * num_rows
        self._next = torch.zeros(num_rows, dtype=torch.int64)  # token of each row that is not yet in the cache
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._worker.start()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cache_bytes(self) -> int:
        """Memory of the key/value cache."""
        return 2 * sum(keys.nbytes for keys in self._cache.keys)

    @property
    def max_requests(self) -> int:
        """Requests that are answered or wait at once, at most."""
        return len(self._rows) + self.max_waiting

    def close(self) -> None:
        """Ends the worker; answers that are under way end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> "Tokens":
        """The answer's tokens as they come, up to and including a stop id. Closing frees the row.

        Raises UserError for a prompt that doesn't fit, BusyError beyond `max_requests`.
        """
        check_prompt(prompt, max_new_tokens, self.model.config)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if len(prompt) + max_new_tokens > self.max_length:
            raise UserError(
                f"{len(prompt)} tokens of prompt and {max_new_tokens} of answer are {len(prompt) + max_new_tokens}, "
                f"the limit is {self.max_length}"
            )
        seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=self.device)
        seen[0, torch.tensor(prompt)] = True
        generator = torch.Generator(self.device).manual_seed(seed)
        request = _Request(prompt, max_new_tokens, sampling or Sampling(), frozenset(stop_ids), generator, seen)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            held = len(self._waiting) + sum(row is not None and not row.cancelled for row in self._rows)
            if held >= self.max_requests:
                raise BusyError(f"{held} requests are being answered or wait already")
            self._waiting.append(request)
            self._changed.notify()
        return Tokens(request)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._waiting and not any(self._rows):
                    self._changed.wait()
                if self._closed:
                    break
            try:
                self._admit()
                self._step()
            except Exception as error:  # out of memory, for example: these answers are lost, later ones may work
                logger.exception("requests failed")
                self._drop_all(error)
        self._drop_all(RuntimeError("the batcher was closed"))

    def _admit(self) -> None:
        """Feed the prompts of waiting requests into free rows."""
        for row, held in enumerate(self._rows):
            if held is not None:
                continue
            with self._changed:
                request = self._waiting.popleft() if self._waiting else None
                if request is None:
                    return
                if request.cancelled:
                    continue
                self._rows[row] = request
            prompt = torch.tensor([list(request.prompt)], device=self.device)
            cache = KVCache(self.model.config, 1, prompt.shape[1], self.device, self._cache.keys[0].dtype)
            logits = prefill(self.model, cache, prompt, torch.tensor([prompt.shape[1]], device=self.device))
            self._cache.put(row, cache)
            self._advance(row, request, logits)

    def _step(self) -> None:
        """One token for every row that is being answered."""
        running = [(row, request) for row, request in enumerate(self._rows) if request is not None]
        if not running:
            return
        self._cache.longest = max(len(request.prompt) + request.num_new - 1 for _, request in running)
        num_new = torch.tensor([int(request is not None) for request in self._rows])
        logits = self.model.decode(self._next[:, None].to(self.device), self._cache, num_new.to(self.device))
        for row, request in running:
            self._advance(row, request, logits[row : row + 1])

    def _advance(self, row: int, request: _Request, logits: Tensor) -> None:
        try:
            token = request.add(logits)
        except Exception as error:  # its own settings made it fail: the others go on
            logger.exception("a request failed")
            self._free(row)
            request.tokens.put(error)
            return
        self._next[row] = token
        if request.is_done(token):
            self._free(row)  # first: who reads the end may ask again at once
            request.tokens.put(None)

    def _free(self, row: int) -> None:
        self._rows[row] = None
        self._cache.lengths[row] = 0

    def _drop_all(self, error: Exception) -> None:
        with self._changed:
            waiting = list(self._waiting) if self._closed else []
            self._waiting = deque() if self._closed else self._waiting
        for request in [*filter(None, self._rows), *waiting]:
            request.tokens.put(error)
        for row in range(len(self._rows)):
            self._free(row)


class Tokens(Iterator[int]):
    """The tokens of one request. It may be closed by another thread than the one that waits for a token."""

    def __init__(self, request: _Request) -> None:
        self._request = request

    def __next__(self) -> int:
        token = None if self._request.cancelled else self._request.tokens.get()
        if isinstance(token, int):
            return token
        self._request.cancelled = True
        if token is None:
            raise StopIteration
        raise RuntimeError(f"the answer was broken off: {token}") from token

    def close(self) -> None:
        """Gives the row, or the place among the waiting, back."""
        self._request.cancelled = True
        self._request.tokens.put(None)  # for a thread that waits
