"""Mistakes in tokenizer and names of data files, found before anything is read for long."""

from internlm.config.schema import Config
from internlm.data.chat import ChatEncoder, recipe_of
from internlm.data.encoder import Encoder, Recipe
from internlm.data.sources import data_files
from internlm.data.tokenizer import check_tokenizer, open_tokenizer
from internlm.utils.errors import collected

TOKENISED_ON_THE_FLY = ("text", "chat", "preference")  # values of data.type; it may take hours


def find_name_problems(config: Config) -> list[str]:
    """What is wrong with the tokenizer, and with folders of files that are to be tokenised."""
    data = config.data
    problems: list[str] = []
    with collected(problems):
        _read_tokenizer(config)
    if data.type in TOKENISED_ON_THE_FLY:
        with collected(problems):
            data_files(data, "train_folder")
        if data.valid_folder is not None:
            with collected(problems):
                data_files(data, "valid_folder")
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
