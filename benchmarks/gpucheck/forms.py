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
    """CUDA's kernels, and Triton's, in this form inside. A captured graph keeps what it was
    captured with."""
    from dipkernels import backends

    restore = []
    if backends.library().cuda_archs:
        library = backends.c_functions(backends.library().path)
        restore.append(functools.partial(library.dip_set_cuda_forms, library.dip_cuda_forms()))
        library.dip_set_cuda_forms(bits)
    if backends.has_triton():
        from dipkernels.triton_kernels import perturb

        restore.append(functools.partial(vars(perturb).update, _triton_form(vars(perturb))))
        perturb.P_FROM_END = bool(bits & P_FROM_END)
        perturb.SUMS_FROM_END = bool(bits & SUMS_FROM_END)
        perturb.ONE_LAUNCH = bool(bits & ONE_LAUNCH)
    try:
        yield
    finally:
        for undo in restore:
            undo()


def _triton_form(names: dict) -> dict[str, bool]:
    return {name: names[name] for name in ("P_FROM_END", "SUMS_FROM_END", "ONE_LAUNCH")}


def walk(check: object = None) -> Settings:
    """Rows from the first on, as before; P's from the last; all from the last. The default is P's
    on CUDA, none on Triton."""
    named = {
        "from the start": 0,
        "P from the end": P_FROM_END,
        "from the end": P_FROM_END | SUMS_FROM_END,
    }
    return {name: functools.partial(forms, bits) for name, bits in named.items()}


def column_sum(check: object = None) -> Settings:
    """Q's partial sums added up by a second launch, the default, or by the last block."""
    named = {"two launches": P_FROM_END, "last block": P_FROM_END | ONE_LAUNCH}
    return {name: functools.partial(forms, bits) for name, bits in named.items()}


@contextlib.contextmanager
def _of_triton(bits: int) -> Iterator[None]:
    from dipkernels import backends

    with backends.backend("triton"), forms(bits):
        yield


def triton_column_sum(check: object = None) -> Settings:
    """The same of Triton's kernels, which run where the library was built without nvcc."""
    named = {"Triton, two launches": 0, "Triton, last program": ONE_LAUNCH}
    return {name: functools.partial(_of_triton, bits) for name, bits in named.items()}
