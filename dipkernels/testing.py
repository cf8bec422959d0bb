"""For those who write kernels: compare an operation with the reference and see the first element
that differs.

python -c "import dipkernels.testing as t; print(t.compare('perturb', 'cpu'))"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .arguments import one_of
from .ops import registry

_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}  # z is float32's
_PLAIN: dict[str, object] = {
    "dim": -1,
    "row0": 0,
    "col0": 0,
    "sample": 0,
    "num_samples": 1,
    "factor": 1.0,
    "log_variance": False,
    "out_dtype": None,
    "activation": "gelu",
    "kind": "layer",
    "eps": 1e-5,
    "offset": 0.0,
    "given": None,
}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; str() says it in words.

    Attributes:
        op: The operation.
        backend: What ran it.
        output: Which of its results differs, by its number from 0; None where all agree.
        count: How many elements of that result differ.
        index: Of the first of them.
        got: Its value there.
        expected: The reference's value there.
        draw: Where the noise of that element lies and what it is made of, in words; empty where no
            noise is in it.
    """

    op: str
    backend: str
    output: int | None = None
    count: int = 0
    index: tuple[int, ...] = ()
    got: float = 0.0
    expected: float = 0.0
    draw: str = ""

    def __bool__(self) -> bool:
        """Whether all agree."""
        return self.output is None

    def __str__(self) -> str:
        if self:
            return f"{self.op} on {self.backend!r}: as the reference"
        where = (
            f"{self.op} on {self.backend!r}: result {self.output} differs in {self.count} "
            f"element(s), first at {self.index}"
        )
        return f"{where}\n  got {self.got!r}, expected {self.expected!r}{self.draw}"


def compare(
    op: str,
    backend: str,
    shape: Sequence[int] = (5, 24),
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    **arguments: Any,
) -> Comparison:
    """Run an operation and its reference on the same input and find the first element that differs.

    Args:
        op: Its name, one of `dipkernels.ops.registry.SCHEMAS`: "perturb", "linear_bwd", ...
        backend: "cpu", "cuda", "triton" (on a CPU under TRITON_INTERPRET=1) or "reference".
        shape: The shape of the data, [..., K]. The weight of a layer has K + 3 rows.
        dtype: The type of the data.
        tolerance: By how much results may differ, relative to 1 + the largest expected value. By
            default what one rounding to `dtype` explains.
        arguments: Values for arguments of the operation, by the names in its schema: row0=7,
            seed=..., activation="tanh".

    Returns:
        A `Comparison`, which is true if all agree.

    Raises:
        ValueError: An operation or an argument that does not exist, or a shape without features.
        RuntimeError: The backend cannot run here.

    Examples:
        >>> from dipkernels import testing
        >>> bool(testing.compare("perturb", "reference", (2, 16), row0=7))
        True
    """
    one_of("op", op, sorted(registry.SCHEMAS))
    if not shape or shape[-1] < 1:
        raise ValueError(f"shape: expected (..., K) with K >= 1, got {tuple(shape)}")
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    one_of("backend", backend, registry.NAMESPACES)
    overload = getattr(getattr(torch.ops, registry.NAMESPACES[backend]), op).default
    # an optional one is for one backend alone
    names = [a.name for a in overload._schema.arguments if not a.has_default_value()]
    if unknown := sorted(arguments.keys() - set(names)):
        raise ValueError(f"arguments: expected some of {names}, got {unknown}")
    values = {**_inputs(names, list(shape), dtype, op), **arguments}
    with backends.backend(backend):
        given = [v.to(device) if isinstance(v, Tensor) else v for v in map(values.get, names)]
        got = overload(*given)
    wide = [
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in (values[n] for n in names)
    ]
    want = getattr(reference, op)(*wide)
    pairs = zip(*((out,) if isinstance(out, Tensor) else tuple(out) for out in (got, want)))
    for number, (ours, exact) in enumerate(pairs):
        found = _first(ours.cpu(), exact, _TOLERANCE[dtype] if tolerance is None else tolerance)
        if found is not None:
            count, index, a, b = found
            draws = ours.shape == torch.Size(shape) and "seed" in names
            text = _draw_at(values, tuple(shape), index) if draws else ""
            return Comparison(op, backend, number, count, index, a, b, text)
    return Comparison(op, backend)


def _inputs(names: Sequence[str], shape: list[int], dtype: torch.dtype, op: str) -> dict[str, Any]:
    """A value for every argument of an operation, the same for each call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    k, n = shape[-1], shape[-1] + 3
    is_layer = op.startswith(("linear", "affine"))
    made: dict[str, Any] = dict(_PLAIN)
    for name in names:
        if name in ("sigma", "v", "dv"):
            made[name] = torch.rand(n if name == "dv" else k, generator=generator) + 0.1
        elif name == "seed":
            made[name] = torch.tensor([0x0123456789ABCDEF, 5])
        elif name == "shape":
            made[name] = shape
        elif name == "weight":
            made[name] = normal(n, k) if is_layer else normal(k)
        elif name == "bias":
            made[name] = normal(n if is_layer else k)
        elif name == "dy" and is_layer:
            made[name] = normal(*shape[:-1], n)
        elif name not in made:
            made[name] = normal(*shape)
    if "stats" in names:  # what the norm's forward kept
        forward = torch.ops.dipkernels_reference.norm.default
        wanted = [argument.name for argument in forward._schema.arguments]
        made["stats"] = forward(*(made[name] for name in wanted))[1]
    return made


def _first(
    got: Tensor, want: Tensor, tolerance: float
) -> tuple[int, tuple[int, ...], float, float] | None:
    if got.shape != want.shape:
        return got.numel(), tuple(got.shape), float("nan"), float("nan")
    if not got.numel():  # of an argument that is None
        return None
    got, want = got.double(), want.double()
    far = (got - want).abs() > tolerance * (1 + want.abs().nan_to_num(0).max())
    far |= got.isnan() != want.isnan()
    if not far.any():
        return None
    index = tuple(int(i) for i in far.nonzero()[0])
    return int(far.sum()), index, float(got[index]), float(want[index])


def _draw_at(values: Mapping[str, Any], shape: tuple[int, ...], index: tuple[int, ...]) -> str:
    """The row, column, counter, words and z of one element."""
    dim = values["dim"] % len(shape) if "dim" in values else len(shape) - 1
    row, col = 0, index[dim] + values["col0"]
    for d, size in enumerate(shape):
        if d != dim:
            row = row * size + index[d]
    row += values["row0"]
    seed, sample = values["seed"].cpu(), values["sample"]
    words = reference.words(seed, torch.tensor([row]), torch.tensor([col // 8]), sample)[0, 0]
    z = float(reference.standard_normal(seed, 1, 1, row, col, sample))
    listed = " ".join(f"{int(word):#010x}" for word in words)
    half = "cosine" if col % 2 == 0 else "sine"
    return (
        f"\n  row {row}, column {col}, sample {sample}: group {col // 8}, word {col % 8 // 2}, its "
        f"{half}"
        f"\n  words {listed}\n  z {z!r}"
    )
