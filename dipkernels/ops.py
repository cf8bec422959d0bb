"""torch.library operations: schemas, checks, fakes, implementations.  One schema, three namespaces:

    dipkernels            the compiled library (CPU, CUDA)
    dipkernels_triton     the Triton kernels
    dipkernels_reference  plain PyTorch

The functions below take the arguments of the schema of their name, check them, and call the namespace that `backends.choose` names.
They are deterministic functions of tensors, seed included, without autograd: see functional.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import backends, reference, row_blocks

_WHERE = "int dim, SymInt row0, SymInt col0, int sample, int num_samples"
_SCALE = "float factor, bool log_variance"
_LINEAR = (
    "Tensor weight, Tensor? bias, Tensor sigma, Tensor seed, SymInt row0, SymInt col0, int sample, int num_samples"
)
_LINEAR = f"{_LINEAR}, {_SCALE}"
SCHEMAS = {
    "noise": f"(Tensor seed, SymInt[] shape, {_WHERE}) -> Tensor",
    "perturb": f"(Tensor x, Tensor sigma, Tensor seed, {_WHERE}, {_SCALE}, ScalarType? out_dtype) -> Tensor",
    "perturb_bwd": f"(Tensor du, Tensor sigma, Tensor seed, {_WHERE}, {_SCALE}) -> Tensor",
    "perturb_replay": f"(Tensor du, Tensor x, Tensor sigma, Tensor seed, {_WHERE}, {_SCALE}, ScalarType? out_dtype)"
    " -> (Tensor, Tensor)",
    # The mean over samples of act(affine), and its derivatives dx, dweight, dbias ([N], also without a bias), dsigma.
    "linear": f"(Tensor x, {_LINEAR}, str activation, ScalarType? out_dtype) -> Tensor",
    "linear_bwd": f"(Tensor dy, Tensor x, {_LINEAR}, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    # The same on a CPU, with what backward needs of the first num_kept samples: act'(h), [num_kept, rows, N], in bfloat16 as
    # a byte, round(200 act') + 26; behind relu of all of them a bit, uint8 [ceil(samples / 8), rows, N].
    "linear_keep": f"(Tensor x, {_LINEAR}, str activation, int num_kept, ScalarType? out_dtype) -> (Tensor, Tensor)",
    "linear_keep_bwd": f"(Tensor dy, Tensor x, {_LINEAR}, str activation, Tensor kept)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # E[act(mu + sqrt(v) z)] with v [N]; back: dmu = dy d/dmu, and of v's dtype the sums over rows of dy d/dv and of dmu.
    "activation": "(Tensor mu, Tensor v, str activation) -> Tensor",
    "activation_bwd": "(Tensor dy, Tensor mu, Tensor v, str activation) -> (Tensor, Tensor, Tensor)",
    # v [N] = sum over k of sigma_k^2 W_nk^2, of sigma's dtype; back: (given + dweight, dsigma).
    "activation_variance": "(Tensor weight, Tensor sigma, bool log_variance) -> Tensor",
    "activation_variance_bwd": "(Tensor dv, Tensor weight, Tensor sigma, bool log_variance, Tensor? given)"
    " -> (Tensor, Tensor)",
}
# Passes of linear behind an activation and of its backward, in the compiled library on a CPU alone: for row_blocks.
_PASSES = {
    # u_s = x + factor sigma z_s and z_s, [samples, rows, K], into what is given.
    "draw_samples": "(Tensor(a!)? u, Tensor(b!)? z, Tensor x, Tensor sigma, Tensor seed, SymInt row0, SymInt col0,"
    " int sample, float factor) -> ()",
    # total [A, B] += the sum over samples of act(h), h [samples, A, B]; slopes: as `kept` of linear_keep, [:, A, B], written
    # for those samples, the first of which is number `first`. Then out [A, B] = factor total, where it is wanted.
    "act_add": "(Tensor(a!) total, Tensor h, str activation, Tensor(b!)? slopes, int first, Tensor(c!)? out, float factor)"
    " -> ()",
    # Back: dh = dy act'(h + bias[:, None]) as [A, samples, B], total += its sum; h: of the samples whose slopes are not given;
    # dy [B, A] and slopes [:, B, A] are transposed on the way.
    "act_add_bwd": "(Tensor(a!) total, Tensor h, Tensor? bias, Tensor dy, str activation, Tensor? slopes, int first,"
    " int num_samples, Tensor(b!)? out, float factor) -> Tensor",
}
NAMESPACES = {
    "cpu": "dipkernels",
    "cuda": "dipkernels",
    "triton": "dipkernels_triton",
    "reference": "dipkernels_reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh")
MAX_SAMPLES = 2**16
MAX_ORIGIN = 2**62  # of row0 and col0: with the rows of any tensor added it is still an int64


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_seed(seed: Tensor, device: torch.device) -> None:
    if seed.dtype is not torch.int64:
        raise TypeError(f"seed: expected dtype torch.int64, got {seed.dtype}")
    if seed.shape != (2,):
        raise ValueError(f"seed: expected shape (2,) = (key, stream), got {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed: expected device {device}, as the data, got {seed.device}")


def _check_where(ndim: int, dim: int, row0: int, col0: int, sample: int, num_samples: int) -> None:
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim: expected a dimension of a tensor of {ndim}, got {dim}")
    if not (0 <= row0 <= MAX_ORIGIN and 0 <= col0 <= MAX_ORIGIN):
        raise ValueError(f"row0, col0: expected 0 to 2^62, got {row0}, {col0}")
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples: expected 1 to {MAX_SAMPLES}, got {num_samples}")
    if not 0 <= sample <= MAX_SAMPLES - num_samples:
        raise ValueError(f"sample: expected 0 <= sample and sample + num_samples <= {MAX_SAMPLES}, got {sample}")


def _check(x: Tensor, sigma: Tensor, seed: Tensor, dim: int, *where: int) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected one of {DTYPES}, got {x.dtype}")
    _check_where(x.dim(), dim, *where)
    if sigma.shape != x.shape[dim : dim + 1 or None]:
        raise ValueError(f"sigma: expected shape (K,) = ({x.shape[dim]},), got {tuple(sigma.shape)}")
    if sigma.dtype is not torch.float32 and sigma.dtype is not torch.float64:
        raise TypeError(f"sigma: expected torch.float32 or torch.float64, got {sigma.dtype}")
    if sigma.device != x.device:
        raise ValueError(f"sigma: expected device {x.device}, as x, got {sigma.device}")
    _check_seed(seed, x.device)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def _check_out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {out_dtype}")


# ---- the operations ------------------------------------------------------------------------------------------------

# What `choose` said for the devices at hand: filled at import and by `backend`, so that a call is one look-up, eager or traced.
_chosen: dict[tuple[str, str], Callable[..., Any]] = {}
_keepers: set[str] = set()  # devices where linear_keep runs
_fusers: set[str] = set()  # devices where an affine layer may sample inside its GEMM


def _overload(op: str, plan: backends.Plan) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACES[plan.backend]), op).default
    return found


# In place of a device: a shape that is backends.is_wide, and any device without kernels of its own.
_WIDE, _OTHER = "cuda, wide", "other"


def _kernel(op: str, device: str) -> Callable[..., Any]:
    if device == _WIDE:
        return _overload(op, backends.choose(op, "cuda", torch.float32, (2**12, 2**12, 2**12)))
    return _overload(op, backends.choose(op, device))


def _refusal(op: str, device: str, error: Exception) -> Callable[..., Any]:
    """What cannot run raises when it is called: an import, and `backend`, raise nothing for it."""

    def refuse(*args: object) -> None:
        raise type(error)(str(error).replace(repr(_OTHER), repr(_device_of(args))))

    return refuse


def _device_of(args: Sequence[object]) -> str:
    return next(a for a in args if isinstance(a, Tensor)).device.type


_One = Literal["noise", "perturb", "perturb_bwd", "activation", "activation_variance"]
_Two = Literal["perturb_replay", "linear_keep", "activation_variance_bwd"]


@overload
def _run(op: _One, device: str) -> Callable[..., Tensor]: ...
@overload
def _run(op: _Two, device: str) -> Callable[..., tuple[Tensor, Tensor]]: ...
@overload
def _run(op: Literal["activation_bwd"], device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]: ...
@overload
def _run(op: Literal["linear", "linear_bwd"], device: str) -> Callable[..., Any]: ...
@overload
def _run(op: Literal["linear_keep_bwd"], device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]: ...
def _run(op: str, device: str) -> Callable[..., Any]:
    return _chosen.get((op, device)) or _chosen[op, _OTHER]


def _choose_all() -> None:
    for op in SCHEMAS:
        for device in ("cpu", "cuda", "meta", _WIDE, _OTHER):
            try:
                _chosen[op, device] = _kernel(op, device)
            except (RuntimeError, ValueError) as error:
                _chosen[op, device] = _refusal(op, device, error)
    _keepers.clear()
    if backends._forced in (None, "cpu", "reference"):
        _keepers.add("cpu")
    _fusers.clear()
    _fusers.update(device for device in ("cpu", "cuda") if backends.can_fuse(device))


def _linear_kernel(op: Literal["linear", "linear_bwd"], device: str, x: Tensor, weight: Tensor) -> Callable[..., Any]:
    """device: x's type."""
    if device == "cuda" and weight.numel():
        m = x.numel() // weight.shape[1]
        device = _WIDE if backends.is_wide(weight.dtype, m, *weight.shape) else device
    return _run(op, device)


def noise(seed: Tensor, shape: Sequence[int], dim: int, row0: int, col0: int, sample: int, num_samples: int) -> Tensor:
    _check_seed(seed, seed.device)
    _check_where(len(shape), dim, row0, col0, sample, num_samples)
    return _run("noise", seed.device.type)(seed, shape, dim, row0, col0, sample, num_samples)


def perturb(
    x: Tensor, sigma: Tensor, seed: Tensor, dim: int, row0: int, col0: int, sample: int, num_samples: int, factor: float,
    log_variance: bool, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    _check(x, sigma, seed, dim, row0, col0, sample, num_samples)
    _check_out_dtype(out_dtype)
    return _run("perturb", x.device.type)(
        x, sigma, seed, dim, row0, col0, sample, num_samples, factor, log_variance, out_dtype
    )


def perturb_bwd(
    du: Tensor, sigma: Tensor, seed: Tensor, dim: int, row0: int, col0: int, sample: int, num_samples: int, factor: float,
    log_variance: bool,
) -> Tensor:  # fmt: skip
    # Nothing to check: backward repeats what forward was given, and autograd gives du its shape.
    return _run("perturb_bwd", du.device.type)(
        du, sigma, seed, dim, row0, col0, sample, num_samples, factor, log_variance
    )


def perturb_replay(
    du: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, dim: int, row0: int, col0: int, sample: int, num_samples: int,
    factor: float, log_variance: bool, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if du.shape != x.shape:
        raise ValueError(f"du: expected shape {tuple(x.shape)}, as x, got {tuple(du.shape)}")
    if du.dtype not in DTYPES:
        raise TypeError(f"du: expected one of {DTYPES}, got {du.dtype}")
    return _run("perturb_replay", x.device.type)(
        du, x, sigma, seed, dim, row0, col0, sample, num_samples, factor, log_variance, out_dtype
    )


def _check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, out_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    _check(x, sigma, seed, -1, row0, col0, sample, num_samples)
    _check_out_dtype(out_dtype)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape (N, K = {x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape (N,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device}, as x, got {weight.device}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias: expected device {x.device}, as x, got {bias.device}")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    if activation != "identity":
        _check_activation(activation)
    _check_linear(x, weight, bias, sigma, seed, row0, col0, sample, num_samples, out_dtype)
    y: Tensor = _linear_kernel("linear", x.device.type, x, weight)(
        x, weight, bias, sigma, seed, row0, col0, sample, num_samples, factor, log_variance, activation, out_dtype
    )
    return y


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = _linear_kernel("linear_bwd", x.device.type, x, weight)(
        dy, x, weight, bias, sigma, seed, row0, col0, sample, num_samples, factor, log_variance, activation
    )
    return grads


def can_keep(device: str) -> bool:
    """Whether linear_keep runs there."""
    return device in _keepers


def fuses(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether an affine layer of these sizes samples inside its GEMM: backends.fuses as a look-up."""
    return device in _fusers and backends.is_narrow(dtype, m, n, k)


def linear_keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, num_kept: int, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_activation(activation)
    _check_linear(x, weight, bias, sigma, seed, row0, col0, sample, num_samples, out_dtype)
    least = num_samples if activation == "relu" else 0  # the signs of all samples
    if not least <= num_kept <= num_samples:
        raise ValueError(f"num_kept: expected {least} to num_samples = {num_samples}, got {num_kept}")
    where = (row0, col0, sample, num_samples, factor, log_variance)
    return _run("linear_keep", x.device.type)(x, weight, bias, sigma, seed, *where, activation, num_kept, out_dtype)


def linear_keep_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _run("linear_keep_bwd", x.device.type)(
        dy, x, weight, bias, sigma, seed, row0, col0, sample, num_samples, factor, log_variance, activation, kept
    )


def activation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    _check_activation(activation)
    if mu.dtype not in DTYPES:
        raise TypeError(f"mu: expected one of {DTYPES}, got {mu.dtype}")
    if mu.dim() == 0 or v.shape != mu.shape[-1:]:
        raise ValueError(f"v: expected shape (N,) = {tuple(mu.shape[-1:])}, got {tuple(v.shape)}")
    if v.dtype is not torch.float32 and v.dtype is not torch.float64:
        raise TypeError(f"v: expected torch.float32 or torch.float64, got {v.dtype}")
    if v.device != mu.device:
        raise ValueError(f"v: expected device {mu.device}, as mu, got {v.device}")
    return _run("activation", mu.device.type)(mu, v, activation)


def activation_bwd(dy: Tensor, mu: Tensor, v: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    return _run("activation_bwd", mu.device.type)(dy, mu, v, activation)


def activation_variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    return _run("activation_variance", weight.device.type)(weight, sigma, log_variance)


def activation_variance_bwd(
    dv: Tensor, weight: Tensor, sigma: Tensor, log_variance: bool, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _run("activation_variance_bwd", weight.device.type)(dv, weight, sigma, log_variance, given)


# ---- fakes: shapes, dtypes and strides without data ----------------------------------------------------------------


def _fake_noise(seed: Tensor, shape: Sequence[int], *where: int) -> Tensor:
    return seed.new_empty(shape, dtype=torch.float32)


def _fake_perturb(
    x: Tensor, sigma: Tensor, seed: Tensor, dim: int, row0: int, col0: int, sample: int, num_samples: int, factor: float,
    log_variance: bool, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=out_dtype)


def _fake_perturb_bwd(du: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(sigma, memory_format=torch.contiguous_format)


def _fake_perturb_replay(du: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_perturb(x, sigma, seed, *rest), _fake_perturb_bwd(du, sigma)


def _fake_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-1])


def _fake_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    like = weight.new_empty(weight.shape[:1]) if bias is None else bias
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, like, sigma))


def _fake_linear_keep(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_samples, activation, num_kept = rest[-6], rest[-3], rest[-2]
    first, dtype = row_blocks.slopes_form(activation, weight.dtype, num_samples, num_kept)
    kept = x.new_empty((first, x.shape[:-1].numel(), weight.shape[0]), dtype=dtype)
    return _fake_linear(x, weight, *rest), kept


def _fake_activation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    return torch.empty_like(mu, memory_format=torch.contiguous_format)


def _fake_activation_bwd(dy: Tensor, mu: Tensor, v: Tensor, activation: str) -> tuple[Tensor, ...]:
    return tuple(_fake_activation(like, v, activation) for like in (mu, v, v))


def _fake_activation_variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    return sigma.new_empty(weight.shape[:1])


def _fake_activation_variance_bwd(dv: Tensor, weight: Tensor, sigma: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, sigma))


_FAKES: dict[str, Callable[..., Any]] = {
    "noise": _fake_noise,
    "perturb": _fake_perturb,
    "perturb_bwd": _fake_perturb_bwd,
    "perturb_replay": _fake_perturb_replay,
    "linear": _fake_linear,
    "linear_bwd": _fake_linear_bwd,
    "linear_keep": _fake_linear_keep,
    "linear_keep_bwd": _fake_linear_bwd,
    "activation": _fake_activation,
    "activation_bwd": _fake_activation_bwd,
    "activation_variance": _fake_activation_variance,
    "activation_variance_bwd": _fake_activation_variance_bwd,
}


# ---- registration --------------------------------------------------------------------------------------------------


# Modules of triton_kernels, imported at the first call: Triton takes a while.
_STEMS = {op: op.split("_")[0] for op in SCHEMAS if op.startswith(("linear", "activation"))}


def _triton(op: str) -> Callable[..., Any]:
    stem = f"{__package__}.triton_kernels.{_STEMS.get(op, 'perturb')}"

    def launch(*args: Any) -> Any:
        if stem.endswith("linear") and "identity" in args[-2:]:
            args = tuple(None if a == "identity" else a for a in args)
        out = getattr(importlib.import_module(stem), op)(*args)
        if op == "linear_bwd" and out[2] is None:  # a schema has no optional results
            out = (*out[:2], out[1].new_zeros(out[1].shape[0]), out[3])
        return out

    def run(*args: Any) -> Any:
        if op not in backends.triton_problems:
            try:
                return launch(*args)
            except Exception as error:
                backends.note_triton_problem(op, error)
        plan = backends.choose(op, _device_of(args))  # no longer Triton
        return _overload(op, plan)(*args)

    return run


_libraries = []
for _namespace in dict.fromkeys(NAMESPACES.values()):
    _library = torch.library.Library(_namespace, "DEF")
    _libraries.append(_library)  # a Library's registrations live as long as it does
    for _op, _schema in SCHEMAS.items():
        _library.define(_op + _schema)
        torch.library.register_fake(f"{_namespace}::{_op}", _FAKES[_op], lib=_library)
        if _namespace == "dipkernels" and hasattr(row_blocks, _op):
            _library.impl(_op, getattr(row_blocks, _op), "CompositeExplicitAutograd")
        elif _namespace == "dipkernels_reference":
            _library.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")
        elif _namespace == "dipkernels_triton":
            _library.impl(_op, _triton(_op), "CUDA")
            _library.impl(_op, _triton(_op), "CPU")  # under TRITON_INTERPRET=1

for _op, _schema in _PASSES.items():
    _libraries[0].define(_op + _schema)

_choose_all()
backends._listeners.append(_choose_all)
backends.watch_cuda()
backends.warn_reference_here()
