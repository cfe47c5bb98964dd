"""What all tests share: thread limits, a tiny tokenizer, the `gpu` marker, the order of parallel runs."""

import os
import tempfile

if not os.access(os.path.expanduser("~"), os.W_OK):  # where libraries keep what they have downloaded or compiled
    _home = tempfile.TemporaryDirectory()  # of all processes of the run, until it ends
    os.environ["HOME"] = _home.name
# Before torch starts its threads: workers of multi-rank tests share the cores with this process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if os.uname().sysname == "Linux" else "lo0")  # asks no name server
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # tests' servers are not behind a proxy

import inspect
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import sentencepiece
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Which tests came before in this process depends on how fast the other one is."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def uses_the_pool(item: pytest.Item) -> bool:
    """Whether a test's module, or a helper that it imports, runs ranks in the pool of tests/pool.py."""
    functions = [value for value in vars(item.module).values() if inspect.isfunction(value)]  # type: ignore[attr-defined]
    return any("run_ranks" in function.__globals__ for function in functions)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take long come first, so that at the end no process has one to itself.
    items.sort(key=lambda item: not (uses_the_pool(item) or "house" in item.path.parts))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _no_log_of_another_test() -> Iterator[None]:
    """Tests set logging up in this process; lines of one must not wait there for the file of the next."""
    _forget_logging()
    yield
    _forget_logging()


def _forget_logging() -> None:
    logger = logging.getLogger("internlm")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 512 pieces with byte fallback; ids 0 <unk>, 1 <s>, 2 </s>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_prefix=str(folder / "tiny"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tiny.model"
