"""One command that proves and measures the GPU side: python benchmarks/gpu_check.py, no network,
under ten minutes.

Needs torch for CUDA, nvcc, and from Python setuptools, ninja, numpy and pytest; no installation of
this package: the source tree is used. Builds the library for the GPU at hand, runs tests/gpu, times
kernels, layers and a transformer block, and lets compute-sanitizer watch every CUDA kernel. Each
section runs in processes of its own with a time limit (docs/gpu.md). DIR/gpu-check-<date>.json is
rewritten after every row, so that a run that is cut off keeps what it had.

Exit code: 0 all passed; 1 something failed; 2 no GPU, or a wrong argument; 3 something was not
reached or not proven. --dry-run rehearses the same on a CPU with small shapes: its figures mean
nothing, and its JSON says so.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from gpucheck import driver, report
from gpucheck.driver import Section
from gpucheck.record import Record

MACHINE = Section("machine", 90, "gpucheck.tools:machine")
SECTIONS = (
    Section("build", 55, "gpucheck.tools:build"),
    Section("tests", 60, "gpucheck.tools:tests"),
    Section("copy", 10, "gpucheck.kernels:copy"),
    Section("perturb", 30, "gpucheck.kernels:perturb"),
    Section("graph", 10, "gpucheck.kernels:graph"),
    Section("block", 40, "gpucheck.layers:block"),
    Section("layers", 55, "gpucheck.layers:layers"),
    Section("averaging", 20, "gpucheck.layers:averaging"),
    Section("crossover", 20, "gpucheck.kernels:crossover"),
    Section("producers", 25, "gpucheck.producers:producers"),
    Section("models", 40, "gpucheck.producers:whole_models"),
    Section("switches", 40, "gpucheck.switches:switches"),
    Section("sanitizer", 50, "gpucheck.sanitizer:sanitizer"),
)
PLOT = Section("plot", 20, "gpucheck.report:plot")
NAMES = tuple(section.name for section in SECTIONS)
WITHIN_S = 455


def names(value: str) -> list[str]:
    found = value.split(",")
    if unknown := [name for name in found if name not in NAMES]:
        raise argparse.ArgumentTypeError(
            f"expected names out of {', '.join(NAMES)}, got {', '.join(unknown)}"
        )
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    said = "rehearse on the CPU with small shapes: measures nothing"
    add("--dry-run", action="store_true", help=said)
    said = "folder of the results: out/benchmarks, and out for a rehearsal"
    add("--out", type=Path, metavar="DIR", help=said)
    add("--only", type=names, default=list(NAMES), metavar="A,B", help="run these sections alone")
    add("--skip", type=names, default=[], metavar="A,B", help="leave these sections out")
    said = "seconds for all sections together (%(default)s)"
    add("--within", type=float, default=WITHIN_S, metavar="S", help=said)
    return parser.parse_args(arguments)


def folder(options: argparse.Namespace) -> Path:
    default = "out" if options.dry_run else "out/benchmarks"
    return (options.out or driver.ROOT / default).resolve()


def start(options: argparse.Namespace) -> Record:
    """The record, on disk, of what is to come."""
    now = datetime.datetime.now(datetime.timezone.utc)
    kind = "rehearsal" if options.dry_run else "gpu-check"
    path = folder(options) / f"{kind}-{now.strftime('%Y%m%d-%H%M%S')}.json"
    data = {"program": "gpu_check", "rehearsal": options.dry_run, "ended": False}
    data |= {"machine": {}, "sections": {}}
    if options.dry_run:
        data["warning"] = (
            "A rehearsal on a CPU with small shapes. No figure in this file is evidence of "
            "anything."
        )
    for name in (MACHINE.name, *NAMES):
        left_out = name in NAMES and (name not in options.only or name in options.skip)
        data["sections"][name] = {"status": "skipped" if left_out else "waiting", "rows": []}
    record = Record(path, data)
    record.save()
    return record


def chosen(options: argparse.Namespace) -> list[Section]:
    """The sections that were asked for. Few of them share the time of all."""
    found = [s for s in SECTIONS if s.name in options.only and s.name not in options.skip]
    more = max(1.0, options.within / max(sum(s.limit_s for s in found), 1.0))
    return [replace(s, limit_s=more * s.limit_s) for s in found]


def run(record: Record, options: argparse.Namespace) -> None:
    def write_text() -> None:
        record.path.with_suffix(".txt").write_text(report.text(record.data))

    driver.run(chosen(options), record, options.within, write_text)
    driver.run([PLOT], record, PLOT.limit_s, write_text)
    record.data["ended"] = True
    record.save()
    write_text()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # so that the section's processes end
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if options.dry_run:
        # Triton's kernels run too, in its interpreter, where it is installed.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    # nvcc and compute-sanitizer where the build looks for nvcc
    path, home = os.environ.get("PATH", os.defpath), os.environ.get("CUDA_HOME")
    places = (f"{home}/bin", path) if home else (path, "/usr/local/cuda/bin")
    os.environ["PATH"] = os.pathsep.join(places)
    record = start(options)
    # A cache of its own: the compilers are part of what is proven.
    caches = tempfile.mkdtemp(prefix="dipkernels-gpu-check-")
    os.environ |= {
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
    }
    try:
        driver.run([MACHINE], record, MACHINE.limit_s)
        if record.data["sections"]["machine"]["status"] != "ok":
            print(
                "\n".join(report.verdict(record.data)[1]),
                f"gpu_check: {record.path}",
                sep="\n",
                file=sys.stderr,
            )
            return 2
        run(record, options)
    finally:
        shutil.rmtree(caches, ignore_errors=True)
    code, lines = report.verdict(record.data)
    what = "the rehearsal" if options.dry_run else "the run"
    print(report.text(record.data))
    print("\n".join(lines))
    print(f"gpu_check: {what} {('passed', 'FAILED', '', 'is not whole')[code]}; {record.path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
