"""What must hold on any CPU, as ratios that hardly depend on the machine: `python benchmarks/cpu.py`.

    demo       training of configs/demo.py against a bare torch loop over the same model     wanted: at least 0.9
    loader     reading and packing of 1.8B rows against what one H200 trains on, 4 cores      wanted: at least 20
    tokenizer  tools/tokenizer.py against datasets.map with the same model, per core          wanted: at least 2

All are of CPU time, which other work on the machine changes little; give the first one thread (OMP_NUM_THREADS=1), as
waiting threads count. `datasets` is needed for the last (`pip install datasets`; requirements/eval.txt brings it).
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import internlm  # noqa: E402
from benchmarks.corpus import write_source  # noqa: E402
from benchmarks.throughput import CASES, COMMON, SYNTHETIC, write_ragged  # noqa: E402
from internlm.config.schema import Config  # noqa: E402

H200_TOKENS = 49_164  # tokens/s of the 1.8B on one H200, benchmarks/README.md
TOKENIZER = ROOT / "configs" / "demo_sft" / "tokenizer.model"


def demo(folder: Path, turns: int = 6, steps: int = 4) -> str:
    """The Trainer with its monitor and the loop below take turns in one process; the least disturbed of them count."""
    overrides = [*SYNTHETIC, "data.valid_folder=None", "data.valid_every=0"]
    config = internlm.load_config(ROOT / "configs" / "demo.py", overrides, run_dir=str(folder))
    value_of = partial(internlm.initial_value, config=config.model, seed=config.seed)
    with internlm.launch() as world:
        mesh = internlm.build_mesh(config.parallel, world)
        model = internlm.build_model(config)
        placements = internlm.parallelize(model, config, mesh)
        optimizer = internlm.HybridZero(model, config, mesh, value_of, placements)
        schedule = internlm.build_schedule(model, optimizer, config, mesh)
        loader = internlm.build_train_loader(config, mesh.dp_rank, mesh.dp_size)
        trainer = internlm.Trainer(schedule, optimizer, loader, internlm.TrainState(), config, mesh, {})
        with internlm.Monitor(config, folder) as monitor:
            sides: dict[str, Iterator[object]] = {"ours": map(monitor.report, trainer.steps()), "bare": _bare(config)}
            times: dict[str, list[float]] = {name: [] for name in sides}
            for turn, (name, side) in itertools.product(range(turns), sides.items()):
                start = time.process_time()
                for _ in itertools.islice(side, steps):
                    pass
                if turn > 0:
                    times[name].append((time.process_time() - start) / steps)
    tokens = config.data.seq_len * config.data.micro_bsz * config.data.micro_num
    ours, bare = (tokens / min(times[name]) for name in sides)
    threads = torch.get_num_threads()
    return f"demo: {ours:,.0f} tokens per CPU second, bare torch loop {bare:,.0f}, {threads} threads: {ours / bare:.2f}"


def _bare(config: Config) -> Iterator[None]:
    """What one would write by hand: the model, all logits, torch's AdamW; the same rows from the same loader."""
    model = internlm.build_model(config, device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(internlm.initial_value(name, tuple(parameter.shape), config.model, config.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    for batch in internlm.build_train_loader(config, 0, 1):
        for row in batch.micro_batches:
            F.cross_entropy(model(row), row.labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def loader(folder: Path, steps: int = 60) -> str:
    """Tokens per second of CPU time of reading and packing, in this process; then by two workers, on the clock."""
    write_ragged(folder)
    config, *settings = CASES["1.8B-ragged-4k"]
    settings = [setting.replace("RAGGED", str(folder)) for setting in settings]

    def rate(num_workers: int, clock: Callable[[], float]) -> float:
        run = internlm.load_config(
            ROOT / config, [*COMMON, *settings, f"data.num_worker={num_workers}", f"data.total_steps={steps}"]
        )
        batches = iter(internlm.build_train_loader(run, 0, 1))
        next(batches)  # starts the workers
        start = clock()
        tokens = sum(row.tokens.numel() for batch in batches for row in batch.micro_batches)
        return tokens / (clock() - start)

    core, pair = rate(0, time.process_time), rate(2, time.perf_counter)
    return (
        f"loader: {core:,.0f} tokens/s a core (2 workers on the clock: {pair:,.0f}), 4 cores {4 * core:,.0f}, "
        f"an H200 trains on {H200_TOKENS:,}: {4 * core / H200_TOKENS:.0f}"
    )


# What the documentation of `datasets` advises for tokenising: batches, one process a core.
MAP = """
import sys, datasets, sentencepiece
datasets.disable_progress_bars()
source, target, model = sys.argv[1:]
pieces = sentencepiece.SentencePieceProcessor(model_file=model)
data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=target + "/cache")
ids = lambda rows: {"tokens": pieces.encode(rows["text"], add_bos=True, num_threads=1)}
data.map(ids, batched=True, remove_columns=["text"]).save_to_disk(target)
"""


def tokenizer(folder: Path, model: Path, turns: int = 3, num_characters: int = 40_000_000) -> str:
    """Tokens per second of CPU time of both, start and writing included; they take turns, and medians count."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = []
    for kind in ("source code", "its docstrings"):
        source = folder / f"{kind}.jsonl"
        write_source(source, num_characters, prose=kind != "source code")
        with source.open(encoding="utf-8") as texts:
            tokens = sum(len(pieces.encode(json.loads(text)["text"])) + 1 for text in texts)
        ours = [ROOT / "tools" / "tokenizer.py", "--text_input_path", source, "--text_key", "text"]
        ours += ["--num_workers", "1", "--tokenizer", model, "--bin_output_path", folder / kind / "text.bin"]
        times: list[tuple[float, float]] = []
        for turn in range(turns):  # theirs in a new folder each time, as `datasets` keeps what it has done
            theirs = ["-c", MAP, source, folder / f"{kind} {turn}", model]
            times.append((_cpu_seconds([*ours, "--overwrite"]), _cpu_seconds(theirs)))
        rates = [tokens / statistics.median(seconds) for seconds in zip(*times, strict=True)]
        lines.append(
            f"tokenizer, {kind}, {tokens:,} tokens, {model.name}: {rates[0]:,.0f} tokens/s a core, datasets.map "
            f"{rates[1]:,.0f}: {rates[0] / rates[1]:.2f}"
        )
    return "\n".join(lines)


def _cpu_seconds(arguments: list[str | Path]) -> float:
    """CPU time of a Python command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["demo", "loader", "tokenizer"], help="default: all three")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="sentencepiece model of the last part")
    options = parser.parse_args()
    parts = {"demo": demo, "loader": loader, "tokenizer": partial(tokenizer, model=options.tokenizer)}
    lines = []
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(parts[part](Path(folder)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
