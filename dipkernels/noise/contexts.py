"""Under which key layers draw, and whether: fixed_noise, noise_off, sampling_on.  docs/maths.md,
section 3.

The state is module-level. torch.compile reads it through guards on tensor properties, so that a new
key or row recompiles nothing; a context variable would break the trace, and a thread-local would be
missed by the backward thread.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import worlds
from ..arguments import integer

if TYPE_CHECKING:
    from typing_extensions import Self

_F = TypeVar("_F", bound=Callable[..., Any])
# what a function returns whose body has not run yet
_RUN_LATER = (
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    contextlib._GeneratorContextManager,
    contextlib._AsyncGeneratorContextManager,
)
KEY: Tensor | None = None  # int64 [2] = (key, 0) under fixed_noise
# [row0, 0, entries], without numbers: a module's integer would be a constant to torch.compile, and
# each new one another graph
ROWS: Tensor = torch.empty(0, 0, 0, device="cpu")
MODE: str | None = None  # None: noise where the layer is in training mode; "off"; "on"
# what KEY and ROWS came from, on the host: reading a key would stop a GPU
TAG: tuple[Any, ...] | None = None
LATEST: tuple[Any, ...] | None = None  # TAG of the fixed_noise that was entered last, uncompiled
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: an odd step, so that 2^64 passes have 2^64 keys


def row0() -> int:
    """First entry of the leading dimension, under fixed_noise; otherwise 0."""
    return ROWS.shape[0]


def entries() -> int:
    """How many entries the leading dimension has, under fixed_noise; 0 where it was not said."""
    return ROWS.shape[2]


def signed(value: int) -> int:
    """The int64 with the bits of value mod 2^64."""
    if not -(2**63) <= value < 2**63:
        # index: to torch.compile a constant, because Inductor computes in int64
        value = (operator.index(value) + 2**63) % 2**64 - 2**63
    return value


class _State(contextlib.ContextDecorator):
    """Saves the state on entry and restores it on exit. One instance may be entered again, nested
    or as a decorator.

    The state is the process's. Where threads, tasks or generators overlap, nobody can say what was
    there before: the exit that finds another state than the entry left raises, and nothing stays
    on.
    """

    def __init__(self, *given: object) -> None:
        if given:
            name = type(self).__name__
            raise TypeError(
                f"{name}: expected no argument, because it holds for every DIP layer, got "
                f"{type(given[0]).__name__}; write `with dip.{name}():`, or `@dip.{name}()` above "
                "a function"
            )
        self._saved: list[tuple[Any, ...]] = []

    def _set(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        before = KEY, ROWS, MODE, TAG
        self._set()
        self._saved.append((before, KEY, ROWS, (MODE, TAG)))
        return self

    def __exit__(self, *exc: object) -> None:
        global KEY, ROWS, MODE, TAG
        before, key, rows, others = self._saved.pop()
        if worlds.tracing() or (KEY is key and ROWS is rows and others == (MODE, TAG)):
            KEY, ROWS, MODE, TAG = before
            return
        KEY, ROWS, MODE, TAG = None, _rows(0), None, None
        raise RuntimeError(
            "dipkernels: another thread, task or open generator entered or left fixed_noise, "
            "noise_off, sampling_on or what uses them (predict, calibrate, check) meanwhile. They "
            "hold for the whole process, so the noise here was not what was asked for: run them "
            "one after another (a lock), or in processes of their own"
        )

    def __call__(self, func: _F) -> _F:
        if (
            inspect.isgeneratorfunction(func)
            or inspect.iscoroutinefunction(func)
            or inspect.isasyncgenfunction(func)
        ):
            raise self._runs_later(func)
        inside = super().__call__(func)

        @functools.wraps(func)
        def run(*args: Any, **kwargs: Any) -> Any:
            made = inside(*args, **kwargs)
            if isinstance(made, _RUN_LATER):
                if isinstance(made, types.CoroutineType):
                    made.close()  # Python would warn that nobody awaits it
                raise self._runs_later(func)
            return made

        return run  # type: ignore[return-value]

    def _runs_later(self, func: Callable[..., Any]) -> TypeError:
        return TypeError(
            f"{type(self).__name__}: expected a plain function to decorate, got the generator or "
            f"coroutine {getattr(func, '__qualname__', func)}, whose body runs after the context "
            "has ended: write `with` inside it"
        )


class fixed_noise(_State):
    """Inside, the noise of a DIP layer depends only on the key and on the layer's number in the
    model: same key, same noise.

    With checkpointed blocks run the backward pass inside too, because it computes them again;
    outside, it raises RuntimeError. A layer that is called twice inside repeats its noise, and a
    deep copy of a model, such as an AveragedModel, replays the noise of the original. Contexts can
    be nested, restore the state after exceptions, and work as decorators. They hold for the whole
    process, all its threads: enter one in one thread at a time.

    Args:
        key: Any integer, taken mod 2^64, or an int64 tensor of one element.
        row0: Index of the input's first entry along its LEADING (batch) dimension, >= 0. A worker
            that holds examples b0 .. b1 of a larger batch passes row0=b0 and gets their noise in
            that batch. Under `trajectories` the leading dimension is batch * m: pass row0=b0 * m.
            Examples must have one size for all workers; otherwise workers draw some rows twice
            (docs/cluster.md).
        entries: Size of the leading dimension of this worker's own input, not of the whole batch.
            Give it beside row0 for a model whose layers read examples elsewhere too: sequence
            first, windows or tokens of all examples in one dimension. Without it workers draw some
            of their rows twice there.

    Raises:
        TypeError, ValueError: A key, row0 or entries outside these.

    Examples:
        >>> layer, x = dip.DIPLinear(4, 2), torch.randn(8, 4)
        >>> with dip.fixed_noise(key=7):
        ...     whole = layer(x)
        >>> with dip.fixed_noise(key=7, row0=6):
        ...     part = layer(x[6:])
        >>> torch.allclose(part, whole[6:], atol=1e-6)
        True

    Source: the noise contract, docs/maths.md, section 3.
    """

    def __init__(self, key: int | Tensor, row0: int = 0, entries: int = 0) -> None:
        super().__init__()
        row0 = integer("row0", row0, 0, 2**62)
        self._key = _checked_key(key)
        self._rows = _rows(row0, integer("entries", entries, 0, 2**62))
        known = not isinstance(self._key, Tensor)
        self._tag = (self._key % 2**64 if known else "a tensor", row0)

    def _set(self) -> None:
        global KEY, ROWS, TAG, LATEST
        key = self._key
        KEY = key if isinstance(key, Tensor) else _with_zero(key, _device_of_keys())
        ROWS, TAG = self._rows, self._tag
        if not worlds.tracing():
            LATEST = TAG
            _counted_in.clear()


class noise_off(_State):
    """DIP layers inside compute the plain layer, in training mode too: for BatchNorm re-estimation
    and debugging.

    Checkpointed blocks are computed again in the backward pass: run it inside too. Nests; restores
    on exceptions; works as a decorator.

    Examples:
        >>> layer, x = dip.DIPLinear(4, 2), torch.randn(8, 4)
        >>> with dip.noise_off():
        ...     y = layer(x)
        >>> torch.equal(y, layer.eval()(x))
        True
    """

    def _set(self) -> None:
        global MODE
        MODE = "off"


# torch.compile pauses attention's fast path while it traces, and so traces the layers themselves.
# If it gives up there, the path stays off until the next sampling_on ends.
_sampling = 0  # how many sampling_on are entered
_paused = False  # whether attention's fast path was on before the first, and is off now


@worlds.in_no_graph
def _pause_fast_path() -> None:
    global _paused
    if torch.backends.mha.get_fastpath_enabled():
        torch.backends.mha.set_fastpath_enabled(False)
        _paused = True


@worlds.in_no_graph
def _resume_fast_path() -> None:
    global _paused
    if _paused:
        torch.backends.mha.set_fastpath_enabled(True)
        _paused = False


class sampling_on(_State):
    """DIP layers inside draw noise, in eval mode too; `predict` runs in it.

    nn.TransformerEncoderLayer's eval fast path, which calls none of its layers, is off inside.
    Checkpointed blocks are computed again in the backward pass: run it inside too. Nests; restores
    on exceptions; works as a decorator.

    Examples:
        >>> layer, x = dip.DIPLinear(4, 2).eval(), torch.randn(8, 4)
        >>> with dip.sampling_on():
        ...     y = layer(x)
        >>> torch.equal(y, layer(x))
        False
    """

    def _set(self) -> None:
        global MODE
        MODE = "on"

    def __enter__(self) -> Self:
        global _sampling
        _sampling += 1
        _pause_fast_path()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        global _sampling
        _sampling -= 1
        if _sampling == 0:  # the last one, also where two have overlapped
            _resume_fast_path()
        super().__exit__(*exc)


class numbered_pass(_State):
    """Under fixed_noise: key + number * 0x9E3779B97F4A7C15 (mod 2^64), and row0 * rows_per_entry.
    Otherwise nothing."""

    def __init__(self, number: int, rows_per_entry: int = 1) -> None:
        super().__init__()
        self._number, self._rows_per_entry = number, rows_per_entry

    def _set(self) -> None:
        global KEY, ROWS, TAG
        if KEY is not None:
            keep_for_replays(KEY)
            step = _with_zero(self._number * GOLDEN, KEY.device)
            rows = integer("row0", row0() * self._rows_per_entry, 0, 2**62)
            KEY, ROWS = KEY + step, _rows(rows, entries() * self._rows_per_entry)
            TAG = (TAG, self._number)


def _rows(row0: int, entries: int = 0) -> Tensor:
    return torch.empty(row0, 0, entries, device="cpu")


def _checked_key(key: int | Tensor) -> int | Tensor:
    """The key, if it is known here, else int64 [2] = (key, 0) on its device."""
    if not isinstance(key, Tensor):
        return integer("key", key, other=" or an int64 tensor of one element")
    if key.dtype is not torch.int64 or key.numel() != 1:
        raise TypeError(
            f"key: expected an int64 tensor of one element, got {key.dtype} of shape "
            f"{tuple(key.shape)}"
        )
    if key.device.type == "cpu" and worlds.has_values(key):
        return int(key)
    key = key.detach().reshape(1)
    return torch.cat([key, torch.zeros_like(key)])


def _device_of_keys() -> torch.device:
    """The accelerator that this process uses, so that no layer copies the key to it; else the CPU:
    a key asks for no GPU that no tensor is on, which a forked process could not give."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return torch.device("cpu")
    used = device.type != "cuda" or worlds.tracing() or torch.cuda.is_initialized()
    return device if used else torch.device("cpu")


def _with_zero(number: int, device: torch.device) -> Tensor:
    """int64 [2] = (number mod 2^64, 0).

    Without a copy from the host, which waits for all that runs on a GPU, and which the capture of a
    CUDA graph refuses.
    """
    if worlds.tracing():
        return torch.tensor([signed(number), 0], device=device)
    return torch.arange(1, -1, -1, device=device) * signed(number)


# By id, what CUDA graphs captured under fixed_noise read again at each replay, which contexts and
# layers let go of before.
_captured: dict[int, Tensor] = {}


def key_of(tag: Any) -> Any:
    """The key in a TAG, (key, row0) or a numbered pass of that: a number, "a tensor" for one that
    is not read, None where there is none."""
    while isinstance(tag, tuple):
        tag = tag[0]
    return tag


def keep_for_replays(key: Tensor, stream: Tensor | None = None) -> None:
    """Where a CUDA graph is captured, keep alive what a draw reads; warn, once for each key that is
    a number, that every replay draws its noise."""
    if not worlds.capturing((key if stream is None else stream).device.type):
        return
    new = id(key) not in _captured
    _captured.update({id(t): t for t in (key, stream) if t is not None})
    if new and key_of(TAG) not in (None, "a tensor"):
        warnings.warn(
            "dipkernels: a CUDA graph that is captured under fixed_noise keeps its key and row0: "
            "each replay draws the same noise, whatever fixed_noise is on then. For new noise in "
            "each replay capture it outside. For a key of each replay's own call fixed_noise(key) "
            "inside the capture, with an int64 CUDA tensor that you fill before each replay",
            stacklevel=2,
        )


# Which count each number came from, in this fixed_noise context, and the pairs of counts that a
# warning has named.
_counted_in: dict[int, str] = {}
_named: set[frozenset[str]] = set()


def note_number(number: int, counted_in: str) -> None:
    """Warn, once, where layers that were numbered apart draw the noise of one number under one
    key."""
    other = _counted_in.setdefault(number, counted_in)
    if other == counted_in or (pair := frozenset((other, counted_in))) in _named:
        return
    _named.add(pair)
    warnings.warn(
        f"dipkernels: layers of two models that were converted apart have one number ({number}) "
        "and draw under one fixed_noise key, so their noise is the same. If they are parts "
        "of one model, call dip.number_layers(model) on the whole. If not, and their noise "
        "should differ, give each model a key of its own",
        stacklevel=2,
    )
