"""One tiny chat model for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm.apis.chat import ChatModel, load_chat
from tests.apis.tiny_chat import make_chat_folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("tiny_chat"))


@pytest.fixture(scope="session")
def chat(chat_folder: Path) -> Iterator[ChatModel]:
    with load_chat(chat_folder, device="cpu", num_rows=3) as loaded:
        yield loaded
