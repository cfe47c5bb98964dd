"""Conversations with a model that knows some by heart; prompts equal to transformers' of the same folder."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from internlm.apis.chat import ChatModel, Conversation, ReplyOptions, load_chat
from internlm.apis.sampling import Sampling
from internlm.apis.terminal import Terminal, main
from internlm.apis.tool_calls import code_block, parse_tool_calls
from internlm.data.chat_template import BUILT_IN
from internlm.data.message import Message, ToolCall
from internlm.utils.errors import UserError
from tests.apis.tiny_chat import ANSWERS, CALLS, COUNT, HELLO, SECOND

GREEDY = ReplyOptions(Sampling(), max_new_tokens=200)


def ask(chat: ChatModel, text: str, **options: object) -> str:
    return "".join(chat.reply([Message("user", text)], ReplyOptions(Sampling(), **options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("question", ANSWERS)
def test_answers_are_what_was_learnt(chat: ChatModel, question: str) -> None:
    reply = chat.reply([Message("user", question)], GREEDY)
    pieces = list(reply)
    assert "".join(pieces) == reply.text == ANSWERS[question]
    assert reply.finish_reason == "stop"
    assert len(pieces) > 3 and all(pieces)
    assert reply.num_prompt_tokens == len(chat.prompt_of([Message("user", question)]))


@pytest.mark.parametrize("question", CALLS)
def test_calls_are_read(chat: ChatModel, question: str) -> None:
    reply = chat.reply([Message("user", question)], GREEDY)
    list(reply)
    assert reply.message == Message("assistant", "", tool_calls=(CALLS[question],))


@pytest.mark.parametrize("template", ["internlm2", "qwen2"])
@pytest.mark.parametrize(
    "call",
    [
        ToolCall("interpreter", {"code": "print('```', \"```\")\nx = 1"}),
        ToolCall("interpreter", {"code": ""}),
        ToolCall("interpreter", {"code": "1 + 1", "timeout": 5}),
        ToolCall("f", {"text": "```python\n\\u4e66 书\n```", "deep": {"a": [1, None, True]}}),
        ToolCall("f", {}),
    ],
)
def test_calls_are_read_as_they_are_written(template: str, call: ToolCall) -> None:
    turns = [Message("user", "a"), Message("assistant", "So:", tool_calls=(call, call))]
    written = BUILT_IN[template].render(turns).split("assistant\n")[-1].removesuffix("<|im_end|>\n")
    assert parse_tool_calls(written) == ("So:", (call, call))


@pytest.mark.parametrize(
    ("text", "code"),
    [("```python\nx = 1\n```\n", "x = 1"), ("```\nx = 1```", "x = 1"), ("```py\nx = '```'\ny", "x = '```'\ny")],
)
def test_the_end_of_a_block_of_code(text: str, code: str) -> None:
    assert code_block(text) == code


def test_prompts_are_those_of_transformers(chat: ChatModel, chat_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(chat_folder)
    turns = [("system", "be\nkind"), ("user", "hello"), ("assistant", ANSWERS[HELLO]), ("user", "naïve 书 🦙  x")]
    dicts = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(dicts, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.prompt_of([Message(*turn) for turn in turns]) == expected


def test_a_native_checkpoint_answers_as_its_export(chat_folder: Path) -> None:
    """Tokenizer and template come from the config of the run."""
    with load_chat(chat_folder.parent / "native", device="cpu") as native:
        assert ask(native, HELLO) == ANSWERS[HELLO]
        assert native.template.name == "internlm2"


def test_limits_and_stop_texts(chat: ChatModel) -> None:
    reply = chat.reply([Message("user", COUNT)], ReplyOptions(Sampling(), max_new_tokens=5))
    assert ANSWERS[COUNT].startswith("".join(reply)) and reply.text
    assert (reply.finish_reason, reply.num_new_tokens) == ("length", 5)
    assert ask(chat, COUNT, stop=(" 12 13",)) == ANSWERS[COUNT].split(" 12 13")[0]
    assert ask(chat, COUNT, stop=("no such text",)) == ANSWERS[COUNT]


def test_too_long_a_prompt_is_refused(chat: ChatModel) -> None:
    with pytest.raises(UserError, match=r"conversation has \d+ tokens, the limit is 512"):
        chat.reply([Message("user", "x" * 600)])


def test_seeds_repeat_and_differ_otherwise(chat: ChatModel) -> None:
    hot = Sampling(temperature=3.0)
    first, again, other = (
        "".join(chat.reply([Message("user", "hm")], ReplyOptions(hot, 40, seed))) for seed in (1, 1, 2)
    )
    assert first == again != other
    unseeded = {"".join(chat.reply([Message("user", "hm")], ReplyOptions(hot, 40))) for _ in range(3)}
    assert len(unseeded) > 1  # that two are alike is rare, and three never


def test_a_conversation_goes_on_and_starts_anew(chat: ChatModel) -> None:
    conversation = Conversation(chat)
    assert "".join(conversation.ask(HELLO, GREEDY)) == ANSWERS[HELLO]
    assert "".join(conversation.ask(SECOND[0], GREEDY)) == SECOND[1]  # learnt after HELLO only
    assert "".join(conversation.again(GREEDY)) == SECOND[1]
    assert [message.content for message in conversation.messages] == [HELLO, ANSWERS[HELLO], *SECOND]
    saved = json.loads(Conversation(chat, "be kind").as_json())
    assert saved == {"messages": [{"role": "system", "content": "be kind"}]}
    conversation.clear()
    assert not conversation.messages
    with pytest.raises(UserError, match="nothing was asked"):
        next(conversation.again())


def test_a_stopped_answer_keeps_what_it_said(chat: ChatModel) -> None:
    conversation = Conversation(chat)
    pieces = conversation.ask(COUNT, GREEDY)
    said = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages == [Message("user", COUNT), Message("assistant", said)]


def test_another_question_ends_an_answer(chat: ChatModel) -> None:
    """As where a page is open twice. What was said stays; of what is cleared, nothing."""
    conversation = Conversation(chat)
    first = conversation.ask(COUNT, GREEDY)
    said = next(first) + next(first)
    second = conversation.ask(HELLO, GREEDY)
    begun = next(second)
    assert list(first) == []
    turns = [Message("user", COUNT), Message("assistant", said), Message("user", HELLO)]
    assert conversation.messages == [*turns, Message("assistant", begun)]
    conversation.clear()
    assert list(second) == [] and conversation.messages == []


def test_calls_of_a_conversation(chat: ChatModel) -> None:
    conversation = Conversation(chat)
    for _ in conversation.ask("weather?", GREEDY):
        pass
    assert conversation.last_calls == (ToolCall("get_weather", {"city": "Shanghai"}),)


def test_the_oldest_turns_give_way(chat: ChatModel) -> None:
    conversation = Conversation(chat, system="s")
    for _ in range(6):
        list(conversation.ask("y" * 70 + " " + HELLO, ReplyOptions(Sampling(), 8)))
    assert conversation.num_forgotten % 2 == 0 and conversation.num_forgotten > 0
    assert len(conversation.messages) == 12  # all are kept, and fewer are sent
    sent = [Message("system", "s"), *conversation.messages[conversation.num_forgotten : -1]]
    assert len(chat.prompt_of(sent)) <= 512 - 8
    with pytest.raises(UserError, match="limit is 512"):
        list(conversation.ask("y" * 600))
    assert len(conversation.messages) == 12  # what can't be asked leaves no trace


def test_the_terminal(chat_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    command = [sys.executable, "-m", "internlm.apis.chat", str(chat_folder), "--temperature=0", "--device=cpu"]
    lines = (
        "hello\n/nonsense\n/set top_p 2\n/set temperature nan\n/set seed 99999999999999999999\n"
        "/set max_new_tokens 50\n/system be kind\n/system -\nand \\\nagain?\n"
        f"/history\n/save {file}\n/clear\n/again\nweather?\n/exit\nnever read"
    )
    done = subprocess.run(
        command, input=lines, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    shown = done.stdout
    assert done.returncode == 0, shown
    for text in (
        ANSWERS[HELLO],
        "there is no command /nonsense",
        "top_p=2.0 must be above 0",
        "temperature=nan must be 0 or a positive number",
        "seed=99999999999999999999 must fit in 64 bits",
        "max_new_tokens 50",
        "be kind",
        "no system text",
        "asks for get_weather",
        "nothing was asked yet",
    ):
        assert text in shown, shown
    turns = json.loads(file.read_text())["messages"]
    assert [turn["content"] for turn in turns[:3]] == [HELLO, ANSWERS[HELLO], "and \nagain?"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_that_are_no_text(chat_folder: Path, encoding: str) -> None:
    """One wrong line spoils no other, and what a terminal can't show is spelt."""
    done = subprocess.run(
        [sys.executable, "-m", "internlm.apis.chat", str(chat_folder), "--temperature=0", "--device=cpu"],
        input=b"a\xff\nhello\n/system \xe4\xb9\xa6\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"},
        timeout=300,
    )
    shown = done.stdout.decode(encoding)
    assert done.returncode == 0 and "remove it" in shown and ANSWERS[HELLO] in shown, shown
    assert ("书" if encoding == "utf-8" else "\\udce4") in shown


@pytest.mark.parametrize("number", [0, -1])
def test_an_answer_has_a_token_at_least(number: int) -> None:
    with pytest.raises(UserError, match=f"max_new_tokens={number} must be at least 1"):
        ReplyOptions(max_new_tokens=number)


def test_the_terminal_obeys_the_user_alone(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's text can't command it, and an answer that breaks off doesn't end the chat."""
    console = Console(file=io.StringIO(), force_terminal=False)
    terminal = Terminal(Conversation(chat), GREEDY, console)
    terminal.show(iter(["a\x1b]52;c;YQ==\x07", "b\x9b31m\tc"]))
    terminal.conversation.messages = [Message("user", "d\x1b[2J")]
    terminal.history("")

    def broken(*_: object) -> Iterator[str]:
        raise RuntimeError("the answer was broken off")

    monkeypatch.setattr(terminal.conversation, "ask", broken)
    terminal.handle("hello")
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert not set("\x1b\x07\x9b") & set(said)
    assert "a\ufffd]52;c;YQ==\ufffdb" in said and "d\ufffd[2J" in said and "broken off" in said


def test_mistakes_on_the_command_line_end_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no checkpoint and holds none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "nowhere"}, "nowhere does not exist"),
        ({"template": "nothing"}, "chat template 'nothing'"),
        ({"max_length": 513}, "max_length 513: the model was made for 512"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"max_waiting": -1}, "max_waiting=-1 not negative"),
        ({"device": "foo"}, "device 'foo' can't be used .*; here are cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used"),
    ],
)
def test_wrong_options_are_named(chat_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_chat(chat_folder, **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_refused(chat_folder: Path, tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer has 512 ids, the model's vocab_size is \d+"):
        load_chat(chat_folder, tokenizer=tiny_tokenizer, device="cpu")
