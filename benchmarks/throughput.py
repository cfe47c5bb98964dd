"""Runs train.py on random tokens for some steps and prints one row of benchmarks/README.md.

    python benchmarks/throughput.py 7B [--gpus 2] [--steps 25] [--profile] [section.key=value ...]

The run is the one that a user makes: train.py (under torchrun where there are several GPUs), loader, logging and
optimizer step included. The figures are medians over the steps after the first five. `--profile` traces two steps and
prints where their time went.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trace import kernel_table  # noqa: E402
from internlm.data.writer import BinWriter  # noqa: E402

WARM_UP = 5  # steps: allocator, kernels' choice, loader
SYNTHETIC = ['data.type="synthetic"', "data.train_folder=None"]
RAGGED = ["data.train_folder=RAGGED"]
SEVEN = ["configs/7B_sft.py", "hybrid_zero_optimizer.moment_dtype=torch.bfloat16"]
TWO = ["configs/1.8B_internlm2.py"]
CASES: dict[str, list[str]] = {
    "demo": ["configs/demo.py", *SYNTHETIC],
    # 10 bytes a parameter leave room for all results of matrix products of 8k tokens on 141 GB
    "7B": [*SEVEN, *SYNTHETIC, "data.seq_len=4096", "data.micro_bsz=2", "data.micro_num=8"],
    "7B-32k": [
        *SEVEN,
        *SYNTHETIC,
        "data.seq_len=32768",
        "data.micro_bsz=1",
        "data.micro_num=2",
        "model.checkpoint=offload",  # 42 GiB of the host's memory
    ],
    "1.8B": [*TWO, *SYNTHETIC, "data.seq_len=4096", "data.micro_bsz=8", "data.micro_num=2"],
    # documents of log-normal length, mean 1k, and uniform rows of the same mean attention work
    "1.8B-ragged-4k": [*TWO, *RAGGED, "data.seq_len=4096", "data.micro_bsz=4", "data.micro_num=4"],
    "1.8B-even-4k": [*TWO, *SYNTHETIC, "data.seq_len=1920", "data.micro_bsz=8", "data.micro_num=4"],
    "1.8B-ragged-32k": [*TWO, *RAGGED, "data.seq_len=32768", "data.micro_bsz=1", "data.micro_num=2"],
    "1.8B-even-32k": [*TWO, *SYNTHETIC, "data.seq_len=2688", "data.micro_bsz=12", "data.micro_num=2"],
}
COMMON = [
    "data.valid_folder=None",
    "data.valid_every=0",
    "data.num_worker=4",
    "data.min_length=0",
    "parallel.zero1.size=-1",
    "ckpt.enable_save_ckpt=False",
    "ckpt.oss_snapshot_freq=None",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default 1)")
    parser.add_argument("--steps", type=int, default=20 + WARM_UP)
    parser.add_argument("--profile", action="store_true", help="print the time of two steps by kind of kernel")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


class Sampler(threading.Thread):
    """SM clock (MHz), power (W) of the first GPU twice a second, and when the first step was reported."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.metrics, self.start_time, self.first_step = metrics, time.perf_counter(), float("nan")
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        query = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        while True:
            if self.first_step != self.first_step and self.metrics.exists() and self.metrics.stat().st_size:
                self.first_step = time.perf_counter() - self.start_time
            if torch.cuda.is_available():
                clock, power = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
                self.samples.append((float(clock), float(power)))
            time.sleep(0.5)

    def summary(self) -> str:
        """Medians over the second half, when the run is in full swing."""
        late = self.samples[len(self.samples) // 2 :]
        if not late:
            return "-"
        clock, power = (statistics.median(column) for column in zip(*late, strict=True))
        return f"{clock:,.0f} MHz, {power:.0f} W"


def write_ragged(folder: Path, num_tokens: int = 6_000_000, mean: int = 1024, seed: int = 0) -> None:
    """Documents of random tokens whose lengths are log-normal with sigma 1."""
    random = np.random.default_rng(seed)
    with BinWriter(folder / "en" / "random.bin") as writer:
        while writer.num_tokens < num_tokens:
            lengths = random.lognormal(np.log(mean) - 0.5, 1.0, 256).astype(int).clip(8, 32768)
            writer.write([", ".join(map(str, random.integers(1, 90000, length))) for length in lengths])


def run(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, float]], Sampler]:
    """Trains; the lines of metrics.jsonl."""
    config, *settings = CASES[options.case]
    if "data.train_folder=RAGGED" in settings:
        write_ragged(folder / "data")
    settings = [setting.replace("RAGGED", str(folder / "data")) for setting in settings]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={options.gpus}", "--standalone"]
    command = [sys.executable, *(torchrun if options.gpus > 1 else []), "train.py"]
    command += ["--config", config, "--run_dir", str(folder), f"data.total_steps={options.steps}"]
    command += ["--profiling"] * options.profile
    sampler = Sampler(folder / "metrics.jsonl")
    sampler.start()
    subprocess.run([*command, *COMMON, *settings, *options.overrides], cwd=ROOT, check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], sampler


def main() -> None:
    options = parse_arguments()
    if options.steps <= WARM_UP:
        sys.exit(f"--steps {options.steps}: the first {WARM_UP} steps are left out, so more are needed")
    with tempfile.TemporaryDirectory() as folder:
        lines, sampler = run(options, Path(folder))
        if options.profile:
            print(kernel_table(Path(folder) / "traces" / "rank0.json.gz"))

    def median(key: str) -> float:
        return statistics.median(line[key] for line in lines[WARM_UP:])

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = [
        str(datetime.date.today()),
        f"{options.gpus} x {machine}, torch {torch.__version__}",
        " ".join(["`python benchmarks/throughput.py", *sys.argv[1:]]) + "`",
        f"{median('tgs'):,.0f}",
        f"{median('tflops'):,.0f}",
        f"{median('mfu'):.1%} / {median('mfu_full'):.1%} / {median('hfu'):.1%}",
        f"{max(line['memory'] for line in lines) / 2**30:.1f} GiB",
        sampler.summary(),
        f"{sampler.first_step:.0f} s",
        f"loss {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f}",
    ]
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
