"""Writes what a check measured into docs/reliability.md, between its markers, with machine,
versions and date."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"


def machine() -> str:
    """One line: processor, cores, system, Python, compiler, commit, date."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if cpuinfo.exists()
        else []
    )
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    sets = [name for name, flag in (("AVX2", " avx2 "), ("AVX-512", " avx512f ")) if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        f"{models[0].strip() if models else platform.machine()} "
        f"({', '.join(sets) or 'no vectors'}), {cores} cores",
        f"{platform.system()}, Python {platform.python_version()}",
        _first_line("g++", "--version"),
        f"commit {_first_line('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD')}",
        datetime.date.today().isoformat(),
    ]
    return "; ".join(part for part in parts if part)


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return f"no {command[0]}"
    return (
        done.stdout.splitlines()[0]
        if done.returncode == 0 and done.stdout
        else f"{command[0]}: unknown"
    )


def command_line(doc: str, records: str = "") -> argparse.ArgumentParser:
    """With --record, which every check has; records: what it does besides."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    said = f"write the figures into docs/reliability.md{records}"
    parser.add_argument("--record", action="store_true", help=said)
    return parser


def record(name: str, text: str) -> None:
    """Replace what stands between <!-- name --> and <!-- end of name -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    document = DOCUMENT.read_text(encoding="utf-8")
    if begin not in document or end not in document:
        raise RuntimeError(
            f"{DOCUMENT.name}: expected the markers {begin.strip()} and {end}, found none"
        )
    before, rest = document.split(begin, 1)
    after = rest.split(end, 1)[1]
    DOCUMENT.write_text(
        f"{before}{begin}{text.rstrip()}\n\nOn {machine()}.\n{end}{after}", encoding="utf-8"
    )
