"""A model's tokenizer as conversations need it: special tokens in the text, and where in the text each id comes from.

Nothing is added to a text: what a chat template writes is all there is. A sentencepiece model alone does not know the
special tokens that were named after it was made, so they are looked for here: those that the folder's
tokenizer_config.json adds, and InternLM2's, whose released models name six unused pieces.
"""

import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internlm.data.encoder import SPACE, load_model
from internlm.data.formats import Int64s
from internlm.utils.errors import UserError

# Names in the chat models that InternLM released -> pieces of the sentencepiece model.
INTERNLM2_NAMES = {
    "<|plugin|>": "[UNUSED_TOKEN_141]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]",
    "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|action_start|>": "[UNUSED_TOKEN_144]",
    "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|im_start|>": "[UNUSED_TOKEN_146]",
}


@dataclass(frozen=True)
class Encoding:
    """The ids of a text; id i is of the characters from starts[i] to ends[i]. All int64 [ids]."""

    ids: Int64s
    starts: Int64s
    ends: Int64s

    def inside(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """bool [ids]: has a character of one of `spans`. Bytes of one character belong together."""
        found = np.zeros(len(self.ids), bool)
        for start, end in spans:
            found |= ((self.ends > start) | (self.starts >= start)) & (self.starts < end)
        return found


class ChatTokenizer(Protocol):
    size: int  # ids are below it
    ends: tuple[str, str]  # texts of the tokens that begin and end a document, "" where there is none

    def encode(self, text: str) -> Encoding: ...

    def piece(self, index: int) -> str:
        """The text of one id, for people to read."""
        ...


def tokenizer_files(path: Path) -> list[Path]:
    """The files that decide about the ids: of a sentencepiece model, a tokenizer.json or a Hugging Face folder.

    Raises UserError if there is none.
    """
    if not path.is_dir():
        candidates = [path]
    else:
        vocabulary = next(
            (path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), path
        )
        candidates = [vocabulary, path / "tokenizer_config.json"]
    if not candidates[0].is_file():
        raise UserError(f"tokenizer {path}: neither a file nor a folder with tokenizer.json or tokenizer.model.")
    return [file for file in candidates if file.is_file()]


def open_chat_tokenizer(path: Path) -> ChatTokenizer:
    """Raises UserError where `path` is no tokenizer."""
    vocabulary = tokenizer_files(path)[0]
    settings = _settings(vocabulary.with_name("tokenizer_config.json"))
    if vocabulary.suffix == ".json":
        return _Fast(vocabulary, settings)
    return _SentencePiece(vocabulary, settings)


def _settings(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}).") from error


def _name(token: Any) -> str:
    return (token.get("content") if isinstance(token, dict) else token) or ""


class _SentencePiece:
    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        model = self.model = load_model(str(file))
        special = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
        if model.piece_to_id(INTERNLM2_NAMES["<|im_start|>"]) != model.unk_id():
            special |= {name: model.piece_to_id(piece) for name, piece in INTERNLM2_NAMES.items()}
        special |= {_name(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
        self.special, self.names = special, {index: name for name, index in special.items()}
        self.size = max(model.vocab_size(), *(index + 1 for index in special.values()))
        bos, eos = (model.id_to_piece(i) if i >= 0 else "" for i in (model.bos_id(), model.eos_id()))
        self.ends = (bos, eos)
        self._boundary = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def encode(self, text: str) -> Encoding:
        parts: list[tuple[Int64s, Int64s, Int64s]] = []
        place = 0
        for number, part in enumerate(self._boundary.split(text)):  # every second one is a special token
            if number % 2:
                parts.append((np.array([self.special[part]]), np.array([place]), np.array([place + len(part)])))
            elif part:
                parts.append(self._encode_plain(part, place))
            place += len(part)
        columns = zip(*parts, strict=True) if parts else ([], [], [])
        return Encoding(*(np.concatenate([np.empty(0, np.int64), *column]).astype(np.int64) for column in columns))

    def _encode_plain(self, text: str, place: int) -> tuple[Int64s, Int64s, Int64s]:
        pieces = self.model.encode(text, return_type="proto").pieces
        # sentencepiece counts bytes: characters that begin before each byte
        starts_character = (np.frombuffer(text.encode("utf-8"), np.uint8) & 0xC0) != 0x80
        characters = np.concatenate(([0], starts_character.cumsum()))
        spans = np.array([(piece.begin, piece.end) for piece in pieces], np.int64).reshape(-1, 2)
        ids = np.array([piece.id for piece in pieces], np.int64)
        return ids, characters[spans[:, 0]] + place, characters[spans[:, 1]] + place

    def piece(self, index: int) -> str:
        return self.names.get(index) or self.model.id_to_piece(index).replace(SPACE, " ")


class _Fast:
    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        try:
            # by name: who reads it here and who writes it for exports need the same optional package
            self.backend = import_module("tokenizers").Tokenizer.from_file(str(file))
        except ImportError as error:
            raise UserError(f'{file} is read by a package that is missing: pip install "internlm[export]"') from error
        except Exception as error:  # the package raises this bare class
            raise UserError(f"{file} is not a tokenizer that the tokenizers package reads: {error}") from error
        self.backend.no_truncation()
        self.size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        self.ends = (_name(settings.get("bos_token")), _name(settings.get("eos_token")))

    def encode(self, text: str) -> Encoding:
        encoded = self.backend.encode(text, add_special_tokens=False)
        spans = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        return Encoding(np.array(encoded.ids, np.int64), spans[:, 0], spans[:, 1])

    def piece(self, index: int) -> str:
        return self.backend.decode([index], skip_special_tokens=False)
