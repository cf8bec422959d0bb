"""The suite under another release of torch, in an environment of its own: .compat/<torch>.
docs/install.md has the table.

    make compat TORCH=2.11.0  # the whole suite, with the Triton that this torch asks for
    make compat TORCH=2.11.0 QUICK=1  # without the files of LONG
    make compat TORCH=2.11.0 COMPAT_PYTHON=python3.12  # under another Python

The package is this checkout and its library the one that `make setup` built, by another torch: one
library serves all. The last line is the row for the table: all, quick, or some where pytest was
told more. An environment takes about 6 GB; `make clean` removes all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What QUICK leaves out, as it says little of a release of torch and takes long: no code of torch
# in them; the library's own C++; the release; random cases; the examples.
LONG = """
cuda_compile figures ptx_checks ptx_matrices ptx_opcodes ptx_radii sanitize_cuda triton_compiles
    triton_expectation triton_interpreter
faults noise
build docs release stems wheel
benchmarks fuzz fuzz_examples gpu_check properties
cluster_example digits examples_recipes studies_arithmetic studies_vision
"""
_VERSIONS = """
import importlib.metadata as m, platform
names = ("torch", "triton", "numpy")
found = {d.metadata["Name"].lower() for d in m.distributions()}
print(*(m.version(n) if n in found else "none" for n in names), platform.python_version())
"""


def environment(torch: str, python: str) -> Path:
    """The Python of .compat/<torch>, with that torch and what the suite needs."""
    folder = ROOT / ".compat" / torch
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    wanted = [
        line.split("#")[0].strip()
        for line in (ROOT / "requirements-dev.txt").read_text().splitlines()
    ]
    wanted = [
        "setuptools" if line.startswith("setuptools==") else line for line in wanted
    ]  # torch 2.11 caps it
    # the interpreter of their Triton, 3.6, does not know NumPy 2.4
    if torch.startswith(("2.10.", "2.11.")):
        wanted = ["numpy<2.4" if line.startswith("numpy==") else line for line in wanted]
    others = [line for line in wanted if line and not re.match(r"(torch|triton)==", line)]
    # Both in one call: alone, the second would bring the newest torch along.
    pip = [
        inside,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"torch=={torch}",
    ]
    subprocess.run([*pip, *others], check=True)
    return inside


def counts(report: Path) -> dict[str, int]:
    """Of pytest's JUnit file: passed, failed (errors too), skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch", required=True, help="such as 2.11.0")
    parser.add_argument("--python", default=sys.executable, help="that of a new environment")
    parser.add_argument("--quick", action="store_true", help="without the files of LONG")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, which take turns with files"
    )
    parser.add_argument("rest", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    if not (ROOT / "dipkernels" / "_C.so").is_file():
        parser.error("dipkernels/_C.so: expected the compiled library, found none: make setup")
    inside = environment(args.torch, args.python)
    report = ROOT / ".compat" / f"{args.torch}.xml"
    report.unlink(missing_ok=True)
    command = [inside, "-m", "pytest", "-q", f"--junitxml={report}", *args.rest]
    if args.jobs > 1:
        command += [f"-n{args.jobs}", "--dist=loadscope", "--no-loadscope-reorder"]
    if args.quick:
        command += [f"--ignore=tests/test_{name}.py" for name in LONG.split()]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, "PYTHONPATH": path}
    if args.jobs > 1:  # as make test does
        env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=env)
    if not report.exists():
        return done.returncode or 1
    versions = subprocess.run(
        [inside, "-c", _VERSIONS], check=True, capture_output=True, text=True
    ).stdout.split()
    what = "some" if args.rest else "quick" if args.quick else "all"
    print("|", " | ".join([*versions, what, *map(str, counts(report).values())]), "|")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
