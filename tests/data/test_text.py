"""Text to ids: the fast encoder against sentencepiece itself, the tools as commands, the cache of type="text"."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from internlm.data import encoder as encoder_module
from internlm.data import text as text_module
from internlm.data import tokenize
from internlm.data.encoder import Cutter, Encoder, Recipe, load_model
from internlm.data.formats import TokenizedFile
from internlm.data.loader import build_train_loader, build_valid_loaders
from internlm.data.text import cache_folder, open_text
from internlm.data.tokenize import Encoded, Task, encode_file, in_processes, json_elements
from internlm.utils.errors import UserError
from tests.data.helpers import REAL_TOKENIZER, make_config, open_and_log, train_tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), **PLAIN)


def ids_of(model: Path, texts: list[str], eos: bool = False) -> list[list[int]]:
    """By sentencepiece alone."""
    processor = load_model(str(model))
    return [[1, *processor.encode(text), *([2] if eos else [])] for text in texts]


def read_bin(path: Path) -> list[list[int]]:
    samples = [json.loads(line)["tokens"] for line in path.read_text().splitlines()]
    file = TokenizedFile(path)
    assert [file.tokens(i).tolist() for i in range(len(file))] == samples
    return samples


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOOLS.parents[1])


def odd_texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    parts = ["abc", "de", "fgh", "hij", "ab", "x", "0", ".", "),", "é", "e\u0301", "ﬁ", "中文", "😀", "<s>", "▁", "▁▁"]
    parts += [" ", " ", " ", "  ", "\t", "\n", "\u3000", "\u2028", "\0", "\x01", "\x02", "\x7f", "a" * 40, "#" * 90]
    rare = {"▁", "▁▁", "\x01", "\x02"}  # texts with these are encoded whole
    weights = np.array([0.2 if part in rare else 1.0 for part in parts])
    return ["".join(random.choice(parts, int(n), p=weights / weights.sum())) for n in random.integers(0, 25, count)]


SETTINGS = [
    {**PLAIN, "add_dummy_prefix": True},
    {**PLAIN, "add_dummy_prefix": False},
    {**PLAIN, "user_defined_symbols": ["hij", "<sep>", "x", "é.", "\n\n"]},
    {**PLAIN, "split_by_whitespace": False, "vocab_size": 500},
    {**PLAIN, "user_defined_symbols": ["de fgh"]},
    {**PLAIN, "byte_fallback": False},  # unknown characters in a row are one id
    {**PLAIN, "user_defined_symbols": ["\x01a"]},
    {},
    {"model_type": "unigram"},
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_encoder_equals_sentencepiece(tmp_path: Path, number: int) -> None:
    model = train_tokenizer(tmp_path, **SETTINGS[number])
    assert (Cutter.of(load_model(str(model))) is not None) == (number < 4)
    encoder = Encoder(Recipe(str(model)))
    for texts in (odd_texts(2000), odd_texts(100), [], [""], ["", ""]):  # the second time from memory
        expected = [str(ids)[1:-1] for ids in ids_of(model, texts)]
        assert encoder.encode(texts) == expected


@pytest.mark.parametrize("name", ["tokenizer_internlm.model", "tokenizer_internlm2.model"])
def test_encoder_equals_sentencepiece_on_the_real_tokenizers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = REAL_TOKENIZER.with_name(name)
    if not model.exists():
        pytest.skip(f"{name} is not here")
    monkeypatch.setattr(encoder_module, "MAX_WORDS", 500)  # many are forgotten and come back
    encoder = Encoder(Recipe(str(model)))
    assert Cutter.of(encoder.model) is not None
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    texts = odd_texts(3000) + sources[0].splitlines(keepends=True) + sources
    texts += [" ".join(sources[0].split()), "<eoh> <eoa>x <eoa>", "\0 \0", "Привет, мир (und Grüße): 你好，世界。"]
    expected = [str(ids)[1:-1] for ids in ids_of(model, texts)]
    assert [ids for at in range(0, len(texts), 50) for ids in encoder.encode(texts[at : at + 50])] == expected


def test_txt_tool(tmp_path: Path, tokenizer: Path) -> None:
    lines = ["abc de", "", "  fgh ij \t", "   ", "a\x0bb\x1cc", "中文 \u2028 x", "last\r", "no newline"]
    (tmp_path / "in.txt").write_text("\n".join(lines), newline="")
    out = tmp_path / "new/out.bin"
    done = tool(
        "tokenizer.py", "--text_input_path", tmp_path / "in.txt", "--bin_output_path", out, "--tokenizer", tokenizer
    )
    assert done.returncode == 0, done.stderr
    assert f"Successfully converted {tmp_path}/in.txt to {out}\nSuccessfully generated {out}.meta" in done.stdout
    assert read_bin(out) == ids_of(tokenizer, [line.strip() for line in lines if line.strip()])
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.bin", "out.bin.meta"]


def test_jsonl_tool_and_existing_outputs(tmp_path: Path, tokenizer: Path) -> None:
    lines = [json.dumps({"text": "abc de", "n": 1}) + "\n", json.dumps({"text": "fgh\nij "}) + "\n"]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    out = tmp_path / "out.bin"
    common = ("--text_input_path", tmp_path / "in.jsonl", "--bin_output_path", out, "--tokenizer", tokenizer)
    assert tool("tokenizer.py", *common).returncode == 0
    raw = ids_of(tokenizer, lines)  # the line itself, newline included
    assert read_bin(out) == raw
    again = tool("tokenizer.py", *common)
    assert again.returncode == 2 and "--append" in again.stderr and "Traceback" not in again.stderr
    assert read_bin(out) == raw
    assert tool("tokenizer.py", *common, "--append", "--text_key", "text", "--add_eos").returncode == 0
    texts = ids_of(tokenizer, ["abc de", "fgh\nij "], eos=True)
    assert read_bin(out) == raw + texts
    assert tool("tokenizer.py", *common, "--overwrite", "--no_bos", "--text_key", "text").returncode == 0
    assert read_bin(out) == [ids[1:-1] for ids in texts]


def test_json_tool(tmp_path: Path, tokenizer: Path) -> None:
    elements = [{"a": "abc é"}, "de", 3, [1, 2]]
    (tmp_path / "in.json").write_text(json.dumps(elements))
    out = tmp_path / "out.bin"
    common = ("--text_input_path", tmp_path / "in.json", "--bin_output_path", out, "--tokenizer", tokenizer)
    assert tool("tokenizer.py", *common).returncode == 0
    assert read_bin(out) == ids_of(tokenizer, [json.dumps(element) for element in elements])


@pytest.mark.parametrize(
    ("name", "content", "options", "reason"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n{"text": "y"}\n',
            ("--text_key", "text"),
            "a.jsonl, line 2: broken JSON",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"t": "y"}\n',
            ("--text_key", "text"),
            "line 3: expected an object with a string",
        ),
        ("a.jsonl", b'{"t": "x"}\n{"t": "\\ud800 y"}\n', ("--text_key", "t"), "line 2: half a character"),
        ("a.json", b'[{"t": "x"}, {"t": "\\ud800 y"}]', ("--text_key", "t"), "a.json, element 2: half a character"),
        ("a.txt", b"abc\nd\xffe\n", (), "a.txt, line 2: not UTF-8"),
        ("b.json", b'["\xff"]', (), "b.json: not UTF-8"),
        ("a.json", b'{"text": "x"}', (), "a.json: a .json file must hold one list"),
        ("a.json", b'["x", "y', (), "a.json, element 2: broken JSON"),
        ("a.json", b'["x", 3]', ("--text_key", "text"), "a.json, element 1: expected an object"),
        ("a.csv", b"x", (), "must end in .txt, .json or .jsonl"),
    ],
)
def test_broken_input_names_its_place(
    tmp_path: Path, tokenizer: Path, name: str, content: bytes, options: tuple[str, ...], reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.bin"
    common = ("--text_input_path", tmp_path / name, "--bin_output_path", out, "--tokenizer", tokenizer)
    done = tool("tokenizer.py", *common, *options)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_tool_without_input_or_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    common = ("--bin_output_path", tmp_path / "o.bin", "--text_input_path")
    assert "no such file" in tool("tokenizer.py", *common, tmp_path / "b.txt", "--tokenizer", tokenizer).stderr
    assert "not a sentencepiece" in tool("tokenizer.py", *common, tmp_path / "a.txt", "--tokenizer", __file__).stderr
    (tmp_path / "file").write_text("")
    into_file = ("--bin_output_path", tmp_path / "file" / "o.bin", "--text_input_path", tmp_path / "a.txt")
    done = tool("tokenizer.py", *into_file, "--tokenizer", tokenizer)
    assert done.returncode == 2 and "o.bin can't be written (" in done.stderr and "Traceback" not in done.stderr
    if not any((TOOLS / name).exists() for name in ("V7_sft.model", "tokenizer_internlm.model")):
        assert "--tokenizer" in tool("tokenizer.py", *common, tmp_path / "a.txt").stderr


@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_cover_the_file_in_order(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(tokenize, "PIECE_BYTES", 50)
    lines = [f"{number} abc" + " de" * (number % 30) for number in range(200)]
    texts = [{"text": line} for line in lines]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "a.json").write_text(json.dumps(texts, indent=1))
    expected = [str(ids)[1:-1] for ids in ids_of(tokenizer, lines)]
    for name in ("a.txt", "a.jsonl", "a.json"):
        pieces = list(encode_file(tmp_path / name, Recipe(str(tokenizer), text_key="text"), workers))
        assert [ids for piece in pieces for ids in piece.ids] == expected
        assert len(pieces) > 20 and pieces[-1].end == (tmp_path / name).stat().st_size
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts) + "[]\n")
    with pytest.raises(UserError, match="line 201"):
        list(encode_file(tmp_path / "a.jsonl", Recipe(str(tokenizer), text_key="text"), workers))


def test_json_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = [12345, -1.5e10, "x" * 90, {"a": [1, {"b": None}]}, True, [], "é"]
    for size in (1, 2, 7, 64, 1000):
        monkeypatch.setattr(tokenize, "PIECE_BYTES", size)
        for indent in (None, 2):
            (tmp_path / "a.json").write_text(json.dumps(elements, indent=indent))
            assert [element for element, _ in json_elements(tmp_path / "a.json")] == elements


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def write_texts(path: Path, count: int = 40) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"abc {'de ' * (number % 7)}{number}" for number in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return lines


def test_text_cache(tmp_path: Path, cache: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write_texts(tmp_path / "a.jsonl")
    file = open_text(tmp_path / "a.jsonl", tokenizer, "text")
    assert [file.tokens(i).tolist() for i in range(len(file))] == ids_of(tokenizer, lines)
    assert file.masks_zero and file.name == str(tmp_path / "a.jsonl")
    built = sorted(path.name for path in cache.iterdir())
    assert [name.rsplit(".", 1)[1] for name in built] == ["bin", "idx", "lock"]
    monkeypatch.setattr(text_module, "encode_file", None)  # from now on nothing may be tokenised
    assert len(open_text(tmp_path / "a.jsonl", tokenizer, "text")) == 40
    (tmp_path / "a.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(TypeError):
        open_text(tmp_path / "a.jsonl", tokenizer, "text")
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".idx", ".lock", ".lock"]  # nothing half done


def test_a_cache_that_can_not_be_written_is_named(
    tmp_path: Path, cache: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run tells of it with the other mistakes; before, a full disk was a text that could not be read."""
    path = tmp_path / "train/en/a.jsonl"
    write_texts(path)
    config = make_config(type="text", tokenizer_path=str(tokenizer), train_folder=str(tmp_path / "train"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(text_module.os, "fsync", full)
        with pytest.raises(UserError, match=rf"^{path}: its tokens can't be stored in {cache}: .*No space") as told:
            build_train_loader(config, 0, 1)
    assert "XDG_CACHE_HOME" in str(told.value)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(UserError, match=rf"^{path}: its tokens can't be stored in {path}/internlm/text: "):
        build_train_loader(config, 0, 1)


@pytest.mark.parametrize("broken", [False, True])
def test_one_process_builds_and_the_others_wait(tmp_path: Path, cache: Path, tokenizer: Path, broken: bool) -> None:
    """A mistake, which the builder alone has read, is told by all of them."""
    write_texts(tmp_path / "a.jsonl", 3000)
    if broken:
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write("{\n")
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "a.jsonl", tokenizer, tmp_path / "log")
    processes = [context.Process(target=open_and_log, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    told = (tmp_path / "log").read_text().splitlines()
    assert sorted(told) == [*(["a.jsonl, line 3001: broken JSON"] * 3 if broken else []), "built", *["here"] * 3]


def test_text_folders_train_and_validate(tmp_path: Path, cache: Path, tokenizer: Path) -> None:
    lines = write_texts(tmp_path / "train/en/a.jsonl", 100)
    write_texts(tmp_path / "valid/en/a.jsonl", 5)
    (tmp_path / "train/cn").mkdir()
    (tmp_path / "train/cn/b.txt").write_text("\n".join(lines))
    folders = {"train_folder": str(tmp_path / "train"), "valid_folder": str(tmp_path / "valid")}
    config = make_config(type="text", tokenizer_path=str(tokenizer), **folders)
    loader = build_train_loader(config, 0, 1)
    assert loader.type_names == ["cn", "en"]
    assert len(list(loader)) == 10
    expected = sum(min(len(ids), 16) - 1 for ids in ids_of(tokenizer, lines[:5]))
    assert sum(batch.num_trained for batch in build_valid_loaders(config, 0, 1)["en"]) == expected
    with pytest.raises(UserError, match=r"data\.tokenizer_path"):
        build_train_loader(make_config(type="text", **folders), 0, 1)


RECORDS = [{"instruction": f"abc {i}", "input": "x y" if i % 3 else "", "output": "de " * i} for i in range(40)]


def test_alpaca_refuses_other_tokenizers_and_broken_records(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    done = tool("alpaca_tokenizer.py", tmp_path / "a.json", tmp_path / "o", tokenizer)
    assert done.returncode == 2 and "v1 tokenizer" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="the InternLM tokenizer is not here")
def test_alpaca_tool(tmp_path: Path) -> None:
    records = [*RECORDS, {"instruction": "long", "input": "", "output": "word " * 3000}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    done = tool("alpaca_tokenizer.py", tmp_path / "a.json", tmp_path / "o", REAL_TOKENIZER, "--split_ratio", "0.25")
    assert done.returncode == 0, done.stderr
    encode = load_model(str(REAL_TOKENIZER)).encode
    np.random.seed(0)
    valid = set(np.random.choice(range(41), int(41 * 0.25)).tolist())
    expected: dict[str, list[list[int]]] = {"train": [], "valid": []}
    for index, record in enumerate(records):
        user = f"<|User|>:{record['instruction']}" + (f"\n{record['input']}" if record["input"] else "")
        masked = [*encode(user), 103167, 13, *encode("<|Bot|>:")]
        ids = [*[1, *(-i for i in masked), *encode(record["output"]), 103166, 13][:2047], 2]
        expected["valid" if index in valid else "train"].append(ids)
    for name, label in (("train", "train"), ("valid", "validation")):
        assert read_bin(tmp_path / "o" / name / "en/dataset.bin") == expected[name]
        tokens = sum(map(len, expected[name]))
        line = f"number of {label} dataset: {len(expected[name])}, number of {label} dataset token: {tokens}"
        assert line in done.stdout
    chat = tool("alpaca_tokenizer.py", tmp_path / "a.json", tmp_path / "o", REAL_TOKENIZER, "--chat_ids")
    assert chat.returncode == 0
    ids = read_bin(tmp_path / "o/train/en/dataset.bin")[0]
    assert -103027 in ids and 103028 in ids and not {103166, -103167} & set(ids)
    (tmp_path / "a.json").write_text('[{"instruction": "x", "output": "y"}]')
    broken = tool("alpaca_tokenizer.py", tmp_path / "a.json", tmp_path / "o", REAL_TOKENIZER)
    assert broken.returncode == 2 and 'record 0: expected an object with a string under "input"' in broken.stderr


def killed(task: Task) -> Encoded:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killer() -> Callable[[Task], Encoded]:
    return killed


def test_a_killed_process_is_no_traceback() -> None:
    """The kernel kills one when memory runs out."""
    with pytest.raises(UserError, match="one of 2 tokenising processes was killed"):
        list(in_processes(iter([Task("x", "txt")]), killer, 2))
