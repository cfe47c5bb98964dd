"""Exported tokenizers give sentencepiece's ids through AutoTokenizer, and its text back."""

import inspect
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config

from internlm.checkpoint.hf_tokenizer import inspect_tokenizer, write_tokenizer
from internlm.data.tokenizer import open_tokenizer
from internlm.utils.errors import UserError

TEXTS = [
    "Hello, world! 1 + 1 = 2",
    "",
    " ",
    "  leading and trailing  ",
    "tabs\tand\n\nline ends\n",
    "\n\u00a0inside\u00a0\n",
    "书生·浦语 是一个语言模型，由上海人工智能实验室开发。",
    "naïve Ünïcödé ﬁ ½ Ａ \u00a0 \u3000 🦙 \u0378",
    inspect.getsource(json),
]


def check_equal(model_file: Path, folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    folder.mkdir(exist_ok=True)
    write_tokenizer(inspect_tokenizer(model_file, processor.vocab_size()), folder, 2048)
    LlamaConfig().save_pretrained(folder)  # AutoTokenizer also looks at the model's type
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    for text in TEXTS:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [processor.bos_id(), *ids], text
        if processor.unk_id() not in ids:  # sentencepiece shows unknown characters as a sign of its own
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == processor.decode(ids), text
    assert len(tokenizer) == processor.vocab_size()
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == processor.eos_id()
    assert tokenizer.bos_token_id == processor.bos_id() and tokenizer.unk_token_id == processor.unk_id()
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0][0] == 0  # padded on the left, as generation needs it
    assert (folder / "tokenizer.model").read_bytes() == model_file.read_bytes()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "identity"},
        {"byte_fallback": False},
        {"user_defined_symbols": ["<eoh>", "<eoa>"]},
    ],
)
def test_trained_here(model_type: str, options: dict[str, object], tmp_path: Path) -> None:
    check_equal(trained(tmp_path, model_type=model_type, **options), tmp_path / "hf")


def trained(folder: Path, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_prefix=str(folder / "tiny"),
        **{
            "vocab_size": 512,
            "model_type": "bpe",
            "byte_fallback": True,
            "num_threads": 1,
            "minloglevel": 2,
            **options,
        },
    )
    return folder / "tiny.model"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False, "remove_extra_whitespaces": False}])
def test_control_tokens_in_a_text(model_type: str, options: dict[str, object], tmp_path: Path) -> None:
    """In training, on a checkpoint and in its export they are one id each, and what follows has the same ids."""
    symbols = ["<eoh>", "<|im_start|>"]
    model_file = trained(tmp_path, model_type=model_type, user_defined_symbols=symbols, **options)
    write_tokenizer(inspect_tokenizer(model_file, 512), tmp_path, 2048)
    LlamaConfig().save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(model_file)
    for text in (
        *("<s>def f", "a<s>b </s> c", "<|im_start|>user\nhi<eoh>\nself", "a  <eoh>  b", "<eoh><eoh>x", "<eoh>"),
        *("the <unk> is", "<unk>", "<s", "<eoh >", "  <|im_start|>"),
    ):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
    ids = ours.encode("a <unk> b")
    shown = [token for token in ids if token not in ours.special_ids]
    assert 0 in ids and ours.decode(shown) == theirs.decode(ids, skip_special_tokens=True)


def test_what_tokenizer_json_cannot_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_file = trained(tmp_path, user_defined_symbols=["fox"])  # gets a blank behind it there, which it has not here
    with caplog.at_level("WARNING", "internlm"):
        write_tokenizer(inspect_tokenizer(model_file, 512), tmp_path, 2048)
    assert "prefer tokenizer.model" in caplog.text and "afoxb" in caplog.text and "\u0302" in caplog.text
    with pytest.raises(UserError, match="treat_whitespace_as_suffix cannot be exported"):
        write_tokenizer(inspect_tokenizer(trained(tmp_path, treat_whitespace_as_suffix=True), 512), tmp_path, 2048)


@pytest.mark.parametrize("name", ["tokenizer_internlm.model", "tokenizer_internlm2.model"])
def test_public_tokenizers(name: str, repo_root: Path, tmp_path: Path) -> None:
    file = repo_root.parent / "shared" / "data" / name
    if not file.exists():
        pytest.skip("the public tokenizers are not beside the repository")
    check_equal(file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if name == "tokenizer_internlm.model":
        assert tokenizer.encode("hi<eoh>\n<|Bot|>:", add_special_tokens=False)[1:3] == [103027, 364]


def test_a_folder_is_copied(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A fine-tuned model goes out with the tokenizer folder that it came in with."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    write_tokenizer(inspect_tokenizer(tiny_tokenizer, 512), first, 2048)
    (first / "chat_template.jinja").write_text("{{ messages }}")
    (first / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert inspect_tokenizer(first / "tokenizer.json", 600) == inspect_tokenizer(first, 600)
    source = inspect_tokenizer(first, 600)
    assert source.size == 512
    assert source.special_ids == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 2}
    write_tokenizer(source, second, 2048)
    Qwen3Config().save_pretrained(second)
    tokenizer = AutoTokenizer.from_pretrained(second)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    assert tokenizer.encode("def f(x):") == [1, *processor.encode("def f(x):")]
    assert tokenizer.chat_template == "{{ messages }}"


def test_wrong_tokenizers_are_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        inspect_tokenizer(tmp_path / "none.model", 512)
    with pytest.raises(UserError, match=r"has 512 ids, the model's vocab_size is 500"):
        inspect_tokenizer(tiny_tokenizer, 500)
    with pytest.raises(UserError, match="holds neither"):
        inspect_tokenizer(tmp_path, 512)
    (tmp_path / "wrong.model").write_text("hello")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        inspect_tokenizer(tmp_path / "wrong.model", 512)


def test_a_smaller_tokenizer_is_a_warning(tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "internlm"):
        inspect_tokenizer(tiny_tokenizer, 520)
    assert "512 ids, the model 520" in caplog.text
