"""One pool of worker processes for the whole test session.

Starting a process that imports torch takes seconds; the pool starts each worker once and builds a fresh gloo group for
every call, so a multi-rank test costs some milliseconds.
"""

import gc
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 240.0


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` on `world_size` ranks of one gloo group; the results, by rank.

    `fn` is a function of a module, the arguments and results can be pickled. An exception on any rank is raised here
    with that rank's traceback.
    """
    return _pool().run(world_size, fn, args, timeout)


class _Pool:
    def __init__(self) -> None:
        self.context = mp.get_context("forkserver")
        # imported once, for all workers to inherit
        self.context.set_forkserver_preload(["internlm.checkpoint.checkpointer", "torch.distributed.pipelining"])
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        while len(self.workers) < world_size:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self.workers[:world_size]):
                pipe.send((rank, world_size, os.path.join(folder, "store"), fn, args))
            return self._collect(world_size, timeout)

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world_size])}
        while len(results) < world_size:
            waiting = [pipe for pipe, rank in pipes.items() if rank not in results]
            ready = mp.connection.wait(waiting, timeout)
            if not ready:
                missing = sorted(set(range(world_size)) - set(results))
                self.close()
                raise TimeoutError(f"ranks {missing} gave no result within {timeout} s")
            for pipe in ready:
                try:
                    error, result = pipe.recv()
                except EOFError:
                    error, result = "the worker process died", None
                if error:  # the other ranks may hang in a collective: start afresh
                    self.close()
                    raise AssertionError(f"rank {pipes[pipe]} of {world_size}:\n{error}")
                results[pipes[pipe]] = pickle.loads(result)
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers.clear()


_the_pool: _Pool | None = None


def _pool() -> _Pool:
    global _the_pool
    if _the_pool is None:
        _the_pool = _Pool()
    return _the_pool


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    freeze = gc.freeze
    gc.freeze = gc.unfreeze = lambda: None  # training would thaw everything that was imported, see below
    while True:
        try:
            rank, world_size, store, fn, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)  # whatever was run before
        freeze()  # what was imported by now: collecting it again after every call costs a quarter of a second
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            try:
                result = fn(rank, world_size, *args)
                dist.barrier()
            finally:
                dist.destroy_process_group()
                gc.collect()  # an engine and its model refer to each other, and hold groups with threads of their own
            # As bytes: tensors would be sent as shared memory, with an open file for each as long as it lives.
            pipe.send((None, pickle.dumps(result)))
        except BaseException:
            with suppress(OSError):
                pipe.send((traceback.format_exc(), None))
