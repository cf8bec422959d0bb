"""Noise that would be drawn twice, or alike on several ranks: noticed where a seed is drawn."""

from __future__ import annotations

import hashlib
import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import checkpoint

from .. import worlds
from . import contexts

# ---- noise that would be drawn twice: checkpointing, and torch.compile's partitioner -------------
# Of blocks that a backward pass may compute again, the newest _MAX_DRAWS, in their order.
_first_draws: OrderedDict[tuple[Any, ...], None] = OrderedDict()
_MAX_DRAWS = 2**16
_in_backward = torch._C._current_graph_task_id  # -1 outside a backward pass
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_forward_mode = torch._C._is_fwd_grad_enabled


def watch_checkpoint(seed: Tensor) -> None:
    """Raise RuntimeError where a checkpointed block, computed again, draws other noise than at
    first."""
    task = _in_backward()
    first = task == -1
    # Inside no autograd.Function's forward, in which a function that takes a derivative turns
    # gradients on by itself, but forward mode is off.
    outside = first and _forward_mode() and not worlds.transforming()
    if first and torch.is_grad_enabled():
        _note_key()
        if outside and _saved_tensor_hooks(False) is None:  # no checkpointed block's first forward
            return
    same = True
    for block, again in _blocks(outside):
        tags, done = vars(block).setdefault("_dipkernels_draws", ([], {}))
        if again:
            place = done.get(task, 0)
            done[task] = place + 1
            same = tags[place : place + 1] == [contexts.TAG]
            break  # a block around it records none now
        tags.append(contexts.TAG)
    mark = _mark_of(seed)
    if first:
        if mark is not None:
            _first_draws[mark] = None
            _first_draws.move_to_end(mark)
            if len(_first_draws) > _MAX_DRAWS:
                _first_draws.popitem(last=False)
        return
    if same and (mark is None or mark in _first_draws):
        return
    what = "draws a seed"
    if contexts.KEY is not None:
        what = f"takes its noise from fixed_noise(key, row0) = {contexts.TAG}"
    raise RuntimeError(
        "checkpoint: a layer in the backward pass (of a block that is computed again, an adjoint, "
        f"a hook) {what}, which is not what the forward pass had, so gradients would be wrong. "
        "Keep preserve_rng_state=True, or run forward and backward inside one fixed_noise(key) or "
        "noise_off, or enter it inside the block, where blocks have several keys; put layers that "
        "share one draw into one checkpoint"
    )


# torch's object for a call of checkpoint keeps under what its block drew at first, draw by draw,
# and how many of these each backward pass has made again. Keys of _first_draws do not tell: two
# blocks, such as the towers of a contrastive loss, may have one each.
_FRAME: Any = getattr(checkpoint, "_CheckpointFrame", ())
_REENTRANT = {
    getattr(checkpoint.CheckpointFunction, name).__code__: name == "backward"
    for name in ("forward", "backward")
}
_BACKWARD = torch.autograd.backward.__code__


def _blocks(outside: bool) -> Iterator[tuple[Any, bool]]:
    """torch's object of the checkpoints whose blocks run now, and whether one runs again; the
    inmost first. outside: whether no autograd.Function is running, which a reentrant one is."""
    hooks = _saved_tensor_hooks(False)
    pack = None if hooks is None else inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", "") == checkpoint.__name__:
        for cell in getattr(pack, "__closure__", None) or ():
            again = isinstance(cell.cell_contents, ReferenceType)
            block = cell.cell_contents() if again else cell.cell_contents
            if isinstance(block, _FRAME):
                yield block, again
    # not in inference mode, which no derivative passes: up a deep stack the walk takes long
    frame = None if outside or torch.is_inference_mode_enabled() else sys._getframe()
    while frame is not None and (frame := frame.f_back) is not None:
        code = frame.f_code
        if code is _BACKWARD:
            return  # of a block that has run again, where an adjoint may draw once more
        if code in _REENTRANT:
            yield frame.f_locals["ctx"], _REENTRANT[code]
        elif code.co_name == "unpack_hook" and code.co_filename == checkpoint.__file__:
            return  # another block runs again, because those further out want their inputs


def _mark_of(seed: Tensor) -> tuple[Any, ...] | None:
    """What tells one draw from another without stopping a GPU; None where nothing does."""
    if contexts.KEY is not None:
        return contexts.TAG
    if worlds.transforming():
        seed = worlds.unwrapped(seed)
    if type(seed) is not Tensor or worlds.recording():
        return None
    if seed.device.type == "cpu":
        with torch._C._DisableFuncTorch():
            return tuple(seed.flatten()[:2].tolist())  # the first of those that vmap maps over
    if seed.device.type != "cuda" or worlds.capturing("cuda"):
        return None
    generator = torch.cuda.default_generators[seed.device.index]
    return generator.initial_seed(), generator.get_offset()


@worlds.in_no_graph
def when_traced(device: str, shared: bool) -> None:
    """Runs where torch.compile traces `draw`."""
    if ranks_to_compare and torch.distributed.is_initialized():
        compare_ranks(device, shared)
    _check_memory_budget()


def _check_memory_budget() -> None:
    from torch._functorch import config

    if config.activation_memory_budget < 1:
        warnings.warn(
            "dipkernels: torch.compile with activation_memory_budget < 1 may draw the noise of a "
            "layer again in backward (as it does torch.randn), which makes gradients wrong; run "
            "forward and backward inside fixed_noise(key)",
            stacklevel=2,
        )


# ---- steps of training that have one noise -------------------------------------------------------
# Of the passes with gradients: under what the last one drew, the key of that, how often this has
# changed, and how many draws there were.
_tag: Any = None
_key: Any = None
_keys = _draws = 0
# of an optimiser, at its last step: how many steps had one key, _keys and _draws
_steps: WeakKeyDictionary[Any, tuple[int, int, int]] = WeakKeyDictionary()


def _note_key() -> None:
    global _tag, _key, _keys, _draws
    _draws += 1
    if contexts.TAG is _tag:
        return
    _tag, key = contexts.TAG, contexts.key_of(contexts.TAG)
    if key != _key:
        _key, _keys = key, _keys + 1


_compiled = False  # whether torch.compile has traced a layer under a key


@worlds.in_no_graph
def note_compiled() -> None:
    """Runs where torch.compile traces a draw under fixed_noise."""
    global _compiled
    _compiled = True


def steps_of_one_key(optimizer: object) -> int:
    """Before a step of an optimiser: how many of its steps, this one too, had the noise of one key,
    and none of another between; 0 where nothing tells."""
    count, keys, draws = _steps.get(optimizer, (0, -1, -1))
    here = contexts.TAG is not None and contexts.TAG is contexts.LATEST
    if _compiled and draws in (-1, _draws) and here and contexts.MODE != "off":
        _note_key()  # compiled passes, unseen, had that of the context around the step
    if _key in (None, "a tensor") or draws == _draws:  # a tensor would have to be read
        return 0
    count = count + 1 if keys == _keys else 1
    _steps[optimizer] = count, _keys, _draws
    return count


# ---- data parallel: ranks that would draw one noise for different examples -----------------------
# until this process drew for the first time as one of several
ranks_to_compare = torch.distributed.is_available()


def compare_ranks(device: str, shared: bool) -> None:
    """Leave a digest of the generator's state in the process group's store, and warn where another
    rank left the same.

    shared: whether the ranks share the tensor (DTensor) and have to draw alike. No collective: a
    rank that never gets here keeps none waiting.
    """
    global ranks_to_compare
    distributed = torch.distributed
    if shared or distributed.get_world_size() == 1:
        return
    ranks_to_compare = False
    place = f"dipkernels/{device}/{generator_digest(device)}"
    store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank()
    if store.add(place, 1) == 1:
        store.set(f"{place}/rank", str(rank))
    else:
        other = store.get(f"{place}/rank").decode() if store.check([f"{place}/rank"]) else "another"
        warnings.warn(
            f"dipkernels: rank {rank} draws the same noise as rank {other}. Ranks that hold "
            "different examples should differ: torch.manual_seed(seed + rank), or "
            "fixed_noise(key, row0=index of the rank's first example)",
            stacklevel=2,
        )


def generator_digest(device: str | torch.device) -> str:
    """Of the state of the device's default generator, which decides its next draw."""
    on_gpu = torch.device(device).type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    return hashlib.sha256(bytes(state.tolist())).hexdigest()


# ---- graphs that keep no noise -------------------------------------------------------------------

_PLAIN = "dipkernels.to_plain(copy.deepcopy(model))"


@worlds.in_no_graph
def refuse_in_trace() -> None:
    """Raise where noise is drawn while torch.jit.trace or torch.onnx.export records."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "dipkernels: ONNX has no operation for the noise of a DIP layer. Export in eval mode, "
            f"model.eval(), without predict and sampling_on, or the plain model, {_PLAIN}"
        )
    if worlds.jit_tracing():
        raise RuntimeError(
            "dipkernels: torch.jit.trace cannot keep noise that is drawn at each call. Trace in "
            "eval mode, model.eval(), without predict and sampling_on, or the plain model, "
            f"{_PLAIN}; torch.export keeps the noise"
        )
