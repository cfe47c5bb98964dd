"""Serve a model to OpenAI's clients: chat completions, with streaming and function calls.

    python tools/openai_api.py runs/demo/hf
    curl http://127.0.0.1:8000/v1/models

Requests are answered together, --num_rows of them at a time; others wait. There is no password: only this machine is
served unless --host says otherwise.
"""

import argparse
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.apis.openai_server import build_app
from internlm.apis.terminal import add_model_arguments, load_with_progress
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import get_logger, setup_logging

logger = get_logger("openai_api")

_PATIENCE = 5  # seconds that clients may take to read what is left when the server ends


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run, a checkpoint, or a folder in Hugging Face format")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default %(default)s)")
    parser.add_argument("--num_rows", type=int, default=8, help="requests answered at once (default %(default)s)")
    parser.add_argument("--max_waiting", type=int, default=64, help="more are refused with 429 (default %(default)s)")
    add_model_arguments(parser)
    return parser.parse_args(arguments)


def serve(given: argparse.Namespace) -> None:
    """Until SIGINT or SIGTERM, which break answers off. Raises UserError."""
    try:
        import uvicorn
    except ImportError as error:
        raise UserError('serving needs uvicorn: pip install "internlm[serve]"') from error
    with (
        _bound(given.host, given.port) as listening,  # first: a large model is read for minutes
        load_with_progress(given.path, given, given.num_rows, given.max_waiting) as chat,
    ):
        config = uvicorn.Config(build_app(chat), log_level="warning", timeout_graceful_shutdown=_PATIENCE)
        server = uvicorn.Server(config)

        def stop(*_: object) -> None:
            logger.info("the server ends; answers under way are broken off")
            server.should_exit = True
            chat.close()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        if not _is_loopback(given.host):
            logger.warning(f"whoever reaches {given.host}:{given.port} can use the model: there is no password")
        host = f"[{given.host}]" if ":" in given.host else given.host
        logger.info(f"model {chat.name!r} at http://{host}:{listening.getsockname()[1]}/v1")
        # in another thread, where uvicorn has no handlers of its own, which let answers go on to their end
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while thread.is_alive():
            thread.join(1)  # wakes up for a signal that reached another thread


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the first address of `host`. Raises UserError."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port} is not from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"can't listen at --host {host} --port {port} ({error}): choose others") from error
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when it was stopped, 2 for a mistake that the user can fix."""
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: serve(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
