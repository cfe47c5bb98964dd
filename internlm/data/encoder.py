"""Texts to token ids with a sentencepiece model, several times faster than line by line where that is exact.

A BPE model without text normalisation never merges across most spaces, because no piece of its vocabulary reaches
across them. So a line can be cut there, and the words encoded one by one and remembered: same ids, less work.
`Cutter` proves from the model file where cuts are allowed; for other models whole lines are encoded.

Ids are handed out in decimal ("1, 22, 333"), as they are written: joining remembered text beats joining numbers.
Torch is not imported here, so that worker processes start fast.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from internlm.utils.errors import UserError

SPACE = "\u2581"  # how sentencepiece writes a space
MAX_WORDS = 1 << 18  # remembered per process, about 60 MB
MAX_WORD_LENGTH = 32  # longer ones rarely come back


@dataclass(frozen=True)
class Recipe:
    """How a text becomes ids. `text_key`: a jsonl line or json element is an object with its text there;
    None: the line itself, or the element written as JSON, is the text (as the 2023 tool did)."""

    tokenizer: str
    add_bos: bool = True
    add_eos: bool = False
    text_key: str | None = None


class Encoder:
    """Ids of texts. Raises UserError if the model can't be read or lacks `<s>` or `</s>` where the recipe adds it."""

    def __init__(self, recipe: Recipe) -> None:
        self.model = load_model(recipe.tokenizer)
        head = [self.model.bos_id()] if recipe.add_bos else []
        tail = [self.model.eos_id()] if recipe.add_eos else []
        if min([*head, *tail, 0]) < 0:
            raise UserError(f"{recipe.tokenizer}: this model has no <s> or no </s> to add.")
        self._head, self._tail = _decimal(head), _decimal(tail)
        self._cutter = Cutter.of(self.model)
        self._firsts: dict[str, str] = {}  # text -> its ids as ", 1, 22"
        self._words: dict[str, str] = {}  # text behind the space of a cut -> ids of the space and the text

    def encode(self, texts: list[str]) -> list[str]:
        """The ids of each text in decimal, with `<s>` and `</s>` as the recipe says."""
        inner = self._whole(texts) if self._cutter is None else self._by_words(texts, self._cutter)
        return [(self._head + ids + self._tail)[2:] for ids in inner]

    def _whole(self, texts: list[str]) -> list[str]:
        return [_decimal(ids) for ids in self.model.encode(texts, num_threads=1)]

    def _by_words(self, texts: list[str], cutter: "Cutter") -> list[str]:
        lines = [cutter.cut(text) for text in texts]
        firsts = [words.pop(0) for words in lines]
        space = "" if cutter.dummy_prefix else " "
        long = [
            (self._firsts, self._learn(self._firsts, set(firsts), "")),
            (self._words, self._learn(self._words, set().union(*lines), space)),
        ]
        known = self._words.__getitem__
        ids = [self._firsts[first] + "".join(map(known, words)) for first, words in zip(firsts, lines, strict=True)]
        for table, words in long:
            for word in words:
                del table[word]
            if len(table) > MAX_WORDS:
                table.clear()
        return ids

    def _learn(self, known: dict[str, str], words: set[str], prefix: str) -> list[str]:
        """Encode what is not yet known, in one call, which costs half of many; returns those too long to be kept."""
        new = list(words - known.keys())
        known.update(zip(new, self._whole([prefix + word for word in new]), strict=True))
        return [word for word in new if len(word) > MAX_WORD_LENGTH]


@dataclass(frozen=True)
class Cutter:
    """Cuts texts at spaces where the ids stay the same; the space of a cut is dropped from the parts.

    A cut between character c and a space is allowed when no piece of the vocabulary holds c followed by a space.
    """

    boundary: "re.Pattern[str]"
    forbidden: tuple[str, ...]  # texts with one of these need `boundary`; others are cut at every space
    dummy_prefix: bool  # the model itself puts a space before every text

    @staticmethod
    def of(model: Any) -> "Cutter | None":
        """None: for this model no cut is known to be safe."""
        fields = ModelFields(model.serialized_model_proto())
        if not fields.cuts_words:
            return None
        before = sorted({left for piece in fields.pieces for left in re.findall(f"([^{SPACE}]){SPACE}", piece)})
        boundary = re.compile(f"(?<=[^ {re.escape(''.join(before))}]) ")
        return Cutter(boundary, ("  ", *(left + " " for left in before)), fields.dummy_prefix)

    def cut(self, text: str) -> list[str]:
        """The parts of `text`, at least one: all but the first stood behind a space."""
        # A literal U+2581 counts as a space in the model; a space at the end would leave an empty text, which gets
        # no dummy prefix.
        if SPACE in text or (self.dummy_prefix and text[-1:] == " "):
            return [text]
        body = text.lstrip(" ")
        for pair in self.forbidden:
            if pair in body:
                return self.boundary.split(text)
        words = body.split(" ")
        words[0] = text[: len(text) - len(body)] + words[0]
        return words


def _decimal(ids: list[int]) -> str:
    """ids with a comma before each: ", 1, 22"."""
    return ", " + str(ids)[1:-1] if ids else ""


def load_model(path: str) -> Any:
    """The sentencepiece model in the file. Raises UserError."""
    import sentencepiece  # not every run reads text

    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a sentencepiece model file ({error}).") from error


class ModelFields:
    """What a model file says of its pieces and switches; field numbers from sentencepiece_model.proto."""

    def __init__(self, data: bytes) -> None:
        top = list(_proto(data))
        pieces = [dict(_proto(value)) for number, value in top if number == 1]
        trainer = dict(item for number, value in top if number == 2 for item in _proto(value))
        normalizer = dict(item for number, value in top if number == 3 for item in _proto(value))
        self.pieces = [piece[1].decode("utf-8") for piece in pieces if 1 in piece]
        self.user_defined = [piece[1].decode("utf-8") for piece in pieces if piece.get(3) == 4]
        self.dummy_prefix = normalizer.get(3, 1) == 1
        self.cuts_words = (
            trainer.get(3) == 2  # model_type: BPE
            and not trainer.get(24)  # treat_whitespace_as_suffix
            and not normalizer.get(2)  # precompiled_charsmap: text is changed before it is encoded
            and normalizer.get(4, 1) == 0  # remove_extra_whitespaces
            and normalizer.get(5, 1) == 1  # escape_whitespaces
            and SPACE in self.pieces
            and not any(SPACE in piece or " " in piece for piece in self.user_defined)
        )


def _proto(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for varints, bytes for anything longer."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
            yield key >> 3, data[place : place + size]
            place += size
