"""Special tokens become ids; text comes out of a stream whole, whatever the pieces."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from internlm.apis.text_stream import TextStream
from internlm.apis.tool_calls import parse_tool_calls
from internlm.data.chat_template import BUILT_IN
from internlm.data.message import Message, ToolCall
from internlm.data.tokenizer import open_tokenizer
from internlm.utils.errors import UserError
from tests.data.helpers import REAL_TOKENIZER

TEXTS = ["Hello, world!", "书生·浦语 🦙🦙 naïve\n\n  x = 1\n", " leading", "a<|im_end|>b", "\ufffd", ""]


@pytest.mark.parametrize("name", ["tiny.model", "hf"])
@pytest.mark.parametrize("text", TEXTS)
def test_both_kinds_equal_transformers(chat_folder: Path, name: str, text: str) -> None:
    ours = open_tokenizer(chat_folder.parent / name)
    theirs = AutoTokenizer.from_pretrained(chat_folder)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.size == len(theirs)


@pytest.mark.parametrize("name", ["tiny.model", "hf"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_says_what_decoding_says(chat_folder: Path, name: str, text: str) -> None:
    tokenizer = open_tokenizer(chat_folder.parent / name)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    if "🦙" in text:
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc STOP def", ("STOP",), "abc "),
        ("abc STO def", ("STOP",), "abc STO def"),
        ("abc STO", ("STOP",), "abc STO"),
        ("aab", ("aab",), ""),
        ("xaaab", ("aab",), "xa"),
        ("one two", ("two", "one"), ""),
        ("one", ("",), "one"),
    ],
)
def test_stop_texts(chat_folder: Path, text: str, stop: tuple[str, ...], expected: str) -> None:
    tokenizer = open_tokenizer(chat_folder)
    stream = TextStream(tokenizer, stop)
    out = "".join(stream.add(token) for character in text for token in tokenizer.encode(character))
    assert out + stream.finish() == expected


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="InternLM's tokenizers are not here")
def test_internlm_tokenizers() -> None:
    """Ids of the released models."""
    first = open_tokenizer(REAL_TOKENIZER)
    assert [first.id_of(name) for name in ("<s>", "</s>", "<eoh>", "<eoa>", "<|im_end|>")] == [
        1,
        2,
        103027,
        103028,
        None,
    ]
    assert first.encode("<s><|User|>:hi<eoh>\n<|Bot|>:")[0] == 1
    assert 103027 in first.encode("<s><|User|>:hi<eoh>\n<|Bot|>:")
    second = open_tokenizer(REAL_TOKENIZER.with_name("tokenizer_internlm2.model"))
    names = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
    assert [second.id_of(name) for name in names] == list(range(92538, 92544))
    text = BUILT_IN["internlm2"].render([Message("user", "你好")], add_generation_prompt=True)
    ids = second.encode(text)
    assert ids[:2] == [1, 92543] and ids.count(92542) == 1
    assert "<s>" + second.decode(ids) == text


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="not as expected"):
        open_tokenizer(tmp_path)


CALL = ToolCall("f", {"x": 1, "y": "二\n"})
CODE = ToolCall("interpreter", {"code": "x = 1\nprint(x)"})


@pytest.mark.parametrize("template", ["internlm2", "qwen2"])
@pytest.mark.parametrize("calls", [(CALL,), (CALL, ToolCall("g", {})), (CODE,)])
def test_what_a_template_writes_is_read(template: str, calls: tuple[ToolCall, ...]) -> None:
    turn = Message("assistant", "Let me see.", tool_calls=calls)
    text, spans, _ = BUILT_IN[template].write([Message("user", "q"), turn])
    answer = text[slice(*spans[0])].removesuffix("<|im_end|>")
    assert parse_tool_calls(answer) == ("Let me see.", calls)
    cut = answer.removesuffix("<|action_end|>").removesuffix("</tool_call>")
    assert parse_tool_calls(cut) == ("Let me see.", calls)


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        '<|action_start|><|plugin|>\n{"name": 3}<|action_end|>',
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": [1]}<|action_end|>',
        "<tool_call>\n{broken\n</tool_call>",
        "<|action_start|>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, ())
