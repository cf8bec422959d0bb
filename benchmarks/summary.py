"""One small record of a release and a kind of machine:

    python benchmarks/summary.py out/benchmarks/*.json

Takes runs that overhead.py, cost.py, averaging.py, models.py, producers.py, profile_small_layer.py
and gpu_check.py stored, and writes benchmarks/results/<kind>-<release>.json, which git keeps; the
runs themselves stay in out/, which it does not.

Of each program the newest whole run is kept, without what no table shows. Of the other
runs of overhead.py the ratios of DIP are, one beside another: how far a figure moves from run to
run. `overhead.py --from` and `cost.py --from` print, or with --docs write, the tables of a record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import machine
import report

import dipkernels as dip

DIGITS = 6  # significant; the tables show three
# What no table shows: anywhere, but in the section small, in a program
UNREAD = {"traceback", "said", "elapsed_s", "rounds", "quick", "program"}
DIFFERENCES = {"over_base_s", "over_base_quartiles_s"}
UNREAD_OF = {"producers": {"quartiles"}}


def rounded(value: object) -> object:
    """The same with floating-point numbers of DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def condensed(run: object, leave: set[str]) -> object:
    """A run without these keys."""
    if isinstance(run, list):
        return [condensed(item, leave) for item in run]
    if not isinstance(run, dict):
        return run
    if run.get("section") == "small":
        leave = leave - DIFFERENCES
    return {key: condensed(item, leave) for key, item in run.items() if key not in leave}


def ratios_of(run: dict) -> dict[str, float]:
    """The ratios of a run of overhead.py that are DIP's, by section, type, shape and what."""
    of_dip = {"linear": "dip", "small": "dip", "perturb": "eager"}
    rows = [
        row
        for row in run["rows"]
        if "ratio" in row and row["variant"] == of_dip.get(row["section"])
    ]
    names = ("section", "dtype", "shape", "what", "variant")
    return {
        " ".join(str(row[name]) for name in names if row.get(name)): row["ratio"] for row in rows
    }


def between(runs: list[dict]) -> dict:
    """The runs, oldest first, and each ratio in all of them: null where a run did not time it."""
    listed = [
        {key: run["machine"].get(key) for key in ("date", "commit", "modified", "cpu")}
        | {"in_place": bool(run["machine"].get("glibc_tunables"))}
        for run in runs
    ]
    found = [ratios_of(run) for run in runs]
    keys = dict.fromkeys(key for ratios in found for key in ratios)
    return {
        "runs": listed,
        "ratios": {key: [round(r[key], 3) if key in r else None for r in found] for key in keys},
    }


def summarise(runs: list[dict]) -> dict:
    """One record of runs on one kind of machine, of this release.

    Raises:
        ValueError: a quick run or a rehearsal, whose figures mean nothing; machines of several
            kinds; no run.
    """
    if not runs:
        raise ValueError("expected at least one run, got none")
    if any(run.get("quick") or run.get("rehearsal") for run in runs):
        raise ValueError(
            "expected full runs, whose figures mean something, got a quick run or a rehearsal"
        )
    kinds = {machine.kind_of(run["machine"]) for run in runs}
    if len(kinds) > 1:
        raise ValueError(f"expected runs of one kind of machine, got {', '.join(sorted(kinds))}")
    if strange := [run for run in runs if "program" not in run]:
        raise ValueError(
            f"expected runs that a benchmark stored, got one of {', '.join(strange[0])}"
        )
    by_program: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: run["machine"]["date"]):
        by_program.setdefault(run["program"], []).append(run)
    record: dict = {
        "release": dip.__version__,
        "kind": kinds.pop(),
        "command": "python benchmarks/summary.py",
    }
    for program, found in sorted(by_program.items()):
        newest = max(found, key=lambda run: (len(run.get("rows", [])), run["machine"]["date"]))
        leave = UNREAD | DIFFERENCES | UNREAD_OF.get(program, set())
        record[program] = rounded(condensed(newest, leave))
    if overheads := by_program.get("overhead"):
        record["overhead, run by run"] = between(overheads)
    return record


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="stored runs, of one kind of machine")
    parser.add_argument(
        "--out", type=Path, help="where to write (benchmarks/results/<kind>-<release>.json)"
    )
    args = parser.parse_args(arguments)
    for path in args.runs:
        if not path.is_file():
            parser.error(f"runs: expected a stored run, found no file {path}")
    try:
        record = summarise([json.loads(path.read_text()) for path in args.runs])
    except ValueError as error:
        parser.error(f"runs: {error}")
    path = args.out or report.RECORDS / f"{record['kind']}-{record['release']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.compact(record) + "\n")
    print(f"wrote {path}, {path.stat().st_size / 1024:.0f} KiB")
    return path


if __name__ == "__main__":
    main()
