"""Convert a Hugging Face folder into a checkpoint of this framework, to train on or to generate from.

    python tools/convert_from_hf.py --src hf --tgt checkpoints

It streams: one tensor is in memory at a time. --format 2023 (or --tp_size, as the revert_internlm*.py of InternEvo had
it) writes the folder layout of 2023 instead. The source may also be a checkpoint of this framework or of 2023.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.checkpoint.hf import DTYPES, HFReader
from internlm.checkpoint.hf_names import native_shapes
from internlm.checkpoint.legacy.writer import write_legacy
from internlm.checkpoint.native import is_hf_folder, open_checkpoint
from internlm.checkpoint.native_writer import write_native
from internlm.config.presets import PRESETS
from internlm.config.schema import Config, ModelConfig
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import setup_logging
from internlm.utils.progress import watched


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", "--src_folder", required=True, help="Hugging Face folder: safetensors or .bin")
    parser.add_argument("--tgt", "--tgt_folder", required=True, help="folder of checkpoints to write step 0 into")
    parser.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)} or auto (default): as in the source")
    parser.add_argument("--format", choices=["native", "2023"], help="default: native; 2023 when --tp_size is given")
    old = parser.add_argument_group("the layout of 2023")
    old.add_argument("--tp_size", type=int, help="tensor ranks, default 1")
    old.add_argument("--version", type=int, choices=[1, 2], default=2, help="1: w3 is the output, 2: w2 (default)")
    old.add_argument("--family", choices=["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"], help="default: what fits")
    old.add_argument("--top_k", type=int, help="experts that compute a token, where a source of 2023 doesn't say")
    old.add_argument("--embed_split", action="store_true", help="cut the embedding along its columns, not its rows")
    for flag in ("--use_flash", "--safetensors", "--adapt_hf"):
        old.add_argument(flag, action="store_true", help="accepted as in 2023; found out by itself")
    return parser.parse_args(arguments)


def open_source(folder: str, top_k: int | None) -> tuple[dict[str, Any], str, Callable[[str], Tensor]]:
    """The model section, the preset's name, and what reads a parameter. Raises UserError."""
    if is_hf_folder(folder):
        if top_k is not None:
            raise UserError(f"--top_k is for sources of 2023; {folder} says in its config.json how many it is")
        reader = HFReader(folder)
        return reader.config_model(), reader.model_type, reader.read
    checkpoint = open_checkpoint(folder, top_k=top_k)
    return checkpoint.config.model.model_dump(), checkpoint.config.model_type, checkpoint.read


def convert(arguments: argparse.Namespace) -> None:
    """Raises UserError for what the user can fix."""
    dtype = arguments.dtype.removeprefix("torch.")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {arguments.dtype} is not known; use auto, {', '.join(DTYPES)}")
    if arguments.tp_size is not None and arguments.tp_size < 1:
        raise UserError(f"--tp_size {arguments.tp_size} must be positive")
    if arguments.format == "native" and arguments.tp_size is not None:
        raise UserError("--tp_size belongs to --format 2023; a checkpoint of ours loads on any number of ranks")
    is_2023 = arguments.format == "2023" or arguments.tp_size is not None
    if not is_2023 and (arguments.embed_split or arguments.family):
        raise UserError("--embed_split and --family belong to --format 2023; a checkpoint of ours has one layout")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top_k {arguments.top_k} must be positive")
    section, model_type, read = open_source(arguments.src, arguments.top_k)
    if dtype != "auto":
        section["dtype"] = f"torch.{dtype}"
    model = ModelConfig(**{**PRESETS[model_type], **section})
    with watched(read, len(native_shapes(model))) as named:
        if is_2023:
            mlp = "old" if arguments.version == 1 else "new"
            ranks = arguments.tp_size or 1
            write_legacy(named, model, arguments.tgt, arguments.family, mlp, ranks, arguments.embed_split)
            path = arguments.tgt
        else:
            data = {"seq_len": model.max_position_embeddings, "total_steps": 1}
            config = Config.model_validate({"model_type": model_type, "model": model, "data": data})
            path = write_native(named, config, arguments.tgt)
    print(f"train on it with ckpt.load_ckpt_info.path={path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the checkpoint is complete, 2 for a mistake that the user can fix."""
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: convert(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
