"""Exports to chat with: the template beside the tokenizer, turn marks as tokens, and InternLM's chat methods."""

import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from internlm.apis.generate import generate
from internlm.checkpoint.hf import HFReader, export_hf
from internlm.data.chat_template import BUILT_IN
from internlm.data.message import Message
from internlm.model.transformer import Transformer
from tests.checkpoint.hf_models import named, tiny_run
from tests.model.tiny import random_batch

TURNS = [("hello", "hi"), ("what is torch?", None)]
MESSAGES = [
    {"role": role, "content": text}
    for turn in TURNS
    for role, text in zip(("user", "assistant"), turn, strict=True)
    if text
]


def exported(folder: Path, tokenizer: Path, case: str = "internlm", vocab: int = 512, **options: object) -> Transformer:
    config, model = tiny_run(case, vocab_size=vocab)
    export_hf(named(model), config, folder, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    return model


def rendered(name: str) -> str:
    turns = [Message.of(message) for message in MESSAGES]
    return BUILT_IN[name].render(turns, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["internlm", "internlm1.1", "internlm2", "chatml"])
def test_apply_chat_template_gives_our_text(name: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    exported(tmp_path, tiny_tokenizer, template=BUILT_IN[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert theirs == rendered(name)
    assert "generation" not in (tmp_path / "chat_template.jinja").read_text().replace("add_generation_prompt", "")


@pytest.fixture(scope="module")
def marked_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As InternLM2's: the last pieces are free."""
    import inspect

    folder = tmp_path_factory.mktemp("marked")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_prefix=str(folder / "tiny"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)],
    )
    return folder / "tiny.model"


def test_marks_of_turns_are_single_special_tokens(marked_tokenizer: Path, tmp_path: Path) -> None:
    exported(tmp_path, marked_tokenizer, template=BUILT_IN["internlm2"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(marked_tokenizer))
    start, end = (processor.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in (146, 145))
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [start, end]
    ids = tokenizer(rendered("internlm2"), add_special_tokens=False)["input_ids"]
    assert ids[:2] == [1, start] and ids.count(start) == 4 and ids.count(end) == 3
    assert "im_start" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, end]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2
    text = "def f(x): return [x]"
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)


def test_missing_marks_are_said(tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "internlm"):
        exported(tmp_path, tiny_tokenizer, template=BUILT_IN["chatml"])
    assert "has no token <|im_end|>" in caplog.text


def test_public_internlm2_tokenizer(repo_root: Path, tmp_path: Path) -> None:
    file = repo_root.parent / "shared" / "data" / "tokenizer_internlm2.model"
    if not file.exists():
        pytest.skip("the public tokenizers are not beside the repository")
    exported(tmp_path, file, vocab=92544, template=BUILT_IN["internlm2"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 92543
    assert tokenizer.convert_tokens_to_ids("<|plugin|>") == 92538
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 92542]


def test_sentencepiece_beside_qwen2(tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers overrules tokenizer_config.json for this model type, so the export says what to load instead."""
    with caplog.at_level("WARNING", "internlm"):
        exported(tmp_path, tiny_tokenizer, "qwen2")
    assert "load PreTrainedTokenizerFast.from_pretrained" in caplog.text
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    for text in ("Hello,  world!", "书生·浦语\n\tx = 1", "naïve 🦙"):
        assert tokenizer.encode(text) == [1, *processor.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == processor.decode(
            processor.encode(text)
        )


# ---- remote code -----------------------------------------------------------------------------------------------------


@pytest.fixture
def internlm(tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Transformer]:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = exported(tmp_path / "hf", tiny_tokenizer, arch="internlm", template=BUILT_IN["internlm1.1"])
    return tmp_path / "hf", model


@torch.no_grad()
def test_remote_code_computes_the_same(internlm: tuple[Path, Transformer]) -> None:
    folder, ours = internlm
    theirs, about = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "InternLMForCausalLM" and not about["missing_keys"] and not about["unexpected_keys"]
    batch = random_batch((41,), 512)
    torch.testing.assert_close(ours(batch), theirs(batch.tokens[None]).logits[0], atol=1e-5, rtol=1e-5)
    prompt = batch.tokens[:9].tolist()
    (expected,) = generate(ours, [prompt], max_new_tokens=64)
    found = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=2
    )
    stop = next((i for i, token in enumerate(expected) if token == 2), 64)  # which they were not to choose
    assert found[0, 9 : 9 + stop].tolist() == expected[:stop] and stop > 8


def test_chat_and_stream_chat(internlm: tuple[Path, Transformer]) -> None:
    folder, ours = internlm
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answer, history = theirs.chat(tokenizer, TURNS[1][0], history=[TURNS[0]], max_new_tokens=12, do_sample=False)
    ids = tokenizer(rendered("internlm1.1"), add_special_tokens=False)["input_ids"]
    (expected,) = generate(ours, [ids], max_new_tokens=12, stop_ids=[2])
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    assert history == [TURNS[0], (TURNS[1][0], answer)]
    parts = list(theirs.stream_chat(tokenizer, TURNS[1][0], [TURNS[0]], max_new_tokens=12, do_sample=False))
    assert len(parts) > 3 and parts[-1] == (answer, history)
    assert all(len(a[0]) <= len(b[0]) for a, b in pairwise(parts))
    with pytest.raises(ValueError, match="nonsense"):
        list(theirs.stream_chat(tokenizer, "x", max_new_tokens=2, nonsense=1))


def test_a_stream_that_is_broken_off_ends(internlm: tuple[Path, Transformer]) -> None:
    """The generating thread too, at its next token."""
    folder, _ = internlm
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    before = set(threading.enumerate())
    forward, left, calls = theirs.forward, threading.Event(), []

    def counted(*given: object, **named: object) -> object:
        calls.append(left.is_set())
        assert len(calls) < 6 or left.wait(60)
        return forward(*given, **named)

    theirs.forward = counted
    parts = theirs.stream_chat(tokenizer, "hello", max_new_tokens=100, do_sample=False, eos_token_id=[0])
    next(parts)
    (thread,) = set(threading.enumerate()) - before
    parts.close()
    left.set()
    thread.join(60)
    assert not thread.is_alive() and sum(calls) <= 1


def test_old_configs_of_internlm_are_understood(internlm: tuple[Path, Transformer]) -> None:
    """What InternLM published in 2023: no rotary, or a dynamic one."""
    folder, _ = internlm
    about = json.loads((folder / "config.json").read_text())
    del about["rotary"]
    (folder / "config.json").write_text(json.dumps(about))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.rope_parameters["rope_type"] == "dynamic" and config.rope_parameters["rope_theta"] == 10000
    assert config.attention_bias is True and config.model_type == "internlm"
    ours = HFReader(folder).config_model()
    assert ours["rope_base"] == 10000 and ours["rope_scaling"]["type"] == "dynamic"
    assert ours["rope_scaling"]["factor"] == config.rope_parameters["factor"]
    assert issubclass(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).__class__, LlamaForCausalLM)
