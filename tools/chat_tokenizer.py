"""Tokenises conversations ahead of a run: .bin/.meta files whose negative ids are fed, but not trained on.

    python tools/chat_tokenizer.py --config configs/demo_sft.py --output data/tokens [section.key=value ...]

Reads data.train_folder and data.valid_folder as a run of this config with data.type="chat" would, and writes
OUTPUT/train and OUTPUT/valid, folder by folder. A run on OUTPUT/train with data.type="tokenized" and
data.packing="fit" trains on the same rows. Files that are there already are replaced.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.config.checks import check
from internlm.config.loader import load_config
from internlm.data.chat import CHAT_SUFFIXES, ChatFile, open_chat, recipe_of
from internlm.data.sources import walk
from internlm.data.writer import BinWriter
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import setup_logging


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run's config file, with data.type=chat")
    parser.add_argument("--output", type=Path, required=True, help="folder for train/ and valid/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that win over the file")
    return parser.parse_args(arguments)


def signed(file: ChatFile, index: int) -> list[int]:
    """The ids of a sample, negative where nothing is trained. Raises UserError for what the format can't say."""
    ids, trained = file.sample(index)
    if (trained & (ids == 0)).any():
        raise UserError(
            f"{file.name}, {file.place(index)}: id 0 is trained on, but 0 in a .bin file never is: it is an ordinary "
            'token of this tokenizer. Train with data.type = "chat", which caches what it tokenises.'
        )
    return np.where(trained, ids, -ids).tolist()


def tokenize(options: argparse.Namespace) -> None:
    """Write all files, and say which settings train on them."""
    config = load_config(options.config, options.overrides)
    check(config)
    if config.data.type != "chat":
        raise UserError(f'--config {options.config}: data.type = "{config.data.type}", expected "chat"')
    recipe = recipe_of(config.data, config.model.vocab_size)
    for name, folder in (("train", config.data.train_folder), ("valid", config.data.valid_folder)):
        for source in walk(Path(folder), CHAT_SUFFIXES) if folder else ():
            file = open_chat(recipe, source)
            target = options.output / name / source.relative_to(folder).with_name(f"{source.name}.bin")
            with BinWriter(target) as writer:
                writer.write([str(signed(file, index))[1:-1] for index in range(len(file))])
            print(f"{target}: {writer.num_samples} samples, {writer.num_tokens} tokens")
    print(f'train with data.type="tokenized" data.packing="fit" data.train_folder={options.output / "train"}')


def main() -> int:
    """Exit code: 0 when all is written, 2 for a mistake that the user can fix."""
    setup_logging(0, 1)
    return exit_code(lambda: tokenize(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
