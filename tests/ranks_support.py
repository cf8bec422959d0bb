"""Several processes on one machine, started once and given one function after another:
`ranks.run(check, ...)`, or a test that is `@on_ranks()`."""

import functools
import inspect
import os
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait

import pytest
from fresh_support import PROCESSES

TIMEOUT = 300  # seconds for one function; machines that run tests may pause


def on_ranks(*worlds):
    """Makes check(rank, world, ...) a test that each of two processes runs, or of `worlds`: of four
    among the slow tests."""
    sizes = [pytest.param(w, marks=[pytest.mark.slow] * (w > 2)) for w in worlds or (2,)]

    def of(check):
        names = list(inspect.signature(check).parameters)[2:]

        @functools.wraps(check)
        def test(pools, processes, **given):
            pools[processes].run(test, *(given[name] for name in names))

        test.__signature__ = inspect.Signature(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("pools", "processes", *names)
        )
        return pytest.mark.parametrize("processes", sizes)(test)

    return of


def raised(call):
    """The error of call() as text, which a rank can send back."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


class Ranks:
    """`world` gloo processes. A function that raises in one of them ends them all; the next call
    starts new ones."""

    def __init__(self, world: int):
        self.world, self._processes, self._pipes = world, [], []

    def run(self, check, *args):
        """check(rank, world, *args) on every rank, which share a process group. Returns what each
        returned."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((check, args))
        answers, end = {}, time.monotonic() + TIMEOUT
        while len(answers) < self.world and all(good for good, _ in answers.values()):
            waiting = [pipe for pipe in self._pipes if pipe not in answers]
            for pipe in wait(waiting, end - time.monotonic()) or waiting:
                answers[pipe] = _answer(pipe, 0)
        if not all(good for good, _ in answers.values()):
            # The other ranks may wait for this one: take what they have to say, and end them.
            found = [answers.get(pipe) or _answer(pipe, 2) for pipe in self._pipes]
            self.stop()
            raise AssertionError(
                "\n".join(f"rank {r}:\n{text}" for r, (good, text) in enumerate(found) if not good)
            )
        return [answers[pipe][1] for pipe in self._pipes]

    def _start(self):
        folder = tempfile.mkdtemp()
        for rank in range(self.world):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve, args=(theirs, folder, rank, self.world), daemon=True
            )
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self):
        for process in self._processes:
            process.terminate()  # measured coverage is written on this signal
            process.join(10)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _answer(pipe, seconds):
    try:
        return pipe.recv() if pipe.poll(seconds) else (False, "no answer in time")
    except (EOFError, ConnectionResetError):
        return False, "died"


def _serve(pipe, folder, rank, world):
    if "COVERAGE_PROCESS_CONFIG" in os.environ or "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        coverage.process_startup(force=True)  # a process of a fork server starts without it
    import torch
    from seeding import start_again
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    # accelerate asks
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    number = 0
    while True:
        check, args = pipe.recv()
        check = inspect.unwrap(check)
        number += 1
        try:
            store = distributed.FileStore(f"{folder}/{number}", world)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
            start_again()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = check(rank, world, *args)
            distributed.barrier()
            distributed.destroy_process_group()
            pipe.send((True, value))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
