"""The server as OpenAI's own client sees it."""

import asyncio
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from internlm.apis.chat import ChatModel, Reply, ReplyOptions
from internlm.apis.openai_server import _Answer, build_app, pieces_of
from internlm.apis.sampling import Sampling
from internlm.apis.text_stream import TextStream
from internlm.data.message import Message
from tests.apis.tiny_chat import ANSWERS, CALLS, COUNT, HELLO, HTML, PLOT, SECOND, SLOW, WEATHER
from tools.openai_api import main

GREEDY = ReplyOptions(Sampling())
LONG = 60  # seconds: nothing takes that long on a busy machine
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Shanghai"}'}}
PICTURE = {"type": "image_url", "text": "a", "image_url": {"url": "http://127.0.0.1:9/1.png"}}
DEEP: Any = functools.reduce(lambda inner, _: {"a": inner}, range(700), {})


@pytest.fixture(scope="module")
def client(chat: ChatModel) -> Iterator[Any]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # a first request waits for the server instead of being refused
        server = uvicorn.Server(uvicorn.Config(build_app(chat), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            port = listening.getsockname()[1]
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as made:
                yield made
        finally:
            server.should_exit = True
            thread.join(LONG)


def ask(client: Any, text: str, **options: Any) -> Any:
    turns = [{"role": "user", "content": text}]
    return client.chat.completions.create(**{"model": "hf", "messages": turns, "temperature": 0, **options})


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["hf"]
    assert client.models.retrieve("hf").owned_by == "owner"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("organisation/other")


def test_what_changes_nothing_may_be_asked_for(client: Any) -> None:
    """Many clients send the defaults of OpenAI's API, or null."""
    neutral = {"response_format": {"type": "text"}, "logit_bias": {}, "top_logprobs": 0, "modalities": ["text"], "n": 1}
    nulls = dict.fromkeys(("stream", "prediction", "tools", "logprobs"))
    extra_body = {**neutral, **nulls, "service_tier": "auto", "prompt_cache_key": "a", "safety_identifier": "b"}
    assert ask(client, HELLO, extra_body=extra_body).choices[0].message.content == ANSWERS[HELLO]


@pytest.mark.parametrize("question", ANSWERS)
def test_whole_and_streamed_answers(client: Any, chat: ChatModel, question: str) -> None:
    whole = ask(client, question)
    assert whole.choices[0].message.content == ANSWERS[question]
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(ask(client, question, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == ANSWERS[question] and len(pieces) > 3
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "stop"
    ids = chat.tokenizer.encode(ANSWERS[question])
    assert whole.usage.completion_tokens == len(ids) + 1  # and the end of the turn


def test_limits_and_stops(client: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        cut = ask(client, COUNT, **{name: 4})
        assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (4, "length")
    assert ask(client, COUNT, stop=[" 7", " 5"]).choices[0].message.content == "1 2 3 4"


def test_history_and_parts(client: Any) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": HELLO}]},
        {"role": "assistant", "content": ANSWERS[HELLO]},
        {"role": "user", "content": SECOND[0]},
    ]
    assert ask(client, "", messages=turns).choices[0].message.content == SECOND[1]


@pytest.mark.parametrize("question", CALLS)
def test_function_calls(client: Any, monkeypatch: pytest.MonkeyPatch, chat: ChatModel, question: str) -> None:
    """The tiny model has never seen a list of tools, so the prompt is made without it."""
    monkeypatch.setattr(type(chat), "prompt_of", lambda self, turns, tools=(): prompt_of(self, turns))
    call = ask(client, question, tools=TOOLS).choices[0]
    assert call.finish_reason == "tool_calls" and call.message.content is None
    function = call.message.tool_calls[0].function
    assert function.name == CALLS[question].name
    assert json.loads(function.arguments) == dict(CALLS[question].arguments)
    deltas = [chunk.choices[0] for chunk in ask(client, question, tools=TOOLS, stream=True)]
    assert not any(delta.delta.content for delta in deltas)
    streamed = [delta.delta.tool_calls[0].function for delta in deltas if delta.delta.tool_calls]
    assert [(made.name, made.arguments) for made in streamed] == [(function.name, function.arguments)]
    assert deltas[-1].finish_reason == "tool_calls"


prompt_of = ChatModel.prompt_of


def test_a_cut_call_is_no_call(client: Any, monkeypatch: pytest.MonkeyPatch, chat: ChatModel) -> None:
    """Half a program may do something else."""
    monkeypatch.setattr(type(chat), "prompt_of", lambda self, turns, tools=(): prompt_of(self, turns))
    whole = ask(client, PLOT, tools=TOOLS)
    cut = ask(client, PLOT, tools=TOOLS, max_tokens=whole.usage.completion_tokens - 6)
    assert cut.choices[0].finish_reason == "length"


def test_text_around_calls_is_streamed_too(chat: ChatModel) -> None:
    text = 'So: <tool_call>{"name": "f"}</tool_call> and\n<tool_call>{"name": "g"}</tool_call> done. '

    async def pieces() -> AsyncIterator[str]:
        reply.finish_reason = "stop"
        for letter in text:
            reply.text += letter
            yield letter

    async def read() -> list[Any]:
        return [json.loads(event[6:])["choices"][0] async for event in answer.chunks(False) if "[DONE]" not in event]

    reply = Reply(iter(()), 1, TextStream(chat.tokenizer, ()), ())
    answer = _Answer(reply, "hf", True, pieces())
    said = asyncio.run(read())
    assert "".join(part["delta"].get("content", "") for part in said) == "So:  and\n done."
    whole = answer.whole()["choices"][0]["message"]
    assert whole["content"] == "So:  and\n done." and [call["function"]["name"] for call in whole["tool_calls"]] == [
        "f",
        "g",
    ]


def test_an_answer_that_nobody_begins_to_read_is_closed(chat: ChatModel) -> None:
    async def leave() -> None:
        reply = chat.reply([Message("user", COUNT)], GREEDY)
        answer = _Answer(reply, "hf", False, pieces_of(reply, None, ThreadPoolExecutor(1)))
        chunks = answer.chunks(False)
        await anext(chunks)  # says the role only
        await chunks.aclose()  # type: ignore[attr-defined]
        assert reply._tokens._request.cancelled  # type: ignore[attr-defined]

    asyncio.run(leave())


def test_a_long_prompt_stops_nobody(client: Any, chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is made into ids, others are served."""
    begun, served = threading.Event(), threading.Event()

    def slow(*_: Any) -> list[int]:
        begun.set()
        assert served.wait(LONG)
        return [1]

    monkeypatch.setattr(type(chat), "prompt_of", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, HELLO, max_tokens=1)
        assert begun.wait(LONG)
        client.models.list(timeout=LONG)
        served.set()
        assert asked.result().usage.prompt_tokens == 1


def test_a_result_goes_back(client: Any) -> None:
    turns = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    assert ask(client, "", messages=turns, max_tokens=5).usage.completion_tokens > 0


def test_many_at_once(client: Any) -> None:
    """More than there are rows: the rest waits its turn, and each gets its own answer."""
    questions = [HELLO, COUNT, HTML] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: ask(client, question), questions))
    assert [answer.choices[0].message.content for answer in answers] == [ANSWERS[question] for question in questions]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_leaves_is_forgotten(client: Any, chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """While waiting, and in the middle of an answer, whose row is free then."""
    release = threading.Event()
    letter = torch.tensor(chat.tokenizer.encode("a")[-1:])

    def choose(*_: Any) -> torch.Tensor:
        """A token that ends nothing; none any more once every row has an answer to write."""
        assert not all(chat.batcher._rows) or release.wait(LONG)
        return letter

    monkeypatch.setattr(Sampling, "choose", choose)
    streams = [ask(client, "?", stream=True, max_tokens=480) for _ in range(3)]
    try:
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            ask(client, HELLO, timeout=0.3)
        until(lambda: [waiting.cancelled for waiting in chat.batcher._waiting] == [True])
        rows = list(chat.batcher._rows)
        assert all(row and not row.cancelled for row in rows)
        for stream in streams:
            stream.close()
        until(lambda: all(row and row.cancelled for row in rows))
    finally:
        release.set()
    until(lambda: not any(chat.batcher._rows))
    assert all(row and row.num_new < 480 for row in rows)


def test_more_wait_than_the_server_has_threads_by_default(client: Any, chat: ChatModel) -> None:
    assert chat.batcher.max_requests > 60
    release = threading.Event()
    tokens = (iter(lambda: release.wait() and None, None) for _ in range(60))

    class Reader:
        async def is_disconnected(self) -> bool:
            return False

    async def read(reply: Reply, threads: ThreadPoolExecutor) -> str:
        return "".join([piece async for piece in pieces_of(reply, Reader(), threads)])

    async def read_all() -> None:
        threads = ThreadPoolExecutor(chat.batcher.max_requests)
        replies = [Reply(held, 1, TextStream(chat.tokenizer, ()), ()) for held in tokens]
        held = [asyncio.create_task(read(reply, threads)) for reply in replies]
        await asyncio.sleep(0.1)
        try:
            said = await asyncio.wait_for(read(chat.reply([Message("user", HELLO)], GREEDY), threads), LONG)
        finally:
            release.set()
        assert said == ANSWERS[HELLO]
        await asyncio.gather(*held)

    asyncio.run(read_all())


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "gpt"}, 404, "'gpt' is not served here, 'hf' is"),
        ({"n": 2}, 400, "n: "),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_tokens": True}, 400, "max_tokens: Input should be a valid integer"),
        ({"extra_body": {"temperature": "0"}}, 400, "temperature: Input should be a valid number"),
        ({"stream": True, "stream_options": {"other": 1}}, 400, "stream_options.other: not offered here"),
        ({"tools": TOOLS, "tool_choice": "required"}, 400, "tool_choice: not offered here"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, 400, "parallel_tool_calls: not offered here"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, 400, "messages.0.prefix: not offered here"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, 400, 'a list of parts of type "text"'),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, 400, "only the assistant calls"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "c9"}]}, 400, '"tool_call_id" is "c9"'),
        ({"tools": [{"function": {"name": "f", "parameters": DEEP}}]}, 400, "nested too deeply"),
        ({"messages": [{"role": "user", "content": "x" * 1_100_000}]}, 413, "a body of more than 1081344 bytes"),
        ({"logprobs": True}, 400, "logprobs: not offered"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type: not offered here"),
        ({"logit_bias": {"3": 5}}, 400, "logit_bias: "),
        ({"extra_body": {"min_p": 0.1}}, 400, "min_p: not offered here"),
        ({"tools": [{"type": "function", "function": {}}]}, 400, 'has no function with a "name"'),
        ({"temperature": -1}, 400, "temperature: "),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, 'role "robot" is unknown'),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "the limit is 512"),
        ({"messages": []}, 400, "messages: "),
        ({"seed": 2**64}, 400, "seed=18446744073709551616 must fit"),
        ({"extra_body": {"repetition_penalty": 1e-40}}, 400, "repetition_penalty=1e-40"),
    ],
)
def test_refusals(client: Any, options: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, HELLO, **options)
    assert refused.value.status_code == status and message in refused.value.body["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "chat/completions", rb'{"model": "hf", "messages": [{"role": "user", "content": "a\ud800b"}]}', 400),
        ("POST", "chat/completions", rb'{"model": "hf", "messages": [{"role": "a\ud800b"}]}', 400),
        ("POST", "chat/completions", b"\xff", 400),
        ("POST", "chat/completions", b"{not json", 400),
        ("POST", "chat/completions", b"[]", 400),
        ("GET", "chat/completions", b"", 405),
        ("GET", "nowhere", b"", 404),
    ],
)
def test_every_error_is_an_object_of_openai(client: Any, method: str, path: str, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{client.base_url}{path}", content or None, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=LONG)
    assert refused.value.code == status
    assert json.loads(refused.value.read())["error"]["type"] == "invalid_request_error"


def test_too_many(client: Any, monkeypatch: pytest.MonkeyPatch, chat: ChatModel) -> None:
    monkeypatch.setattr(chat.batcher, "max_waiting", -len(chat.batcher._rows))
    with pytest.raises(openai.RateLimitError, match="0 requests are being answered or wait already; try again later"):
        ask(client, HELLO)


def test_our_own_mistakes_too(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatModel, "prompt_of", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError) as failed:
        ask(client, HELLO, extra_headers={"connection": "close"})
    assert failed.value.body["message"] == "the server failed: ZeroDivisionError"


def test_paths_of_2023(client: Any) -> None:
    with client.with_options(base_url=str(client.base_url).replace("/v1", "/internlm")) as old:
        assert ask(old, HELLO, model="internlm").choices[0].message.content == ANSWERS[HELLO]


def test_a_wrong_folder(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no checkpoint and holds none" in capsys.readouterr().err


@pytest.mark.parametrize(("port", "message"), [(None, "in use"), (65536, "is not from 0"), (-1, "is not from 0")])
def test_a_port_is_tried_before_a_model_is_read(port: int | None, message: str, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["no such folder", f"--port={taken.getsockname()[1] if port is None else port}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_breaks_answers_off(number: int, chat_folder: Path, repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    command = [sys.executable, str(repo_root / "tools" / "openai_api.py"), str(chat_folder), "--port=0", "--device=cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(repo_root)))}
    log = tmp_path / "log"
    with log.open("w") as told, subprocess.Popen(command, env=environment, stdout=told, stderr=told) as server:
        until(lambda: "http://" in log.read_text() or server.poll() is not None)
        address = re.findall(r"http://\S+", log.read_text())[0]
        with openai.OpenAI(base_url=address, api_key="none") as client:
            answer = iter(ask(client, COUNT, stream=True))
            next(answer)
            server.send_signal(number)
            with pytest.raises(openai.APIError, match="the answer was broken off"):
                list(answer)
        assert server.wait(LONG) == 0
    assert "Traceback" not in log.read_text()
