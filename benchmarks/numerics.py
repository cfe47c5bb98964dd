"""What cheaper numbers do to a loss: `python benchmarks/numerics.py [section.key=value ...]`, on one GPU.

A model of 105M parameters first trains on Python's standard library in the numbers of the second row, then goes on for
300 steps of 16k tokens, once for each row below and each seed of the order of the data. Young models won't do: two runs
of the same numbers part, since attention's backward adds in another order each time, and where the loss falls steeply
they end 2 % apart (H200, 2026-12-01). The learning rate rises anew and ends at zero.

Printed: the loss on held-out files, averaged over the seeds, and by how much it differs from the first row's of the
same seeds, with the standard error of that. The first two rows compute the same numbers (tests/ops/test_adamw.py), so
their difference is noise; what exceeds twice the pooled standard error is not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpus import write_source  # noqa: E402

TOKENIZER = ROOT / "configs" / "demo_sft" / "tokenizer.model"
ENGINE = "hybrid_zero_optimizer"
KINDS = {
    "16 bytes: fp32 master and moments": [f"{ENGINE}.master=fp32"],
    "14 bytes: split master, fp32 moments": [],
    "10 bytes: split master, bf16 moments": [f"{ENGINE}.moment_dtype=torch.bfloat16"],
    "14 bytes, fp8 products": ["model.fp8=True"],
}
MODEL = ["model.num_layers=8", "model.hidden_size=1024", "model.num_attention_heads=8", "model.mlp_ratio=2.75"]
MODEL += ["model.vocab_size=1024", "model.dtype=torch.bfloat16", "model.max_position_embeddings=2048"]
# A fifth of the steps warm up: at 1e-3 after 15 of them, this model was behind where 3e-4 brings it.
RUN = ["data.seq_len=2048", "data.micro_num=1", "data.num_worker=1", "adam.lr=5e-4"]
RUN += ["lr_scheduler.warmup_ratio=0.2", "lr_scheduler.eta_min=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base_steps", type=int, default=600, help="of 32k tokens, before those that are compared")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at_once", type=int, default=6, help="runs that share the GPU")
    parser.add_argument("--megabytes", type=int, default=16, help="of source code; fewer are read again and again")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [*write_data(folder, options.megabytes * 1_000_000), *MODEL, *RUN, *options.overrides]
        base = train_base(folder / "base", common, options.base_steps)

        def train(index: int, seed: int, settings: list[str]) -> float:
            start = [f"ckpt.load_ckpt_info.path={base}", 'ckpt.load_ckpt_info.content=("model",)']
            return run_steps(
                folder / f"{index} {seed}", options.steps, [*common, *start, f"data.seed={seed}", *settings]
            )

        with ThreadPoolExecutor(options.at_once) as pool:  # a later run finds compiled what an earlier one compiled
            runs = [
                (kind, pool.submit(train, index, seed, settings))
                for seed in range(1, options.seeds + 1)
                for index, (kind, settings) in enumerate(KINDS.items())
            ]
        losses = {kind: [future.result() for name, future in runs if name == kind] for kind in KINDS}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    took = time.monotonic() - start
    print(f"{machine}, torch {torch.__version__}, {options.steps} steps, {options.seeds} seeds, {took:.0f} s")
    print(table(losses))


def train_base(folder: Path, settings: Sequence[str], steps: int) -> Path:
    """Trains what all rows start from; its checkpoint."""
    save = ["ckpt.enable_save_ckpt=True", f"ckpt.checkpoint_every={steps}", "ckpt.oss_snapshot_freq=None"]
    loss = run_steps(folder, steps, [*settings, "data.micro_bsz=16", *save])
    print(f"all rows start from a held-out loss of {loss:.4f}")
    return folder / "checkpoints" / str(steps)


def run_steps(folder: Path, steps: int, settings: Sequence[str]) -> float:
    """Trains in `folder`; the held-out loss at the end. Later settings win, so those of the base do."""
    length = [f"data.total_steps={steps}", f"data.valid_every={steps}"]
    few = ["data.micro_bsz=8", "ckpt.enable_save_ckpt=False"]
    run("train.py", "--config", "configs/demo.py", "--run_dir", folder, *length, *few, *settings)
    last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["val/code_loss"])


def write_data(folder: Path, num_characters: int) -> list[str]:
    """Tokenises source files; one of twelve is held out. Returns the settings that name the folders."""
    write_source(folder / "text.jsonl", num_characters)
    texts = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"valid": texts[::12], "train": [text for index, text in enumerate(texts) if index % 12]}
    for part, lines in parts.items():
        source = folder / f"{part}.jsonl"
        source.write_text("".join(lines), encoding="utf-8")
        where = ["--bin_output_path", folder / part / "code" / "text.bin", "--tokenizer", TOKENIZER]
        run("tools/tokenizer.py", "--text_input_path", source, "--text_key", "text", *where)
    return [f"data.{part}_folder={folder / part}" for part in parts]


def run(*command: str | Path) -> None:
    """A command of the project, quietly. Exits where it fails."""
    if code := subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with code {code}")


def table(losses: Mapping[str, Sequence[float]]) -> str:
    """Rows of Markdown. `losses`: by kind, one a seed; differences are to the first kind, seed by seed."""
    first, *_ = losses.values()
    count = len(first)
    lines = ["| numbers | held-out loss | difference | standard error |", "|---|---|---|---|"]
    variances = []
    for kind, values in losses.items():
        differences = [100 * (value / other - 1) for value, other in zip(values, first, strict=True)]
        variance = statistics.variance(differences) if count > 1 else float("nan")
        mean, error = statistics.mean(differences), (variance / count) ** 0.5
        lines.append(f"| {kind} | {statistics.mean(values):.4f} | {mean:+.2f} % | {error:.2f} % |")
        variances.append(variance)
    pooled = (statistics.mean(variances[1:]) / count) ** 0.5
    return "\n".join([*lines, f"standard error of a difference, pooled over the rows: {pooled:.2f} %"])


if __name__ == "__main__":
    main()
