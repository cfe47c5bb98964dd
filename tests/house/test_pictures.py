"""The pictures of the documentation are what the code's tables say now."""

import xml.etree.ElementTree as ElementTree

import pytest

from tools.pictures import FOLDER, PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_current(name: str) -> None:
    drawn = PICTURES[name]()
    ElementTree.fromstring(drawn)
    assert (FOLDER / name).read_text(encoding="utf-8") == drawn, "run: python tools/pictures.py"
