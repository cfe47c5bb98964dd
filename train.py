"""Train a language model: `[torchrun --nproc_per_node=N] train.py --config FILE [section.key=value ...]`.

The order below is the order in which data flows. `--help` lists all options and config keys.
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch

from internlm.apis.in_training import evaluated
from internlm.checkpoint.checkpointer import Checkpointer
from internlm.checkpoint.inputs import check_files, open_files
from internlm.checkpoint.reference import build_objective
from internlm.checkpoint.reference_sums import give_reference
from internlm.config.checks import check
from internlm.config.loader import load_config
from internlm.core.launch import launch
from internlm.core.mesh import build_mesh
from internlm.core.random import seed_of
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.monitor.monitor import Monitor
from internlm.monitor.profiler import traced
from internlm.parallel.parallelize import parallelize
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.train import dry_run
from internlm.train.cli import EXIT_SIGTERM, open_run_dir, parse_arguments, say, start_logging, user_errors
from internlm.train.routing import Routing
from internlm.train.state import TrainState
from internlm.train.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; the exit code: 0 when it is done or the stop file ended it, 143 after SIGTERM."""
    args = parse_arguments(arguments)
    world = start_logging(args)
    config = load_config(args.config, args.overrides, **args.top_level)
    check(config, world.size)
    if args.dry_run:
        check_files(config, world)
        say(world, dry_run.report(config, world.size))
        return 0

    train_loader, valid_loaders = open_files(config, world)
    with open_run_dir(config, world) as run_dir, launch(args.launcher, args.port) as world:
        torch.manual_seed(seed_of(config.seed, f"rank {world.rank}"))
        mesh = build_mesh(config.parallel, world)
        model = build_model(config)
        placements = parallelize(model, config, mesh)
        initial = partial(initial_value, config=config.model, seed=config.seed, device=mesh.device)
        optimizer = HybridZero(model, config, mesh, initial, placements)
        schedule = build_schedule(model, optimizer, config, mesh, build_objective(config, mesh, optimizer.lanes))

        state = TrainState(num_rows=train_loader.num_rows)
        checkpointer = Checkpointer(config, run_dir, optimizer, state, mesh)
        checkpointer.resume()
        give_reference(config, mesh, model, optimizer, checkpointer, train_loader, valid_loaders)
        trainer = Trainer(schedule, optimizer, train_loader, state, config, mesh, valid_loaders, Routing(model, config))
        reports = evaluated(trainer.steps(), model, optimizer, config, mesh)
        if args.profiling:
            reports = traced(reports, run_dir / "traces", world.rank)
        monitor = Monitor(config, run_dir, world.rank, start_step=state.batch_count, ranks=mesh.world_group)
        with monitor, checkpointer:
            for report in reports:
                monitor.report(report)
                checkpointer.after_step(report)
                if checkpointer.should_stop:
                    monitor.stop_reason = checkpointer.stop_reason
                    break
    return EXIT_SIGTERM if checkpointer.stop_reason == "SIGTERM" else 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
