"""The instruction sets of the CPU kernels that this machine offers and the library carries."""

import torch

from dipkernels import library
from dipkernels.library import CAPABILITIES, cpu_capability


def _offered():
    before = cpu_capability()
    names = []
    for name in CAPABILITIES:
        try:
            names.append(cpu_capability(name))
        except RuntimeError:
            continue
    cpu_capability(before)
    return names


OFFERED = _offered() if "portable" in library.load().cpu_capabilities else []


def assert_same_everywhere(results):
    """results() are the same bits on every instruction set that is offered, in 1, 2 and 3
    threads."""
    threads, want = torch.get_num_threads(), None
    try:
        for name in OFFERED or ["auto"]:
            cpu_capability(name)
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                got = list(results())
                want = want or got
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (name, n)
    finally:
        cpu_capability("auto")
        torch.set_num_threads(threads)
