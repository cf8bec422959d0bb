"""Settings of how the kernels walk their rows and where Q's sum ends:
docs/measured_gpu_expectation.md says what each may gain."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

Settings = dict[str, Callable[[], contextlib.AbstractContextManager]]

# Bits of dip_set_cuda_forms in csrc/perturb_op.cpp.
P_FROM_END, SUMS_FROM_END, ONE_LAUNCH = 1, 2, 4


@contextlib.contextmanager
def forms(bits: int) -> Iterator[None]:
    """CUDA's kernels in this form inside. A captured graph keeps what it was captured with."""
    from dipkernels import backends

    if not backends.library().cuda_archs:
        yield
        return
    library = backends.c_functions(backends.library().path)
    before = library.dip_cuda_forms()
    library.dip_set_cuda_forms(bits)
    try:
        yield
    finally:
        library.dip_set_cuda_forms(before)


def walk() -> Settings:
    """P's rows from the last on, the default; all from the first; all from the last."""
    named = {
        "P from the end": P_FROM_END,
        "from the start": 0,
        "from the end": P_FROM_END | SUMS_FROM_END,
    }
    return {name: functools.partial(forms, bits) for name, bits in named.items()}


def column_sum() -> Settings:
    """Q's partial sums added up by a second launch, the default, or by the last block."""
    named = {"two launches": P_FROM_END, "last block": P_FROM_END | ONE_LAUNCH}
    return {name: functools.partial(forms, bits) for name, bits in named.items()}
