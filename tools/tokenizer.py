"""Turns a text file into training data: `OUT` (.bin, one {"tokens": [...]} a line) and `OUT.meta` (offsets, lengths).

    python tools/tokenizer.py --text_input_path corpus.jsonl --text_key text --bin_output_path data/en/corpus.bin

The format follows from the input's name. .txt: each line, stripped, is a sample; empty lines are passed over.
.jsonl: each line, with its newline, is tokenised as it stands; with --text_key, the text under that key of the line's
object. .json: one list; each element, written as JSON, or the text under --text_key of it.

Each sample begins with <s>, as in the 2023 tool; --add_eos adds </s> at its end, as its successor did. OUT appears
when it is complete. An OUT that exists is replaced only with --overwrite and added to only with --append: the
2023 tool always appended, so that running it twice doubled the data.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from internlm.data.encoder import Recipe, load_model
from internlm.data.tokenize import encode_file, kind_of
from internlm.data.writer import BinWriter
from internlm.utils.errors import UserError, exit_code

BESIDE = ("V7_sft.model", "tokenizer_internlm.model")  # names under which the two 2023 generations shipped the model


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_input_path", type=Path, required=True, help="the text: .txt, .json or .jsonl")
    parser.add_argument("--bin_output_path", type=Path, required=True, help="the .bin to write; its folder is created")
    parser.add_argument("--tokenizer", type=Path, help=f"sentencepiece model; default: {' or '.join(BESIDE)} in tools/")
    parser.add_argument("--text_key", help="the text is under this key of each jsonl line or json element")
    parser.add_argument("--add_eos", action="store_true", help="end each sample with </s>")
    parser.add_argument("--no_bos", action="store_true", help="do not begin each sample with <s>")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--append", action="store_true", help="add to an existing OUT")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser.parse_args(arguments)


def find_tokenizer(given: Path | None) -> Path:
    """The model to use. Raises UserError when there is none."""
    candidates = [given] if given else [Path(__file__).with_name(name) for name in BESIDE]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        reason = f"{given}: no such file" if given else f"no {' or '.join(BESIDE)} beside {Path(__file__).name}"
        raise UserError(f"--tokenizer: {reason}. Give the path of a sentencepiece model file.")
    load_model(str(found))
    return found


def tokenize(options: argparse.Namespace) -> None:
    source, target = options.text_input_path, options.bin_output_path
    if not source.is_file():
        raise UserError(f"--text_input_path {source}: no such file.")
    kind_of(source)
    if target.exists() and not (options.append or options.overwrite):
        raise UserError(f"--bin_output_path {target} exists: give --append to add to it, or --overwrite to replace it.")
    recipe = Recipe(str(find_tokenizer(options.tokenizer)), not options.no_bos, options.add_eos, options.text_key)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress, BinWriter(target, append=options.append) as writer:
        task = progress.add_task(source.name, total=source.stat().st_size)
        for piece in encode_file(source, recipe, options.num_workers):
            writer.write(piece.ids)
            progress.update(task, completed=piece.end)
    print(f"Successfully converted {source} to {target}")
    print(f"Successfully generated {target}.meta")
    print(f"{writer.num_samples} samples, {writer.num_tokens} tokens")


def main() -> int:
    """Exit code: 0 when all went well, 2 for a mistake that the user can fix."""
    return exit_code(lambda: tokenize(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
