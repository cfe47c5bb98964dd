"""Shows what a run trains on: one sample with its trained tokens in colour, and the statistics of all of them.

    python tools/inspect_data.py --config configs/demo_sft.py [--sample 3] [section.key=value ...]

Green tokens are trained on, grey ones are only read. Nothing is trained, and no GPU is touched.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from rich.console import Console
from rich.table import Table
from rich.text import Text

from internlm.config.checks import check
from internlm.config.loader import load_config
from internlm.data.formats import SampleFile
from internlm.data.loader import pack_options
from internlm.data.rows import TrainRows
from internlm.data.sources import open_train
from internlm.data.tokenizer import Tokenizer, open_tokenizer
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import setup_logging

MOST = 10_000  # samples that are read for the trained share; lengths are known of all
console = Console(highlight=False)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run's config file")
    parser.add_argument(
        "--sample", type=int, default=0, help="number of the sample to show, over all files (default 0)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that win over the file")
    return parser.parse_args(arguments)


def coloured(file: SampleFile, index: int, tokenizer: Tokenizer | None) -> Text:
    """The sample, each token as text (or as its id, without a tokenizer)."""
    text = Text()
    ids, trained = file.sample(index)
    for token, is_trained in zip(ids.tolist(), trained.tolist(), strict=True):
        piece = f"{token} " if tokenizer is None else tokenizer.piece(token)
        text.append(piece, style="bold green" if is_trained else "bright_black")
    return text


def statistics(files: list[SampleFile], rows: TrainRows, row_length: int) -> Table:
    """Lengths, the share of row places that hold tokens, and the share of tokens that are trained on."""
    lengths = np.concatenate([file.lengths for file in files])
    places = [(file, index) for file in files for index in range(len(file))]
    chosen = np.linspace(0, len(places) - 1, min(len(places), MOST)).astype(int)
    trained = tokens = 0
    for place in chosen:
        file, index = places[place]
        mask = file.sample(index)[1]
        trained, tokens = trained + int(mask.sum()), tokens + len(mask)
    table = Table(show_header=False, box=None, padding=(0, 2))
    quantiles = np.percentile(lengths, [0, 50, 95, 100])
    table.add_row("samples", f"{len(lengths):,} in {len(files)} files")
    table.add_row("tokens", f"{lengths.sum():,}")
    table.add_row("tokens a sample", "{:.0f} least, {:.0f} median, {:.0f} of 95 %, {:.0f} most".format(*quantiles))
    table.add_row("rows", f"{len(rows):,} of {row_length:,} tokens")
    filled = sum(used_tokens(rows, number) for number in range(min(len(rows), MOST)))
    table.add_row(
        "packing efficiency", f"{filled / max(1, min(len(rows), MOST) * row_length):.1%} of the places of a row"
    )
    table.add_row("trained on", f"{trained / max(1, tokens):.1%} of the tokens")
    return table


def used_tokens(rows: TrainRows, number: int) -> int:
    """Tokens of a row up to its padding, in which nothing is trained and every id is 0."""
    row = rows[number]
    ends = np.cumsum(row.lengths)
    padding = [not row.data[0, end - length : end].any() for end, length in zip(ends, row.lengths, strict=True)]
    return int(sum(length for length, empty in zip(row.lengths, padding, strict=True) if not empty))


def inspect(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    check(config)
    sources = open_train(config.data, config.model.vocab_size)
    pack = pack_options(config)
    rows = TrainRows(sources, pack)
    number = options.sample
    total = sum(len(file) for file in sources.files)
    if total == 0:
        raise UserError(
            f"data.train_folder = {config.data.train_folder}: no sample to train on is left (data.type = "
            f"{config.data.type}, data.min_length = {config.data.min_length}, data.long_samples = "
            f"{config.data.long_samples}); see the warnings above."
        )
    if not 0 <= number < total:
        raise UserError(f"--sample {number}: there are {total} samples, counted from 0.")
    for file in sources.files:
        if number < len(file):
            break
        number -= len(file)
    tokenizer = None if config.data.tokenizer_path is None else open_tokenizer(config.data.tokenizer_path)
    console.print(f"[bold]{file.name}, {file.place(number)}")
    console.print(coloured(file, number, tokenizer))
    console.print(statistics(sources.files, rows, pack.row_length))


def main() -> int:
    """Exit code: 0 when all went well, 2 for a mistake that the user can fix."""
    setup_logging(0, 1)
    return exit_code(lambda: inspect(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
