"""Texts to token ids with a sentencepiece model, several times faster than line by line where that is exact.

A BPE model without text normalisation never merges two characters that stand side by side in no piece of its
vocabulary, such as a letter and the comma behind it. So a text can be cut there, and the words encoded one by one and
remembered: same ids, less work. `Cutter` proves from the model file where cuts are allowed; for other models whole
texts are encoded.

Ids are handed out in decimal ("1, 22, 333"), as they are written: joining remembered text beats joining numbers.
Torch is not imported here, so that worker processes start fast.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from internlm.utils.errors import UserError

SPACE = "\u2581"  # how sentencepiece writes a space
SEPARATOR = "\x01"  # hardly in any text
GROUP = 256  # words that are encoded as one text
MAX_WORDS = 1 << 19  # remembered per process, twice: about 200 MB
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
        self._words: dict[str, str] = {}  # what stands between two cuts -> its ids as ", 1, 22"
        self._earlier: dict[str, str] = {}

    def encode(self, texts: list[str]) -> list[str]:
        """The ids of each text in decimal, with `<s>` and `</s>` as the recipe says."""
        inner = self._whole(texts) if self._cutter is None else self._by_words(texts, self._cutter)
        return [(self._head + ids + self._tail)[2:] for ids in inner]

    def _whole(self, texts: list[str]) -> list[str]:
        return [_decimal(ids) for ids in self.model.encode(texts, num_threads=1)]

    def _by_words(self, texts: list[str], cutter: "Cutter") -> list[str]:
        lines = [cutter.cut(text) for text in texts]
        missing = set().union(*lines) - self._words.keys()
        seen = missing & self._earlier.keys()
        new = list(missing - seen)
        self._words.update(zip(new, self._learn(new, cutter), strict=True))
        self._words.update((word, self._earlier[word]) for word in seen)
        known = self._words.__getitem__
        ids = ["".join(map(known, words)) for words in lines]
        for word in new:
            if len(word) > MAX_WORD_LENGTH:
                del self._words[word]
        if len(self._words) > MAX_WORDS:
            self._earlier, self._words = self._words, {}  # what is still in use comes back from there
        return ids

    def _learn(self, words: list[str], cutter: "Cutter") -> list[str]:
        """The ids of words that are not known yet: many words, held apart, are encoded as one text, since each text
        costs as much as a dozen letters."""
        separator = cutter.separator
        if separator is None or any(SEPARATOR in word or not word for word in words):
            return self._whole(words)
        lead = SEPARATOR + " " * cutter.dummy_prefix
        groups = [lead + lead.join(words[at : at + GROUP]) for at in range(0, len(words), GROUP)]
        return [", " + ids for text in self._whole(groups) for ids in text.split(separator)[1:]]


@dataclass(frozen=True)
class Cutter:
    """Cuts texts where the ids stay the same: between characters that no piece of the vocabulary holds side by side.

    Cuts are made in front of *openers* only: a space, and other ASCII characters that follow no letter in any piece.
    A model that puts a space before every text would put one before each word; there it stands for the space of the
    cut, and spaces are the only openers.
    """

    word: "re.Pattern[str]"  # from one cut to the next
    dummy_prefix: bool  # the model itself puts a space before every text
    separator: str | None  # SEPARATOR's id among others, such as ", 4, ", if it has one to itself

    @staticmethod
    def of(model: Any) -> "Cutter | None":
        """None: for this model no cut is known to be safe."""
        fields = ModelFields(model.serialized_model_proto())
        if not fields.cuts_words:
            return None
        pairs = {piece[at : at + 2].replace(SPACE, " ") for piece in fields.pieces for at in range(len(piece) - 1)}
        openers = set(" ") if fields.dummy_prefix else set(string.punctuation + string.whitespace)
        openers -= {pair[1] for pair in pairs if pair[0] in string.ascii_letters}
        # A cut is between any other character and an opener, unless it stands in front of an opener in some piece.
        glued = {pair[0] for pair in pairs if pair[1] in openers} | {SPACE}
        others = _characters(openers | glued)
        word = f"[{others}]*(?:[^{others}]++[{_characters(glued - openers)}][{others}]*)*+[^{others}]*"
        ids = model.encode("x" + SEPARATOR)
        alone = not any(SEPARATOR in pair for pair in pairs) and ids[:-1] == model.encode("x")
        alone = alone and model.id_to_piece(ids[-1]) in (SEPARATOR, "<0x01>")
        return Cutter(re.compile(word), fields.dummy_prefix, f", {ids[-1]}, " if alone else None)

    def cut(self, text: str) -> list[str]:
        """The parts of `text`, to be encoded one by one."""
        if self.dummy_prefix and text[-1:] == " ":
            return [text]  # an empty text gets no dummy prefix
        words = self.word.findall(text)[:-1]  # the last match is the empty one at the end
        if self.dummy_prefix:
            words[1:] = [word[1:] for word in words[1:]]
        return words


def _characters(characters: set[str]) -> str:
    """The inside of a class of a regular expression."""
    return "".join(map(re.escape, sorted(characters)))


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
