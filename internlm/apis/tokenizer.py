"""Text to ids and back, from a sentencepiece model or the tokenizer.json of a Hugging Face folder.

Special tokens in a text become their ids, as chat templates need it; nothing is added to a text. A sentencepiece model
does not know those that were named after it was made, so they are looked for here: those that the folder's
tokenizer_config.json adds, and InternLM2's, whose released models name six of the unused pieces.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm.checkpoint.hf_tokenizer import fast_tokenizer
from internlm.config.schema import ModelConfig
from internlm.data.encoder import load_model
from internlm.data.tokenizer import INTERNLM2_NAMES
from internlm.utils.errors import UserError


class Tokenizer(Protocol):
    """What chat needs of a tokenizer."""

    size: int  # ids are below it
    bos_id: int | None  # what a text begins with; None where the model expects nothing
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, special tokens in it as one id each, nothing added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with the names of special tokens but those of begin, end and padding."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a special token, None where the vocabulary has no such token."""
        ...


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a sentencepiece .model file, a tokenizer.json, or a Hugging Face folder. Raises UserError."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist; give a sentencepiece .model file or a Hugging Face folder")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model; name the model's tokenizer")
        path = found[0]
    added, ends = _settings(folder / "tokenizer_config.json")
    if path.suffix == ".json":
        return _FastTokenizer(fast_tokenizer(path), ends)
    return _SentencePiece(load_model(str(path)), added)


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises UserError where a tokenizer has ids that the model doesn't."""
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids, the model's vocab_size is {config.vocab_size}: "
            "it is not the one that the model was trained with"
        )


class _SentencePiece:
    def __init__(self, model: Any, added: dict[str, int]) -> None:
        self.model = model
        pieces = range(model.vocab_size())
        self.special = {model.id_to_piece(index): index for index in pieces if model.is_control(index)}
        self.silent = frozenset(self.special.values())
        last = model.piece_to_id(INTERNLM2_NAMES["<|im_start|>"])
        renamed = INTERNLM2_NAMES if last != model.unk_id() else {}
        self.named = {name: model.piece_to_id(piece) for name, piece in renamed.items()} | {
            name: index for name, index in added.items() if name not in self.special
        }
        self.special |= self.named
        self.names = {index: name for name, index in self.named.items()}
        self.size = 1 + max([model.vocab_size() - 1, *self.special.values()])
        self.bos_id, self.eos_id = (index if index >= 0 else None for index in (model.bos_id(), model.eos_id()))
        self.boundary = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def encode(self, text: str) -> list[int]:
        parts = self.boundary.split(text)  # every second one is a special token
        return [
            token
            for number, part in enumerate(parts)
            for token in ([self.special[part]] if number % 2 else self.model.encode(part))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        run: list[int] = []
        for token in ids:
            if token in self.names:
                text, run = text + self.model.decode(run) + self.names[token], []
            elif token not in self.silent and token < self.model.vocab_size():
                run.append(token)
        return text + self.model.decode(run)

    def id_of(self, token: str) -> int | None:
        if token in self.special:
            return self.special[token]
        index = self.model.piece_to_id(token)
        return None if index == self.model.unk_id() else index


class _FastTokenizer:
    def __init__(self, backend: Any, ends: Mapping[str, str]) -> None:
        self.backend = backend
        self.size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.silent = frozenset(backend.token_to_id(name) for name in ends.values())
        self.bos_id = next(iter(backend.encode("").ids), None)  # what its post-processor adds
        self.eos_id = backend.token_to_id(ends["eos"]) if "eos" in ends else None

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([token for token in ids if token not in self.silent], skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)


def _settings(file: Path) -> tuple[dict[str, int], dict[str, str]]:
    """What tokenizer_config.json says: ids of tokens beyond the vocabulary file, and its bos, eos and pad tokens."""
    if not file.is_file():
        return {}, {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        added = {entry["content"]: int(index) for index, entry in settings.get("added_tokens_decoder", {}).items()}
        ends = {kind: settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        return added, {kind: t["content"] if isinstance(t, dict) else t for kind, t in ends.items() if t}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not as expected ({error!r}); fetch it again") from error


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
