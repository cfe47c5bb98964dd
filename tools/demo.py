"""`make demo`: from raw text to a trained, evaluated, resumed, exported model, on whatever machine this is.

The text is the source code of Python's own standard library, so nothing is downloaded. Every stage calls what a user
would call: `tools/tokenizer.py`, `train.py`, `tools/convert2hf.py`, and the library's evaluation and generation.
Arguments of the form section.key=value are laid over configs/demo.py.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

import internlm
from internlm.apis.sampling import Sampling
from internlm.checkpoint.manifest import MANIFEST
from internlm.config.schema import Config
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.py"
MARK = ".demo"  # in a folder that this script made and may therefore empty

CORPUS_BYTES = 6_000_000  # some 2 million tokens: more than the run reads, so that nothing is seen twice
VALID_SHARE = 16  # every 16th file is held out
VALID_LINES, VALID_PIECES = 25, 3  # of a held-out file; validation reads the first seq_len tokens of a piece only
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOKENIZER_LINES = 60_000  # enough for 4096 pieces in some seconds
RESUME_STEPS = 3  # steps between the first checkpoint and the kill: they are lost and done again
PERPLEXITY_FACTOR = 10  # by which held-out perplexity falls at least, by the config as it is
LOGITS_LIMIT = 1e-4  # between our logits and the export's, which are some tens
PROMPTS = ("import ", "def __init__(self", "class ")

console = Console()


@contextmanager
def stage(title: str) -> Iterator[None]:
    """A heading, and the seconds that its work took."""
    console.rule(f"[bold]{title}", align="left")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s")


def run(*command: str | Path) -> None:
    """Runs a command of the project with its output shown. Raises UserError if it fails."""
    shown = " ".join(_short(part) for part in command)
    console.print(f"[cyan]$ python {shown}", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        raise UserError(f"this ended with code {code}: python {shown}")


def _short(part: str | Path) -> str:
    return str(part).replace(f"{ROOT}/", "")


def collect_corpus(folder: Path) -> dict[str, int]:
    """Writes folder/train.jsonl and folder/valid.jsonl, one source file a line; the number of files of each.

    Which files are taken and which are held out depends on their names only.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder_name, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        files += [Path(folder_name, name) for name in names if name.endswith(".py")]
    ranked = sorted((hashlib.sha256(path.relative_to(library).as_posix().encode()).digest(), path) for path in files)
    folder.mkdir(parents=True)
    counts, room = {"train": 0, "valid": 0}, CORPUS_BYTES
    outputs = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in counts}
    for digest, path in ranked:
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip() or len(text) > room:
            continue
        room -= len(text)
        name = "valid" if digest[0] % VALID_SHARE == 0 else "train"
        for piece in [text] if name == "train" else _pieces(text):
            outputs[name].write(json.dumps({"text": piece}) + "\n")
        counts[name] += 1
    for output in outputs.values():
        output.close()
    if min(counts.values()) == 0:
        raise UserError(f"{library} holds too few .py files for a corpus: {counts}")
    return counts


def _pieces(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    starts = range(0, len(lines), 2 * VALID_LINES)[:VALID_PIECES]  # not only heads, which are licences and imports
    return ["".join(lines[start : start + VALID_LINES]) for start in starts]


def train_tokenizer(corpus: Path, model: Path, vocab_size: int) -> None:
    """A sentencepiece model with byte fallback that keeps blanks and line ends, as source code needs it."""
    lines = [
        line for row in corpus.open(encoding="utf-8") for line in json.loads(row)["text"].splitlines() if line.strip()
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:: max(1, len(lines) // TOKENIZER_LINES)]),
        model_prefix=str(model.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )


def held_out_perplexity(config: Config, run_dir: Path) -> float:
    """Of the run's newest checkpoint, or of the initial weights when there is none yet."""
    with internlm.launch() as world:
        mesh = internlm.build_mesh(config.parallel, world)
        model = internlm.build_model(config)
        placements = internlm.parallelize(model, config, mesh)
        value_of = partial(internlm.initial_value, config=config.model, seed=config.seed)
        optimizer = internlm.HybridZero(model, config, mesh, value_of, placements)
        checkpointer = internlm.Checkpointer(config, run_dir, optimizer, internlm.TrainState(), mesh)
        checkpointer.resume()
        (loader,) = internlm.build_valid_loaders(config, mesh.dp_rank, mesh.dp_size).values()
        report = internlm.evaluate(internlm.build_schedule(model, optimizer, config, mesh), loader, mesh)
        checkpointer.close()
    console.print(f"held-out perplexity {report.perplexity:.1f} over {report.num_tokens} tokens")
    return report.perplexity


def train_until_killed(command: list[str | Path], run_dir: Path) -> int:
    """Starts the training and kills it (SIGKILL) some steps after its first checkpoint; that checkpoint's step."""
    console.print("this run will be killed after its first checkpoint", style="yellow")
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        while process.poll() is None:
            saved = newest_checkpoint(run_dir)
            if saved and steps_done(run_dir) >= saved + RESUME_STEPS:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                console.show_cursor()
                console.print(f"killed at step {steps_done(run_dir)}; the checkpoint is of step {saved}")
                return newest_checkpoint(run_dir)
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    raise UserError(f"the training ended by itself with code {process.returncode} before it could be killed")


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, 0 when there is none."""
    found = (run_dir / "checkpoints").glob(f"*/{MANIFEST}")
    return max((int(path.parent.name) for path in found if path.parent.name.isdigit()), default=0)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are complete."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_done(run_dir: Path) -> int:
    return max((line["step"] for line in metrics(run_dir) if "loss" in line), default=0)


def continued(earlier: list[dict[str, Any]], later: list[dict[str, Any]], saved: int, total: int) -> bool:
    """Whether the second run kept the lines up to step `saved` and wrote each later step once."""
    kept = later[:saved] == earlier[:saved] and [line["step"] for line in later] == list(range(1, total + 1))
    redone = [(a["loss"], b["loss"]) for a, b in zip(earlier[saved:], later[saved:], strict=False)]
    same = sum(a == b for a, b in redone)
    console.print(f"{len(redone)} steps were lost by the kill and done again, {same} of them with the very same loss")
    return kept


def compare_logits(model: Transformer, exported: Path, tokens: list[int]) -> float:
    """Largest difference between our logits and those of the export in transformers, both in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = torch.tensor(tokens)
    positions, ignored = torch.arange(len(tokens)), torch.full_like(ids, IGNORE_INDEX)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]  # [tokens, vocab]
        found = model(Batch(ids, ignored, positions, Segments.of((len(tokens),))))
    difference = float((found.float() - expected).abs().max())
    console.print(f"{len(tokens)} held-out tokens: logits differ by {difference:.1e} at most")
    return difference


def write_some_code(model: Transformer, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Prints what the model makes of the beginnings in PROMPTS."""
    prompts = [[tokenizer.bos_id(), *tokenizer.encode(prompt)] for prompt in PROMPTS]
    sampling = Sampling(temperature=0.7, top_p=0.9)
    for prompt, tokens in zip(PROMPTS, internlm.generate(model, prompts, 60, sampling), strict=True):
        console.print(f"[bold]{escape(prompt)}[/]{escape(tokenizer.decode(tokens))}\n", highlight=False, soft_wrap=True)


def write_report(run_dir: Path, figures: dict[str, Any]) -> None:
    """runs/demo/report.json, and the same for the eyes."""
    (run_dir / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    table = Table.grid(padding=(0, 2))
    rows = {
        "held-out perplexity": f"{figures['perplexity_before']:.0f} before, {figures['perplexity_after']:.1f} after",
        "speed": f"{figures['tokens_per_second']:.0f} tokens/s on {figures['device']}",
        "killed and resumed": "yes, it went on from its checkpoint" if figures["resumed"] else "NO",
        "export against ours": f"largest difference of logits {figures['logits_max_diff']:.1e}",
        "time": f"{figures['seconds']:.0f} s",
        "Hugging Face folder": _short(figures["hf_folder"]),
        "loss curve": _short(run_dir / "loss.png"),
        "figures of this report": _short(run_dir / "report.json"),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    console.print(Panel(table, title="internlm demo", expand=False))


def prepare_folder(run_dir: Path) -> None:
    """An empty run_dir. Raises UserError if something lies there that this script did not make."""
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / MARK).exists():
        raise UserError(
            f"{run_dir} holds something that is not an earlier demo: move it away, or give another --run_dir"
        )
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / MARK).touch()


def demo(run_dir: Path, overrides: list[str]) -> None:
    """All stages, in order. Raises UserError where something is missing."""
    start = time.perf_counter()
    prepare_folder(run_dir)
    corpus, data, exported, tokenizer = (run_dir / name for name in ("corpus", "data", "hf", "tokenizer.model"))
    ours = [f"data.train_folder={data / 'train'}", f"data.valid_folder={data / 'valid'}"]
    for name in ("train", "valid"):
        (data / name / "py").mkdir(parents=True)
    config = internlm.load_config(CONFIG, [*ours, *overrides], run_dir=str(run_dir))
    train: list[str | Path] = [ROOT / "train.py", "--config", CONFIG, "--run_dir", run_dir, *ours, *overrides]

    with stage("1. Text: the Python standard library's own source"):
        counts = collect_corpus(corpus)
        console.print(f"{counts['train']} files to train on, {counts['valid']} held out, in {_short(corpus)}")
    with stage("2. Tokenizer"):
        train_tokenizer(corpus / "train.jsonl", tokenizer, config.model.vocab_size)
        console.print(f"{config.model.vocab_size} pieces in {_short(tokenizer)}")
    with stage("3. Tokens"):
        for name in ("train", "valid"):
            source = ["--text_input_path", corpus / f"{name}.jsonl", "--text_key", "text", "--tokenizer", tokenizer]
            run(ROOT / "tools" / "tokenizer.py", *source, "--bin_output_path", data / name / "py" / "stdlib.bin")
    with stage("4. Before training"):
        before = held_out_perplexity(config, run_dir)
    with stage("5. Training, killed on the way"):
        killed_after = train_until_killed(train, run_dir)
    with stage("6. The same command again: it resumes"):
        earlier = metrics(run_dir)
        run(*train)
        resumed = continued(earlier, metrics(run_dir), killed_after, config.data.total_steps)
    with stage("7. After training"):
        after = held_out_perplexity(config, run_dir)
    with stage("8. Export to Hugging Face, read back with transformers"):
        target = ["--tgt_folder", exported, "--tokenizer", tokenizer, "--dtype", "float32"]
        run(ROOT / "tools" / "convert2hf.py", "--src_folder", run_dir / "checkpoints", *target)
        model, _ = internlm.load_model(run_dir / "checkpoints", device="cpu")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        first = json.loads((corpus / "valid.jsonl").open(encoding="utf-8").readline())["text"]
        difference = compare_logits(model, exported, pieces.encode(first)[: config.data.seq_len])
    with stage("9. The model writes"):
        write_some_code(model, pieces)

    figures = {
        "perplexity_before": before,
        "perplexity_after": after,
        "logits_max_diff": difference,
        "resumed": resumed,
        "tokens_per_second": statistics.median(line["tgs"] for line in metrics(run_dir) if "tgs" in line),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "hf_folder": str(exported),
        "seconds": time.perf_counter() - start,
    }
    write_report(run_dir, figures)
    check_figures(figures, factor=1.0 if overrides else PERPLEXITY_FACTOR)


def check_figures(figures: dict[str, Any], factor: float) -> None:
    """Raises UserError if the job's outcome isn't what it promises; `factor`: by which perplexity falls at least."""
    problems = []
    if not figures["resumed"]:
        problems.append("the killed training did not go on from its checkpoint")
    if not figures["logits_max_diff"] < LOGITS_LIMIT:
        problems.append(f"logits of the export differ by {figures['logits_max_diff']:.1e} from ours")
    if not figures["perplexity_after"] * factor < figures["perplexity_before"]:
        problems.append(f"perplexity did not fall by a factor of {factor:g}")
    if problems:
        raise UserError("; ".join(problems))


def main() -> int:
    """Exit code 0 only when every stage did its work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=ROOT / "runs" / "demo", help="folder of all outputs; emptied")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over configs/demo.py")
    arguments = parser.parse_args()
    try:
        demo(arguments.run_dir.resolve(), arguments.overrides)
    except UserError as error:
        console.print(f"[red]demo: {escape(str(error))}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
