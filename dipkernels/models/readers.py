"""Who reads what a module makes, watched on a batch: shapes and identities alone, and no trace
left."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import worlds
from .probe import (
    COPIES,
    around,
    for_each,
    frozen,
    input_of,
    leaves,
    run_batch,
    seed_alike,
    shown,
    storage_of,
    untouched,
)

# which torch's dispatcher does not see
_HOST_READS = ("data_ptr", "numpy", "tolist", "__array__", "__dlpack__")


class Layout(NamedTuple):
    """How a tensor lies in its storage."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def layout_of(x: Tensor) -> Layout:
    return Layout(tuple(x.shape), x.stride(), int(x.storage_offset()))


def dimension_in(made: Layout, seen: Layout, dim: int) -> int | None:
    """The dimension of a tensor `made` that is dimension `dim` of a view `seen` of its storage,
    from its first entry to its last.

    None where there is none, where the view's other dimensions run through features too, or where
    the view reads an entry twice: then noise at what is made would not be noise of the same law at
    what is read.
    """
    k, stride = seen.sizes[dim], seen.strides[dim]
    if k == 1 and made == seen:  # no stride tells a single feature's dimension
        return dim % len(seen.sizes)
    found = [i for i, size in enumerate(made.sizes) if size == k > 1 and made.strides[i] == stride]
    if len(found) != 1:
        return None
    for layout, own in ((made, found[0]), (seen, dim % len(seen.sizes))):
        rows = [
            (s, n)
            for i, (n, s) in enumerate(zip(layout.sizes, layout.strides))
            if i != own and n > 1
        ]
        below = sum((n - 1) * s for s, n in rows if s < stride)
        start = layout.offset - made.offset
        if (
            start % stride + below >= stride
            or start // stride % k
            or any(s % (stride * k) for s, _ in rows if s >= stride)
        ):
            return None
        reach = 0
        for s, n in sorted([*rows, (stride, k)]):
            if s <= reach:
                return None
            reach += (n - 1) * s
    return found[0]


class World(NamedTuple):
    """What a module is called in."""

    training: bool
    grad: bool
    autocast: torch.dtype | None
    without: int  # how deep inside autocasts that are off, whatever there is around the model later

    @staticmethod
    def of(module: nn.Module, x: Tensor) -> World:
        dtype = worlds.autocast_dtype(x)
        torch.autocast_increment_nesting()  # nothing else says how deep it is
        depth = torch.autocast_decrement_nesting()
        return World(module.training, torch.is_grad_enabled(), dtype, 0 if dtype else depth)


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module that may make a layer's input."""

    caller: nn.Module | None
    dtypes: tuple[torch.dtype | None, torch.dtype]  # of its input and its output
    device: torch.device  # of its output
    ndim: int
    world: World
    # each layer that read the output, in whatever shape, and its feature dimension from the last
    reads: list[tuple[nn.Module, int]] = dataclasses.field(default_factory=list)
    elsewhere: str | None = None  # what else reads it, as the end of a sentence

    def read_by(self, what: str) -> None:
        self.elsewhere = self.elsewhere or what


@dataclasses.dataclass(eq=False)
class Made:
    """A storage that an operation of the pass filled."""

    ref: StorageWeakRef
    op: str  # the function that was called
    module: nn.Module | None  # which called it, or the candidate of the call
    number: int  # of this storage in the pass
    alike: bool = True  # whether what it was made of has its shape and dtype
    call: Call | None = None  # of a candidate, whose output it holds or a copy of that
    layout: Layout | None = None  # of that output or copy in this storage
    source: tuple[Made, Layout] | None = None  # of a copy: what was copied, and how that lay

    def dimension(self, seen: Layout, dim: int) -> int | None:
        """The output's dimension that is dimension `dim` of a view of this storage; see
        `dimension_in`."""
        found = None if self.layout is None else dimension_in(self.layout, seen, dim)
        if found is None or self.source is None:
            return found
        before, layout = self.source
        return before.dimension(layout, found)


class _Functions(TorchFunctionMode):
    """The name of the function that an operation is part of; reads past torch's dispatcher."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _HOST_READS:
            self._watch.read(args[:1], name)
        before, self._watch.function = self._watch.function, self._watch.function or name
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._watch.function = before


class Watch(TorchDispatchMode):
    """Follows what candidates make through views and copies to the layers that read it, and notes
    any other reader.

    names: every module's name. layers: {layer: its feature dimension}. candidates: modules that may
    make an input. After a pass `sources` has for each layer what each of its calls read, None for
    what no operation of the pass made, and `calls` for each candidate its calls.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        layers: Mapping[nn.Module, int],
        candidates: Iterable[nn.Module],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: defaultdict[nn.Module, list[Call]] = defaultdict(list)
        self.sources: dict[nn.Module, list[Made | None]] = {layer: [] for layer in layers}
        self.transformed: set[nn.Module] = set()  # layers that torch.func has called
        self.function: str = ""
        self._names, self._layers, self._candidates = names, layers, set(candidates)
        self._made: dict[int, Made] = {}
        # the calls by the storage of their input, which the twins keep for backward
        self._inputs: defaultdict[int | None, list[Call]] = defaultdict(list)
        # the modules that are running, and how much was made before each
        self._stack: list[tuple[nn.Module, int]] = []
        self._count = 0
        self._reading = 0  # layers around the current operation

    # ---- passes

    @torch.no_grad()
    def run(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Each batch in training mode, with gradients on, and in eval mode without, both without
        noise; the model's state, modes and random states stay."""

        def both(batch: Any) -> None:
            for training in (True, False):
                with torch.set_grad_enabled(training):
                    self._pass(model.train(training), batch)

        # a wrapper has no name: what it does is done by the module around it
        modules = [m for m in self._names if not isinstance(m, torch.jit.ScriptModule)]
        with contextlib.ExitStack() as watched, untouched(model), frozen(model):
            for m in modules:
                # of a candidate with hooks, which change what it makes, the whole call
                name = "_call_impl" if m in self._candidates and m._forward_hooks else "forward"
                watched.enter_context(around(m, self._enter, self._leave, name))
            seed_alike()
            for_each(batches, both)

    def _pass(self, model: nn.Module, batch: Any) -> None:
        self._stack, self._reading = [], 0
        with _Functions(self), self:
            made = leaves(run_batch(model, batch))
            self._note(made, "the model returns it")
        # a returned object may keep a tensor; a returned tensor's graph keeps what nobody reads
        made = [each for each in made if not isinstance(each, Tensor)]
        if self._kept():
            gc.collect()
        for call in self._kept():
            call.read_by("the model, a hook or its output keeps it")
        self._made.clear()
        self._inputs.clear()

    def _kept(self) -> list[Call]:
        """The calls whose outputs are still there."""
        made = self._made.values()
        return [m.call for m in made if m.call is not None and not m.ref.expired()]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in self._layers and not self._reading:
            self._read_by_layer(module, args, kwargs)
        self._stack.append((module, self._count))
        self._reading += module in self._layers

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Tensor | None:
        _, before = self._stack.pop()
        self._reading -= module in self._layers
        if module not in self._candidates or self._reading:
            return None
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        made = self._found(out)
        # What was there before is passed through or looked at in another shape, as a dropout does
        # in eval mode.
        if made is None or made.number <= before or made.call is not None:
            return None
        x = input_of(module, args, kwargs)
        dtype = x.dtype if isinstance(x, Tensor) else None
        world = World.of(module, out)
        made.call = Call(self._module(), (dtype, out.dtype), out.device, out.ndim, world)
        # What it is a copy of, as of a norm that computes in float32, is the module's own affair.
        made.layout, made.module, made.source = layout_of(out), module, None
        self.calls[module].append(made.call)
        self._inputs[storage_of(x)].append(made.call)
        return self._apart(out, made) if storage_of(x) == storage_of(out) else None

    def _apart(self, out: Tensor, made: Made) -> Tensor:
        """What a module that works in place returns, as a copy: its twin writes nothing into its
        input, so what reads that, and not what is returned, stands in the way."""
        copied = out.clone()
        returned = self._found(copied)
        assert returned is not None
        returned.layout, returned.source, made.layout = layout_of(copied), None, None
        return copied

    def _read_by_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = input_of(layer, args, kwargs)
        if isinstance(layer, nn.MultiheadAttention):
            given = dict(zip(("query", "key", "value"), args)) | kwargs
            x, others = given["query"], (given["key"], given["value"])
            if any(other is not x for other in others):
                self._note((x, *others), f"{self._shown(layer)} reads it beside other tensors")
                self.sources[layer].append(None)
                return
        made = self._found(x) if isinstance(x, Tensor) else None
        self.sources[layer].append(made)
        if worlds.transforming():
            self.transformed.add(layer)
        if made is None or made.call is None:
            return
        call, seen = made.call, layout_of(x)
        dim = made.dimension(seen, self._layers[layer])
        if made.layout is None:
            call.read_by(f"{self._shown(layer)} reads what it wrote into its input, in place")
        elif dim is None:
            call.read_by(
                f"{self._shown(layer)} reads it with other features, or some entries twice"
            )
        else:
            call.reads.append((layer, dim - call.ndim))
            there, here = call.world, World.of(layer, x)
            if there.training != here.training:
                call.read_by(f"one of it and {self._shown(layer)} stays in eval mode")
            elif (
                here.grad > there.grad
                or there.autocast not in (None, here.autocast)
                or here.without > there.without
            ):
                call.read_by(f"{self._shown(layer)} reads it outside of its no_grad or autocast")

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        name = getattr(func, "__name__", "") if schema is None else schema.name.partition("::")[2]
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        storages = {storage_of(t) for t in given}
        changes = schema is not None and schema.is_mutable
        view = outputs and not changes and all(storage_of(t) in storages for t in outputs)
        # Behind a detach a variance would learn nothing; what expands nothing here would repeat
        # entries of a larger batch.
        same = name == "detach" or (name == "expand" and outputs[0].shape == given[0].shape)
        if view and not same:
            return out
        read = [(t, made) for t in given if (made := self._found(t)) is not None]
        source = None
        copies = name in COPIES and len(read) == len(outputs) == 1
        if copies and outputs[0].is_floating_point():
            source = read[0][1], layout_of(read[0][0])
        elif not name.endswith("_like") and not name.startswith("new_"):  # which read a shape
            self.read([t for t, _ in read], self.function or name.strip("_"))
        for t in outputs:
            for call in self._inputs.get(storage_of(t), ()) if changes else ():
                call.read_by(f"{self._shown_call(name)} changes its input, in place")
            self._fill(t, name, source, changes, all(_kind(g) == _kind(t) for g in given))
        return out

    def _fill(
        self,
        t: Tensor,
        name: str,
        source: tuple[Made, Layout] | None,
        changes: bool,
        alike: bool,
    ) -> None:
        key = storage_of(t)
        known = self._found(t)
        if key is None or (known is not None and not changes):
            return
        self._count += 1
        ref = StorageWeakRef(t.untyped_storage())
        made = Made(ref, self.function or name.strip("_"), self._module(), self._count, alike)
        if source is not None:
            made.op, made.module, made.call = source[0].op, source[0].module, source[0].call
            made.layout, made.source = layout_of(t), source
        self._made[key] = made

    def read(self, tensors: Iterable[Any], function: str) -> None:
        """Note that a function that is no layer's reads these."""
        if not self._reading:
            self._note(tensors, f"{self._shown_call(function)} reads it")

    def _note(self, tensors: Iterable[Any], what: str) -> None:
        for t in tensors:
            made = self._found(t)
            if made is not None and made.call is not None:
                made.call.read_by(what)

    def _found(self, t: object) -> Made | None:
        key = storage_of(t)
        return None if key is None else self._made.get(key)

    def _module(self) -> nn.Module | None:
        return self._stack[-1][0] if self._stack else None

    def _shown_call(self, function: str) -> str:
        module = self._module()
        return function if module is None else f"{function} in {self._shown(module)}"

    def _shown(self, module: nn.Module) -> str:
        return shown(self._names.get(module, ""), module)


def _kind(t: Tensor) -> tuple[Any, ...] | None:
    return None if t.is_nested else (t.shape, t.dtype)  # a nested one has no one shape
