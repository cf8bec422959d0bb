"""torch.library operations: each has one schema in three namespaces, and a table says which of them
runs.

    dipkernels            the compiled library (CPU, CUDA)
    dipkernels_triton     the Triton kernels
    dipkernels_reference  plain PyTorch

The operations are deterministic functions of tensors, seed included; what autograd needs lies
around them, in their files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from . import sizes

NAMESPACES = {
    "cpu": "dipkernels",
    "cuda": "dipkernels",
    "triton": "dipkernels_triton",
    "reference": "dipkernels_reference",
}
SCHEMAS: dict[str, str] = {}
PASSES: dict[str, str] = {}  # schemas of parts of operations
_libraries = {
    name: torch.library.Library(name, "DEF") for name in dict.fromkeys(NAMESPACES.values())
}  # live as we do


def define(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    anywhere: Callable[..., Any] | None = None,
) -> None:
    """Define an operation in every namespace, with the reference of its name; the Triton launcher
    of its name lies in the module of triton_kernels that is called as the file that defines it.

    Args:
        op: Its name.
        schema: Its schema, without the name.
        fake: Its results' shapes, dtypes and strides, without data.
        anywhere: An implementation made of other operations, where the compiled library has no
            kernel.
    """
    SCHEMAS[op] = schema
    for namespace, library in _libraries.items():
        # Any layout will do. torch.compile would otherwise copy its channels-last tensors, which it
        # gives every convolution, into the layout of eager mode in front of each.
        library.define(op + schema, tags=(torch.Tag.flexible_layout,))
        torch.library.register_fake(f"{namespace}::{op}", fake, lib=library)
    if anywhere is not None:
        # as a kernel: whoever calls the operation itself may have gradients on
        _libraries["dipkernels"].impl(op, torch.no_grad()(anywhere), "CompositeExplicitAutograd")
    _libraries["dipkernels_reference"].impl(op, getattr(reference, op), "CompositeExplicitAutograd")
    module = fake.__module__.rpartition(".")[2]
    for device in ("CUDA", "CPU"):  # the latter under TRITON_INTERPRET=1
        _libraries["dipkernels_triton"].impl(op, _triton(op, module), device)


def define_pass(op: str, schema: str) -> None:
    """Define a part of an operation, in the compiled library on a CPU alone."""
    PASSES[op] = schema
    _libraries["dipkernels"].define(op + schema)


def _triton(op: str, module: str) -> Callable[..., Any]:
    """The Triton kernel's launcher, and where this Triton cannot compile it, what is chosen
    then."""

    def run(*args: Any) -> Any:
        if op not in backends.triton_problems:
            try:  # imported at the first call: Triton takes a while
                return getattr(importlib.import_module(f"dipkernels.triton_kernels.{module}"), op)(
                    *args
                )
            except Exception as error:
                backends.note_triton_problem(op, error)
        return _overload(op, backends.choose(op, _device_of(args)))(*args)  # no longer Triton

    return run


# ---- which runs ----------------------------------------------------------------------------------

# What `choose` said for the devices at hand: filled at import and by `backend`, so that a call is
# one look-up, eager or traced.
_chosen: dict[tuple[str, str], Callable[..., Any]] = {}
_fusers: set[str] = set()  # devices where an affine layer may sample inside its GEMM
# In place of a device: a shape that is sizes.is_wide, and any device without kernels of its own.
WIDE, OTHER = "cuda, wide", "other"


def kernel(op: str, device: str) -> Callable[..., Any]:
    """What runs the operation on a device, a type or WIDE."""
    return _chosen.get((op, device)) or _chosen[op, OTHER]


def fuses(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether an affine layer of these sizes samples inside its GEMM: backends.can_fuse as a
    look-up, and is_narrow."""
    return device in _fusers and sizes.is_narrow(dtype, m, n, k)


def choose_all() -> None:
    """Fill the table anew."""
    for op in SCHEMAS:
        for device in ("cpu", "cuda", "meta", WIDE, OTHER):
            wide = device == WIDE
            try:
                plan = backends.choose(op, "cuda" if wide else device, wide)
                _chosen[op, device] = _overload(op, plan)
            except (RuntimeError, ValueError) as error:
                _chosen[op, device] = _refusal(error)
    _fusers.clear()
    _fusers.update(device for device in ("cpu", "cuda") if backends.can_fuse(device))


def _overload(op: str, plan: backends.Plan) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, NAMESPACES[plan.backend]), op).default


def _refusal(error: Exception) -> Callable[..., Any]:
    """What cannot run raises when it is called: an import, and `backend`, raise nothing for it."""

    def refuse(*args: object) -> None:
        raise type(error)(str(error).replace(repr(OTHER), repr(_device_of(args))))

    return refuse


def _device_of(args: Sequence[object]) -> str:
    return next(a for a in args if isinstance(a, Tensor)).device.type
