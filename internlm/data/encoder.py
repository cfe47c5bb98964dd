"""Texts to token ids with a sentencepiece model, several times faster than text by text where that is exact.

A BPE model without text normalisation never merges two characters that stand side by side in no piece of its
vocabulary, such as a closing bracket and the letter behind it. So a text can be cut there, and its parts, here called
words, encoded one by one and remembered: same ids, less work. `Cutter` proves from the model file where cuts are
allowed; for other models whole texts are encoded.

All cuts are made that are allowed. Source code has two to six times as many words then as with cuts in front of
punctuation only, but half to a sixteenth as many different ones, and a new word costs as much as fifteen known ones.
numpy finds the cuts of a megabyte at a time; nothing in Python runs once a word, except for new ones.

Ids are handed out in decimal ("1, 22, 333"), as they are written: joining remembered text beats joining numbers.
Torch is not imported here, so that worker processes start fast.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm.utils.errors import UserError

SPACE = "\u2581"  # how sentencepiece writes a space
SEPARATOR, MARK = "\x01", "\x02"  # between words and between texts; hardly in any text
GROUP = 64  # words that are encoded as one text
MAX_WORDS = 1 << 19  # remembered per process, twice: about 200 MB
MAX_WORD_BYTES = 48  # longer ones rarely come back


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
        self._words = dict(NO_WORDS)  # what stands between two cuts -> its ids as ", 1, 22"
        self._earlier: dict[bytes, str] = {}

    def encode(self, texts: list[str]) -> list[str]:
        """The ids of each text in decimal, with `<s>` and `</s>` as the recipe says."""
        parts = [text for text in texts if self._can_cut(text)]
        whole = [text for text in texts if not self._can_cut(text)]
        ids = dict(zip(parts + whole, self._by_words(parts) + self._whole(whole), strict=True))
        return [(self._head + ids[text] + self._tail)[2:] for text in texts]

    def _can_cut(self, text: str) -> bool:
        return self._cutter is not None and not any(sign in text for sign in (SEPARATOR, MARK, SPACE))

    def _whole(self, texts: list[str]) -> list[str]:
        return [_decimal(ids) for ids in self.model.encode(texts, num_threads=1)]

    def _by_words(self, texts: list[str]) -> list[str]:
        if self._cutter is None or not texts:
            return []
        words = self._cutter.cut(texts)
        ids: list[Any] = list(map(self._words.get, words))
        places, place = [], -1  # of words that are not known
        with suppress(ValueError):
            while True:
                place = ids.index(None, place + 1)
                places.append(place)
        new = dict.fromkeys(words[place] for place in places)
        self._learn(new, self._cutter.separator)
        for place in places:
            ids[place] = self._words[words[place]]
        for word in new:
            if len(word) > MAX_WORD_BYTES:
                del self._words[word]
        if len(self._words) > MAX_WORDS:
            self._earlier, self._words = self._words, dict(NO_WORDS)  # what is still in use comes back from there
        return "".join(ids).split(MARK)

    def _learn(self, words: Iterable[bytes], separator: str) -> None:
        """Many words, held apart, are encoded as one text, since each text costs as much as a dozen letters."""
        new = []
        for word in words:
            if word in self._earlier:
                self._words[word] = self._earlier[word]
            else:
                new.append(word)
        lead = SEPARATOR.encode()
        groups = [lead + lead.join(new[start : start + GROUP]) for start in range(0, len(new), GROUP)]
        encoded = (ids.split(separator)[1:] for ids in self._whole([group.decode() for group in groups]))
        self._words.update(zip(new, (", " + ids for group in encoded for ids in group), strict=True))


NO_WORDS = {MARK.encode(): MARK, b"": ""}


@dataclass(frozen=True)
class Cutter:
    """Cuts texts where the ids stay the same: between characters that no piece of the vocabulary holds side by side.

    At least one of the two is ASCII, so that a table of two bytes of UTF-8 tells. Without byte fallback no cut is safe:
    unknown characters in a row become one id together, which a cut would make two.
    """

    allowed: np.ndarray  # bool [256 * 256]: whether a cut may be between these two bytes
    dummy_prefix: bool  # the model itself puts a space before every text
    separator: str  # SEPARATOR's id among others, such as ", 4, "

    @staticmethod
    def of(model: Any) -> "Cutter | None":
        """None: for this model no cut is known to be safe."""
        fields = ModelFields(model.serialized_model_proto())
        signs = SEPARATOR, MARK
        if not fields.cuts_words or any(sign in piece and piece != sign for piece in fields.pieces for sign in signs):
            return None
        pieces = np.frombuffer(MARK.join(fields.pieces).replace(SPACE, " ").encode(), np.uint8)
        allowed = np.ones((256, 256), np.bool_)
        allowed[pieces[:-1], pieces[1:]] = False
        allowed[128:, 128:] = False
        allowed[ord(MARK), :] = allowed[:, ord(MARK)] = True
        return Cutter(allowed.ravel(), fields.dummy_prefix, f", {model.encode(SEPARATOR)[-1]}, ")

    def cut(self, texts: list[str]) -> list[bytes]:
        """The parts of all texts, with MARK between those of one text and of the next."""
        if self.dummy_prefix:
            texts = [" " * bool(text) + text for text in texts]
        text = np.frombuffer(MARK.join(texts).encode(), np.uint8)
        pairs = text[:-1].astype(np.uint16) << 8 | text[1:]
        cuts = np.flatnonzero(self.allowed[pairs]) + 1
        return np.insert(text, cuts, ord(SEPARATOR)).tobytes().split(SEPARATOR.encode())


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
        # control pieces, bytes and the unknown one are never found in a text
        self.pieces = [piece[1].decode("utf-8") for piece in pieces if 1 in piece and piece.get(3, 1) in (1, 4, 5)]
        self.user_defined = [piece[1].decode("utf-8") for piece in pieces if piece.get(3) == 4]
        self.dummy_prefix = normalizer.get(3, 1) == 1
        self.cuts_words = (
            trainer.get(3) == 2  # model_type: BPE
            and not trainer.get(24)  # treat_whitespace_as_suffix
            and not normalizer.get(2)  # precompiled_charsmap: text is changed before it is encoded
            and normalizer.get(4, 1) == 0  # remove_extra_whitespaces
            and normalizer.get(5, 1) == 1  # escape_whitespaces
            and trainer.get(35) == 1  # byte_fallback
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
