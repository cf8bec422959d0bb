"""What `convert` cannot convert, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layer import DIPLayer
from .convertible import (
    OUT_PROJECTION,
    REPLACED,
    SCRIPTED,
    Names,
    Types,
    base_layer,
    counts_as,
    feature_dim_of,
    forward_set_by,
    has_plain_type,
    is_adapter,
    is_candidate,
    is_quantised,
    names_taken,
    twin_of,
)
from .loose_weights import ELSEWHERE, has_lazy_weights, is_quiet, own_matrices
from .naming import patterns_for
from .patterns import is_inside
from .weight_readers import read_past

_READS_ANOTHERS = (
    "it reads the weight of a layer that others call: give its name in before=[...] to noise its "
    "input; in exclude=[...] it would leave that layer plain too"
)


def block_names(names: Names, types: Types) -> set[str]:
    """The names of the modules inside which no layer may be converted by itself."""
    return {name for module in names if _blocks(module, types) for name in names[module]}


def cannot(names: Names, types: Types, blocks: set[str]) -> dict[nn.Module, str]:
    """The modules that would look converted and draw no noise, or the wrong noise, each with the
    reason."""
    reasons = {module: reason for module in names if (reason := _reason(module, types))}
    by_name = {name: module for module, every_name in names.items() for name in every_name}
    readers: dict[type[Any], dict[nn.Module, nn.Module]] = {}  # {class: {layer: what reads it}}
    for module, every_name in names.items():
        if module in reasons or type(module) is OUT_PROJECTION or not is_candidate(module, types):
            continue
        read_by: list[nn.Module] = []
        for name in every_name:
            parent, _, own = name.rpartition(".")
            kind: Any = type(by_name[parent])
            if name and own in read_past(kind):
                read_by.append(by_name[parent])
        if len(read_by) < len(every_name):  # a decoder that is tied to its encoder's layer
            reason = _READS_ANOTHERS + ELSEWHERE * (feature_dim_of(module) != -1)
            reasons |= {m: reason for m in read_by if m not in reasons}
            continue
        for reader in read_by:
            readers.setdefault(type(reader), {})[module] = reader
    for kind, read in readers.items():
        way_out = f"before={patterns_for(list(dict.fromkeys(read.values())), names)}"
        reasons |= dict.fromkeys(
            read,
            f"{kind.__name__} reads its weight without calling it: {way_out} puts noise at the "
            "input of the whole" + ELSEWHERE * any(feature_dim_of(m) != -1 for m in read),
        )
    return {m: reason for m, reason in reasons.items() if not is_inside(names[m], blocks)}


def _blocks(module: nn.Module, types: Types) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or _looks_like_lora(module, types):
        return True
    if is_adapter(module):
        return counts_as(module) is not None or _adapter_reason(module) is not None
    return (
        isinstance(module, nn.MultiheadAttention)
        and nn.MultiheadAttention in types
        and bool(_reason(module, types))
    )


def _looks_like_lora(module: nn.Module, types: Types) -> bool:
    """Whether it is a layer and its adapter in one, by others than PEFT: litgpt, torchtune,
    cloneofsimo's lora. A block of several layers is none, nor is an adapter by itself."""
    if is_adapter(module) or not any(hasattr(module, n) for n in ("lora_A", "lora_a", "lora_down")):
        return False
    parts = {n: m for n, m in module.named_modules() if not isinstance(m, nn.Embedding)}
    layers = {n for n, m in parts.items() if is_candidate(m, types) or (n and own_matrices(m))}
    adapted = [n for n in layers if not n.startswith("lora") and not is_inside([n], layers)]
    weights = [n for n in own_matrices(module) if not n.startswith("lora")]
    return bool(layers) and (len(adapted) == 1 if adapted else bool(weights))


def _adapter_reason(module: nn.Module) -> str | None:
    base = base_layer(module)
    if isinstance(base, DIPLayer) and base.share is not None:
        return "an adapter over a layer whose noise is shared: convert after PEFT, with share"
    if isinstance(base, DIPLayer) and not has_plain_type(base):
        return (
            "an adapter over a subclass of a DIP layer, whose plain class nobody knows: if it is "
            "parametrised, call torch.nn.utils.parametrize.remove_parametrizations first; in a "
            "class of your own set plain_type = the class that computes the same without noise"
        )
    if (
        counts_as(module) is not None
        or not own_matrices(base)
        or "Embedding" in type(base).__name__
    ):
        return None  # a norm or a whole block, whose layers are converted by themselves
    if isinstance(base, nn.MultiheadAttention):
        return (
            "an adapter over nn.MultiheadAttention, whose three inputs it reads: put a DIPInput "
            "before each"
        )
    return (
        f"an adapter over {type(base).__name__}, whose input convert does not know: give its name "
        "in before=[...]"
    )


def _reason(module: nn.Module, types: Types) -> str | None:
    kind = type(module)
    if isinstance(module, DIPLayer):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if is_adapter(module):
        reason = _adapter_reason(module)
        if reason is not None or counts_as(module) not in types:
            return reason
    if _looks_like_lora(module, types):
        return (
            "a LoRA layer that is not PEFT's: give its name in before=[...], or put a DIPInput "
            "before it"
        )
    of_a_kind = any(t.__name__ in kind.__name__ for t in types) and "Packed" not in kind.__name__
    parametrised = nn.utils.parametrize.is_parametrized(module)
    if of_a_kind and counts_as(module) is None and is_quantised(kind) and not parametrised:
        return (
            "quantised: give its name in before=[...] to noise its input; to quantise a converted "
            "model, call to_plain first"
        )
    lazy_layer = is_candidate(module, types) and isinstance(module, nn.modules.lazy.LazyModuleMixin)
    if lazy_layer or (has_lazy_weights(module) and not is_quiet(module)):
        return "lazy: run one batch through the model, then convert"
    if not is_candidate(module, types) and not (kind is OUT_PROJECTION and nn.Linear in types):
        return None
    if kind is OUT_PROJECTION and nn.MultiheadAttention not in types:
        return (
            "nn.MultiheadAttention uses its weight without calling it: add nn.MultiheadAttention "
            "to types"
        )
    attention = isinstance(module, (nn.MultiheadAttention, OUT_PROJECTION))  # never in `before`
    if parametrised:
        way_out = "" if attention else ", or give its name in before=[...]"
        return f"parametrised: its weight is computed, so parametrise after converting{way_out}"
    if counts_as(module) is None:
        base = next(t.__name__ for t in types if isinstance(module, t))
        way_out = "put a DIPInput before each" if attention else "before=[...] puts noise at its"
        return f"a subclass of nn.{base}, whose forward may be its own: {way_out} input"
    if replaced := REPLACED.get(forward_set_by(module)):
        return replaced
    twin = twin_of(module)
    if twin is not kind and (taken := names_taken(module, twin)):
        return f"it has {taken} of its own, names that a DIP layer uses: rename them"
    weight = None if is_adapter(module) else getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout})"
    data = type(getattr(weight, "data", None))
    if is_quantised(data):
        return f"quantised: its weight is a {data.__name__}; convert the model before quantising it"
    return None
