"""compute-sanitizer over every CUDA kernel, and proof that it sees: each tool also has to find a
planted error.

The program without torch, tools/verify/sanitize_cuda.cu, gives every tensor memory of its own of
exactly its size. What runs under torch, Triton's kernels among it, does so without torch's caching
allocator, whose segments hide an overrun.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys

from gpucheck.child import Check, Rows
from gpucheck.driver import ROOT

PROGRAM = ROOT / "build" / "sanitize_cuda"
# of compute-sanitizer where it has found something; the program's own codes are others
ERROR_CODE = 9
PLANTED = {"memcheck": "overrun", "racecheck": "race", "initcheck": "uninitialised"}
CALLS = "sanitize_cuda: "  # the program's last words, with the number of calls
CACHE_OFF = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Not the compilers that Triton starts; and a program that imports torch is slow to reach the GPU.
OPTIONS = ["--target-processes", "application-only", "--launch-timeout", "120"]
# memcheck also counts calls of CUDA's that fail, and torch asks for much that a driver may lack.
OPTIONS_OF = {"memcheck": ["--report-api-errors", "no"]}
# The end of what a tool says, with the number of its findings. Its exit code says less: it is the
# program's own where that has failed, as one does behind an overrun.
SUMMARY = re.compile(r"SUMMARY: (\d+)")
UNSUPPORTED = "Device not supported"
OBJECTS = "build/temp*/ninja/cuda_*.o"


def compile_command(capability: str) -> list[str]:
    """The program with the objects that the library was linked from."""
    objects = sorted(ROOT.glob(OBJECTS), key=lambda path: path.stat().st_mtime)
    if not objects:
        raise RuntimeError(
            f"sanitizer: expected the library's CUDA objects, {OBJECTS}, and found none: build it "
            "first"
        )
    newest = sorted(objects[-1].parent.glob("cuda_*.o"))
    nvcc = [os.environ.get("NVCC", "nvcc"), "-std=c++17", "-O2", f"-arch=sm_{capability}"]
    return [
        *nvcc,
        str(ROOT / "tools" / "verify" / "sanitize_cuda.cu"),
        *map(str, newest),
        "-o",
        str(PROGRAM),
    ]


def run(command: list[str], **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.decode(errors="replace")


def expect_clean(code: int, said: str, *words: str) -> dict:
    if code or not all(word in said for word in words):
        return {"error": f"expected no finding and all calls, got exit code {code}\n{said[-6000:]}"}
    return {"found": "nothing", "said": said[-500:]}


def expect_found(found: bool, code: int, said: str) -> dict:
    """A planted error that goes unseen means that the clean runs prove nothing."""
    if not found:
        return {
            "error": f"expected the planted error to be found, got exit code {code}\n{said[-3000:]}"
        }
    return {"found": "the planted error"}


# ---- rows ----------------------------------------------------------------------------------------


def guards(planted: str | None) -> dict:
    """Without any tool: patterns around every tensor, which show what is written outside."""
    code, said = run([str(PROGRAM), "guards", *([planted] if planted else [])])
    if planted:
        return expect_found(code == 1 and "written outside of the tensor" in said, code, said)
    return expect_clean(code, said, CALLS)


def watched(
    check: Check, tool: str, command: list[str], planted: bool, last_words: str, **environment: str
) -> dict:
    """The command under one of compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"missing": "compute-sanitizer is not installed: it comes with the CUDA toolkit"}
    options = ["--tool", tool, "--error-exitcode", str(ERROR_CODE), "--print-limit", "20"]
    options += OPTIONS + OPTIONS_OF.get(tool, [])
    code, said = run([sanitizer, *options, *command], **environment)
    if UNSUPPORTED in said:
        return {"missing": f"compute-sanitizer says: {UNSUPPORTED}, as in some virtual machines"}
    if planted:
        summary = SUMMARY.search(said)
        return expect_found(summary is not None and summary[1] != "0", code, said)
    return expect_clean(code, said, last_words, "SUMMARY: 0 ")


def without_torch(check: Check) -> Rows:
    """The program's rows. A rehearsal has none: tests/test_sanitize_cuda.py runs it without a
    GPU."""
    if check.rehearsal:
        return []
    if not PROGRAM.exists():
        raise RuntimeError(f"sanitizer: expected {PROGRAM}, which the section build makes")
    rows: Rows = [
        ("guards", lambda: guards(None)),
        ("guards, overrun planted", lambda: guards("overrun")),
    ]
    own = [str(PROGRAM), "exact"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        rows.append((tool, functools.partial(watched, check, tool, own, False, CALLS)))
        if plant := PLANTED.get(tool):
            call = functools.partial(watched, check, tool, [*own, plant], True, CALLS)
            rows.append((f"{tool}, {plant} planted", call))
    return rows


def sanitizer(check: Check) -> Rows:
    rows = without_torch(check)
    device = "cpu" if check.rehearsal else "cuda"
    torch_part = [sys.executable, "-m", "gpucheck.once", device]
    for name, extra in (
        ("memcheck of torch and Triton", []),
        ("memcheck of torch, overrun planted", ["overrun"]),
    ):
        command = [*torch_part, *extra]
        call = functools.partial(
            watched, check, "memcheck", command, bool(extra), "once: done", **CACHE_OFF
        )
        rows.append((name, call))
    return rows
