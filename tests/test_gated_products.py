"""convert(place="producer"): the product in a block down(act(gate(x)) * up(x))."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from plain_support import assert_plain
from plan_support import X, left, moved, same_streams
from torch import nn

import dipkernels as dip
from dipkernels.models.gated import gated_parts
from dipkernels.nn.activation import GatedBlock
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise.contexts import fixed_noise

pytestmark = pytest.mark.filterwarnings("ignore:.*converted apart have one number")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 12), nn.Linear(8, 12)
        self.silu, self.w2 = nn.SiLU(), nn.Linear(12, 8)

    def forward(self, hidden):
        return self.w2(self.silu(self.w1(hidden)) * self.w3(hidden))


class Scaled(Gated):
    def forward(self, hidden):
        return self.w2(self.silu(self.w1(hidden)) * self.w3(hidden) * 2)


class Named(Gated):
    """As Llama 4 writes it."""

    def forward(self, hidden):
        product = self.silu(self.w1(hidden)) * self.w3(hidden)
        return self.w2(product)


class Halves(Gated):
    """As Phi-3 and GLM-4 write it."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(8, 24)
        del self.w3

    def forward(self, hidden):
        """Both factors are made by one layer."""
        up = self.w1(hidden)

        gate, up = up.chunk(2, dim=-1)
        up = up * self.silu(gate)

        return self.w2(up)


class OtherHalves(Halves):
    """The same code but for a constant."""

    def forward(self, hidden):
        up = self.w1(hidden)
        gate, up = up.chunk(2, dim=-2)
        up = up * self.silu(gate)
        return self.w2(up)


class Split(Halves):
    """The same code but for a name."""

    def forward(self, hidden):
        up = self.w1(hidden)
        gate, up = up.tensor_split(2, dim=-1)
        up = up * self.silu(gate)
        return self.w2(up)


class Function(Gated):
    """As Meta's Llama writes it; the module of this name computes something else."""

    def __init__(self):
        super().__init__()
        self.silu = nn.Tanh()

    def forward(self, hidden):
        return self.w2(F.silu(self.w1(hidden)) * self.w3(hidden))


@pytest.mark.parametrize("kind, read", [(Gated, "13"), (Named, "13"), (Halves, "1")])
def test_a_gated_product_is_drawn_in_one_pass(kind, read):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(8), kind())
    model = dip.convert(copy.deepcopy(plain), 0.25, place="producer", batches=[X])
    readers = tuple(f"1.w{i}" for i in read)
    assert moved(dip.summary(model).plan) == {"0": readers, "1.silu": ("1.w2",)}
    assert torch.equal(model.eval()(X), plain(X))
    model.train()
    share = [("w1", "w3")] if len(read) > 1 else ()
    reference = dip.convert(copy.deepcopy(plain), 0.25, share=share)
    same_streams(model, reference, {"0": "1.w1", "1.silu": "1.w2"})
    with fixed_noise(3):
        got, want = model(X), reference(X)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[1](hidden=X), model[1](X))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), got, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again[1], GatedBlock) and isinstance(copy.deepcopy(model)[1], Gated)
    with fixed_noise(3):
        assert torch.equal(again(X), got)
    assert "1.silu.variance.log_variance" in model.state_dict()
    dip.calibrate(model, [X])
    assert_plain(dip.to_plain(model)[1], plain[1])


@pytest.mark.parametrize("kind", [Gated, Halves])
@pytest.mark.parametrize("change", ["replaced", "turned back"])
def test_a_gated_product_whose_activation_changed_is_the_blocks_own(kind, change):
    plain = nn.Sequential(nn.LayerNorm(8), kind())
    model = dip.convert(copy.deepcopy(plain), place="producer", batches=[X])
    if change == "replaced":
        model[1].silu, plain[1].silu = nn.GELU(), nn.GELU()
    else:
        dip.to_plain(model[1].silu)
    assert list(dip.check(model, X, strict=False).faults) == ["1.silu"]
    assert torch.equal(model.eval()(X), plain(X))
    dip.convert(model.train())
    assert list(dip_layers(model)) == ["0", "1.w2"] and dip.check(model, X)
    assert torch.equal(model.eval()(X), plain(X))
    assert_plain(dip.to_plain(model)[1], plain[1])


@pytest.mark.parametrize("kind, size", [(nn.Conv1d, (5,)), (nn.Conv2d, (12, 5))])
def test_a_gated_product_of_convolutions_is_noised_by_channel(kind, size):
    torch.manual_seed(0)
    plain, x = Gated(), torch.randn(2, 8, *size)
    plain.w1, plain.w3, plain.w2 = kind(8, 12, 1), kind(8, 12, 1), kind(12, 8, 1)
    model = dip.convert(copy.deepcopy(plain), 0.25, place="producer", batches=[x])
    assert moved(dip.summary(model).plan) == {"silu": ("w2",)}
    reference = dip.convert(plain, 0.25)
    same_streams(model, reference, {"w1": "w1", "w3": "w3", "silu": "w2"})
    with fixed_noise(3):
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


def narrow():
    gated = Gated()
    gated.w3 = nn.Linear(8, 1)
    return gated


def wide():
    gated = Gated()
    gated.w3.register_forward_hook(lambda module, args, out: out.double())
    gated.w2.double()
    return gated


@pytest.mark.parametrize("make", [Scaled, narrow, wide, Split])
def test_another_product_is_left_with_the_way_out(make):
    model = nn.Sequential(nn.LayerNorm(8), make())
    plan = dip.producer_plan(model, [X])
    assert "whose forward is not exactly down(act(gate(x)) * up(x))" in left(plan)["1.w2"]
    dip.convert(model, place="producer", batches=[X])(X).sum().backward()


def test_a_gates_activation_that_others_call_too_stays():
    class Twice(Gated):
        def forward(self, hidden):
            return self.inner(self.inner.silu(hidden))

    model = Twice()
    model.inner = Gated()
    dip.convert(model, place="producer", batches=[X], exclude=["w?"])
    plan = dip.summary(model).plan
    assert "it is called outside of inner (Gated) too" in left(plan)["inner.w2"]
    model(X).sum().backward()


@pytest.mark.parametrize("name, kind", [("parts", "Gated"), ("kind", "SiLU")])
def test_a_gated_product_with_a_name_that_its_dip_class_uses_stays(name, kind):
    model = nn.Sequential(nn.LayerNorm(8), Gated())
    setattr(model[1] if kind == "Gated" else model[1].silu, name, 2)
    dip.convert(model, place="producer", batches=[X])
    assert f"{kind} has ['{name}'] of its own" in left(dip.summary(model).plan)["1.w2"]
    model(X).sum().backward()


def test_halves_along_another_dimension_are_no_gated_product():
    assert gated_parts(Halves) == ("w2", "silu", "w1", "w1")
    assert gated_parts(OtherHalves) is None


def acting(act):
    gated = Gated()
    del gated.silu
    gated.silu = act
    return gated


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda: acting(F.silu),
            r"Gated\) calls silu, which is no module: use nn\.SiLU\(\) to move",
        ),
        (lambda: acting(lambda x: x), r"Gated\) calls <lambda>, which is no module$"),
        (Function, r"calls F\.silu, which is no module: use nn\.SiLU\(\) to move it$"),
    ],
)
def test_a_gated_product_of_a_function_is_left_with_the_way_out(make, reason):
    model = nn.Sequential(nn.LayerNorm(8), make())
    assert re.search(reason, left(dip.producer_plan(model, [X]))["1.w2"])
    dip.convert(model, place="producer", batches=[X])
    assert isinstance(model[1].w2, DIPLinear)
