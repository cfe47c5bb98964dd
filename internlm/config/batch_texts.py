"""What the texts `data.rampup_batch_size` and `data.skip_batches` say."""

import re
from typing import NamedTuple

from internlm.utils.errors import UserError


class Ramp(NamedTuple):
    """Micro batches of a step while their number grows: `start`, then `increment` more every `every` steps."""

    start: int
    increment: int
    every: int


def parse_ramp(text: str) -> Ramp | None:
    """From "START INCR EVERY"; None for an empty text. Raises UserError."""
    words = text.split()
    if not words:
        return None
    if len(words) != 3 or not all(word.isdecimal() for word in words):
        raise UserError(f'data.rampup_batch_size = {text!r}: expected three numbers "START INCR EVERY", as "2 2 100"')
    ramp = Ramp(*map(int, words))
    if min(ramp) < 1:
        raise UserError(f"data.rampup_batch_size = {text!r}: START, INCR and EVERY must be 1 or more")
    return ramp


def parse_batches(text: str) -> list[range]:
    """The batches "N" and spans "A-B" (B included) of a text such as "3,10-12", which ascend. Raises UserError."""
    spans: list[range] = []
    for item in text.split(",") if text.strip() else []:
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if match is None:
            raise UserError(f'data.skip_batches = {text!r}: expected batches "N" and spans "A-B" for {item!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        what = f"data.skip_batches = {text!r}: {item.strip()}"
        if last < first:
            raise UserError(f"{what} ends before it begins; write {last}-{first}")
        if spans and first < spans[-1].stop:
            raise UserError(f"{what} comes after {spans[-1][-1]}; spans must ascend, without overlap")
        spans.append(range(first, last + 1))
    return spans
