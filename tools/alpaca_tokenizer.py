"""Turns an Alpaca-style JSON list into fine-tuning data: OUT/{train,valid}/en/dataset.bin and .bin.meta.

    python tools/alpaca_tokenizer.py alpaca_data.json OUT tokenizer.model [--split_ratio 0.1]

Each record has "instruction", "input" (may be empty) and "output". A sample is <s>, the user turn
"<|User|>:{instruction}\\n{input}" with its end, "<|Bot|>:", the answer with its end, cut to 2047 tokens, and </s>.
User turn and "<|Bot|>:" are written as negative ids: fed, but not trained on.

The ends are the ids of the 2023 tool: 103167, 13 after the user turn and 103166, 13 after the answer. That tool called
them <eoh> and <eoa>, but in the v1 tokenizer these are 103027 and 103028; 103167 and 103166 are unused tokens, and 13
is the raw newline byte. They are kept so that data compare with data made in 2023. Chat programs stop at 103028: give
--chat_ids to write 103027 and 103028 instead, for a model that is to chat with them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.data.encoder import load_model
from internlm.data.writer import BinWriter
from internlm.utils.errors import UserError, exit_code

MAX_TOKENS = 2047  # before </s>
NEWLINE = 13  # the byte 0x0A
ENDS_2023 = (103167, 103166)
ENDS_CHAT = (103027, 103028)  # <eoh>, <eoa>


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_path", type=Path, help="JSON list of records")
    parser.add_argument("output_path", type=Path, help="folder for train/ and valid/; files there are replaced")
    parser.add_argument("tokenizer_path", type=Path, help="sentencepiece model, the v1 tokenizer of InternLM")
    parser.add_argument("--split_ratio", type=float, default=0.1, help="share of validation records (default 0.1)")
    parser.add_argument("--chat_ids", action="store_true", help="end turns with <eoh> 103027 and <eoa> 103028")
    return parser.parse_args(arguments)


def read_records(path: Path) -> list[dict[str, str]]:
    """Raises UserError naming the record that is not as expected."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON list of records, found {type(records).__name__}.")
    for number, record in enumerate(records):
        for key in ("instruction", "input", "output"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise UserError(f'{path}, record {number}: expected an object with a string under "{key}".')
    return records


def sample_of(record: dict[str, str], tokenizer: Any, ends: tuple[int, int]) -> list[int]:
    """The ids of one record; negative where nothing is trained."""
    user = f"<|User|>:{record['instruction']}"
    if record["input"]:
        user += f"\n{record['input']}"
    masked = [*tokenizer.encode(user), ends[0], NEWLINE, *tokenizer.encode("<|Bot|>:")]
    answer = [*tokenizer.encode(record["output"]), ends[1], NEWLINE]
    ids = [tokenizer.bos_id(), *(-token for token in masked), *answer]
    return [*ids[:MAX_TOKENS], tokenizer.eos_id()]


def convert(options: argparse.Namespace) -> None:
    if not 0 <= options.split_ratio < 1:
        raise UserError(f"--split_ratio {options.split_ratio}: expected a share from 0 to below 1.")
    tokenizer = load_model(str(options.tokenizer_path))
    ends = ENDS_CHAT if options.chat_ids else ENDS_2023
    if tokenizer.vocab_size() <= max(ends):
        raise UserError(
            f"{options.tokenizer_path}: {tokenizer.vocab_size()} pieces, but turns end with the ids {ends} of the "
            "v1 tokenizer (103168 pieces); use that one."
        )
    records = read_records(options.dataset_path)
    # Drawn with replacement, so the validation part is slightly smaller than the ratio says; as in 2023.
    random = np.random.RandomState(0)
    drawn = random.choice(len(records), int(len(records) * options.split_ratio)) if records else []
    valid = {int(index) for index in drawn}
    for name, label in (("train", "train"), ("valid", "validation")):
        path = options.output_path / name / "en" / "dataset.bin"
        with BinWriter(path) as writer:
            for index, record in enumerate(records):
                if (index in valid) == (name == "valid"):
                    writer.write([", ".join(map(str, sample_of(record, tokenizer, ends)))])
        print(f"number of {label} dataset: {writer.num_samples}, number of {label} dataset token: {writer.num_tokens}")


def main() -> int:
    """Exit code: 0 when all went well, 2 for a mistake that the user can fix."""
    return exit_code(lambda: convert(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
