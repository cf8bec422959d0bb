"""The sections that run other programs: what machine this is, the build for its GPU, and tests/gpu
over all cores."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

from gpucheck import sanitizer
from gpucheck.child import Check, Rows
from gpucheck.driver import ROOT
from gpucheck.record import NO_TIME


def run_tool(command: list[str], **environment: str) -> str:
    """What the command said; raises RuntimeError with the end of it where it fails. The section's
    limit is its limit."""
    code, said = sanitizer.run(command, **environment)
    if code:
        raise RuntimeError(f"{' '.join(command[:4])}: exit code {code}\n{said[-6000:]}")
    return said


# ---- the machine ---------------------------------------------------------------------------------


def _tool_version(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    said = subprocess.run(
        [path, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout
    return next(
        (line.strip() for line in said.splitlines() if re.search(r"\d+\.\d+", line)), "unknown"
    )


def _driver() -> str | None:
    """Its version, where nvidia-smi says it: in a container it may be there and fail."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    code, said = sanitizer.run(query) if shutil.which("nvidia-smi") else (1, "")
    return said.splitlines()[0] if code == 0 and said else None


def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run here: that of Triton 3.6 does not under NumPy 2.4 or
    newer. A GPU needs none."""
    import torch

    from dipkernels import backends
    from dipkernels.ops.draw import Draw
    from dipkernels.ops.perturb import noise

    if not backends.has_triton():
        return "Triton is not installed"
    try:
        with backends.backend("triton"):
            noise(torch.tensor([1, 2]), (3, 8), Draw(1))
    except Exception as error:
        return str(error).splitlines()[0]
    return None


def describe_machine(check: Check) -> dict:
    import machine
    import torch

    found = machine.describe(check.device)
    del found["backend"]  # of the library before it is built
    found |= {
        "nvcc": _tool_version("nvcc"),
        "compute_sanitizer": _tool_version("compute-sanitizer"),
    }
    if check.rehearsal:
        found["interpreter_problem"] = interpreter_problem()
    if check.device.type == "cuda":
        properties = torch.cuda.get_device_properties(check.device)
        found |= {
            "capability": f"{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "gpus": torch.cuda.device_count(),
            "driver": _driver(),
        }
    check.record.data["machine"] = found
    return {"gpu": found.get("gpu")}


def machine(check: Check) -> Rows:
    import torch

    if not check.rehearsal and not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} finds no CUDA device; --dry-run rehearses the program "
            "without one"
        )
    return [("machine", lambda: describe_machine(check))]


# ---- build ---------------------------------------------------------------------------------------


def _compile(check: Check) -> dict:
    if check.rehearsal:
        return {"said": "a rehearsal builds nothing"}
    architecture = {"DIPKERNELS_CUDA": "1", "DIPKERNELS_CUDA_ARCHS": check.machine["capability"]}
    said = run_tool([sys.executable, "setup.py", "build_ext", "--inplace"], **architecture)
    return {"said": said[-1500:]}


CHOICE = """
import torch
from dipkernels import backends
torch.cuda.is_available() and torch.cuda.init()
print("chosen:", backends.choose("perturb", "cuda" if torch.cuda.is_available() else "cpu"))
"""


def _report(check: Check) -> dict:
    """python -m dipkernels, and that the kernels just built are those that run."""
    said = run_tool([sys.executable, "-m", "dipkernels"])
    said += run_tool([sys.executable, "-c", CHOICE])
    row = {"said": said[-4000:]}
    if not check.rehearsal and "chosen: Plan(backend='cuda'" not in said:
        row["error"] = f"expected CUDA kernels to be chosen on a GPU, got {said.splitlines()[-1]}"
    return row


def _compile_watched(check: Check) -> dict:
    """The program that the section sanitizer runs."""
    if check.rehearsal:
        return {"said": "a rehearsal builds nothing"}
    sanitizer.PROGRAM.parent.mkdir(exist_ok=True)
    said = run_tool(sanitizer.compile_command(check.machine["capability"]))
    return {"said": said[-1500:]}


def build(check: Check) -> Rows:
    return [
        ("library", lambda: _compile(check)),
        ("report", lambda: _report(check)),
        ("sanitize_cuda", lambda: _compile_watched(check)),
    ]


# ---- tests ---------------------------------------------------------------------------------------


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def collect(folder: str) -> list[str]:
    """The tests of a folder, as pytest names them."""
    said = run_tool(_pytest("--collect-only", folder))
    names = [line for line in said.splitlines() if re.match(r"\S+\.py::", line)]
    if not names:
        raise RuntimeError(f"{folder}: expected tests, pytest collected none\n{said[-2000:]}")
    return names


def read_results(path: Path) -> tuple[Counter, list[str], list[str]]:
    """(how many of each outcome, what failed with the end of its text, why tests were skipped)"""
    outcomes: Counter = Counter()
    failures, reasons = [], []
    for case in xml.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found = {child.tag: child for child in case}
        outcome = next((tag for tag in ("failure", "error", "skipped") if tag in found), "passed")
        outcomes[outcome] += 1
        if outcome in ("failure", "error"):
            failures.append(f"{name}\n{(found[outcome].text or '')[-1500:]}")
        elif outcome == "skipped":
            reasons.append(f"{name}: {found[outcome].get('message')}")
    return outcomes, failures, reasons


class Shards:
    """The tests dealt out to processes that run side by side: Triton compiles in series within one,
    on one core."""

    def __init__(self, check: Check, names: list[str], count: int) -> None:
        self.check = check
        self.parts = {f"part {i + 1} of {count}": names[i::count] for i in range(count)}
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-check-tests-"))
        self.running: dict[str, tuple[subprocess.Popen, Path]] = {}
        self.cut_short = False

    def start(self) -> None:
        """Every part whose result is not written yet."""
        one_core = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for name, tests in self.parts.items():
            if self.check.holds(name):
                continue
            results = self.folder / f"{name.replace(' ', '-')}.xml"
            log = results.with_suffix(".txt").open("wb")
            process = subprocess.Popen(
                _pytest("-vv", f"--junitxml={results}", *tests),  # each result as it comes
                cwd=ROOT,
                env={**os.environ, **one_core},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self.running[name] = process, results

    def result(self, name: str) -> dict:
        """Of a part that has ended: 0 all passed, 1 some failed, 5 none ran."""
        process, results = self.running.pop(name)
        said = results.with_suffix(".txt").read_text(errors="replace")
        if process.returncode not in (0, 1) or not results.exists():
            if self.cut_short:
                failed = re.findall(r"^\S+\.py::.* (?:FAILED|ERROR)", said, re.MULTILINE)
                error = {"error": "\n".join(failed)} if failed else {}
                return {"skipped": NO_TIME, "said": said[-2000:], **error}
            return {"error": f"pytest ended with {process.returncode}\n{said[-3000:]}"}
        outcomes, failures, reasons = read_results(results)
        row = {"outcomes": dict(outcomes), "skips": reasons}
        if outcomes.total() != len(self.parts[name]):
            row["error"] = (
                f"expected {len(self.parts[name])} results, got {outcomes.total()}\n{said[-2000:]}"
            )
        if failures:
            row["error"] = "\n".join(failures)
        return row

    def interrupt(self) -> None:
        """End all parts at once, so that what they have said so far is kept."""
        self.cut_short = True
        for process, _ in self.running.values():
            process.kill()
            process.wait()

    def wait_for(self, name: str) -> dict:
        """The part's row. The rows of other parts that end before it are written as they do."""
        if not self.running:
            self.start()
        while self.running[name][0].poll() is None:
            if self.check.left() <= 0:
                self.interrupt()
            for other in [
                key for key, (process, _) in self.running.items() if process.poll() is not None
            ]:
                if other != name:
                    self.check.add(other, self.result(other))
                    self.check.begin(name)
            time.sleep(0.1)
        return self.result(name)


def _all_passed(check: Check, total: int) -> dict:
    """Every test has a result, and on a GPU at least one has passed."""
    outcomes = Counter()
    for row in check.record.section("tests")["rows"]:
        outcomes.update(row.get("outcomes", {}))
    row = {"collected": total, "outcomes": dict(outcomes)}
    if outcomes.total() != total:
        row["error"] = f"expected {total} results, got {outcomes.total()}"
    elif not check.rehearsal and not outcomes["passed"]:
        row["error"] = f"expected passing tests, got {dict(outcomes)}"
    return row


def tests(check: Check, folder: str = "tests/gpu") -> Rows:
    names = collect(folder)
    cores = len(os.sched_getaffinity(0))
    shards = Shards(check, names, 2 if check.rehearsal else max(2, min(cores - 1, 16)))
    parts: Rows = [(name, functools.partial(shards.wait_for, name)) for name in shards.parts]
    return [*parts, ("all", lambda: _all_passed(check, len(names)))]
