"""Another trainer and ours on the same shapes, one after the other, and the ratio of their speeds.

    python benchmarks/peer.py torchtitan 7B [--gpus 2] [--recompute full|none] [--steps 25] [section.key=value ...]
    python benchmarks/peer.py hf 1.8B --recompute none

    torchtitan  from its wheel, 0.2.2: its Llama 3 with these sizes, compiled, AdamW, FSDP where there are several GPUs
    hf          transformers.Trainer on LlamaForCausalLM in bf16, compiled on GPUs, fused AdamW; one GPU

Both train on random tokens with the case's micro batches. The settings after the case are for both. Tokens/s are
medians of steps after the first five.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import CASES, SYNTHETIC, WARM_UP, run  # noqa: E402
from internlm.config.loader import load_config  # noqa: E402
from internlm.config.schema import Config  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("torchtitan", "hf"))
    parser.add_argument("case", choices=[case for case, settings in CASES.items() if SYNTHETIC[0] in settings])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20 + WARM_UP)
    parser.add_argument("--recompute", choices=("full", "none"), default="full", help="of the peer's blocks")
    parser.add_argument("--no_ours", action="store_true", help="the peer alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def torchtitan(options: argparse.Namespace, config: Config, folder: Path) -> list[float]:
    """Tokens/s/GPU of each step, from its log."""
    data = config.data
    sizes = {
        "--training.seq_len": data.seq_len,
        "--training.local_batch_size": data.micro_bsz,
        "--training.global_batch_size": data.micro_bsz * data.micro_num * options.gpus,
        "--training.steps": options.steps,
        "--activation_checkpoint.mode": options.recompute,
        "--experimental.custom_import": "benchmarks.peer_titan",
        "--model.name": "internlm_case",
        "--model.flavor": "case",
        "--metrics.log_freq": 1,
        "--job.dump_folder": folder,
    }
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={options.gpus}", "--standalone"]
    command += ["-m", "torchtitan.train", "--compile.enable", *(str(x) for pair in sizes.items() for x in pair)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["INTERNLM_CASE"] = config.model_dump_json()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"torchtitan ended with code {done.returncode}:\n{done.stdout[-4000:]}")
    return [float(tps.replace(",", "")) for tps in re.findall(r"step: +\d+ .*?tps: ([\d,]+)", done.stdout)]


def hugging_face(options: argparse.Namespace, config: Config, folder: Path) -> list[float]:
    """Tokens/s of each step."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model, data, on_gpu = config.model, config.data, torch.cuda.is_available()
    sizes = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=data.seq_len,
        attention_bias=model.qkv_bias,
        use_cache=False,
        dtype="bfloat16",
    )
    with torch.device("cuda" if on_gpu else "cpu"):
        llama = LlamaForCausalLM(sizes).bfloat16()
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.randint(model.vocab_size, (data.seq_len,))
            return {"input_ids": tokens, "labels": tokens}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=data.micro_bsz,
        gradient_accumulation_steps=data.micro_num,
        max_steps=options.steps,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=options.recompute == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=on_gpu,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        dataloader_num_workers=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    Trainer(llama, arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    tokens = data.seq_len * data.micro_bsz * data.micro_num
    return [0.0, *(tokens / (end - start) for start, end in itertools.pairwise(ends))]


def main() -> None:
    options = parse_arguments()
    if options.steps <= WARM_UP:
        sys.exit(f"--steps {options.steps}: the first {WARM_UP} steps are left out, so more are needed")
    if options.peer == "hf" and options.gpus > 1:
        sys.exit(f"--gpus {options.gpus}: hf runs on one GPU")
    file, *settings = CASES[options.case]
    config = load_config(ROOT / file, [*settings, *options.overrides])
    if not options.no_ours:
        options.profile = False
        with tempfile.TemporaryDirectory() as folder:
            lines, _ = run(options, Path(folder))
    peer = {"torchtitan": torchtitan, "hf": hugging_face}[options.peer]
    with tempfile.TemporaryDirectory() as folder:
        theirs = statistics.median(peer(options, config, Path(folder))[WARM_UP:])
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = f"{options.case}, {options.gpus} x {machine}, torch {torch.__version__}: {options.peer} {theirs:,.0f}"
    if not options.no_ours:
        ours = statistics.median(line["tgs"] for line in lines[WARM_UP:])
        text += f", ours {ours:,.0f}, ratio {ours / theirs:.2f}"
    print(f"{text} (tokens/s/GPU)")


if __name__ == "__main__":
    main()
