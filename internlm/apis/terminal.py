"""The terminal chat: `python -m internlm.apis.chat PATH`."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from internlm.apis.chat import ChatModel, Conversation, ReplyOptions, load_chat
from internlm.apis.generate import Progress
from internlm.apis.sampling import Sampling
from internlm.data.chat_template import BUILT_IN, META_INSTRUCTION
from internlm.utils.device import torch_dtype
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import setup_logging

HELP = """/help             this list
/system [TEXT]    show or set the system text; "/system -" removes it
/set NAME VALUE   temperature, top_p, top_k, repetition_penalty, max_new_tokens or seed; /set shows them
/again            another answer to the last question
/history          the conversation so far
/clear            a new conversation
/save FILE        write the conversation as a line of JSON, in the form that fine-tuning reads
/exit             leave (as does Ctrl-D); Ctrl-C stops an answer
A line that ends with a backslash goes on in the next one."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and new line


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every program that chats asks for; see `load_chat`."""
    add = parser.add_argument
    add("--tokenizer", help="sentencepiece .model, tokenizer.json or Hugging Face folder; default: the model's own")
    add("--template", help=f"{', '.join(BUILT_IN)}, a Jinja file or a Hugging Face folder; default: the model's own")
    add("--device", help="such as cuda:1 or cpu; default: the GPU if there is one")
    add("--dtype", help="float32, bfloat16 or float16; default: as stored")
    add("--max_length", type=int, help="tokens of a conversation; default: the model's own limit, at most 4096")


def load_with_progress(path: str, given: argparse.Namespace, num_rows: int = 1, max_waiting: int = 64) -> ChatModel:
    """`load_chat` as the options of `add_model_arguments` say, with a bar on the terminal."""
    columns = (TextColumn("reading the model"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"))
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        return load_chat(
            path,
            given.tokenizer,
            given.template,
            given.device,
            None if given.dtype is None else torch_dtype(f"torch.{given.dtype.removeprefix('torch.')}"),
            given.max_length,
            num_rows,
            max_waiting,
            _shown_by(bar),
        )


def _shown_by(bar: ProgressBar) -> Progress:
    task = bar.add_task("")
    return lambda done, total: bar.update(task, completed=done, total=total)


class Terminal:
    """Reads lines, runs commands, shows answers."""

    def __init__(self, conversation: Conversation, options: ReplyOptions, console: Console) -> None:
        self.conversation, self.options, self.console = conversation, options, console
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.say(HELP),
            "/system": self.system,
            "/set": self.set,
            "/again": lambda _: self.show(self.conversation.again(self.options)),
            "/history": self.history,
            "/clear": self.clear,
            "/save": self.save,
        }

    def run(self) -> None:
        """Until /exit or the end of input."""
        self.say('Write something, or "/help".')
        with suppress(EOFError):
            while (line := self.read()) != "/exit":
                with suppress(KeyboardInterrupt):
                    self.handle(line)

    def read(self) -> str:
        """A line or several that end with a backslash. Ctrl-C throws it away."""
        lines: list[str] = []
        while True:
            try:
                lines.append(self.console.input("[bold green]> " if not lines else "[green]. "))
            except KeyboardInterrupt:
                self.console.print()
                lines = []
                continue
            if not lines[-1].endswith("\\"):
                return "\n".join(line.removesuffix("\\") for line in lines).strip()

    def handle(self, line: str) -> None:
        """A command, a question, or nothing."""
        name, _, rest = line.partition(" ")
        try:
            if name in self.commands:
                self.commands[name](rest.strip())
            elif name.startswith("/") and "/" not in name[1:]:
                self.say(f"there is no command {name}; /help lists them", "red")
            elif line:
                self.show(self.conversation.ask(line, self.options))
        except (UserError, OSError, RuntimeError) as error:  # RuntimeError: the answer was broken off
            self.say(str(error), "red")

    def show(self, pieces: Iterator[str]) -> None:
        """An answer as it comes; Ctrl-C stops it, and what it said stays."""
        text = ""
        stopped = False
        with Live(console=self.console, refresh_per_second=10, vertical_overflow="visible") as live:
            try:
                for piece in pieces:
                    text += piece
                    live.update(Markdown(shown(text)))
            except KeyboardInterrupt:
                stopped = True
                pieces.close()  # type: ignore[attr-defined]
        if not self.console.is_terminal:
            self.console.print()
        if stopped:
            self.say("stopped")
        for call in self.conversation.last_calls:
            self.say(f"the model asks for {call.name} with {dict(call.arguments)}; nothing was run", "yellow")
        if self.conversation.num_forgotten:
            self.say(f"the oldest {self.conversation.num_forgotten} turns have no room any more")

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        self.say(self.conversation.system or "no system text")

    def set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            self.options = changed(self.options, name, value.strip())
        sampling = self.options.sampling
        values = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
        values |= {"max_new_tokens": self.options.max_new_tokens, "seed": self.options.seed}
        self.say("  ".join(f"{key} {value}" for key, value in values.items()))

    def history(self, _: str) -> None:
        for message in self.conversation.messages:
            self.console.print(Text(f"{message.role}: ", "bold") + Text(shown(message.content)))
        if not self.conversation.messages:
            self.say("nothing was said yet")

    def clear(self, _: str) -> None:
        self.conversation.clear()
        self.say("a new conversation")

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file")
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(self.conversation.as_json() + "\n")
        self.say(f"added to {name}")

    def say(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(shown(text), style))


def shown(text: str) -> str:
    """Text without the characters that command a terminal, such as ESC; each becomes U+FFFD."""
    return _CONTROLS.sub("\ufffd", text)


def changed(options: ReplyOptions, name: str, value: str) -> ReplyOptions:
    """`options` with one setting changed. Raises UserError for an unknown name or value."""
    kinds = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float}
    try:
        if name in kinds:
            return replace(options, sampling=replace(options.sampling, **{name: kinds[name](value)}))
        if name == "max_new_tokens":
            return replace(options, max_new_tokens=int(value))
        if name == "seed":
            return replace(options, seed=None if value == "-" else int(value))
    except ValueError:
        pass
    known = ", ".join([*kinds, "max_new_tokens", "seed"])
    raise UserError(f"{name} {value}: expected a number for one of {known} (seed -: another each time)")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m internlm.apis.chat", description="Talk with a model in the terminal; /help lists commands."
    )
    add = parser.add_argument
    add("path", help="a run, a checkpoint, or a folder in Hugging Face format")
    add_model_arguments(parser)
    add("--system", default="", help='system text; "default": that of InternLM\'s chat models')
    defaults = Sampling(temperature=0.8, top_p=0.8)
    add("--temperature", type=float, default=defaults.temperature, help="0: always the likeliest (default %(default)s)")
    add("--top_p", type=float, default=defaults.top_p, help="share of probability kept (default %(default)s)")
    add("--top_k", type=int, default=defaults.top_k, help="candidates kept, 0: all (default %(default)s)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: fewer repetitions (default %(default)s)")
    add("--max_new_tokens", type=int, default=1024, help="longest answer (default %(default)s)")
    add("--seed", type=int, help="repeat the same answers; default: other ones each time")
    return parser.parse_args(arguments)


def talk(given: argparse.Namespace) -> None:
    """Until the end of the conversation. Raises UserError."""
    sampling = Sampling(given.temperature, given.top_k, given.top_p, given.repetition_penalty)
    options = ReplyOptions(sampling, given.max_new_tokens, given.seed)
    with load_with_progress(given.path, given) as chat:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # refused as a question
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals without Unicode
        system = META_INSTRUCTION if given.system == "default" else given.system
        Terminal(Conversation(chat, system), options, Console()).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 at the end of the conversation, 2 for a mistake that the user can fix."""
    given = parse_arguments(arguments)
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: talk(given))
