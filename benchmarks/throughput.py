"""Runs train.py on random tokens for some steps and prints one row of benchmarks/README.md.

    python benchmarks/throughput.py 7B [--gpus 2] [--steps 20] [section.key=value ...]

The run is the one that a user makes: train.py under torchrun, loader, logging and optimizer step included. The figures
are medians over the steps after the first five.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5  # steps: allocator, kernels' choice, loader
CASES = {
    "demo": ["configs/demo.py"],
    "7B": ["configs/7B_sft.py", "data.seq_len=4096", "data.micro_bsz=2", "data.micro_num=4", "model.checkpoint=True"],
    "1.8B": ["configs/1.8B_internlm2.py", "data.seq_len=4096", "data.micro_bsz=4", "data.micro_num=4"],
}
COMMON = [
    'data.type="synthetic"',
    "data.train_folder=None",
    "data.valid_folder=None",
    "data.valid_every=0",
    "data.num_worker=2",
    "parallel.zero1.size=-1",
    "ckpt.enable_save_ckpt=False",
    "ckpt.oss_snapshot_freq=None",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default 1)")
    parser.add_argument("--steps", type=int, default=20 + WARM_UP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse_arguments()
    if options.steps <= WARM_UP:
        sys.exit(f"--steps {options.steps}: the first {WARM_UP} steps are left out, so more are needed")
    config, *settings = CASES[options.case]
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={options.gpus}", "--standalone"]
        command += ["train.py", "--config", config, "--run_dir", run_dir, f"data.total_steps={options.steps}"]
        subprocess.run([*command, *COMMON, *settings, *options.overrides], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]

    def median(key: str) -> float:
        return statistics.median(line[key] for line in lines[WARM_UP:])

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = [
        str(datetime.date.today()),
        f"{options.gpus} x {machine}, torch {torch.__version__}",
        " ".join(["`python benchmarks/throughput.py", *sys.argv[1:]]) + "`",
        f"{median('tgs'):,.0f}",
        f"{median('mfu'):.1%} / {median('mfu_full'):.1%}",
        f"{max(line['memory'] for line in lines) / 2**30:.1f} GiB",
        f"loss {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f}",
    ]
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
