"""Other programs that a test runs, and scripts that stand for them."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_support import ROOT

PYTHON = sys.executable


def ran(*command, cwd=ROOT, env=(), without=(), **options):
    """A program that has ended, with what it printed. Of this process's variables it has those whose
    names start with none of `without`, and those of `env`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    kept.update(env)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 1800, **options}
    return subprocess.run(command, cwd=cwd, env=kept, text=True, **options)


def printed(*command, **options):
    """What it printed, of a program that has succeeded."""
    done = ran(*command, **options)
    assert done.returncode == 0, done.stdout[-6000:] + (done.stderr or "")[-3000:]
    return done.stdout


def program_at(path, text):
    """A shell script in a file that may be run, in another program's place."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@functools.cache
def find_tool(name: str) -> str | None:
    """A program on PATH; nvcc, cuobjdump or nvdisasm in CUDA_HOME too, or inside NVIDIA's packages
    (make nvcc) or the triton package."""
    if found := shutil.which(name):
        return found
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if nvidia := importlib.util.find_spec("nvidia"):
        folders += [Path(folder) / "cu13" / "bin" for folder in nvidia.submodule_search_locations]
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin")
    return next((str(folder / name) for folder in folders if (folder / name).exists()), None)


def needs(*names):
    """Skips where there are not all of these programs."""
    missing = [name for name in names if find_tool(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
