"""Every parallel axis on two GPUs beside one GPU: prints the table of axes in benchmarks/README.md.

    python benchmarks/axes.py [--out FOLDER] [--only PATTERN] [--share] [--tiny]

Each layout trains on the same random rows from the same weights as one GPU does, at a constant learning rate, by
train.py's own trainer. Afterwards one more step is traced: communication counts as hidden while another kernel runs.
Layouts run one after the other in the same two processes, so that there is one start; those of one GPU run before them,
two at a time, one on each GPU. What FOLDER has results of is not run again. `--share` compares losses where there is
one GPU: the two processes share it, and NCCL sends by sockets, since each says that it is on a host of its own; their
speed means nothing. `--tiny` tries all of it with small models, on a CPU too.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trace import communication_of, read_kernels  # noqa: E402
from internlm.config.checks import check  # noqa: E402
from internlm.config.loader import load_config  # noqa: E402
from internlm.config.schema import Config  # noqa: E402
from internlm.core.launch import World, launch  # noqa: E402
from internlm.core.mesh import Mesh, build_mesh  # noqa: E402
from internlm.data.loader import build_train_loader  # noqa: E402
from internlm.model.init import initial_value  # noqa: E402
from internlm.model.transformer import build_model  # noqa: E402
from internlm.ops import spread_matmul  # noqa: E402
from internlm.parallel.parallelize import parallelize  # noqa: E402
from internlm.parallel.schedule import build_schedule  # noqa: E402
from internlm.solver.hybrid_zero import HybridZero  # noqa: E402
from internlm.train.routing import Routing  # noqa: E402
from internlm.train.state import TrainState  # noqa: E402
from internlm.train.trainer import Trainer  # noqa: E402

TRACED = 2  # steps after the measured ones: the profiler's start, the trace
MINUTES = 9  # at most for one start of the processes

COMMON = [
    'data.type="synthetic"',
    "data.train_folder=None",
    "data.valid_folder=None",
    "data.valid_every=0",
    "data.num_worker=0",
    "data.min_length=0",
    'lr_scheduler.type="constant"',
    "lr_scheduler.warmup_ratio=0",
]
DENSE = ["data.seq_len=4096", "data.micro_bsz=2"]
LONG = ["data.seq_len=65536", "data.micro_bsz=1", "model.max_position_embeddings=65536", "model.checkpoint=True"]
MOE: dict[str, Any] = {  # 2.3 G parameters, 0.8 G of them active for a token
    "model_type": "QWEN3_MOE",
    "model": {
        "num_layers": 12,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_kv_attention_heads": 4,
        "num_experts": 32,
        "moe": {"top_k": 4, "intermediate_size": 768},
        "vocab_size": 92544,
        "dtype": "torch.bfloat16",
    },
    "data": {"seq_len": 4096, "micro_bsz": 2, "total_steps": 1},
    "loss": {"moe_loss_coeff": 0.001},
}
TINY = ["model.num_layers=4", "model.hidden_size=128", "model.vocab_size=512", "model.num_attention_heads=8"]
TINY += [
    "model.num_kv_attention_heads=2",
    "model.intermediate_size=128",
    "data.seq_len=64",
    'model.dtype="torch.float32"',
]


@dataclass(frozen=True)
class Model:
    source: Any
    overrides: list[str]
    rows: int  # of a step
    steps: int = 20
    lr: float = 1e-4  # at 3e-4 without warm-up rounding decides the losses: moe's gradient norms reach 100
    warm_up: int = 5  # steps left out of the medians


MODELS = {
    "dense": Model(ROOT / "configs" / "1.8B_internlm2.py", DENSE, rows=4),
    "moe": Model(MOE, [], rows=4),
    "dense 64k": Model(ROOT / "configs" / "1.8B_internlm2.py", LONG, rows=1, steps=3, warm_up=1),
    "7B": Model(ROOT / "configs" / "7B_sft.py", [*DENSE, "parallel.zero1.size=-1"], rows=4, steps=8, warm_up=3),
}


@dataclass(frozen=True)
class Case:
    """A layout of two GPUs, or the one GPU that it is compared with."""

    model: str
    name: str
    overrides: list[str] = field(default_factory=list)
    symmetric_from: float = float("inf")  # FLOP from which a product is done by symmetric memory

    @property
    def key(self) -> str:
        return f"{self.model}: {self.name}"


def tensor(mode: str) -> list[str]:
    return ["parallel.tensor.size=2", f"parallel.tensor.mode={mode}"]


def pipeline(schedule: str) -> list[str]:
    return ["parallel.pipeline.size=2", f'parallel.pipeline.schedule="{schedule}"']


ONE = [Case(model, "one GPU") for model in MODELS if model != "7B"]
TWO = [
    Case("dense", "ZeRO-1", ["parallel.zero1.size=2"]),
    Case("dense", "ZeRO-2", ["parallel.gradient.size=2"]),
    Case("dense", "ZeRO-3", ["parallel.weight.size=2"]),
    Case("dense", "Ulysses", ["parallel.context.ulysses=2"]),
    Case("dense 64k", "Ulysses", ["parallel.context.ulysses=2"]),
    Case("dense 64k", "ring", ["parallel.context.ring=2"]),
    Case("dense", "ring", ["parallel.context.ring=2"]),
    Case("dense", "tensor mtp", tensor("mtp")),
    Case("dense", "tensor msp", tensor("msp")),
    Case("dense", "tensor msp, symmetric memory", tensor("msp"), symmetric_from=0),
    Case("dense", "tensor fsp", tensor("fsp")),
    Case("7B", "tensor msp", tensor("msp")),
    Case("7B", "tensor msp, symmetric memory", tensor("msp"), symmetric_from=4e11),
    Case("dense", "pipeline 1f1b", pipeline("1f1b")),
    Case("dense", "pipeline zbv", pipeline("zbv")),
    Case("dense", "pipeline dualpipev", pipeline("dualpipev")),
    Case("moe", "experts", ["parallel.expert.size=2"]),
]


def config_of(case: Case, num_gpus: int, tiny: bool) -> Config:
    model = MODELS[case.model]
    steps = f"data.total_steps={(model.warm_up + 1 if tiny else model.steps) + TRACED}"
    overrides = [*COMMON, f"adam.lr={model.lr}", *model.overrides, *(TINY if tiny else []), steps, *case.overrides]
    shared = any(word in override for override in case.overrides for word in ("tensor.", "context.", "pipeline."))
    readers = 1 if shared else num_gpus
    config = load_config(model.source, [*overrides, f"data.micro_num={model.rows // readers}"])
    check(config, num_gpus)
    return config


# -- in the processes -------------------------------------------------------------------------------------------------


def _remembered(values: dict[str, Tensor], config: Config, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's initial value, drawn once for all layouts of a model."""
    if name not in values:
        values[name] = initial_value(name, shape, config.model, config.seed)
    return values[name]


def run_case(case: Case, world: World, tiny: bool, values: dict[str, Tensor], trace: Path) -> dict[str, Any]:
    """Trains and traces; what is said of it in the table."""
    config = config_of(case, world.size, tiny)
    worthwhile = patch.object(spread_matmul, "WORTHWHILE", case.symmetric_from)
    mesh = build_mesh(config.parallel, world)
    try:
        with worthwhile:
            return {"key": case.key, **_measured(config, mesh, values, trace, MODELS[case.model].warm_up)}
    finally:
        gc.collect()
        _close(mesh)
        torch._dynamo.reset()  # each layout compiles its own blocks, and their number has a limit
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _measured(config: Config, mesh: Mesh, values: dict[str, Tensor], trace: Path, warm_up: int) -> dict[str, Any]:
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    engine = HybridZero(model, config, mesh, partial(_remembered, values, config), placements)
    schedule_ = build_schedule(model, engine, config, mesh)
    loader = build_train_loader(config, mesh.dp_rank, mesh.dp_size)
    trainer = Trainer(schedule_, engine, loader, TrainState(), config, mesh, {}, Routing(model, config))
    steps = trainer.steps()
    reports = [next(steps) for _ in range(config.data.total_steps - TRACED)]
    memory = [torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else 0]
    with profile(
        activities=[ProfilerActivity.CUDA if mesh.device.type == "cuda" else ProfilerActivity.CPU],
        schedule=schedule(wait=0, warmup=TRACED - 1, active=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
    ) as profiler:
        for _ in steps:
            profiler.step()
    communication = communication_of(read_kernels(trace))
    everyone: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(everyone, (memory[0], communication))
    return {
        "losses": [report.loss for report in reports],
        "tgs": median(report.tgs for report in reports[warm_up:]),
        "memory": max(memory for memory, _ in everyone),
        "step_ms": 1000 * median(report.step_time for report in reports[warm_up:]),
        "sent_ms": sum(found.total for _, found in everyone) / len(everyone),
        "hidden_ms": sum(found.hidden for _, found in everyone) / len(everyone),
        "span_ms": sum(found.span for _, found in everyone) / len(everyone),
    }


def _close(mesh: Mesh) -> None:
    """Frees the groups of a layout: each holds buffers on the GPU."""
    groups = [group for axes in (mesh, mesh.dense, mesh.expert) for group in axes.groups.values()]
    for group in dict.fromkeys(groups):
        dist.destroy_process_group(group)


def work(cases: Sequence[Case], tiny: bool, folder: Path) -> None:
    """What the processes do: one case after the other, each result a line of results.jsonl, until one fails."""
    with launch() as world:
        if world.device.type == "cuda":
            torch.zeros(1, device=world.device)
        values: dict[str, dict[str, Tensor]] = {}
        for case in cases:
            trace = folder / f"{case.key}-rank{world.rank}.json".replace(" ", "_")
            try:
                result = run_case(case, world, tiny, values.setdefault(case.model, {}), trace)
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # the other process may wait for this one in a collective
            if world.rank == 0:
                with (folder / "results.jsonl").open("a") as file:
                    file.write(json.dumps(result) + "\n")


# -- the process that starts them -------------------------------------------------------------------------------------


SOCKETS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"}


def share_gpu() -> None:
    """Before `launch`: this process is alone on its host, as NCCL sees it, and uses the first GPU."""
    os.environ.update(SOCKETS, NCCL_HOSTID=f"host {os.environ['RANK']}", LOCAL_RANK="0")


@dataclass(frozen=True)
class Start:
    """How processes are started."""

    folder: Path
    tiny: bool
    share: bool


def start(how: Start, cases: Sequence[Case], num_ranks: int, first_gpu: int = 0) -> subprocess.Popen:
    keys = [word for case in cases for word in ("--case", case.key)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    gpus = "0" if how.share else ",".join(str(first_gpu + index) for index in range(num_ranks))
    tiny, folder = how.tiny, how.folder
    log = (folder / f"log-{cases[0].key}.txt".replace(" ", "_")).open("w")
    return subprocess.Popen(
        [*command, __file__, "--out", str(folder), *keys, *["--tiny"] * tiny, *["--share"] * how.share],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": "1" if tiny else "8"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def run_all(how: Start, one: Sequence[Case], two: Sequence[Case]) -> None:
    """All cases; one that fails is left out, and the rest go on in new processes."""
    one = [case for case in one if case.key not in results_in(how.folder)]
    gpus = [[case for case in one if case.model != "dense 64k"], [case for case in one if case.model == "dense 64k"]]
    for process in [start(how, cases, 1, gpu) for gpu, cases in enumerate(gpus) if cases]:
        process.wait(60 * MINUTES)
    left = [case for case in two if case.key not in results_in(how.folder)]
    while left:
        start(how, left, 2).wait(60 * MINUTES)
        done = results_in(how.folder)
        first = next((index for index, case in enumerate(left) if case.key not in done), len(left))
        left = left[first + 1 :]


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | layout | tokens/s/GPU | of one GPU | memory | losses | communication in a step | of it hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in (*ONE, *TWO):
        result, alone = results.get(case.key), results.get(f"{case.model}: one GPU")
        if result is None:
            lines.append(f"| {case.model} | {case.name} | not run, or failed: see the logs in --out |")
            continue
        ratio = f"{result['tgs'] / alone['tgs']:.2f}" if alone else "-"
        losses = f"{result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
        if alone and result is not alone:
            losses = f"{max(abs(a / b - 1) for a, b in zip(result['losses'], alone['losses'], strict=True)):.1e}"
        sent = f"{result['sent_ms']:.0f} of {result['span_ms']:.0f} ms" if result["sent_ms"] else "-"
        hidden = f"{result['hidden_ms'] / result['sent_ms']:.0%}" if result["sent_ms"] else "-"
        memory = f"{result['memory'] / 2**30:.1f} GiB"
        lines.append(
            f"| {case.model} | {case.name} | {result['tgs']:,.0f} | {ratio} | {memory} | {losses} | {sent} | {hidden} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of results, traces and logs (default: a temporary one)")
    parser.add_argument("--only", default=".", help="regular expression for the names of cases")
    parser.add_argument("--share", action="store_true", help="two processes on one GPU: for losses, not for speed")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--case", action="append", help=argparse.SUPPRESS)  # of a process started by this script
    options = parser.parse_args()
    by_key = {case.key: case for case in (*ONE, *TWO)}
    if options.case:
        if options.share:
            share_gpu()
        work([by_key[key] for key in options.case], options.tiny, options.out)
        return
    folder = options.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    one, two = ([case for case in cases if re.search(options.only, case.key)] for cases in (ONE, TWO))
    run_all(Start(folder, options.tiny, options.share), one, two)
    print(table(results_in(folder)))


if __name__ == "__main__":
    main()
