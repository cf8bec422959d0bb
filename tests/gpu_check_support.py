"""Sections for tests/test_gpu_check.py: what a section of benchmarks/gpu_check.py can do wrong."""

import os
import signal
import subprocess
import sys
import time


def counting(check):
    """Many short rows."""
    return [(f"row {i}", lambda i=i: time.sleep(0.002) or {"value": i}) for i in range(2000)]


def fine(check):
    return [("one", lambda: {"value": 1}), ("two", lambda: {"value": 2})]


def raises(check):
    raise ValueError("no rows at all")


def _raise():
    raise ValueError("as broken as it gets")


def one_row_raises(check):
    return [("one", lambda: {}), ("two", _raise), ("three", lambda: {})]


def falls_back(check):
    """Triton compiles no kernel of the second row, and another backend takes its place."""
    backends = sys.modules["dipkernels.backends"] = type(sys)("dipkernels.backends")
    backends.triton_problems = {"gate": "Triton cannot compile gate"}

    def other_backend():
        backends.triton_problems["norm"] = "Triton cannot compile norm"
        return {"value": 2}

    def process():
        return {"process": os.getpid()}

    return [("one", process), ("two", other_backend), ("three", process)]


def half_a_row(check):
    return [
        ("one", lambda: {"variants": {"fine": {"seconds": 1.0}, "torn": {"error": "torn apart"}}})
    ]


def one_row_dies(check):
    return [
        ("one", lambda: {}),
        ("two", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        ("three", lambda: {}),
    ]


def loses_the_device_in_a_variant(check):
    """The timing catches the error; the device is lost all the same."""
    return loses_the_device(
        check, lambda: {"variants": {"torn": {"error": "as broken as it gets"}}}
    )


def loses_the_device(check, fail=_raise):
    """A torch whose device answers no more once a row has failed, as after an illegal access."""
    lost = []

    class Cuda:
        is_initialized = staticmethod(lambda: True)

        @staticmethod
        def synchronize():
            if lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sys.modules["torch"] = type(sys)("torch")
    sys.modules["torch"].cuda = Cuda
    return [
        ("one", lambda: {"process": os.getpid()}),
        ("two", lambda: lost.append(1) or fail()),
        ("three", lambda: Cuda.synchronize() or {"process": os.getpid()}),
    ]


def hangs(check):
    """With a child in the section's group and one in a session of its own."""

    def forever():
        for own in (False, True):
            subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=own
            )
        time.sleep(600)

    return [("one", lambda: {}), ("two", forever), ("three", lambda: {})]


def hangs_at_once(check):
    hangs(check)[1][1]()


def takes_all_time(check):
    def first():
        left, check.ends = check.left(), time.monotonic()
        return {"left": left}

    return [("row 0", first), *((f"row {i}", dict) for i in range(1, 100))]


def missing(check):
    return [("one", lambda: {"missing": "the tool is not installed"})]
