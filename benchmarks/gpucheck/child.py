"""One section in its own process: python -m gpucheck.child RECORD NAME MODULE:FUNCTION ENDS

FUNCTION(check) lists the section's rows as (name, call) pairs; call() returns a row. Rows that the
record already holds are not run again, so that the driver can start a section anew behind a row
that ended its process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpucheck.record import NO_TIME, Record, row_errors

MARK = "DIPKERNELS_GPU_CHECK"  # in the environment of all that a section starts
START_AGAIN = 75  # exit code: a row left the device, or a kernel, unusable for this process
LEAST_S = 2.0  # a row is not begun with less time than this

Rows = list[tuple[str, Callable[[], dict]]]


@dataclass(eq=False)
class Check:
    """What a section is given."""

    record: Record
    name: str
    ends: float  # time.monotonic() by which the section should be done

    @property
    def rehearsal(self) -> bool:
        return self.record.data["rehearsal"]

    @property
    def machine(self) -> dict:
        return self.record.data["machine"]

    @functools.cached_property
    def device(self):
        import torch

        return torch.device("cpu" if self.rehearsal else "cuda")

    def left(self) -> float:
        return self.ends - time.monotonic()

    def holds(self, name: str) -> bool:
        return any(row["name"] == name for row in self.record.section(self.name)["rows"])

    def add(self, name: str, row: dict) -> None:
        """Write a row to the file, then say so."""
        mark = {"rehearsal": True} if self.rehearsal else {}
        entry = self.record.section(self.name)
        entry["rows"].append({"name": name, **mark, **row})
        entry.pop("running", None)
        self.record.save()
        said = row.get("error") or row.get("missing") or row.get("skipped")
        print(f"{self.name}: {name}{': ' + said.splitlines()[0] if said else ''}", flush=True)

    def begin(self, name: str) -> None:
        self.record.section(self.name)["running"] = name
        self.record.save()


def describe(error: BaseException) -> dict:
    return {
        "error": f"{type(error).__name__}: {error}"[:8000],
        "traceback": traceback.format_exc()[-8000:],
    }


def device_is_lost() -> bool:
    """Whether an error stays with this process: after an illegal access every CUDA call fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def triton_problems() -> dict[str, str]:
    """What Triton could not compile: from then on another backend runs in its place here."""
    return getattr(sys.modules.get("dipkernels.backends"), "triton_problems", {})


@contextlib.contextmanager
def every_kernel_compiles() -> Iterator[None]:
    """Raise RuntimeError where Triton could not compile a kernel inside; dipkernels only warns."""
    before = set(triton_problems())
    yield
    if new := [said for op, said in triton_problems().items() if op not in before]:
        raise RuntimeError("; ".join(new))


def run(check: Check, function: Callable[[Check], Rows]) -> int:
    """Every row in turn; returns the exit code."""
    entry = check.record.section(check.name)
    try:
        rows = function(check)
    except Exception as error:
        entry |= describe(error)
        check.record.save()
        return START_AGAIN - 1
    entry["planned"] = [name for name, _ in rows]
    check.record.save()
    for name, call in rows:
        if check.holds(name):
            continue
        if check.left() < LEAST_S:
            check.add(name, {"skipped": NO_TIME})
            continue
        check.begin(name)
        begin = time.monotonic()
        try:
            with every_kernel_compiles():
                row = call()
        except Exception as error:
            row = describe(error)
        check.add(name, {**row, "elapsed_s": round(time.monotonic() - begin, 3)})
        if row_errors(row) and (triton_problems() or device_is_lost()):
            return START_AGAIN
    return 0


def marked(mark: str) -> list[int]:
    """The processes, alive, whose environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _end_with_the_driver() -> None:
    """Nothing is ever sent: the pipe closes when the driver has died, and then the section's
    processes go too."""
    while os.read(0, 1):
        pass
    kill([pid for pid in marked(os.environ[MARK]) if pid != os.getpid()])
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(path: str, name: str, target: str, ends: str) -> None:
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    module, _, function = target.partition(":")
    check = Check(Record.load(Path(path)), name, float(ends))
    code = run(check, lambda check: getattr(importlib.import_module(module), function)(check))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a device that is lost can hang in what Python does at its end


if __name__ == "__main__":
    main(*sys.argv[1:])
