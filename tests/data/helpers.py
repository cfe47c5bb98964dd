"""Writers of small data files, written from the format descriptions and not with the code under test."""

import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm.config.schema import Config
from internlm.data import text as text_module
from internlm.utils.errors import UserError

REAL_TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer_internlm.model"


def write_bin(path: Path, samples: Sequence[Sequence[int]], dtype: Any = np.int32, extra_columns: int = 0) -> Path:
    """A 2023 pair."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, offset = [], 0
    with path.open("wb") as file:
        for sample in samples:
            line = (json.dumps({"tokens": list(map(int, sample))}) + "\n").encode()
            file.write(line)
            meta.append((offset, *[7] * extra_columns, len(sample)))
            offset += len(line)
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(meta, dtype=dtype).reshape(len(samples), -1))
    return path


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], code: int = 4) -> Path:
    """A Megatron pair; each document is a list of sequences."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    kind = {4: "i", 8: "H"}[code]
    sequences = [sequence for document in documents for sequence in document]
    body, pointers = b"", []
    for sequence in sequences:
        pointers.append(len(body))
        body += struct.pack(f"<{len(sequence)}{kind}", *sequence)
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    index = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(sequences), len(bounds))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(bounds)}q", *bounds)
    Path(f"{prefix}.bin").write_bytes(body)
    Path(f"{prefix}.idx").write_bytes(index)
    return prefix


def random_samples(count: int, longest: int, seed: int = 0, vocab_size: int = 500) -> list[list[int]]:
    """Samples with ids of both signs and zeros, some empty."""
    random = np.random.default_rng(seed)
    return [
        (random.integers(0, vocab_size, int(n)) * random.choice([1, 1, 1, -1], int(n))).tolist()
        for n in random.integers(0, longest + 1, count)
    ]


def make_config(vocab_size: int = 512, **data: Any) -> Config:
    model = {"num_layers": 1, "hidden_size": 8, "vocab_size": vocab_size, "num_attention_heads": 1}
    sizes = {"seq_len": 16, "micro_bsz": 2, "micro_num": 2, "total_steps": 10, "num_worker": 0}
    return Config(model=model, data={**sizes, **data})  # type: ignore[arg-type]


def train_tokenizer(folder: Path, **options: Any) -> Path:
    """A small sentencepiece BPE model with byte fallback, trained on made-up words."""
    import sentencepiece

    random = np.random.default_rng(0)
    letters = "abcdefghij"
    words = ["".join(random.choice(list(letters), int(n))) for n in random.integers(1, 7, 300)]
    text = folder / "words.txt"
    text.write_text("\n".join(" ".join(random.choice(words, 12)) for _ in range(400)))
    defaults = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    prefix = folder / "tiny"
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(prefix), **{**defaults, **options})
    return prefix.with_suffix(".model")


def open_and_log(path: Path, tokenizer: Path, log: Path) -> None:
    """Open a text of 3,000 lines in one of three processes; `log` tells who tokenised it, and what is broken.

    Needs no torch.
    """
    original = text_module.encode_file

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    def counted(*arguments: Any) -> Any:
        note("built")
        while log.read_text().count("here") < 3:
            time.sleep(0.05)
        time.sleep(0.3)  # from there to the lock
        return original(*arguments)

    text_module.encode_file = counted
    note("here")
    try:
        assert len(text_module.open_text(path, tokenizer, "text")) == 3000
    except UserError as error:
        note(str(error).removeprefix(f"{path.parent}/").partition(" (")[0])
