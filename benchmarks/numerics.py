"""What cheaper numbers do to a loss: `python benchmarks/numerics.py [section.key=value ...]`, on one GPU.

A model of 105M parameters trains 300 steps on source code, 65k tokens a step, once for each row below, all from the
same initial values on the same batches and all at once. Printed: the mean loss of the last 50 steps, and by how much it
and the worst mean of 20 steps in a row differ from those of 16 bytes a parameter.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
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
RUN = ["data.seq_len=2048", "data.micro_bsz=8", "data.micro_num=4", "data.total_steps=300", "data.num_worker=2"]
RUN += ["data.valid_folder=None", "data.valid_every=0", "adam.lr=3e-4", "ckpt.enable_save_ckpt=False"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60, help="of source code; fewer are read again and again")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "text.jsonl", options.megabytes * 1_000_000)
        data = folder / "data" / "code" / "text.bin"
        tokenize = ["tools/tokenizer.py", "--text_input_path", folder / "text.jsonl", "--text_key", "text"]
        run([*tokenize, "--tokenizer", TOKENIZER, "--bin_output_path", data]).wait()
        processes = []
        for index, settings in enumerate(KINDS.values()):
            train = ["train.py", "--config", "configs/demo.py", "--run_dir", folder / str(index)]
            where = f"data.train_folder={folder / 'data'}"
            processes.append(run([*train, where, *MODEL, *RUN, *settings, *options.overrides]))
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"the runs ended with codes {codes}")
        curves = [losses(folder / str(index) / "metrics.jsonl") for index in range(len(KINDS))]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{machine}, torch {torch.__version__}, {len(curves[0])} steps")
    for kind, curve in zip(KINDS, curves, strict=True):
        last, first = (statistics.mean(values[-50:]) for values in (curve, curves[0]))
        pairs = list(zip(means(curve), means(curves[0]), strict=True))
        worst = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        print(f"{kind}: loss {last:.4f}, {last / first - 1:+.2%}, worst of 20 steps {worst:.2%}")


def run(command: list[str | Path]) -> subprocess.Popen[bytes]:
    """Starts a command of the project, quietly."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)


def losses(metrics: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]


def means(curve: list[float], width: int = 20) -> list[float]:
    return [statistics.mean(curve[start : start + width]) for start in range(0, len(curve), width)]


if __name__ == "__main__":
    main()
