"""Chat with a model in the browser: `streamlit run web_demo.py -- --model PATH`.

PATH is a run, a checkpoint, or a folder in Hugging Face format. The page is served to this machine only, as
.streamlit/config.toml says. What the model writes is shown as Markdown: never as HTML, and without loading images.
A conversation survives a reload of its page, but not the end of the process.
"""

import argparse
import json
import re
import secrets
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NoReturn

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from internlm.apis.batching import BusyError
from internlm.apis.chat import ChatModel, Conversation, ReplyOptions
from internlm.apis.sampling import Sampling
from internlm.apis.terminal import add_model_arguments, load_with_progress
from internlm.apis.tool_calls import parse_tool_calls
from internlm.data.chat_template import META_INSTRUCTION
from internlm.data.message import Message
from internlm.utils.errors import UserError
from internlm.utils.logger import setup_logging

MAX_CONVERSATIONS = 64  # kept for reloads, the newest
_FENCE = re.compile(r"^```([\w+#-]*)[^`\n]*\n(.*?)(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


@dataclass
class Server:
    """What all browser sessions share."""

    chat: ChatModel
    conversations: OrderedDict[str, Conversation] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def conversation(self, key: str, system: str) -> Conversation:
        """The conversation of a page, a new one for an unknown key."""
        with self.lock:
            conversation = self.conversations.setdefault(key, Conversation(self.chat, system))
            self.conversations.move_to_end(key)
            if len(self.conversations) > MAX_CONVERSATIONS:
                self.conversations.popitem(last=False)
        return conversation


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n\n{self.format_help()}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UserError with the help text for what makes no sense, and for --help."""
    parser = _Parser(prog="streamlit run web_demo.py --", description="Chat with a model in the browser.")
    parser.add_argument("--model", required=True, help="a run, a checkpoint, or a folder in Hugging Face format")
    parser.add_argument("--system", default="", help='system text; "default": that of InternLM\'s chat models')
    parser.add_argument("--num_rows", type=int, default=2, help="conversations answered at once (default %(default)s)")
    add_model_arguments(parser)
    if {"-h", "--help"} & set(arguments):
        raise UserError(parser.format_help())
    return parser.parse_args(arguments)


@st.cache_resource(show_spinner="Reading the model; the terminal shows how far it is.")
def open_server(arguments: tuple[str, ...]) -> Server:
    setup_logging(rank=0, world_size=1)
    given = parse_arguments(arguments)
    return Server(load_with_progress(given.model, given, given.num_rows))


def main() -> None:
    if get_script_run_ctx(suppress_warning=True) is None:
        sys.exit("a page needs its server: streamlit run web_demo.py -- --model PATH (--help instead shows more)")
    st.set_page_config(page_title="internlm chat", page_icon="💬")
    arguments = tuple(sys.argv[1:])
    try:
        given = parse_arguments(arguments)
        server = open_server(arguments)
    except UserError as error:
        st.error("There is no model to talk to.")
        st.code(str(error), language=None, wrap_lines=True)
        st.stop()
    st.title(server.chat.name)
    key = st.query_params.setdefault("chat", secrets.token_urlsafe(16))
    conversation = server.conversation(key, META_INSTRUCTION if given.system == "default" else given.system)
    options = sidebar(conversation)
    for message in conversation.messages:
        show(message)
    question = st.chat_input("Write a message")
    if question:
        show(Message("user", question))
        answer(conversation, conversation.ask(question, options))
    elif conversation.messages and st.button("Regenerate", help="Another answer to the last message"):
        conversation.messages = conversation.asked()
        st.session_state.again = True
        st.rerun()
    if st.session_state.pop("again", False):
        answer(conversation, conversation.again(options))
    if conversation.num_forgotten:
        st.caption(
            f"The oldest {conversation.num_forgotten} turns have no room any more; the model no longer sees them."
        )


def sidebar(conversation: Conversation) -> ReplyOptions:
    """System text, sampling, and what can be done with the conversation."""
    with st.sidebar:
        conversation.system = st.text_area("System prompt", conversation.system, height=120)
        temperature = st.slider("Temperature", 0.0, 2.0, 0.8, 0.05, help="0: always the likeliest token")
        top_p = st.slider("Top p", 0.05, 1.0, 0.8, 0.05, help="Share of probability that is kept")
        top_k = st.slider("Top k", 0, 200, 0, help="Candidates that are kept; 0: all")
        penalty = st.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05)
        limit = conversation.chat.max_length
        max_new_tokens = st.slider("Longest answer, in tokens", 1, limit, min(1024, limit))
        if st.button("Clear Chat History", width="stretch"):
            conversation.clear()
        st.download_button("Save as jsonl", conversation.as_json() + "\n", "chat.jsonl", width="stretch")
    return ReplyOptions(Sampling(temperature, top_k, top_p, penalty), max_new_tokens)


def answer(conversation: Conversation, pieces: Iterator[str]) -> None:
    """Shows an answer while it comes. "Stop" reruns this script, which closes `pieces`; the text so far stays."""
    with st.chat_message("assistant"), closing(pieces):  # type: ignore[type-var]
        place, stop = st.empty(), st.empty()
        stop.button("Stop")
        text = ""
        try:
            for piece in pieces:
                text += piece
                with place.container():
                    write(text + " ▌")
        except BusyError:
            stop.warning("Too many others are waiting; try again in a moment.")
            st.stop()
        except (UserError, RuntimeError) as error:
            stop.error(without_images(str(error)))
            st.stop()
    st.rerun()


def show(message: Message) -> None:
    """One turn; functions that the model asks for are shown and not run."""
    with st.chat_message("user" if message.role == "user" else "assistant"):
        content, calls = parse_tool_calls(message.content) if message.role == "assistant" else (message.content, ())
        write(content)
        for call in calls:
            st.caption(without_images(f"asks for {call.name}; nothing was run"))
            if "code" in call.arguments:
                st.code(call.arguments["code"], language="python")
            else:
                st.code(json.dumps(dict(call.arguments), indent=2, ensure_ascii=False), language="json")


def without_images(text: str) -> str:
    """Markdown that loads nothing: an image's address could carry the conversation to another machine.

    Code is no exception: what is code, only the browser's own reader of Markdown knows.
    """
    return text.replace("![", "!\\[")


def write(text: str) -> None:
    """Shows Markdown. Fenced code keeps every character: the element that shows it reads no Markdown."""
    end = 0
    for fence in [*_FENCE.finditer(text), None]:
        prose = text[end : fence.start() if fence else None]
        if prose.strip():
            st.markdown(without_images(prose))
        if fence:
            st.code(fence[2].removesuffix("\n"), language=fence[1] or None)
            end = fence.end()


main()
