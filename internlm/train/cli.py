"""The command line of train.py, the folder of a run, and what the exit code says."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internlm.config.help import render_help
from internlm.config.schema import Config
from internlm.core.launch import DEFAULT_PORT, Launcher, World, world_from_env
from internlm.utils.device import is_out_of_memory
from internlm.utils.environment import launched_rank, started_by_slurm
from internlm.utils.errors import UserError
from internlm.utils.lock import lock_folder
from internlm.utils.logger import get_logger, setup_logging

logger = get_logger(__name__)

EXIT_USER_ERROR = 2
EXIT_SIGINT, EXIT_SIGTERM = 128 + 2, 128 + 15
PATIENCE = 5.0  # seconds; torchrun looks after its processes ten times a second

OUT_OF_MEMORY = """
out of memory: `train.py ... --dry_run --world_size N` tells what a rank needs. To need less: model.checkpoint=True
recomputes activations; parallel.gradient.size=-1 and parallel.weight.size=-1 share gradients and parameters among the
ranks; parallel.tensor.size or parallel.pipeline.size cut the model. A run with checkpoints goes on with all of these.
A new one may also lower data.micro_bsz or data.seq_len (with a higher data.micro_num for the same batch)."""

# Flags of 2023 that never did anything in train.py, with what decides instead.
_WITHOUT_EFFECT = {
    "host": "the launcher's environment names the first host",
    "rank": "the launcher's environment numbers the ranks",
    "local_rank": "the launcher's environment numbers the ranks",
    "backend": "NCCL on GPUs, gloo on the CPU",
    "enable_ali_topology": "NCCL finds the topology",
    "disable_volc_topology": "NCCL finds the topology",
}


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    config: Path
    launcher: Launcher
    port: int
    profiling: bool
    dry_run: bool
    world_size: int | None  # ranks that a dry run assumes
    overrides: tuple[str, ...]  # section.key=value
    top_level: dict[str, Any]  # keys of the config that have a flag; None where it wasn't given
    ignored: tuple[str, ...]  # flags given that have no effect


def parse_arguments(arguments: Sequence[str] | None = None) -> Arguments:
    """Parse the command line; exits with 0 after --help and with 2 when it makes no sense."""
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    wrong = [text for text in given.overrides if "=" not in text]
    if wrong:
        parser.error(f"expected section.key=value, got {' '.join(wrong)}")
    return Arguments(
        config=given.config,
        launcher=given.launcher or ("slurm" if started_by_slurm() else "torch"),
        port=given.port,
        profiling=given.profiling,
        dry_run=given.dry_run,
        world_size=given.world_size,
        overrides=tuple(given.overrides),
        top_level={"seed": given.seed, "run_dir": given.run_dir},
        ignored=tuple(name for name in _WITHOUT_EFFECT if getattr(given, name)),
    )


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(parser.format_help())
        print(render_help())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a language model as a config file says.",
        usage="[torchrun --nproc_per_node=N] train.py --config FILE [options] [section.key=value ...]",
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="keys that win over the file, as model.num_layers=4")
    add("--config", type=Path, required=True, metavar="FILE", help="Python file that says what to train")
    add("--launcher", choices=("torch", "slurm"), help="where ranks come from; default: slurm under srun, else torch")
    add("--port", type=int, default=DEFAULT_PORT, help="rendezvous port of the slurm launcher (default %(default)s)")
    add("--seed", type=int, help="seed of the initial values, as seed=SEED")
    add("--run_dir", metavar="DIR", help="folder of all outputs, as run_dir=DIR (default runs/JOB_NAME)")
    add("--profiling", action="store_true", help="write a trace of two steps into DIR/traces")
    add("--dry_run", action="store_true", help="print resolved config, parameters and memory per rank, then end")
    add("--world_size", type=_positive, metavar="N", help="ranks that --dry_run assumes; a real run counts them itself")
    add("-h", "--help", action=_Help, nargs=0, help="print this and every config key, then end")
    for name in _WITHOUT_EFFECT:
        action = "store_true" if name.startswith(("enable", "disable")) else "store"
        add(f"--{name}", help=argparse.SUPPRESS, action=action)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks; give 1 or more")
    return int(text)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into its message and exit code 2; everything else keeps its traceback and code 1.

    Rank 0 speaks at once. The others wait PATIENCE, in which the launcher ends them if rank 0 met the same mistake, and
    then speak: one of them may be the only one that knows. Both kinds are in train.log too.
    """
    try:
        yield
    except UserError as error:
        if launched_rank() > 0:
            time.sleep(PATIENCE)
        logger.error(str(error), extra={"file_only": True})
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_SIGINT) from None
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(OUT_OF_MEMORY)
        logger.exception("the run ends by an exception", extra={"file_only": True})
        raise


def start_logging(arguments: Arguments) -> World:
    """Log lines carry the rank from the first on, before there is a process group.

    Returns who this process will be, or, in a dry run, would be.
    """
    setup_logging(0, 1)  # until the rank is known, which may fail
    world, _ = world_from_env(arguments.launcher, arguments.port)
    setup_logging(world.rank, world.size)
    for name in arguments.ignored:
        logger.info(f"--{name} has no effect: {_WITHOUT_EFFECT[name]}")
    if arguments.world_size is not None:
        if arguments.dry_run:
            return replace(world, size=arguments.world_size)
        logger.info(f"--world_size has no effect without --dry_run: the launcher started {world.size} rank(s)")
    return world


def say(world: World, text: str) -> None:
    """Prints what all ranks would say alike, once."""
    if world.rank == 0:
        print(text)


@contextmanager
def open_run_dir(config: Config, world: World) -> Iterator[Path]:
    """The folder of the run, with train.log and config.json in it; the resolved config is printed once.

    No other run can have it at the same time.
    """
    run_dir = Path(config.run_dir or Path("runs", config.JOB_NAME))
    lock = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if world.rank == 0:
            lock = lock_folder(run_dir, "run_dir")
        setup_logging(world.rank, world.size, run_dir / "train.log")
        text = config.model_dump_json(indent=2)
        if world.rank == 0:
            (run_dir / "config.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run_dir = {str(run_dir)!r} can't be written: {error}; choose another with --run_dir"
        ) from error
    logger.info(f"config of {config.JOB_NAME}, stored in {run_dir / 'config.json'}:\n{text}")
    with lock or nullcontext():
        yield run_dir
