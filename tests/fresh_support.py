"""Programs in fresh processes that have imported torch alone: each is a fork of one, because torch
takes seconds to import."""

import multiprocessing
import os
import sys

PROCESSES = multiprocessing.get_context("forkserver")
# A test process has one fork server, which forks ranks_support's ranks too. More in it would be in
# the fresh processes: triton, say, before TRITON_INTERPRET is set.
PROCESSES.set_forkserver_preload(["torch"])


def _run(code, environment, output):
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    assert "dipkernels" not in sys.modules
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run(code, output, within_s=600, **environment):
    """Run code under environment variables: its exit status, and all that it printed, by way of the
    file `output`."""
    process = PROCESSES.Process(target=_run, args=(code, {**os.environ, **environment}, output))
    process.start()
    process.join(within_s)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, output.read_text()
