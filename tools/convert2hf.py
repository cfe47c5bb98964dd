"""Convert a checkpoint of this framework into a Hugging Face folder.

    python tools/convert2hf.py --src_folder runs/demo/checkpoints --tgt_folder hf --tokenizer tokenizer.model

The source is the folder of one checkpoint, or one that holds checkpoints, of which the newest good one is taken.
Checkpoints of the 2023 framework (model_tp*_pp*.pt) are read as they are, cut up in whatever way. An adapter in PEFT's
files is merged with the base that its adapter_config.json names.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.checkpoint.hf import DTYPES, HFReader, export_hf
from internlm.checkpoint.hf_names import LAYOUTS, native_shapes
from internlm.checkpoint.native import CheckpointReader, NativeReader, is_hf_folder, open_checkpoint
from internlm.checkpoint.peft import export_adapter
from internlm.config.data_section import DataConfig
from internlm.config.presets import PRESETS
from internlm.config.rope_section import RopeScaling
from internlm.config.schema import Config, ModelConfig
from internlm.data.chat import template_of_data
from internlm.data.chat_template import BUILT_IN, ChatTemplate
from internlm.data.find_template import find_template
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import get_logger, setup_logging
from internlm.utils.progress import watched

logger = get_logger("convert2hf")

ARCH_HELP = """layout of the export. Default: the one that transformers (5.3 or newer) and the serving engines load
without remote code: llama for INTERNLM (attention_bias=true), INTERNLM2_PUBLIC and LLAMA2, qwen2 for QWEN2, qwen3 for
QWEN3. internlm and internlm2 give the tensor names and config.json that InternLM published. With internlm come the
Python files that load it with trust_remote_code=True and give the model `chat` and `stream_chat`; to load
internlm2, its published modeling_*.py files must be put beside it."""
TEMPLATE_HELP = f"""chat template to put beside the tokenizer, so that chat engines know how turns are written: a name
({", ".join(BUILT_IN)}), a Jinja file or a Hugging Face folder. Its stop tokens go into generation_config.json, and the
free pieces of InternLM2's tokenizer get the names it uses. none: none but what a tokenizer's folder has itself.
Default: the one that the run was trained with, if its data were conversations, else none."""
DTYPE_HELP = """dtype of the tensors: float16 (default, as in 2023), bfloat16, float32, or auto: as trained. A bfloat16
model has values that float16 rounds to zero or cannot hold; the latter are refused, auto keeps every bit."""

ROTARY_HELP = """rotary angles of the export, as in InternEvo's converters: origin, or dynamic for texts longer than
max_position_embeddings; default: those of the model"""
VERSION_HELP = """which tensor of a 2023 checkpoint is the output of its feed-forward layers: 1: w3 (InternLM 0.1 to
0.2.1, InternEvo up to 0.2.3), 2: w2 (InternEvo from 0.3.0 on). Needed only where shapes don't tell."""
VERSIONS: dict[int | None, Literal["old", "new"]] = {1: "old", 2: "new"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--src_folder", "--src", required=True, help="checkpoint of any generation, a folder of them, or PEFT's adapter"
    )
    parser.add_argument("--tgt_folder", "--tgt", required=True, help="folder of the export; made if missing")
    parser.add_argument(
        "--tokenizer", help="sentencepiece .model file or Hugging Face folder; default: data.tokenizer_path of the run"
    )
    parser.add_argument("--chat_template", help=TEMPLATE_HELP)
    parser.add_argument("--arch", choices=[*LAYOUTS], help=ARCH_HELP)
    parser.add_argument("--dtype", default="float16", help=DTYPE_HELP)
    parser.add_argument("--max_shard", default="10GB", help="largest size of one safetensors file, default 10GB")
    parser.add_argument("--max_pos", type=int, help="max_position_embeddings to write; default: the trained one")
    parser.add_argument("--rotary_type", choices=["origin", "dynamic"], help=ROTARY_HELP)
    parser.add_argument("--scaling_factor", type=float, help="factor of --rotary_type dynamic, default 1")
    parser.add_argument("--version", type=int, choices=[1, 2], help=VERSION_HELP)
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, in PEFT's files")
    parser.add_argument("--force", action="store_true", help="replace an earlier export in --tgt_folder")
    return parser.parse_args(arguments)


def convert(arguments: argparse.Namespace) -> None:
    """Raises UserError for what the user can fix."""
    dtype = arguments.dtype.removeprefix("torch.")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {arguments.dtype} is not known; use auto, {', '.join(DTYPES)}")
    reader, config = _open(arguments)
    if arguments.adapter:
        if not isinstance(reader, NativeReader):
            raise UserError("--adapter: checkpoints of 2023 hold no adapters")
        base = config.ckpt.load_ckpt_info
        export_adapter(reader, arguments.tgt_folder, base.path if base is not None else "", arguments.force)
        return
    if arguments.max_pos is not None:
        if arguments.max_pos <= 0:
            raise UserError(f"--max_pos {arguments.max_pos} must be positive")
        model = config.model.model_copy(update={"max_position_embeddings": arguments.max_pos})
        config = config.model_copy(update={"model": model})
    config = _with_rotary(config, arguments)
    tokenizer = arguments.tokenizer
    if tokenizer is None and config.data.tokenizer_path and Path(config.data.tokenizer_path).exists():
        tokenizer = config.data.tokenizer_path
        logger.info(f"tokenizer of the run: {tokenizer}")
    template = template_for(arguments.chat_template, config.data, arguments.tokenizer)
    if template is not None and tokenizer is None:
        raise UserError(
            f"chat template {template.name} goes into the tokenizer's files: give the tokenizer with --tokenizer, "
            "or --chat_template none"
        )
    with watched(reader.read, len(native_shapes(config.model))) as read:
        export_hf(
            read,
            config,
            arguments.tgt_folder,
            arguments.arch,
            dtype,
            arguments.max_shard,
            tokenizer,
            force=arguments.force,
            template=template,
        )


def _open(arguments: argparse.Namespace) -> tuple[HFReader | CheckpointReader, Config]:
    folder, version = arguments.src_folder, arguments.version
    if not is_hf_folder(folder):
        checkpoint = open_checkpoint(folder, mlp=VERSIONS.get(version))
        if version is not None and isinstance(checkpoint, NativeReader):
            raise UserError("--version tells how 2023 named its tensors; this checkpoint is ours, omit it")
        return checkpoint, checkpoint.config
    reader = HFReader(folder)
    if reader.adapter is None:
        raise UserError(
            f"{folder} is a Hugging Face folder already; for another layout or dtype make a checkpoint of it first "
            "(tools/convert_from_hf.py)"
        )
    if arguments.adapter or version is not None:
        raise UserError(f"{folder} holds an adapter in PEFT's files: omit --adapter and --version to merge it")
    logger.info(f"merging the adapter in {folder} into {reader.folder}")
    files = [Path(reader.text_folder, name) for name in ("tokenizer.json", "tokenizer.model")]
    tokenizer = reader.text_folder if any(file.is_file() for file in files) else None
    model = ModelConfig(**{**PRESETS[reader.model_type], **reader.config_model()})
    data = {"seq_len": model.max_position_embeddings, "total_steps": 1, "tokenizer_path": tokenizer}
    return reader, Config.model_validate({"model_type": reader.model_type, "model": model, "data": data})


def _with_rotary(config: Config, arguments: argparse.Namespace) -> Config:
    kind, factor = arguments.rotary_type, arguments.scaling_factor
    if factor is not None and (kind != "dynamic" or factor < 1):
        raise UserError(f"--scaling_factor {factor}: a factor of at least 1, and beside --rotary_type dynamic")
    if kind is None:
        return config
    scaling = RopeScaling(type="dynamic", factor=factor or 1.0) if kind == "dynamic" else None
    return config.model_copy(update={"model": config.model.model_copy(update={"rope_scaling": scaling})})


def template_for(asked: str | None, data: DataConfig, tokenizer: str | None) -> ChatTemplate | None:
    """The template that was asked for, else that of a run on conversations. Raises UserError where it can't be read.

    `tokenizer` stands for the run's, in which the template may be, if that has moved.
    """
    if asked is not None:
        return None if asked == "none" else find_template(asked)
    if data.type not in ("chat", "preference"):
        return None
    if tokenizer is not None and not Path(data.tokenizer_path or "").exists():
        data = data.model_copy(update={"tokenizer_path": tokenizer})
    try:
        template = template_of_data(data)
    except UserError as error:
        raise UserError(
            f"the run's own chat template: {error} Or give --chat_template, or --chat_template none, or as --tokenizer "
            "the run's folder with both, where that has moved"
        ) from error
    logger.info(f"chat template of the run: {template.name}")
    return template


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the export is complete, 2 for a mistake that the user can fix."""
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: convert(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
