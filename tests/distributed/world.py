"""Processes that run a test's function together: gloo on the CPU, NCCL where GPUs suffice.

Starting processes costs seconds, so those of a size are kept for the tests that follow. A test that
fails in one process leaves others waiting, so then all are ended and the next test gets new ones.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 300.0  # seconds, for one function

_worlds: dict[int, "World"] = {}


def device_type(size: int) -> str:
    """Where the tests of so many processes run."""
    return "cuda" if torch.cuda.device_count() >= size else "cpu"


class World:
    """`size` processes of one process group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) returns in each process; its error, with its traceback, if any."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            ready = wait([p for i, p in enumerate(self.pipes) if i not in results], TIMEOUT)
            if not ready:
                raise AssertionError(f"only ranks {sorted(results)} of {len(self.pipes)} returned")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                error, results[rank] = pipe.recv()
                if error is not None:
                    raise AssertionError(f"on rank {rank}:\n{error}")
        return [results[rank] for rank in range(len(self.pipes))]

    def end(self) -> None:
        """Ends all processes."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs a module's function(*args) in `size` processes; what each returned, by rank."""
    if size not in _worlds:
        _worlds[size] = World(size)
    try:
        return _worlds[size].run(function, *args)
    except BaseException:
        _worlds.pop(size).end()
        raise


@atexit.register
def _end_all() -> None:
    for world in _worlds.values():
        world.end()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    if device_type(size) == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device_type(size) == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((None, function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
