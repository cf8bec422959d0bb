"""Noise in what makes a layer's input: fused, beside f alone and f then P, and training steps of
whole models with place="producer"."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import models
import networks
import peers
import timing
import torch
from networks import Network
from producers import Producer
from torch import Tensor

from gpucheck.child import Check, Rows
from gpucheck.kernels import half, in_turns, per_call
from gpucheck.layers import prepare

# Each f's inputs, checked: producers.py in the folder above.
KINDS = ("layer", "rms", "gelu", "gated silu")
FORMS: dict[str, Callable[[Producer], Tensor]] = {
    "f": Producer.plain,
    "fused": Producer.fused,
    "f, P": lambda producer: producer.noised(producer.plain()),
    "f, x + sigma * randn": Producer.expression,
}


@functools.lru_cache(maxsize=1)
def inputs(check: Check, kind: str, m: int, k: int) -> list[Producer]:
    """Sets of one f that L2 does not hold, the first of them checked."""
    prepare(check)
    count = timing.sets_beyond_cache(2 * m * k, check.device, most=4)
    sets = [Producer(kind, half(check), (m, k), check.device) for _ in range(count)]
    sets[0].check()
    return sets


def in_a_row(
    form: Callable[[Producer], Tensor], what: str, sets: list[Producer]
) -> Callable[[], object]:
    """The form's forward, or forward and backward, of all sets."""
    dy = torch.randn_like(sets[0].x[0])

    def forward(producer: Producer) -> object:
        with torch.no_grad():
            return form(producer)

    def step(producer: Producer) -> object:
        return timing.backward_step(lambda: form(producer), dy, producer.leaves())()

    return timing.captured(forward if what == "forward" else step, sets, device=dy.device)


def producer_row(check: Check, kind: str, what: str, m: int, k: int) -> dict:
    """Over f then P; as CUDA graphs, so that launches cost little."""
    sets = inputs(check, kind, m, k)
    calls = {name: in_a_row(form, what, sets) for name, form in FORMS.items()}
    return {"variants": per_call(in_turns(check, calls, "f, P", 0.3), len(sets))}


def producers(check: Check) -> Rows:
    shapes = [(9, 24)] if check.rehearsal else [(8192, 4096), (4096, 1024)]
    return [
        (f"{kind} {what} {m}x{k}", functools.partial(producer_row, check, kind, what, m, k))
        for (m, k), kind, what in itertools.product(shapes, KINDS, ("forward", "step"))
    ]


# ---- whole models --------------------------------------------------------------------------------


def model_row(check: Check, network: Network, compiled: bool) -> dict:
    """Forward, loss, backward and AdamW over the plain model's; the noise at the layers and at the
    producers."""
    prepare(check)
    plain, x, target = models.inputs_of(network, half(check), check.device)
    names = ("linear", "dip", "dip, producer")
    built = {name: models.build(name, plain, x) for name in names}
    peers.check_converted(built["dip, producer"], x[:1])
    steps = {
        name: models.step_of(peers.compiled_in_place(model) if compiled else model, x, target)
        for name, model in built.items()
    }
    return {"variants": in_turns(check, steps, "linear", 2.5, peaks=True)}


def whole_models(check: Check) -> Rows:
    """A block of a language model, compiled too, and a vision transformer, whose block the section
    block compiles."""
    networks_of = {n.name: n for n in networks.MODELS["quick" if check.rehearsal else "cuda"]}
    llama, vit = networks_of["Llama-block"], networks_of["ViT" if check.rehearsal else "ViT-S/16"]
    return [
        (str(llama), functools.partial(model_row, check, llama, False)),
        (f"{llama}, compiled", functools.partial(model_row, check, llama, True)),
        (str(vit), functools.partial(model_row, check, vit, False)),
    ]
