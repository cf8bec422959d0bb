"""What `convert` knows of classes: which it converts, what they stand for, and which it cannot
convert and why."""

from __future__ import annotations

import dis
import functools
import inspect
import re
import types as python_types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..nn.attention import DIPMultiheadAttention, DIPOutProjection
from ..nn.conv import DIPConv1d, DIPConv2d, DIPConv3d
from ..nn.layer import DIPLayer
from ..nn.linear import DIPLinear
from ..nn.twin import Wrapper, first_parameter, made_type, twin_type
from .patterns import Patterns, around

Types = tuple[type[nn.Module], ...]  # some of TWINS
Names = Mapping[nn.Module, list[str]]  # every module of a model, in its order, with all its names
TWINS: dict[type[nn.Module], type[Any]] = {  # DIPLayers, and DIPMultiheadAttention
    twin.plain_type: twin
    for twin in (DIPLinear, DIPConv1d, DIPConv2d, DIPConv3d, DIPMultiheadAttention)
}
OUT_PROJECTION = DIPOutProjection.plain_type
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# parts of the names, with their Python modules, of the classes of quantised layers and weights
_QUANTISED = re.compile(
    r"quantiz|quanto|quantlinear|\.qat|bitsandbytes|torchao|awq|gptq|hqq|eetq|finegrained_fp8",
    re.IGNORECASE,
)
# what a converted module has beside what its class defines
_SET = {"variance", "num_samples", "keep", "plain_type", "made_of"}
_SCRIPTED = "scripted: convert the model before scripting it"
_TORCHS = {kind.__name__ for kind in TWINS}


# ---- what a module is ----------------------------------------------------------------------------


def counts_as(module: nn.Module) -> type[nn.Module] | None:
    """The one of `types` under which this module is converted, or None."""
    kind = type(module)
    if kind in TWINS:
        return kind
    if kind is OUT_PROJECTION:
        return nn.MultiheadAttention
    if is_conv1d_type(kind):
        return nn.Linear
    if is_adapter(module):
        return _stands_for(base_layer(module)) if first_parameter(kind) else None
    if isinstance(module, nn.Linear) and kind.__module__.startswith("torchao."):
        # for training in float8 or with fake quantisation: their forward takes the input alone
        return nn.Linear
    return _computes_as(kind)


def _computes_as(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The layer's class whose forward a subclass keeps, as one that only starts its weight in its
    own way does."""
    code = ("forward", "_conv_forward", "__call__")
    for base in (nn.Linear, *_CONVOLUTIONS):
        if issubclass(kind, base) and all(
            getattr(kind, name, None) is getattr(base, name, None) for name in code
        ):
            return base
    return None


def is_candidate(module: nn.Module, types: Types) -> bool:
    if isinstance(module, (DIPLayer, DIPMultiheadAttention)):
        return False
    return isinstance(module, types) or counts_as(module) in types


def is_conv1d_type(kind: type | None) -> bool:
    """transformers' Conv1D, a linear layer whose weight is transposed."""
    known = ("transformers.pytorch_utils", "Conv1D")
    return kind is not None and (kind.__module__, kind.__name__) == known


def of_peft(module: nn.Module, name: str) -> bool:
    """Whether it is of this class of PEFT's, which is not imported for the question."""
    return any(
        c.__name__ == name and c.__module__.startswith("peft.") for c in type(module).__mro__
    )


def put_away(module: nn.Module) -> nn.Module | None:
    """What this wrapper of PEFT's holds and never calls, because it trains and calls copies."""
    wraps = of_peft(module, "ModulesToSaveWrapper")
    return module.get_submodule("original_module") if wraps else None


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT made it around another layer: what its forward computes is one function of its
    input."""
    return of_peft(module, "BaseTunerLayer") and hasattr(module, "base_layer")


def base_layer(module: Any) -> Any:
    """The layer inside adapters, however many; a module that is none itself."""
    return module.get_base_layer() if is_adapter(module) else module


def _stands_for(base: nn.Module) -> type[nn.Module] | None:
    """What an adapter around this layer is converted as: its input has the features of the
    base's."""
    kind = _plain_type(base)
    if isinstance(base, nn.Linear) or is_conv1d_type(kind):
        return nn.Linear
    if _is_quantised(kind) and isinstance(getattr(base, "in_features", None), int):
        return nn.Linear
    return next((c for c in _CONVOLUTIONS if isinstance(base, c)), None)


def _plain_type(layer: Any) -> Any:
    """Its class, of a DIP layer (that an adapter was put around) the one it was converted from."""
    return layer.plain_type if isinstance(layer, DIPLayer) else type(layer)


def _is_quantised(kind: type) -> bool:
    return bool(_QUANTISED.search(f"{kind.__module__}.{kind.__name__}"))


def twin_of(module: nn.Module) -> type[Any]:
    """The DIP class that a module of one of `types` becomes."""
    kind = type(module)
    if kind is OUT_PROJECTION:
        return DIPOutProjection
    if kind in TWINS:
        return TWINS[kind]
    if (base := _computes_as(kind)) is not None:
        return made_type(TWINS[base], kind)
    package = kind.__module__.split(".")[2].capitalize() if is_adapter(module) else ""
    known = package.lower() in kind.__name__.lower()
    return twin_type(kind, feature_dim_of(module), f"DIP{'' if known else package}{kind.__name__}")


def twin_before(kind: type[nn.Module], dim: int) -> type[Any]:
    """The class that a module of this class becomes with noise before it, along dimension dim."""
    known = TWINS.get(kind)
    return known if known is not None and known.feature_dim == dim else twin_type(kind, dim)


def features_of(module: Any) -> int:
    """The number of input features, or channels, of a module of one of `types`."""
    layer = base_layer(module)
    own = ("nx",) if is_conv1d_type(_plain_type(layer)) else ()
    names = (*own, "in_channels", "in_features", "embed_dim")
    return int(next(getattr(layer, name) for name in names if hasattr(layer, name)))


def feature_dim_of(module: nn.Module) -> int:
    """Where the features of a module's input are, as far as its class says: a convolution's
    channels, or the last."""
    layer = base_layer(module)
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


# ---- what cannot be honoured ---------------------------------------------------------------------


def is_inside(every_name: list[str], blocks: set[str]) -> bool:
    return any(outer in blocks for name in every_name if name for outer in around(name)[:-1])


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
            reason = _READS_ANOTHERS + _ELSEWHERE * (feature_dim_of(module) != -1)
            reasons |= {m: reason for m in read_by if m not in reasons}
            continue
        for reader in read_by:
            readers.setdefault(type(reader), {})[module] = reader
    for kind, read in readers.items():
        way_out = f"before={_patterns(list(dict.fromkeys(read.values())), names)}"
        reasons |= dict.fromkeys(
            read,
            f"{kind.__name__} reads its weight without calling it: {way_out} puts noise at the "
            "input of the whole" + _ELSEWHERE * any(feature_dim_of(m) != -1 for m in read),
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
        return _SCRIPTED
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
    if of_a_kind and counts_as(module) is None and _is_quantised(kind) and not parametrised:
        return (
            "quantised: give its name in before=[...] to noise its input; to quantise a converted "
            "model, call to_plain first"
        )
    lazy_layer = is_candidate(module, types) and isinstance(module, nn.modules.lazy.LazyModuleMixin)
    if lazy_layer or (has_lazy_weights(module) and not _is_quiet(module)):
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
    if replaced := _REPLACED.get(forward_set_by(module)):
        return replaced
    if taken := names_taken(module, twin_of(module)):
        return f"it has {taken} of its own, names that a DIP layer uses: rename them"
    weight = None if is_adapter(module) else getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout})"
    data = type(getattr(weight, "data", None))
    if _is_quantised(data):
        return f"quantised: its weight is a {data.__name__}; convert the model before quantising it"
    return None


_READS_ANOTHERS = (
    "it reads the weight of a layer that others call: give its name in before=[...] to noise its "
    "input; in exclude=[...] it would leave that layer plain too"
)
_ELSEWHERE = "; {pattern: dimension} says where its features are, if not in the last one"
# why the forward of the class would not run, by who set another
_REPLACED = {
    "accelerate": "accelerate dispatched it, and its hook calls the plain forward: convert before "
    "dispatching, or call accelerate.hooks.remove_hook_from_submodules(model), then convert, then "
    "accelerate.dispatch_model again",
    "transformers": "a tp_plan of transformers replaced its forward: load the model without one, "
    "convert, then dip.parallelize_module(model, mesh, plan)",
    "somebody": "its forward was replaced on the object, so a DIP layer's forward would not run",
}


def forward_set_by(module: nn.Module) -> str:
    """Who set a forward of its own on the object: "accelerate", "transformers" or "somebody"; ""
    where it has none but the class's, as accelerate leaves behind."""
    own = vars(module).get("forward")
    if own is not None and hasattr(module, "_hf_hook"):
        return "accelerate"
    if own is None or getattr(own, "__func__", None) is type(module).forward:
        return ""
    return "transformers" if getattr(module, "_is_hooked", False) else "somebody"


def names_taken(module: nn.Module, twin: type[Any], facts: Iterable[str] = ()) -> list[str]:
    """What the module has of its own, itself or by its class, under a name that its DIP class would
    read: one that a class of this package defines before the plain one, or one of the facts that
    the DIP class is made with."""
    package = __name__.partition(".")[0]
    ours = [
        kind
        for kind in twin.__mro__
        if kind.__module__.partition(".")[0] == package and "made_of" not in vars(kind)
    ]
    names = _SET.union(facts, *map(vars, ours)) - {"reset_parameters", "__prepare_scriptable__"}
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    own.update(n for n in names if hasattr(type(module), n))  # a property is not asked: it may fail
    return sorted(n for n in names & own if not hasattr(nn.Module, n))


def no_twin(module: nn.Module) -> str | None:
    """Why the projection cannot be put before a module of this class, or None."""
    kind = type(module)
    if isinstance(module, (DIPLayer, DIPMultiheadAttention)):
        return "a DIP layer already"
    if isinstance(base_layer(module), nn.MultiheadAttention):
        return "it takes three inputs, which convert noises by itself (types)"
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPTED
    if replaced := _REPLACED.get(forward_set_by(module)):
        return replaced
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        return (
            "its forward calls every child in turn, and would call the variance: name its first "
            "module"
        )
    if first_parameter(kind) is None:
        return "its forward takes no first argument"
    if taken := names_taken(module, Wrapper):
        return f"it has {taken} of its own, names that a DIP layer uses"
    return None


# ---- layers whose weight is read past them -------------------------------------------------------

_PLAIN_LOOKS = re.compile(
    r"bias|(in|out)_(features|channels)|kernel_size|stride|padding.*|dilation|groups|training|"
    r"requires_grad_|parameters|="
)
_HARMLESS = re.compile(r"dtype|device|shape|ndim|data|grad|requires_grad|is_cuda|numel|size|dim|=")
_SETTING_UP = re.compile(r"init|reset|tie|load|extra_repr|prune")


@functools.cache
def read_past(kind: Any) -> frozenset[str]:
    """The children that this class's own code never calls or hands on, and whose weight it reads.

    Found in the bytecode of its methods: `F.linear(x, self.qkv.weight)` where no method mentions
    `self.qkv` otherwise.
    """
    if kind.forward is nn.Sequential.forward:  # which calls every child
        return frozenset()
    read, used, replaced = set(), set(), set()
    for base in kind.__mro__:
        if base in (nn.Module, object) or (base in TWINS and base is not kind):
            continue
        for name, member in vars(base).items():
            function = (
                inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
            )
            code = getattr(function, "__code__", None)
            if code is not None and name not in replaced:
                if "__class__" not in code.co_freevars and name not in code.co_names:
                    replaced.add(name)  # by a method that calls no base class's
                for child, is_read in _mentions(code, code.co_varnames[:1]):
                    if not is_read:
                        used.add(child)
                    elif not _SETTING_UP.search(name):
                        read.add(child)
    return frozenset(read - used)


def _mentions(code: python_types.CodeType, own: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """(child, whether its weight is read) for every `self.child` in this code that is more than a
    harmless look."""
    for path in _paths(code, own):
        child, attribute, further = (*path, "", "", "")[:3]
        if child in ("", "="):
            continue
        if attribute == "weight":
            if not _HARMLESS.fullmatch(further):
                yield child, True
        elif not _PLAIN_LOOKS.fullmatch(attribute):
            yield child, False


def _paths(code: python_types.CodeType, own: tuple[str, ...]) -> Iterator[list[str]]:
    """What follows each `self` in this code: ["a", "b"] for self.a.b, and ["a", "="] where self.a.b
    is set."""
    for constant in code.co_consts:
        if isinstance(constant, python_types.CodeType):
            yield from _paths(constant, own)
    path: list[str] | None = None  # of the self that was loaded last
    for step in dis.get_instructions(code):
        if step.opname in ("NOP", "EXTENDED_ARG"):
            continue
        if path is not None:
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                path.append(step.argval)
                continue
            yield [*path, "="] if step.opname == "STORE_ATTR" else path
            path = None
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            # two in one from 3.13 on
            loaded = step.argval[-1:] if isinstance(step.argval, tuple) else (step.argval,)
            path = [] if loaded == own else None


# ---- weights that are in no layer ----------------------------------------------------------------

_QUIET = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.utils.parametrize.ParametrizationList,
    nn.ParameterList,
    nn.ParameterDict,
)
_LEAST_SHARE = 0.01  # of a model's matrix weights, for what is no layer by the look of it


def own_matrices(module: Any) -> dict[str, Tensor]:
    """The floating and complex Parameters of two dimensions or more that are the module's own, in a
    list of its own, or what a parametrisation computes its own from; and what else holds 8-bit
    numbers, as quantised weights do, but for masks."""
    parameters: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    parameters |= {n: b for n, b in module.named_buffers(recurse=False) if _in_eight_bits(b)}
    listed = (nn.ParameterList, nn.ParameterDict)
    lists = {name: each for name, each in module.named_children() if isinstance(each, listed)}
    if nn.utils.parametrize.is_parametrized(module):
        lists |= module.parametrizations.items()
    for name, each in lists.items():
        parameters |= {f"{name}.{own}": p for own, p in each.named_parameters()}
    return {name: p for name, p in parameters.items() if _is_matrix(name, p)}


def has_lazy_weights(module: nn.Module) -> bool:
    """Whether Parameters of its own get their shapes from a first batch."""
    return any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False))


def _in_eight_bits(p: Tensor) -> bool:
    return p.dtype.itemsize == 1 and p.dtype is not torch.bool


def _is_matrix(name: str, p: Tensor) -> bool:
    if nn.parameter.is_lazy(p):
        return False
    if not (p.is_floating_point() or p.is_complex() or _in_eight_bits(p)):
        return False
    # a class token or positions, [1, N, D]; not StyleGAN2's modulated weight, [1, N, C, H, W]
    modulated = p.ndim > 4 and name.startswith("weight")
    embedded = p.ndim > 2 and p.shape[0] == 1 and not modulated
    return sum(size != 1 for size in p.shape) >= 2 and not embedded and not _is_mask(p)


def _may_be_a_table(name: str, p: Tensor) -> bool:
    """Whether it may be of positions, tokens or states, which are real."""
    return p.ndim == 2 and "weight" not in name and not p.is_complex()


def _is_mask(p: Tensor) -> bool:
    """Whether it is of zeros and ones, by its first entries. One of zeros alone may be a weight
    that is not loaded yet."""
    if p.dtype is not torch.uint8 or p.is_meta or not p.numel() or not worlds.has_values(p):
        return False
    return bool(p[:1].max() == 1)


def unnoised(
    names: Names, known: set[nn.Module], blocks: set[str]
) -> dict[tuple[nn.Module, ...], str]:
    """{modules: reason} for those that are no layer of `types` and hold matrix weights, one entry
    for each class.

    known: what is converted, left out on purpose, or named already. Small ones, such as a table of
    relative positions, count as layers only where the name of a matrix begins with `weight`.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    counted = computing_weights(names)  # with the module
    own = {m: own_matrices(m) for m in names if m not in counted and not isinstance(m, kinds)}
    total = sum({id(p): p.numel() for each in own.values() for p in each.values()}.values())
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module, matrices in own.items():
        if not matrices or module in known or is_inside(names[module], blocks) or _is_quiet(module):
            continue
        around_layers = any(child in known for child in module.modules())
        if around_layers and all(_may_be_a_table(*each) for each in matrices.items()):
            continue  # a model's or a block's own, beside its layers
        by_class.setdefault(_class_of(module), []).append(module)
    found = {}
    for kind, modules in by_class.items():
        share = sum(p.numel() for m in modules for p in own[m].values()) / total
        called = list(dict.fromkeys(name for m in modules for name in own[m]))
        if share < _LEAST_SHARE and not any(name.startswith("weight") for name in called):
            continue
        shown = ", ".join(called[:4]) + ", ..." * (len(called) > 4)
        elsewhere = _ELSEWHERE * (not kind.__module__.startswith("torch.nn."))
        way_out = (
            f"before={_patterns(modules, names)} with batches=[...] puts noise at its "
            f"input{elsewhere}"
        )
        if refused := next(filter(None, map(no_twin, modules)), None):
            way_out = f"put a DIPInput in front of it, as before=[...] cannot take it: {refused}"
        found[tuple(modules)] = (
            f"{share:.1%} of the model's matrix weights are its own tensors ({shown}), which "
            f"get no noise: {way_out}"
        )
    return found


def _is_quiet(module: nn.Module) -> bool:
    plain = counts_as(module) is not None or isinstance(module, (*TWINS, DIPLayer, *_QUIET))
    name, package = type(module).__name__, type(module).__module__
    # takes no input: of positions, a bias
    table = len(inspect.signature(type(module).forward).parameters) == 1
    # not a NormedLinear, which multiplies by a normed matrix
    norm = "Norm" in name and not any(part in name for part in ("Linear", "Conv"))
    known = norm or any(part in name for part in ("Embed", "Positional"))
    return plain or table or known or package.startswith("peft.")


def computing_weights(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules inside the parametrised ones of these, from which their weights are computed."""
    parametrised: Any = filter(nn.utils.parametrize.is_parametrized, modules)
    return {p for m in parametrised for p in m.parametrizations.modules()}


# ---- how they are named together -----------------------------------------------------------------

# of a parametrised module, for each of which torch makes a class, the class before that
_class_of = nn.utils.parametrize.type_before_parametrizations


def alike(reasons: Mapping[nn.Module, str], names: Names) -> dict[tuple[nn.Module, ...], str]:
    """{modules: reason}, one entry for those of one class and reason whose names differ in their
    numbers alone."""
    groups: dict[tuple[type, str, str], list[nn.Module]] = {}
    for module, reason in reasons.items():
        key = (_class_of(module), reason, _wide(names[module][0]))
        groups.setdefault(key, []).append(module)
    return {tuple(modules): reason for (_, reason, _), modules in groups.items()}


def shown_together(modules: Sequence[nn.Module], names: Names) -> str:
    """Modules of one class in a warning or an error."""
    first = modules[0]
    kind, origin = type(first).__name__, type(first).__module__.partition(".")[0]
    if kind in _TORCHS and origin != "torch" and not is_adapter(first):
        kind = f"{origin}'s {kind}"  # torch_geometric's Linear
    if len(modules) > 1:
        kind += f", {len(modules)} of them"
    patterns = ", ".join(_patterns(modules, names)) or "the model itself"
    return f"{patterns} ({kind})"


def _patterns(modules: Sequence[nn.Module], names: Names) -> list[str]:
    """Patterns for the names of these, one for those that differ in their numbers alone; none
    matches another module's."""
    own = {*modules, *computing_weights(modules)}
    by_pattern: dict[str, list[str]] = {}
    for module in modules:
        by_pattern.setdefault(_wide(names[module][0]), []).append(names[module][0])
    patterns: list[str] = []
    for pattern, every_name in by_pattern.items():
        wide = len(every_name) > 1 and not Patterns("before", [pattern]).all(
            *(name for m in names if m not in own for name in names[m])
        )
        patterns += [pattern] if wide else every_name
    return patterns


def _wide(name: str) -> str:
    """A pattern for the names that differ from this one in their numbers alone."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
