"""A batch through a model that leaves no trace: what a forward pass hands to its modules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..arguments import described
from ..nn.layer import DIPLayer
from ..nn.twin import first_parameter
from ..noise import contexts

# ---- running -------------------------------------------------------------------------------------


def run_batch(model: nn.Module, batch: object) -> Any:
    """model(batch): a mapping as keywords, of a list or tuple the first element, a tensor as it
    is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError(
                "batch: expected a list or tuple whose first element is the input, got an empty one"
            )
        return model(batch[0])
    return model(batch)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside; every module's own mode restored."""
    with kept_modes(model):
        model.eval()
        yield


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Every module's mode restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:  # parents first
            if module.training != training and type(module).train is not nn.Module.train:
                module.train(training)  # which undoes what eval did: adapters unmerge
            module.training = training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: a pass keeps no graph for them."""
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            with torch.inference_mode(p.is_inference()):  # one made there allows it there alone
                p.requires_grad_(True)


def eager() -> contextlib.AbstractContextManager[object]:
    """Inside, what is compiled, a function too, runs uncompiled: compiled code does not see what is
    put around modules, and compiles under no dispatch mode."""
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def _kept_attributes(model: nn.Module) -> Iterator[None]:
    """What attributes of modules are bound to outside of buffers, restored: a codebook that says
    that it has seen its first batch would never start, were its buffer alone restored, and the
    length that a table was made for goes with the table. Not of a module inside which layers were
    made, or lazy ones got their shapes: it would make them again, or know other shapes."""

    def parts(module: nn.Module) -> list[object]:
        own: list[Any] = [*module._modules.values(), *module._parameters.values()]
        return [*own, *map(nn.parameter.is_lazy, own)]

    before = [(module, parts(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        made = {m for m, had, _ in before if list(map(id, parts(m))) != list(map(id, had))}
        for module, _, attributes in before:
            if not made or made.isdisjoint(module.modules()):
                vars(module).update(attributes)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and other attributes of modules, and the states of the random generators are
    afterwards what they were: inside, the model has copies of its buffers."""
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in buffers}
    devices = {
        t.device
        for t in (*model.parameters(), *model.buffers())
        if t.device.type not in ("cpu", "meta")
    }
    kind = next(iter(devices)).type if devices else "cuda"
    # where nobody has imported it, there is no state that a seed has set
    numpy_random = sys.modules.get("numpy.random")
    states = random.getstate(), numpy_random and numpy_random.get_state()
    with (
        _kept_attributes(model),
        kept_modes(model),
        torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind),
    ):
        try:
            for module, name, buffer in buffers:
                module._buffers[name] = copies[id(buffer)]
            yield
        finally:
            random.setstate(states[0])
            if numpy_random:
                numpy_random.set_state(states[1])
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


def seed_alike() -> None:
    """Seed the host's random generators, inside `untouched`: a model then skips the same blocks
    (LayerDrop) in every process and at every conversion."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed(0)


def each_batch(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches; of a single one, a tensor or a mapping, a list of one."""
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"batches: expected a batch or an iterable of batches, got {described(batches)}"
        )
    if isinstance(batches, (list, tuple)) and all(isinstance(each, Tensor) for each in batches):
        kinds = {(each.dtype, each.ndim > 1): described(each) for each in batches}
        if len(kinds) > 1:  # not batches of one model
            raise ValueError(
                "batches: expected tensors of one kind, each a batch, got "
                f"{' and '.join(kinds.values())}; of a pair (x, y) make one batch, [(x, y)]"
            )
    return [batches] if isinstance(batches, (Tensor, Mapping)) else batches


def listed(batches: Iterable[Any]) -> list[Any]:
    """`each_batch` as a list."""
    return list(each_batch(batches))


def for_each(batches: Iterable[Any], run: Callable[[Any], object]) -> None:
    """Call run(batch) for each, without noise and uncompiled; a tensor or a mapping is one batch.
    Raises ValueError where there is none."""
    count = 0
    # sampling_on switches off the fast path that calls no layer; noise_off, inside it, the noise.
    with contexts.sampling_on(), contexts.noise_off(), eager():
        for batch in each_batch(batches):
            run(batch)
            count += 1
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")


@contextlib.contextmanager
def around(
    module: nn.Module,
    before: Callable[..., object] | None = None,
    after: Callable[..., Any] | None = None,
    name: str = "forward",
) -> Iterator[None]:
    """Inside, before(module, args, kwargs) and after(module, args, kwargs, output) run around each
    call of the module's forward; what `after` returns, unless None, takes the output's place.

    Hooks would not see a call of forward itself, and the module's own hooks are not outside of
    them.
    """
    own, call, of_class = vars(module).get(name), getattr(module, name), getattr(type(module), name)

    @functools.wraps(of_class)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:  # a copy that the model has made of it inside, as a teacher
            if own is None:
                vars(self).pop(name, None)
            return getattr(type(self), name)(self, *args, **kwargs)
        if before is not None:
            before(module, args, kwargs)
        out = changed = None
        try:
            out = call(*args, **kwargs)
        finally:
            if after is not None:
                changed = after(module, args, kwargs, out)
        return out if changed is None else changed

    vars(module)[name] = types.MethodType(watched, module)  # which a deep copy binds to itself
    try:
        yield
    finally:
        vars(module).pop(name, None)
        if own is not None:
            vars(module)[name] = own


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call hands to forward's first parameter."""
    if args:
        return args[0]
    return kwargs.get(
        getattr(module, "input_name", None) or first_parameter(type(module)) or "input"
    )


def leaves(out: Any, opened: Callable[[Any], bool] = dataclasses.is_dataclass) -> list[Any]:
    """What a batch or a model's output is made of, also inside the objects that `opened` says. What
    is in it again, as a part that holds itself, is looked into once."""
    seen: dict[int, Any] = {}  # which keeps each, so that its id stays its own
    done: set[int] = set()

    def again(part: Any) -> bool:
        known = id(part) in seen
        seen[id(part)] = part
        return known

    found = pytree.tree_leaves(out, is_leaf=again)
    for leaf in found:  # which grows meanwhile
        if id(leaf) in done or isinstance(leaf, type) or not opened(leaf):
            continue
        done.add(id(leaf))
        fields = dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()
        parts = {f.name: getattr(leaf, f.name, None) for f in fields}  # of one with slots too
        found += pytree.tree_leaves(parts | getattr(leaf, "__dict__", {}), is_leaf=again)
    return found


def storage_of(t: object) -> int | None:
    """By which tensors that share memory are known, also without values."""
    if not isinstance(t, Tensor) or t.is_nested:  # which lies in no one layout
        return None
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse
        return None


def shown(name: str, module: nn.Module) -> str:
    """A module in an error or a plan."""
    return f"{name or 'the model itself'} ({type(module).__name__})"


# ---- features of modules by a probe --------------------------------------------------------------


@torch.no_grad()
def watch(
    model: nn.Module,
    modules: Iterable[nn.Module],
    observe: Callable[..., None],
    batches: Iterable[Any],
) -> None:
    """Run the batches in eval mode without noise, with observe(module, args, kwargs) before each
    call of the modules; of a DIP layer args is what it would noise, which may be its output, or
    what a subclass makes of its input."""
    with contextlib.ExitStack() as watched, eval_mode(model):
        for module in modules:
            name = "without_noise" if isinstance(module, DIPLayer) else "forward"
            watched.enter_context(around(module, observe, name=name))
        for_each(batches, lambda batch: run_batch(model, batch))


def probed(
    model: nn.Module,
    modules: dict[nn.Module, tuple[str, int]],
    batches: Iterable[Any] | None,
    layers: Iterable[nn.Module],
) -> tuple[dict[nn.Module, int], dict[nn.Module, torch.device], list[nn.Module]]:
    """The number of features of each module's input and where it lies, from one pass in eval mode
    without noise; and of the modules and layers those that read such an input or a part of it, or a
    copy or cast, inside another module.

    modules: {module: (name, dimension)}. Raises ValueError for no batches, a module that they do
    not reach, an input that is no floating tensor, has no such dimension, or has other features in
    another call.
    """
    if not modules:
        return {}, {}, []
    if batches is None:
        raise ValueError(
            "batches: expected a batch, from which before=[...] learns the number of features, got "
            "None"
        )
    found: dict[nn.Module, int] = {}
    given: dict[nn.Module, list[Tensor]] = {}  # each module's input, and copies of it
    again: dict[nn.Module, None] = {}
    parts = {module: set(module.modules()) for module in modules}
    inside = [m for m in layers if m not in modules and any(m in part for part in parts.values())]

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(module, args, kwargs)
        whole = (m for m in given if m is not module and module in parts[m])
        if any(_part_of(x, t) for m in whole for t in given[m]):
            again[module] = None
        if module in modules:
            name, dim = modules[module]
            found[module] = _features(name, dim, x, found.get(module))
            given[module] = [x]

    copies = _Copies(given) if inside else contextlib.nullcontext()
    with untouched(model), copies:
        watch(model, [*modules, *inside], observe, batches)
    unreached = [name for module, (name, _) in modules.items() if module not in found]
    if unreached:
        raise ValueError(
            f"before: expected modules that the batches reach, none reached {unreached}"
        )
    return found, {m: x.device for m, (x, *_) in given.items()}, list(again)


COPIES = ("clone", "_to_copy")  # the same values under the same dimensions


class _Copies(TorchDispatchMode):
    """Adds to each list of tensors the copies and casts of one, or of a part of it."""

    supports_higher_order_operators = True

    def __init__(self, given: dict[nn.Module, list[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").partition(".")[0] in COPIES:
            for tensors in self._given.values():
                if any(_part_of(args[0], t) for t in tensors):
                    tensors.append(out)
        return out


def _part_of(x: object, y: Tensor) -> bool:
    """Whether x is y, or a view of some of it: its first value is one of y's."""
    if not isinstance(x, Tensor) or storage_of(x) is None or storage_of(x) != storage_of(y):
        return False
    place = x.storage_offset() - y.storage_offset()
    for stride, size in sorted(zip(y.stride(), y.shape, strict=True), reverse=True):
        if stride > 0:
            place -= stride * max(0, min(place // stride, size - 1))
    return place == 0


def _features(name: str, dim: int, x: object, before: int | None) -> int:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(
            f"before: expected a floating tensor as the first argument of {name!r}, got "
            f"{described(x)}; put the noise before the module that reads its output"
        )
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"before: expected a dimension of the input of {name!r}, {tuple(x.shape)}, got {dim}"
        )
    features = x.shape[dim]
    if before not in (None, features):
        raise ValueError(
            f"before: expected one number of features in every call of {name!r}, got {before} and "
            f"{features}; choose another dimension by before={{pattern: dimension}}"
        )
    return features
