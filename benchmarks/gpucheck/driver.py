"""Runs sections one after another, each in a process group of its own, and lets none of them cost
another one.

A section may use its own limit and what the ones before it have left over. Past that every process
that it started is killed, in whatever session it is. What a section wrote before stays in the
record.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpucheck.child import MARK, START_AGAIN, kill, marked
from gpucheck.record import NO_TIME, Record, status

ROOT = Path(__file__).resolve().parent.parent.parent
ROOM_S = 3.0  # between the time at which a section should stop and the one at which it is stopped


@dataclass(frozen=True)
class Section:
    """A name, seconds, and "module:function" of what lists the rows (child.py)."""

    name: str
    limit_s: float
    target: str


def end_all(process: subprocess.Popen, mark: str) -> None:
    """Kill the group, then whatever left the group but still carries the mark, until nothing
    does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < until:
        kill(left)
        time.sleep(0.05)


def run_once(record: Record, section: Section, ends: float) -> tuple[int | None, str]:
    """(exit code, or None where time ran out; the end of what the section said on standard
    error)"""
    mark = uuid.uuid4().hex
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [
        sys.executable,
        "-m",
        "gpucheck.child",
        str(record.path),
        section.name,
        section.target,
    ]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, str(ends - ROOM_S)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout=max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_all(process, mark)
            process.stdin.close()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4000))
        return code, said.read().decode(errors="replace")


def note_end(entry: dict, section: Section, code: int | None, said: str, seconds: float) -> bool:
    """Write into the section what its process did not say itself. Returns whether to start it
    again."""
    row = entry.pop("running", None)
    if code in (0, START_AGAIN):
        return code == START_AGAIN
    # A row for which time ran out has shown no fault yet: it is slow, or hangs.
    why = "error"
    if code is None:
        ended = f"ended after {seconds:.0f} s, its limit"
        entry["timed_out"] = True
        why = "skipped"
    else:
        ended = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
    if row is not None:
        entry["rows"].append({"name": row, why: f"{section.name}: {ended}", "said": said[-2000:]})
        return code is not None
    if "error" not in entry:
        entry |= {"error": f"{section.name}: {ended}", "said": said[-2000:]}
    return False


def run_section(record: Record, section: Section, ends: float) -> None:
    """Run it to its end, starting it again behind a row that ended its process."""
    begin = time.monotonic()
    record.section(section.name).update(status="running", limit_s=round(ends - begin, 1))
    record.save()
    again = True
    while again:
        code, said = run_once(record, section, ends)
        record.data = Record.load(record.path).data
        entry = record.section(section.name)
        again = (
            note_end(entry, section, code, said, time.monotonic() - begin)
            and time.monotonic() < ends
        )
        record.save()
    entry["elapsed_s"] = round(time.monotonic() - begin, 1)
    entry["status"] = status(entry)
    record.save()
    print(f"{section.name}: {entry['status']}, {entry['elapsed_s']:.0f} s", flush=True)


def run(sections: Iterable[Section], record: Record, within_s: float, after=lambda: None) -> None:
    """All sections within so many seconds; one for which nothing is left is named and not begun.
    after(): after each."""
    start = time.monotonic()
    ends = start
    for section in sections:
        ends = min(ends + section.limit_s, start + within_s)
        if time.monotonic() > ends - ROOM_S:
            record.section(section.name).update(
                status="cut short", planned=["all"], note=NO_TIME, elapsed_s=0.0
            )
            record.save()
            print(f"{section.name}: {NO_TIME}", flush=True)
            continue
        run_section(record, section, ends)
        after()
