"""Tokens in, text out: what can be shown while an answer goes on."""

from collections.abc import Sequence

from internlm.data.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters, and nothing of a stop text.

    A character may take several tokens, and what a token adds may depend on those before it, so a window of tokens is
    decoded each time. A stop text ends the answer and is not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(filter(None, stop))
        self.stopped = False
        self._context: list[int] = []  # tokens whose text is out already
        self._new: list[int] = []
        self._held = ""  # may be the beginning of a stop text

    def add(self, token: int) -> str:
        """The text that has become certain."""
        self._new.append(token)
        text = self._decoded()
        if text.endswith("\ufffd") and len(self._new) < 8:  # no character has more bytes; else it really is broken
            return ""
        self._context, self._new = self._new, []
        return self._past_stops(text)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        text = "" if self.stopped else self._past_stops(self._decoded()) + self._held
        self._new, self._held = [], ""
        return text

    def _decoded(self) -> str:
        before = self.tokenizer.decode(self._context)
        return self.tokenizer.decode([*self._context, *self._new])[len(before) :]

    def _past_stops(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        lengths = range(min(len(text), max(map(len, self.stop), default=0)), 0, -1)
        held = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
