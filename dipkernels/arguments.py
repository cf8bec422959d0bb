"""What an argument may be that is a number or one of a few words: one rule, one error and one form
of words at every door; and what came, in words."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, other: str = ""
) -> int:
    """The integer that was given: Python's, NumPy's, or that of an integer tensor of one element.

    A bool is none. A SymInt of torch.compile or torch.export stays what it is.

    Args:
        name: The argument's name.
        value: What was given.
        least: The smallest that is allowed.
        most: The largest that is allowed, beside `least`.
        other: What else the caller takes, as the end of a sentence: " or None".

    Raises:
        TypeError: It is no integer.
        ValueError: It is out of range.
    """
    found = _integer_of(value)
    known = found is not None
    if known and (least is None or found >= least) and (most is None or found <= most):
        return found
    allowed = (
        "" if least is None else f" >= {least}" if most is None else f" from {least} to {most}"
    )
    kind = ValueError if known else TypeError
    raise kind(f"{name}: expected an integer{allowed}{other}, got {value!r}")


def _integer_of(value: Any) -> Any:
    """None where it is no integer."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if getattr(value, "dtype", None) in (torch.bool, bool):  # NumPy before 2.3 has an index of it
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    other: str = "",
) -> Any:
    """The finite number that was given: Python's as it is, a tensor of one element as a scalar,
    another kind (NumPy's) as a float.

    A bool, a string and a complex number are none.

    Args:
        name: The argument's name.
        value: What was given.
        least: The smallest that is allowed.
        above: What it must be larger than.
        below: What it must be smaller than.
        other: What else the caller takes, as the end of a sentence: ", or {pattern: number}".

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite, or out of range.
    """
    known = _is_number(value)
    if (
        known
        and _is_finite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        if isinstance(value, Tensor):
            return value.reshape(())
        return value if isinstance(value, (int, float)) else float(value)
    bounds = ((">=", least), (">", above), ("<", below))
    allowed = " and".join(f" {sign} {bound}" for sign, bound in bounds if bound is not None)
    kind = ValueError if known else TypeError
    raise kind(f"{name}: expected a finite number{allowed}{other}, got {value!r}")


def one_of(name: str, value: _T, known: Iterable[object]) -> _T:
    """The value that was given. Raises ValueError where it is none of the known ones."""
    words = tuple(known)
    if value not in words:
        raise ValueError(f"{name}: expected one of {words}, got {value!r}")
    return value


def described(value: object) -> str:
    """What came, in an error: a tensor's dtype and shape, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype is not torch.bool and not value.is_complex()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:  # an integer that no float can hold
        return False
