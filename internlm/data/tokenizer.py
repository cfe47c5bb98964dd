"""Text to ids and back, from a sentencepiece model, a tokenizer.json or a Hugging Face folder.

Control tokens in a text become their ids, as chat templates need it, and nothing is added: what a template writes is
all there is. A sentencepiece model alone does not know the tokens that were named after it was made, so they are looked
for here: those that the folder's tokenizer_config.json adds, and InternLM2's, whose released models name six unused
pieces.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from internlm.config.schema import ModelConfig
from internlm.data.encoder import SPACE, ModelFields, load_model
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

_CONTROL_LIKE = re.compile(r"<\S+>|\[\S+\]")

_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can spell them, UTF-8 can't


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


class Tokenizer(Protocol):
    """What conversations need of a tokenizer.

    `literal` are places in a text where something only looks like a control token: it is encoded in ordinary pieces.
    """

    size: int  # ids are below it
    bos_id: int | None  # what a text begins with; None where the model expects nothing
    eos_id: int | None
    ends: tuple[str, str]  # texts of the tokens that begin and end a document, "" where there is none
    control: "re.Pattern[str]"  # finds the texts that are control tokens
    special_ids: frozenset[int]  # control tokens that a text for people leaves out

    def encode(self, text: str, literal: Collection[int] = ()) -> list[int]:
        """The ids of `text`, control tokens in it as one id each, nothing added."""
        ...

    def locate(self, text: str, literal: Collection[int] = ()) -> Encoding:
        """`encode`, with the characters that each id is of."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with the names of control tokens but those of begin, end and padding."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a control token, None where the vocabulary has no such token."""
        ...

    def piece(self, index: int) -> str:
        """The text of one id, for people to read."""
        ...


def tokenizer_files(path: Path) -> list[Path]:
    """The files that decide about the ids: of a sentencepiece model, a tokenizer.json or a Hugging Face folder.

    Raises UserError if there is none.
    """
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist; give a sentencepiece .model file or a Hugging Face folder")
    files = [path]
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()][:1]
        if not files:
            raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model; name the model's tokenizer")
    settings = files[0].with_name("tokenizer_config.json")
    return [*files, settings] if settings.is_file() else files


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a sentencepiece .model file, a tokenizer.json, or a Hugging Face folder. Raises UserError."""
    vocabulary, *settings = tokenizer_files(Path(path).expanduser())
    added, ends = _settings(settings[0]) if settings else ({}, {})
    return _Fast(vocabulary, ends) if vocabulary.suffix == ".json" else _SentencePiece(vocabulary, added)


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises UserError where a tokenizer has ids that the model doesn't."""
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids, the model's vocab_size is {config.vocab_size}: "
            "it is not the one that the model was trained with"
        )


def _settings(file: Path) -> tuple[dict[str, int], dict[str, str]]:
    """What tokenizer_config.json says: ids of tokens beyond the vocabulary file, and its bos, eos and pad tokens."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        added = {entry["content"]: int(index) for index, entry in settings.get("added_tokens_decoder", {}).items()}
        ends = {kind: settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        return added, {kind: t["content"] if isinstance(t, dict) else t for kind, t in ends.items() if t}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not as expected ({error!r}); fetch it again") from error


class _InParts(ABC):
    """For a tokenizer that knows no literals: texts are cut inside them, so that it finds no control tokens there."""

    def encode(self, text: str, literal: Collection[int] = ()) -> list[int]:
        return self.locate(text, literal).ids.tolist()

    def locate(self, text: str, literal: Collection[int] = ()) -> Encoding:
        if half := _SURROGATE.search(text):
            raise UserError(f"character {half.start()} is {half[0]!r}, half of a UTF-16 pair and no text; remove it")
        cuts = [0, *(place + 1 for place in sorted(literal)), len(text)]
        return _joined((self._locate(text[start:stop]), start) for start, stop in pairwise(cuts) if start < stop)

    @abstractmethod
    def _locate(self, text: str) -> Encoding: ...


def _joined(parts: Iterable[tuple[Encoding, int]]) -> Encoding:
    """One encoding of encodings of parts that begin at the given characters."""
    nothing = np.empty(0, np.int64)
    ids, starts, ends = [nothing], [nothing], [nothing]
    for part, place in parts:
        ids.append(part.ids)
        starts.append(part.starts + place)
        ends.append(part.ends + place)
    return Encoding(*map(np.concatenate, (ids, starts, ends)))


class _SentencePiece(_InParts):
    def __init__(self, file: Path, added: Mapping[str, int]) -> None:
        model = self.model = load_model(str(file))
        end_tokens = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
        unknown = {model.id_to_piece(model.unk_id()): model.unk_id()}  # transformers takes its name for a token, too
        has_names = model.piece_to_id(INTERNLM2_NAMES["<|im_start|>"]) != model.unk_id()
        named = {name: model.piece_to_id(piece) for name, piece in INTERNLM2_NAMES.items()} if has_names else {}
        named |= {name: index for name, index in added.items() if name not in end_tokens}
        self.silent = frozenset(end_tokens.values())
        self.special = end_tokens | unknown | named
        self.names = {index: name for name, index in named.items()}
        self.size = 1 + max(model.vocab_size() - 1, *self.special.values())
        self.bos_id, self.eos_id = (index if index >= 0 else None for index in (model.bos_id(), model.eos_id()))
        bos, eos = ("" if index is None else model.id_to_piece(index) for index in (self.bos_id, self.eos_id))
        self.ends = (bos, eos)
        user_defined = ModelFields(model.serialized_model_proto()).user_defined
        # The text behind each is encoded like a new text, as by an export's tokenizer.json: it may get a blank.
        self._apart = self.special | {
            piece: model.piece_to_id(piece) for piece in filter(is_control_like, user_defined)
        }
        self.control = any_of(self._apart)
        self.special_ids = self.silent | {*self._apart.values()}

    def _locate(self, text: str) -> Encoding:
        parts: list[tuple[Encoding, int]] = []
        place = 0
        for found in self.control.finditer(text):
            parts.append((self._plain(text[place : found.start()]), place))
            place = found.end()
            one = Encoding(np.array([self._apart[found[0]]]), np.array([0]), np.array([len(found[0])]))
            parts.append((one, found.start()))
        return _joined([*parts, (self._plain(text[place:]), place)])

    def _plain(self, text: str) -> Encoding:
        pieces = self.model.encode(text, return_type="proto").pieces
        # sentencepiece counts bytes: characters that begin before each byte
        starts_character = (np.frombuffer(text.encode("utf-8"), np.uint8) & 0xC0) != 0x80
        characters = np.concatenate(([0], starts_character.cumsum()))
        spans = np.array([(piece.begin, piece.end) for piece in pieces], np.int64).reshape(-1, 2)
        ids = np.array([piece.id for piece in pieces], np.int64)
        return Encoding(ids, characters[spans[:, 0]], characters[spans[:, 1]])

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

    def piece(self, index: int) -> str:
        return self.names.get(index) or self.model.id_to_piece(index).replace(SPACE, " ")


class _Fast(_InParts):
    def __init__(self, file: Path, ends: Mapping[str, str]) -> None:
        try:
            # by name: who reads it here and who writes it for exports need the same optional package
            self.backend = import_module("tokenizers").Tokenizer.from_file(str(file))
        except ImportError as error:
            raise UserError(f'{file} is read by a package that is missing: pip install "internlm[export]"') from error
        except Exception as error:  # the package raises this bare class
            raise UserError(f"{file} is not a tokenizer that the tokenizers package reads: {error}") from error
        self.backend.no_truncation()
        self.size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        self.silent = frozenset(self.backend.token_to_id(name) for name in ends.values())
        self.bos_id = next(iter(self.backend.encode("").ids), None)  # what its post-processor adds
        self.eos_id = self.backend.token_to_id(ends["eos"]) if "eos" in ends else None
        self.ends = (ends.get("bos", ""), ends.get("eos", ""))
        added = self.backend.get_added_tokens_decoder().items()
        control = {i: t.content for i, t in added if t.special or is_control_like(t.content)}
        self.control, self._control_ids = any_of(control.values()), np.array(list(control), np.int64)
        self.special_ids = self.silent | {i for i, t in added if t.special}

    def _locate(self, text: str) -> Encoding:
        encoded = self.backend.encode(text, add_special_tokens=False)
        spans = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        ids = np.array(encoded.ids, np.int64)
        for start, end in spans[np.isin(ids, self._control_ids)]:
            if not self.control.fullmatch(text[start:end].strip()):
                raise UserError(
                    f"{text[start:end]!r} becomes a control token in this tokenizer, which nobody may forge"
                )
        return Encoding(ids, spans[:, 0], spans[:, 1])

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([token for token in ids if token not in self.silent], skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def piece(self, index: int) -> str:
        return self.backend.decode([index], skip_special_tokens=False)


def is_control_like(piece: str) -> bool:
    """Whether a piece that a tokenizer keeps whole is for control, by its name: the others are rare characters."""
    return _CONTROL_LIKE.fullmatch(piece) is not None


def any_of(texts: Iterable[str]) -> "re.Pattern[str]":
    """Finds the longest of `texts` that begins at a place; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
