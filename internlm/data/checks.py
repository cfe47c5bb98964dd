"""Mistakes in the files that a run reads, found from names and lengths before anything starts.

Text and conversations are looked at as far as the tokenizer and the names: how long they are is known when they are
tokenised, which is not done here.
"""

from internlm.config.schema import Config
from internlm.data.chat import ChatEncoder, recipe_of
from internlm.data.encoder import Encoder, Recipe
from internlm.data.loader import TrainRows, order_of, pack_options
from internlm.data.sampler import BatchSizes
from internlm.data.sources import data_files, open_train, open_valid
from internlm.data.tokenizer import check_tokenizer, open_tokenizer
from internlm.utils.errors import collected


def find_data_problems(config: Config, num_readers: int) -> list[str]:
    """What is wrong with tokenizer, folders and files, and whether they hold a step of `num_readers` data ranks."""
    data, vocab_size = config.data, config.model.vocab_size
    problems: list[str] = []
    with collected(problems):
        _read_tokenizer(config)
    if data.type in ("text", "chat", "preference"):
        with collected(problems):
            data_files(data, "train_folder")
        if data.valid_folder is not None:
            with collected(problems):
                data_files(data, "valid_folder")
        return problems
    with collected(problems):
        rows = TrainRows(open_train(data, vocab_size), pack_options(config))
        order_of(data, rows, BatchSizes(data.micro_num, num_readers, data.rampup_batch_size))
    with collected(problems):
        open_valid(data, vocab_size)
    return problems


def _read_tokenizer(config: Config) -> None:
    data = config.data
    if data.type in ("chat", "preference"):
        ChatEncoder(recipe_of(data, config.model.vocab_size))
    elif data.type == "text":
        Encoder(Recipe(str(data.tokenizer_path)))
    if config.evaluation.every:
        assert data.tokenizer_path is not None  # config/checks.py
        check_tokenizer(open_tokenizer(data.tokenizer_path), config.model)
