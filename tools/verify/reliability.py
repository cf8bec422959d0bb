"""Writes what a check measured into docs/reliability.md or another page, between its markers, with
machine, versions and date."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/reliability.md"


def command_line(doc: str, records: str = "", page: str = PAGE) -> argparse.ArgumentParser:
    """With --record, which every check has; records: what it does besides."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    said = f"write the figures into {page}{records}"
    parser.add_argument("--record", action="store_true", help=said)
    return parser


def tree() -> str:
    """The commit that is checked out, with "-dirty" where a file differs, for the rows of a run
    that goes on later."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def record(name: str, text: str, page: str = PAGE) -> None:
    """Write between <!-- name:begin --> and <!-- name:end -->."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    # here, and not above: mutants.py tests another copy of the package in forks of its process
    import machine
    import report

    found = machine.describe("cpu")
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    on = [f"{found['cpu']} ({found['instruction_set']}), {found['cores']} cores"]
    on += [f"Python {found['python']}, torch {found['torch']}", compiler.partition("\n")[0]]
    on += [f"commit {found['commit']}", found["date"][:10]]
    report.fill(ROOT / page, name, f"{text.rstrip()}\n\nOn {'; '.join(on)}.")
