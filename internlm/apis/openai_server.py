"""Chat completions over HTTP in OpenAI's form, so that its clients talk to a model of ours; see tools/openai_api.py.

The only place that needs fastapi (requirements/serve.txt). What a request asks for and this server can't do is
refused; only settings that don't change an answer are ignored.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from internlm.apis.batching import BusyError
from internlm.apis.chat import ChatModel, Reply
from internlm.apis.openai_request import Request, problem
from internlm.apis.tool_calls import before_calls
from internlm.data.message import Message, ToolCall
from internlm.utils.errors import UserError

NAME_OF_2023 = "internlm"  # what the server of 2023 called its model, with paths /internlm/...

_WATCH_EVERY = 0.2  # seconds between looks at whether a client is still there
_BODY_BYTES = 1 << 20, 64  # of a body, at most: so many, and so many for each token that the model can take


@dataclass
class _Answer:
    """One completion in OpenAI's words."""

    reply: Reply
    model: str
    with_calls: bool
    pieces: AsyncIterator[str]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> dict[str, Any]:
        message = self.reply.message if self.with_calls else Message("assistant", self.reply.text)
        shown: dict[str, Any] = {"role": "assistant", "content": message.content or None}
        if message.tool_calls:
            shown["tool_calls"] = _tool_calls(message.tool_calls)
        else:
            shown["content"] = message.content
        choice = {"index": 0, "message": shown, "finish_reason": self._finish_reason(), "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    async def chunks(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. What may be a function call is held back until it is whole."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            sent = 0
            async for _ in self.pieces:
                sure = before_calls(self.reply.text) if self.with_calls else self.reply.text
                if len(sure) > sent:
                    yield self._chunk({"content": sure[sent:]})
                    sent = len(sure)
            message = self.reply.message
            if self.with_calls and message.tool_calls:
                if around := message.content[len(self.reply.text[:sent].lstrip()) :]:
                    yield self._chunk({"content": around})
                deltas = [{"index": index, **call} for index, call in enumerate(_tool_calls(message.tool_calls))]
                yield self._chunk({"tool_calls": deltas})
            elif len(self.reply.text) > sent:
                yield self._chunk({"content": self.reply.text[sent:]})
            yield self._chunk({}, self._finish_reason())
            if include_usage:
                yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        except RuntimeError as error:  # the head of the answer is sent already
            yield _event({"error": _error(str(error), "server_error")})
        finally:
            self.reply.close()  # also where the pieces were never begun
        yield "data: [DONE]\n\n"

    def _finish_reason(self) -> str | None:
        """Calls in an answer that a limit ended may be incomplete: then the limit is the reason."""
        calls = self.with_calls and self.reply.finish_reason == "stop" and self.reply.message.tool_calls
        return "tool_calls" if calls else self.reply.finish_reason

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _usage(self) -> dict[str, int]:
        prompt, answer = self.reply.num_prompt_tokens, self.reply.num_new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def build_app(chat: ChatModel) -> Any:
    """The FastAPI application: one model, as many answers at once as the chat's batcher has rows."""
    try:
        import fastapi
        from fastapi.responses import JSONResponse, StreamingResponse
    except ImportError as error:
        raise UserError(
            f'serving needs a package that is missing ({error.name}): pip install "internlm[serve]"'
        ) from error

    threads = ThreadPoolExecutor(chat.batcher.max_requests, "reply")  # the server's own 40 may all be waiting
    app = fastapi.FastAPI(title=f"internlm: {chat.name}")
    least, per_token = _BODY_BYTES
    app.add_middleware(_LimitedBody, limit=least + per_token * chat.max_length, refuse=fastapi.HTTPException)
    model = {"id": chat.name, "object": "model", "created": int(time.time()), "owned_by": "owner"}

    def refuse(status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> Any:
        return JSONResponse({"error": _error(message, kind, code)}, status)

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def wrong_body(_: fastapi.Request, error: fastapi.exceptions.RequestValidationError) -> Any:
        return refuse(400, "; ".join(map(problem, error.errors())))

    async def not_served(_: fastapi.Request, error: Any) -> Any:
        return refuse(error.status_code, str(error.detail))

    def unknown(name: str) -> Any:
        return refuse(404, f"model {name!r} is not served here, {chat.name!r} is", code="model_not_found")

    for status in range(400, 500):  # no such path or method, a body that is no text
        app.add_exception_handler(status, not_served)

    @app.exception_handler(Exception)
    async def our_mistake(_: fastapi.Request, error: Exception) -> Any:
        return refuse(500, f"the server failed: {type(error).__name__}", "server_error")

    @app.get("/v1/models")
    @app.get("/internlm/models")
    async def models() -> Any:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        return model if name == chat.name else unknown(name)

    @app.post("/v1/chat/completions")
    @app.post("/internlm/chat/completions")
    async def complete(body: Request, request: fastapi.Request) -> Any:
        if body.model not in (chat.name, NAME_OF_2023):
            return unknown(body.model)
        try:
            options = body.options(chat)
            reply = await asyncio.to_thread(chat.reply, body.turns(), options)  # others go on meanwhile
        except UserError as error:
            return refuse(400, str(error))
        except RecursionError:
            return refuse(400, "messages or tools are nested too deeply")
        except BusyError as error:
            return refuse(429, f"{error}; try again later", "rate_limit_error")
        answer = _Answer(reply, chat.name, bool(options.tools), pieces_of(reply, request, threads))
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(answer.chunks(include_usage), media_type="text/event-stream")
        try:
            async for _ in answer.pieces:
                pass
        except RuntimeError as error:
            return refuse(500, str(error), "server_error")
        if await request.is_disconnected():
            return fastapi.Response(status_code=499)  # the client has gone
        return answer.whole()

    return app


class _LimitedBody:
    """Answers 413 to a body of more than `limit` bytes, before it is in memory."""

    def __init__(self, app: Any, limit: int, refuse: Callable[[int, str], Exception]) -> None:
        self.app, self.limit, self.refuse = app, limit, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0

        async def counted() -> Any:
            nonlocal size
            event = await receive()
            size += len(event.get("body", b""))
            if size > self.limit:
                raise self.refuse(413, f"a body of more than {self.limit} bytes: the model can't take as much")
            return event

        await self.app(scope, counted, send)


async def pieces_of(reply: Reply, request: Any, threads: Executor) -> AsyncIterator[str]:
    """A reply's pieces, each waited for in one of `threads`.

    The model stops when the caller stops reading or the client disconnects, also before the first piece.
    """

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_WATCH_EVERY)
        reply.close()

    watcher = asyncio.create_task(watch())
    pieces = iter(reply)
    loop = asyncio.get_running_loop()
    try:
        while (piece := await loop.run_in_executor(threads, next, pieces, None)) is not None:
            yield piece
    finally:
        watcher.cancel()
        reply.close()


def _tool_calls(calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
        }
        for call in calls
    ]


def _error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    message = message.encode("utf-8", "replace").decode()  # what it cites may hold half characters
    return {"message": message, "type": kind, "param": None, "code": code}


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
