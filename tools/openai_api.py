"""Serve a model to OpenAI's clients: chat completions, with streaming and function calls.

    python tools/openai_api.py runs/demo/hf
    curl http://127.0.0.1:8000/v1/models

Requests are answered together, --num_rows of them at a time; others wait. There is no password: only this machine is
served unless --host says otherwise.
"""

import argparse
import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.apis.openai_server import build_app
from internlm.apis.terminal import add_model_arguments, load_with_progress
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import get_logger, setup_logging

logger = get_logger("openai_api")


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
    """Until SIGINT or SIGTERM. Raises UserError."""
    try:
        import uvicorn
    except ImportError as error:
        raise UserError('serving needs uvicorn: pip install "internlm[serve]"') from error
    with load_with_progress(given.path, given, given.num_rows, given.max_waiting) as chat:
        app = build_app(chat)
        if not _is_loopback(given.host):
            logger.warning(f"whoever reaches {given.host}:{given.port} can use the model: there is no password")
        logger.info(f"model {chat.name!r} at http://{given.host}:{given.port}/v1")
        uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


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
