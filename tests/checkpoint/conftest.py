from collections.abc import Iterator

import pytest

from tests.checkpoint.fake import world_of_one


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    with world_of_one():
        yield
