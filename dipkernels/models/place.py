"""Which modules can noise what they make in place of the layers that read it: the plan of
convert(place="producer").

docs/maths.md, section 10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..nn.activation import ActivationProducer, GatedBlock, GateProducer, gated_block_type
from ..nn.layer import DIPLayer
from ..nn.twin import made_type
from ..nn.wrappers import inmost
from ..ops.activations import ACTIVATIONS
from .choose import Choice
from .convertible import (
    OUT_PROJECTION,
    Names,
    feature_dim_of,
    features_of,
    is_adapter,
    names_taken,
    no_twin,
)
from .forms import activation_kind, has_hooks, may_produce, norm_form
from .gated import gated_parts
from .probe import shown
from .readers import Call, Made, Watch

_FUNCTIONS = {
    "relu": "nn.ReLU()",
    "gelu": "nn.GELU()",
    "silu": "nn.SiLU()",
    "tanh": "nn.Tanh()",
    "layer_norm": "nn.LayerNorm",
    "rms_norm": "nn.RMSNorm",
}
# why a layer stays that no batch was seen to enter
UNREACHED = "the batches do not reach it, or what is around it reads its weight without calling it"


# ---- the plan ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One module that makes the input of layers, or layers whose input no module makes.

    Attributes:
        producer: The module's name; empty where there is none.
        type: Its class's name.
        layers: The names of the layers that read what it makes.
        reason: Why these layers keep a projection of their own; empty where it moved.
    """

    producer: str
    type: str
    layers: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        made_by = f"{self.producer} ({self.type}) -> " if self.producer else ""
        layers = ", ".join(layer or "the model itself" for layer in self.layers)
        return f"{made_by}{layers}" + (f": {self.reason}" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class ProducerPlan:
    """Which projections move into the module that makes their layers' input, and which stay, and
    why; prints as a list.

    Attributes:
        moved: One row for each module that noises its output, with the layers that read it and are
            plain.
        left: The layers that keep a projection of their own, by what makes their input and the
            reason.
    """

    moved: tuple[PlanRow, ...]
    left: tuple[PlanRow, ...]

    def __str__(self) -> str:
        moved, left = (sum(len(row.layers) for row in rows) for rows in (self.moved, self.left))
        lines = [
            f"plan: {moved} of {moved + left} projections move into {len(self.moved)} module(s) "
            "that make their input"
        ]
        lines += [f"  moved  {row}" for row in self.moved]
        lines += [f"  left   {row}" for row in self.left]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Move:
    """A producer, the class that it becomes, and the layers whose projection it takes."""

    producer: nn.Module
    twin: type[Any] | None  # its DIP class; None of one that was there already
    layers: tuple[nn.Module, ...]  # what reads it
    device: torch.device  # of what it makes
    # with a gated product, the block around it and the class that this becomes
    block: tuple[nn.Module, type[Any]] | None = None


def find_moves(
    model: nn.Module, choice: Choice, batches: Iterable[Any] | None
) -> tuple[ProducerPlan, list[Move]]:
    """Watch passes over the batches: the plan for the layers that are chosen, and what to do by
    it."""
    if batches is None:
        raise ValueError(
            "batches: expected a batch, on which place='producer' sees who reads what, got None"
        )
    names = choice.names
    stay = dict.fromkeys(choice.excluded, "it is excluded")
    stay |= dict.fromkeys(choice.asked, "its own input is noised: before")
    dims = {layer: feature_dim_of(layer) for layer in choice.matched}
    candidates = [m for m in names if m not in dims and may_produce(m)]
    watch = Watch({m: every[0] for m, every in names.items()}, dims, candidates)
    watch.run(model, batches)
    with torch.inference_mode(False):  # in which there are no slopes
        return _Planner(model, names, dims, stay, watch).plan()


class _Gated(NamedTuple):
    """A block down(act(gate(x)) * up(x)), and the names of these four."""

    block: nn.Module
    parts: tuple[str, str, str, str]


@dataclasses.dataclass
class _Planner:
    model: nn.Module
    names: Names
    dims: Mapping[nn.Module, int]
    stay: Mapping[nn.Module, str]
    watch: Watch

    def plan(self) -> tuple[ProducerPlan, list[Move]]:
        groups: dict[tuple[nn.Module | None, _Gated | None, str], list[nn.Module]] = {}
        move: Move | str
        for layer in self.dims:
            groups.setdefault(self._origin(layer), []).append(layer)
        moves, moved, left = [], [], []
        for (producer, gated, reason), layers in groups.items():
            who, move = ("", ""), reason
            if producer is not None:
                who = self._name(producer), type(producer).__name__
                move = reason or self._move(producer, gated, layers)
            shown = tuple(self._name(layer) for layer in layers)
            if isinstance(move, Move):
                moves.append(move)
                moved.append(PlanRow(*who, shown))
            else:
                left.append(PlanRow(*who, shown, move))
        return ProducerPlan(tuple(moved), tuple(left)), moves

    # ---- what makes a layer's input

    def _origin(self, layer: nn.Module) -> tuple[nn.Module | None, _Gated | None, str]:
        """The module that makes this layer's input, the gated product that it does so in, and why
        the layer keeps its projection; None and "" where there is none."""
        sources = self.watch.sources[layer]
        if not sources and type(layer) is OUT_PROJECTION:
            return None, None, "nn.MultiheadAttention makes its input, outside of any module"
        if not sources:
            return None, None, UNREACHED
        made = [source for source in sources if source is not None]
        if len(made) < len(sources):
            if layer in self.watch.transformed:
                return None, None, "torch.func calls it, which hides what makes its input"
            beside = ", or tensors that differ" * isinstance(layer, nn.MultiheadAttention)
            return None, None, f"it reads the network's own input{beside}"
        # behind a dropout that training puts between, what eval mode reads
        makers = [s.module for s in made if "dropout" not in s.op]
        if makers and all(getattr(maker, "noises_output", False) for maker in makers):
            return makers[0], None, ""
        gated = self._gated(layer, made)
        if gated is not None:
            act: Any = getattr(gated.block, gated.parts[1], gated.parts[1])
            act = inmost(act)
            if isinstance(act, nn.Module):
                return act, gated, ""
            where, name = self._shown(gated.block), getattr(act, "__name__", str(act))
            reason = f"its gated product in {where} calls {name}, which is no module"
            instead = _FUNCTIONS.get(name.rpartition(".")[2])
            return None, None, reason + (f": use {instead} to move it" if instead else "")
        producers: list[Any] = list(dict.fromkeys(s.module for s in made if s.call is not None))
        if len(producers) == 1 and all(s.call is not None for s in made):
            return producers[0], None, self._layer_reason(layer)
        # In training mode it reads something else than in eval mode: a dropout between.
        for producer in producers:
            for call in self.watch.calls[producer]:
                if call.elsewhere is not None:
                    return producer, None, call.elsewhere
        return None, None, self._unknown(made)

    def _layer_reason(self, layer: nn.Module) -> str:
        if len(self.names[layer]) > 1:
            return f"the layer is tied, {len(self.names[layer])} names lead to it"
        if is_adapter(layer):
            return "the layer is an adapter, whose variance is saved with it"
        return ""

    def _unknown(self, made: list[Made]) -> str:
        places = {
            (s.op.strip("_"), "the model itself" if s.module is None else self._shown(s.module))
            for s in made
        }
        if len(places) > 1:
            made_by = " and ".join(sorted(f"{op} in {where}" for op, where in places))
            return f"its input is made in more than one place: {made_by}"
        ((op, where),) = places
        if op in _FUNCTIONS:
            return (
                f"its input is made by a call of {op} in {where}, not by a module: use "
                f"{_FUNCTIONS[op]} to move it"
            )
        if op == "mul":
            return (
                f"its input is made by mul in {where}, whose forward is not exactly "
                "down(act(gate(x)) * up(x)) with factors of one shape and dtype: if it is a gated "
                "product all the same, put a DIPGatedActivation there by hand"
            )
        return (
            f"its input is made by {op} in {where}: no norm, activation or gated product that the "
            "kernels know"
        )

    # ---- what can move

    def _move(
        self, producer: nn.Module, gated: _Gated | None, layers: list[nn.Module]
    ) -> Move | str:
        if isinstance(producer, DIPLayer):
            return Move(producer, None, tuple(layers), producer.log_variance.device)
        calls = self.watch.calls[producer]
        read_along = {dim for call in calls for _, dim in call.reads}
        dim = self.dims[layers[0]] if gated is not None else max(read_along, default=-1)
        features = features_of(layers[0])
        what = self._module_reason(producer) or self._form(producer, gated, features, dim)
        if isinstance(what, str):
            return what
        base, facts = what
        reason = self._names_reason(producer, base, facts) or self._dtype_reason(producer, calls)
        if gated is not None:
            reason = reason or self._module_reason(gated.block) or self._layer_reason(layers[0])
            reason = reason or self._names_reason(gated.block, GatedBlock, ["parts"])
            if any(call.caller is not gated.block for call in calls):
                reason = reason or f"it is called outside of {self._shown(gated.block)} too"
        else:
            reason = reason or self._calls_reason(calls, layers)
        if reason:
            return reason
        twin = made_type(base, type(producer), feature_dim=dim, **facts) if facts else base
        around = gated and (gated.block, gated_block_type(type(gated.block), gated.parts))
        return Move(producer, twin, tuple(layers), calls[0].device, around)

    def _module_reason(self, module: Any) -> str:
        if len(self.names[module]) > 1:
            return f"it is tied, {len(self.names[module])} names lead to it"
        if module in self.stay:
            return self.stay[module]
        if has_hooks(module):
            return "it has hooks, which would see noise"
        return no_twin(module) or ""

    @staticmethod
    def _names_reason(module: nn.Module, twin: type[Any], facts: Iterable[str]) -> str:
        taken = names_taken(module, twin, facts)
        kind = type(module).__name__
        return f"{kind} has {taken} of its own, names that a DIP layer uses" if taken else ""

    def _dtype_reason(self, producer: nn.Module, calls: list[Call]) -> str:
        dtypes = {dtype for call in calls for dtype in call.dtypes if dtype is not None}
        dtypes |= {p.dtype for p in producer.parameters()}
        if len(dtypes) > 1:
            return (
                "its input, output and parameters are of mixed types: "
                f"{sorted(str(d) for d in dtypes)}"
            )
        return ""

    def _calls_reason(self, calls: list[Call], layers: list[nn.Module]) -> str:
        readers = [{layer for layer, _ in call.reads} for call in calls]
        others = {layer for each in readers for layer in each} - {*layers}
        if any(each != readers[0] for each in readers):
            return (
                "it is called in several places, and different layers read them: give each place "
                "a module of its own"
            )
        for call in calls:
            if call.elsewhere is not None:
                return call.elsewhere
        if others:
            names = ", ".join(self._name(layer) for layer in self.dims if layer in others)
            return f"it is read by {names} too, which has a projection of its own"
        if any(len(each) < len(call.reads) for each, call in zip(readers, calls)):
            return "a layer reads it twice in a pass, which would be two draws"
        if len({dim for call in calls for _, dim in call.reads}) > 1:
            return "its layers read it along different dimensions"
        return ""

    @staticmethod
    def _form(
        producer: nn.Module, gated: _Gated | None, features: int, dim: int
    ) -> tuple[type[Any], dict[str, Any]] | str:
        """What the producer's DIP class is made of, or why there is none."""
        kind = activation_kind(producer)
        if kind is not None:
            return GateProducer if gated else ActivationProducer, {"kind": kind}
        if gated:
            return (
                f"{type(producer).__name__} is not an activation that the kernels know "
                f"({', '.join(ACTIVATIONS)})"
            )
        return norm_form(producer, features, dim)

    # ---- gated products

    @staticmethod
    def _gated(layer: nn.Module, made: list[Made]) -> _Gated | None:
        """The product whose `down` this layer is, in every call."""
        block, *others = {source.module for source in made}
        product = all(s.op.strip("_") == "mul" and s.call is None and s.alike for s in made)
        if block is None or others or not product:
            return None
        parts = gated_parts(type(block))
        if parts is None or inmost(getattr(block, parts[0], block)) is not layer:
            return None
        return _Gated(block, parts)

    # ---- names

    def _name(self, module: nn.Module) -> str:
        return self.names[module][0]

    def _shown(self, module: nn.Module) -> str:
        return "the model itself" if module is self.model else shown(self._name(module), module)
