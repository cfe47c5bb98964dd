"""The one name that InternEvo's config files import from here."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def read_base() -> Iterator[None]:
    """Marks the imports of base files at the head of a config: `with read_base(): from configs._base_.x import *`.

    It does nothing: the imports are plain Python, and a later assignment of the same name replaces the base's value
    as a whole. The key `_base_` merges section by section instead.
    """
    yield
