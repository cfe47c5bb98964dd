"""Score a model on tasks of lm-evaluation-harness.

    python tools/evaluate.py runs/demo --tasks mine --include_path tasks/
    python tools/evaluate.py runs/demo/hf --tasks hellaswag,piqa --limit 200 --output scores.json
    python tools/evaluate.py runs/7B_sft --tasks gsm8k --apply_chat_template

The model is a run, a checkpoint, or a folder in Hugging Face format; it is read and computed by this framework. Tasks
are names that lm_eval knows (it fetches their data) or those of YAML files in --include_path.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.apis.chat import template_of_model
from internlm.apis.generate import check_length, model_config, open_model, read_model, tokenizer_of
from internlm.apis.harness import Scorer, check_tasks, open_tasks, run_tasks
from internlm.checkpoint.hf import HFReader
from internlm.data.tokenizer import check_tokenizer, open_tokenizer
from internlm.utils.device import torch_dtype
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import setup_logging


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", help="a run, a checkpoint, or a folder in Hugging Face format")
    add("--tasks", required=True, help="names, with commas between them")
    add("--include_path", help="folder with YAML files of tasks of your own")
    add("--num_fewshot", type=int, help="examples before each question; default: as the task says")
    add("--limit", type=int, help="questions of each task; default: all")
    add("--apply_chat_template", action="store_true", help="ask as a conversation, in the model's chat template")
    add("--system_instruction", help="text of the system, before each question")
    add("--output", type=Path, help="write all results there as JSON")
    add("--log_samples", action="store_true", help="with each question, answer and score in --output")
    add("--tokenizer", help="sentencepiece .model, tokenizer.json or Hugging Face folder; default: the model's own")
    add("--device", help="such as cuda:1 or cpu; default: the GPU if there is one")
    add("--dtype", help="float32, bfloat16 or float16; default: as stored")
    add("--max_length", type=int, help="tokens seen of a text; default: what the model was made for")
    add("--row_tokens", type=int, default=4096, help="tokens computed at once (default %(default)s)")
    return parser.parse_args(arguments)


def evaluate(given: argparse.Namespace) -> None:
    """Scores the model, and shows and writes the results. Raises UserError."""
    if given.log_samples and given.output is None:
        raise UserError("--log_samples: they are written into --output, which is missing")
    tasks = [name.strip() for name in given.tasks.split(",") if name.strip()]
    if not tasks:
        raise UserError(f"--tasks {given.tasks!r} names none")
    for flag, least in (("limit", 1), ("row_tokens", 1), ("num_fewshot", 0)):
        if (value := getattr(given, flag)) is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    if given.output is not None and given.output.is_dir():
        raise UserError(f"--output {given.output} is a folder; give the file to write")
    manager = open_tasks(tasks, given.include_path)
    reader = open_model(given.path)
    config = model_config(reader)
    tokenizer = open_tokenizer(given.tokenizer) if given.tokenizer else tokenizer_of(reader, given.path)
    check_tokenizer(tokenizer, config)
    dtype = torch_dtype(f"torch.{given.dtype.removeprefix('torch.')}") if given.dtype else None
    max_length = config.max_position_embeddings if given.max_length is None else given.max_length
    if max_length < 2:
        raise UserError(f"--max_length {max_length}: must be at least 2")
    check_length(max_length, config, f"--max_length {max_length}")
    check_tasks(tasks, manager, max_length, given.num_fewshot)
    template = template_of_model(reader, given.path) if given.apply_chat_template else None
    if isinstance(reader, HFReader):
        stops = reader.end_ids
    else:
        is_chat = reader.config.data.type in ("chat", "preference")  # then an export stops there whatever it is asked
        own = template_of_model(reader, given.path) if is_chat and template is None else template
        stops = [index for text in (own.stop if own else ()) if (index := tokenizer.id_of(text)) is not None]
    scorer = Scorer(read_model(reader, given.device, dtype), tokenizer, max_length, given.row_tokens, stops)
    settings = {name: getattr(given, name) for name in ("num_fewshot", "limit", "system_instruction", "log_samples")}
    results = run_tasks(scorer, tasks, manager, template, **settings)
    if results is None:
        raise UserError("the first process of a node alone has the scores: start this without torchrun")
    show(results)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, default=str, ensure_ascii=False)
        given.output.write_text(text + "\n", encoding="utf-8")


def show(results: dict[str, Any]) -> None:
    """The scores as a table."""
    table = Table("task", "measure", "value", "standard error")
    for task, scores in results["results"].items():
        for name, value in scores.items():
            measure, _, filtered = name.partition(",")
            if isinstance(value, float) and not measure.endswith("_stderr"):
                error = scores.get(f"{measure}_stderr,{filtered}")
                table.add_row(task, measure, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all tasks are scored, 2 for a mistake that the user can fix."""
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: evaluate(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
