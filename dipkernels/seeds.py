"""Where a layer's seed comes from: drawn at each forward pass, or a fixed key.  docs/maths.md, section 3.

The state is module-level. torch.compile reads it through guards on tensor properties, so that a new key recompiles
nothing; a context variable would break the trace, and a thread-local would be missed by the backward thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tracing, worlds
from .worlds import is_dtensor

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY: Tensor | None = None  # int64 [2] = (key, 0) under fixed_noise
_ROW0: int = 0  # first entry of the leading dimension, under fixed_noise
_MODE: str | None = None  # None: noise where the layer is in training mode; "off"; "on"
_TAG: tuple[Any, ...] | None = None  # what _KEY and _ROW0 came from, on the host: reading a key would stop a GPU

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: an odd step, so that 2^64 passes have 2^64 keys


def signed(value: int) -> int:
    """The int64 with the bits of value mod 2^64."""
    return (value + 2**63) % 2**64 - 2**63


class _State(contextlib.ContextDecorator):
    """Saves the state on entry and restores it on exit. One instance may be entered again, nested or as a decorator."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, ...]] = []

    def _set(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._saved.append((_KEY, _ROW0, _MODE, _TAG))
        self._set()
        return self

    def __exit__(self, *exc: object) -> None:
        global _KEY, _ROW0, _MODE, _TAG
        _KEY, _ROW0, _MODE, _TAG = self._saved.pop()


class fixed_noise(_State):
    """Every DIP layer inside takes the seed (key, its number in the model) and draws nothing: same key, same noise.

    key: any integer, taken mod 2^64, or an int64 tensor of one element.
    row0: index of the input's first entry along its LEADING (batch) dimension, >= 0: a worker that holds examples b0
    .. b1 of a larger batch passes row0=b0 and gets their noise of that batch. Under `trajectories` the leading
    dimension is batch * m: pass row0=b0 * m there.
    The backward pass belongs inside too when blocks are checkpointed, for they are computed again there; outside, it
    raises RuntimeError. A layer called twice inside repeats its noise. Nests; restores on exceptions; works as a
    decorator.
    Raises TypeError or ValueError for a key or row0 outside these. Source: the noise contract, DESIGN.
    """

    def __init__(self, key: int | Tensor, row0: int = 0) -> None:
        super().__init__()
        self._key = _key_tensor(key)
        try:
            self._row0 = operator.index(row0)
        except TypeError:
            raise TypeError(f"row0: expected an integer >= 0, got {row0!r}") from None
        if self._row0 < 0:
            raise ValueError(f"row0: expected an integer >= 0, got {row0}")
        on_host = self._key.device.type == "cpu" or not isinstance(key, Tensor)
        self._tag = (int(key) % 2**64 if on_host else "a tensor", self._row0)

    def _set(self) -> None:
        global _KEY, _ROW0, _TAG
        _KEY, _ROW0, _TAG = self._key, self._row0, self._tag
        if not worlds.tracing():
            _counted_in.clear()


class noise_off(_State):
    """DIP layers inside compute the plain layer, in training mode too: for BatchNorm re-estimation and debugging.

    Nests; restores on exceptions; works as a decorator.
    """

    def _set(self) -> None:
        global _MODE
        _MODE = "off"


class sampling_on(_State):
    """DIP layers inside draw noise, in eval mode too; `predict` runs in it.

    nn.TransformerEncoderLayer's eval fast path, which calls none of its layers, is off inside. Nests; restores on
    exceptions; works as a decorator.
    """

    def _set(self) -> None:
        global _MODE
        _MODE = "on"

    def __enter__(self) -> Self:
        self._saved_fast_path = [*getattr(self, "_saved_fast_path", ()), torch.backends.mha.get_fastpath_enabled()]
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        torch.backends.mha.set_fastpath_enabled(self._saved_fast_path.pop())


class numbered_pass(_State):
    """Under fixed_noise: key + number * 0x9E3779B97F4A7C15 (mod 2^64), and row0 * rows_per_entry. Otherwise nothing."""

    def __init__(self, number: int, rows_per_entry: int = 1) -> None:
        super().__init__()
        self._number, self._rows_per_entry = number, rows_per_entry

    def _set(self) -> None:
        global _KEY, _ROW0, _TAG
        if _KEY is not None:
            step = torch.tensor([signed(self._number * _GOLDEN), 0], device=_KEY.device)
            _KEY, _ROW0, _TAG = _KEY + step, _ROW0 * self._rows_per_entry, (_TAG, self._number)


def _key_tensor(key: int | Tensor) -> Tensor:
    if isinstance(key, Tensor):
        if key.dtype is not torch.int64 or key.numel() != 1:
            raise TypeError(
                f"key: expected an int64 tensor of one element, got {key.dtype} of shape {tuple(key.shape)}"
            )
        key = key.detach().reshape(1)
        return torch.cat([key, torch.zeros_like(key)])
    try:
        number = operator.index(key)
    except TypeError:
        raise TypeError(f"key: expected an integer or an int64 tensor of one element, got {key!r}") from None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.tensor([signed(number), 0], device=device or "cpu")


# Which count each number came from, in this fixed_noise context, and the pairs of counts that a warning has named.
_counted_in: dict[int, str] = {}
_named: set[frozenset[str]] = set()


def note_number(number: int, counted_in: str) -> None:
    """Warn, once, where layers that were numbered apart draw the noise of one number under one key."""
    other = _counted_in.setdefault(number, counted_in)
    if other == counted_in or (pair := frozenset((other, counted_in))) in _named:
        return
    _named.add(pair)
    warnings.warn(
        f"dipkernels: layers of two models that were converted apart have one number ({number}) and draw under one "
        "fixed_noise key, so that their noise is the same. If they are parts of one model, call dip.number_layers(model) "
        "on the whole; if not, and their noise should differ, give each model a key of its own",
        stacklevel=2,
    )


def draw(stream: Tensor, x: Tensor) -> Tensor:
    """The seed of one forward pass, int64 [2]: (key, number) under fixed_noise, otherwise two random integers.

    stream: int64 [2] = (0, the layer's number), on x's device. The random seed comes from the default generator of
    that device, in one call, as dropout's does.
    Raises RuntimeError in a checkpointed block's second computation that would draw other noise than its first, and
    under torch.jit.trace and torch.onnx.export.
    """
    traced = worlds.tracing()
    if worlds.exporting() if traced else torch._C._get_tracing_state() is not None:
        tracing.refuse_noise_in_trace()
    if _KEY is None:
        if traced:
            if not worlds.exporting():
                _when_traced(x.device.type, is_dtensor(x))
        elif _ranks_to_compare and torch.distributed.is_initialized():
            _compare_ranks(x.device.type, is_dtensor(x))
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    else:
        seed = _KEY.to(x.device) + stream
    # No checkpointed block's first forward runs with gradients on and no hook on saved tensors.
    if not traced and (_in_backward() != -1 or not torch.is_grad_enabled() or _saved_hooks(False) is not None):
        _watch_checkpoint(seed)
    return seed


# ---- noise that would be drawn a second time: activation checkpointing and the partitioner of torch.compile ---------

# Of blocks that a backward pass may compute again: the newest, and those before, dropped when the newest are as many.
_first_draws: set[tuple[Any, ...]] = set()
_earlier_draws: set[tuple[Any, ...]] = set()
_MAX_DRAWS = 2**16  # of both
_in_backward = torch._C._current_graph_task_id  # -1 outside a backward pass
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _watch_checkpoint(seed: Tensor) -> None:
    global _first_draws, _earlier_draws
    if _in_backward() == -1:
        if _MODE is None and (mark := _mark_of(seed)) is not None:
            if len(_first_draws) >= _MAX_DRAWS // 2:
                _first_draws, _earlier_draws = set(), _first_draws
            _first_draws.add(mark)
        return
    if not _first_draws or (mark := _mark_of(seed)) is None or mark in _first_draws or mark in _earlier_draws:
        return
    what = "draws a seed" if _KEY is None else f"takes its noise from fixed_noise(key, row0) = {_TAG}"
    raise RuntimeError(
        f"checkpoint: a block that is computed again in the backward pass {what}, which is not what its forward pass "
        "had, so that its gradients would be wrong. Keep preserve_rng_state=True, or run forward and backward inside "
        "one fixed_noise(key)"
    )


def _mark_of(seed: Tensor) -> tuple[Any, ...] | None:
    """What tells one draw from another without stopping a GPU; None where nothing does."""
    if _KEY is not None:
        return _TAG
    if type(seed) is not Tensor or worlds.transforming():
        return None
    if seed.device.type == "cpu":
        return tuple(seed.tolist())
    if seed.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    generator = torch.cuda.default_generators[seed.device.index]
    return generator.initial_seed(), generator.get_offset()


def _when_traced(device: str, shared: bool) -> None:
    """Runs while torch.compile traces `draw`, which has it in no graph."""
    if _ranks_to_compare and torch.distributed.is_initialized():
        _compare_ranks(device, shared)
    _check_memory_budget()


# What torch.compiler.assume_constant_result does; calling that imports torch._dynamo, seconds long.
_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_memory_budget() -> None:
    from torch._functorch import config

    if config.activation_memory_budget < 1:
        warnings.warn(
            "dipkernels: torch.compile with activation_memory_budget < 1 may draw the noise of a layer afresh in "
            "backward (as it does torch.randn), which makes gradients wrong; run forward and backward inside "
            "fixed_noise(key)",
            stacklevel=2,
        )


# ---- data parallel: ranks that would draw one noise for different examples -------------------------------------------

_ranks_to_compare = torch.distributed.is_available()  # until this process drew for the first time as one of several


def _compare_ranks(device: str, shared: bool) -> None:
    """Leave a digest of the generator's state in the process group's store, and warn where another rank left the same.

    shared: whether the ranks share the tensor (DTensor) and have to draw alike. No collective: a rank that never gets
    here keeps none waiting.
    """
    global _ranks_to_compare
    distributed = torch.distributed
    if shared or distributed.get_world_size() == 1:
        return
    _ranks_to_compare = False
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    place = f"dipkernels/{device}/{hashlib.sha256(state.numpy().tobytes()).hexdigest()}"
    store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank()
    if store.add(place, 1) == 1:
        store.set(f"{place}/rank", str(rank))
    else:
        other = store.get(f"{place}/rank").decode() if store.check([f"{place}/rank"]) else "another"
        warnings.warn(
            f"dipkernels: rank {rank} draws the same noise as rank {other}. Ranks that hold different examples should "
            "differ: torch.manual_seed(seed + rank), or fixed_noise(key, row0=index of the rank's first example)",
            stacklevel=2,
        )


def first_row(x: Tensor, dim: int = -1) -> int:
    """The row of x's first element: _ROW0 * the rows of one entry of the leading dimension; dim is the feature one."""
    if _ROW0 == 0:
        return 0
    rows, feature = _ROW0, dim % x.ndim
    for d in range(1, x.ndim):
        if d != feature:
            rows *= x.shape[d]
    return rows
