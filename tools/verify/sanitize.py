"""The compiled CPU kernels under g++'s sanitizers and between guard pages.  docs/reliability.md.

    python tools/verify/sanitize.py
        # address, undefined, thread, guard pages; then the tests under the first two
    python tools/verify/sanitize.py --cases 2000  # fewer cases
    python tools/verify/sanitize.py --record  # the same, and the figures go to docs/reliability.md

sanitize_kernels.cpp drives the kernels on random cases, without torch, on several threads of its
own. Then the library itself is built with the address and undefined-behaviour sanitizers in a copy
of the tree, and the kernels' tests run on it in Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reliability import ROOT, command_line, record

sys.path.insert(0, str(ROOT))
from setup import is_x86, kernel_units

KINDS = {
    "guard": ["-O1"],
    "address": [
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-DDIP_SANITIZED",
    ],
    "thread": ["-O1", "-g", "-fsanitize=thread", "-DDIP_SANITIZED"],
}
THREADS = 4  # of the driver's own
TESTS = (
    "tests/test_perturb.py",
    "tests/test_noise.py",
    "tests/test_ops.py",
    "tests/test_properties.py",
    "tests/test_samples.py",
    "tests/test_expectation.py",
    "tests/test_producers.py",
    "tests/test_averaging.py::test_mean_equals_explicit_calls",
    "tests/test_fuzz.py::test_operations_take_any_arguments_without_a_crash[0-2000]",
)


def build(kind: str, folder: Path) -> Path:
    """The program of one kind; it is built again when a source is newer. What is written has a
    folder of its own, and the program appears whole: two processes may build at once."""
    compiler = os.environ.get("CXX", "g++")
    program = folder / f"sanitize_kernels_{kind}"
    sources = [
        *(ROOT / "csrc").rglob("*.h"),
        *(ROOT / "csrc" / "cpu").glob("*.cpp"),
        ROOT / "tools" / "verify" / "sanitize_kernels.cpp",
    ]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return program
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
    flags += [*KINDS[kind], *["-DDIP_HAS_X86"] * is_x86(compiler)]
    cpu = ROOT / "csrc" / "cpu"
    units = [(sources[-1], "main", []), (cpu / "dispatch.cpp", "dispatch", [])]
    for stem, name, options in kernel_units(compiler):
        units.append((cpu / f"{stem}.cpp", name, [*options, "-DDIP_STREAM_BYTES=4096"]))

    def compiled(unit: tuple[Path, str, list[str]], target: str) -> None:
        source, name, options = unit
        done = subprocess.run([compiler, *flags, *options, "-c", str(source), "-o", target])
        if done.returncode:
            raise RuntimeError(f"{compiler} on {name}: exit status {done.returncode}")

    with tempfile.TemporaryDirectory(dir=folder) as own, ThreadPoolExecutor(2) as pool:
        objects = [f"{own}/{name}.o" for _, name, _ in units]
        list(pool.map(compiled, units, objects))
        linked = [*objects, "-Wl,--wrap=malloc,--wrap=calloc", "-pthread", "-o", f"{own}/program"]
        subprocess.run([compiler, *flags, *linked], check=True)
        os.replace(f"{own}/program", program)
    return program


def run(program: Path, cases: int, seed: int, threads: int, mode: str = "run") -> str:
    """What it counted. Raises RuntimeError with what the sanitizer, the kernel or the guard page
    said."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [str(program), str(cases), str(seed), str(threads), mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[1:])}: exit status {done.returncode}\n{done.stderr[-4000:]}"
        )
    return done.stdout.strip()


def in_python() -> str:
    """The kernels' tests in Python on a library built with the sanitizers; the last line of
    pytest."""
    from mutants import Copy

    # The runtime looks for the library's exceptions when it starts, and Python itself has none.
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan", "libubsan", "libstdc++")
    ]
    with tempfile.TemporaryDirectory(prefix="sanitize") as folder:
        copy = Copy(Path(folder))
        setup = copy.folder / "setup.py"
        flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fPIC"
        flags += " -D_GLIBCXX_ASSERTIONS"  # an empty std::optional that is read
        setup.write_text(setup.read_text().replace("-O1 -fPIC", flags))
        copy.environment["LDFLAGS"] = "-fsanitize=address,undefined"
        problem = copy.build()
        if problem:
            raise RuntimeError(problem)
        copy.environment.update(
            LD_PRELOAD=":".join(str(Path(library).resolve()) for library in libraries),
            ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1",
            PYTHONMALLOC="malloc",
        )
        options = ["-q", "-x", "-p", "no:cacheprovider", "--durations-min=1e9"]
        done = copy.python("-m", "pytest", *options, *TESTS, timeout=3600)
    last = (done.stdout.strip().splitlines() or [""])[-1].strip("= ")
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-8000:]}\n{done.stderr[-5000:]}")
    return last


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument(
        "--cases", type=int, default=20000, help="random cases under each sanitizer (20000)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the cases (1)")
    args = parser.parse_args()
    folder = ROOT / "build" / "sanitize"
    what = {
        "guard": "guard pages",
        "address": "AddressSanitizer, UndefinedBehaviorSanitizer",
        "thread": "ThreadSanitizer",
    }
    lines = ["| watched by | cases | found |", "|---|---|---|"]
    for kind, name in what.items():
        program = build(kind, folder)
        for mode, cases in (("run", args.cases), ("fail", args.cases // 10)):
            start = time.monotonic()
            counted = run(program, cases, args.seed, THREADS, mode)
            failing = ", an allocation failing" if mode == "fail" else ""
            lines.append(f"| {name}{failing} | {counted} | nothing |")
            print(f"{name}{failing}: {counted}, {time.monotonic() - start:.0f} s", flush=True)
    last = in_python()
    print(last)
    lines.append(f"| {what['address']}, in Python: {', '.join(TESTS)} | {last} | nothing |")
    if args.record:
        record("sanitize", f"Seed {args.seed}, {THREADS} threads.\n\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
