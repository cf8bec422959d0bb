"""convert(before=...): noise before any module; what holds weights and is no layer; variances by
name."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain_support import assert_plain
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from warning_support import no_warning

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

pytestmark = pytest.mark.filterwarnings("error::dipkernels.DIPConversionWarning")


class Experts(nn.Module):
    """Stacked weights, as transformers holds a mixture of experts; its input may come by
    keyword."""

    def __init__(self, features=8, number=3):
        super().__init__()
        self.up = nn.Parameter(torch.randn(number, 16, features))
        self.down = nn.Parameter(torch.randn(number, features, 16))

    def forward(self, hidden_states, index, scale=1.0):
        up = torch.einsum("nf,nhf->nh", hidden_states, self.up[index])
        return scale * torch.einsum("nh,nfh->nf", up.relu(), self.down[index])


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return F.linear(x, self.weight).argmax(-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts, self.norm = Router(), Experts(), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x + self.experts(hidden_states=x, index=self.router(x), scale=0.5))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 4)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))  # no matrix that multiplies anything

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
ALL = {"before": ["*.experts", "*.router"], "batches": [X]}


def test_noise_before_a_module_is_that_module_on_the_noised_input():
    torch.manual_seed(0)
    plain = Net()
    model = dip.convert(copy.deepcopy(plain), 0.25, **ALL)
    inside = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("router", "experts")]
    assert list(dip_layers(model)) == [*inside, "head"]
    layer, index = model.blocks[1].experts, torch.tensor([0, 1, 2, 0, 1, 2])
    u = X + 0.5 * dip.functional.noise((6, 8), torch.tensor([7, layer.number]))
    want = plain.blocks[1].experts(u, index, scale=2.0)
    with dip.fixed_noise(7):
        torch.testing.assert_close(layer(X, index, scale=2.0), want)
        torch.testing.assert_close(layer(index=index, hidden_states=X, scale=2.0), want)
    with pytest.raises(TypeError, match="its input first"):
        layer(index=index)
    model.eval()
    assert torch.equal(model(X), plain.eval()(X))
    model.train()(X).sum().backward()
    for found in (dip.check(model, strict=False), dip.check(model, X, strict=False)):
        # through whose argmax no gradient comes
        assert list(found.faults) == ["blocks.0.router", "blocks.1.router"]


def test_everything_that_takes_dip_layers_takes_these():
    torch.manual_seed(0)
    plain = Net()
    model = dip.convert(copy.deepcopy(plain), **ALL)
    assert [row.features for row in dip.summary(model)] == [8] * 5
    dip.calibrate(model, [X], ratio=0.2)
    # one sigma for all: the median feature's
    assert dip.summary(model)[1].ratio == pytest.approx(0.2, rel=0.05)
    assert len(dip.param_groups(model, 1e-3)[-1]["params"]) == 5
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.load_state_dict(model.state_dict())
        with dip.fixed_noise(1):
            assert torch.equal(again(X), model(X))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert dip.predict(model, X, k=2).shape == (6, 4)
    assert_plain(dip.to_plain(model), plain)


def test_the_probe_changes_nothing_and_takes_what_calibrate_takes():
    for batches in ([X], [(X, None)], [{"x": X}], X):
        model = Net()
        model.blocks[0].eval()
        before = copy.deepcopy(model.state_dict())
        modes, state = [m.training for m in model.modules()], torch.get_rng_state()
        dip.convert(model, before=["*.experts"], exclude=["*.router"], batches=batches)
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules() if not isinstance(m, dip.Variance)] == modes
        assert not model.blocks[0].experts._forward_pre_hooks


def test_a_dimension_may_be_given_and_layers_that_convert_knows_asked_for():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(4 * 25, 2))
    x = torch.randn(2, 3, 4, 4)
    model = dip.convert(copy.deepcopy(net), before={"0": -3, "2": -1}, exclude="*", batches=[x])
    rows = [(row.type, row.features) for row in dip.summary(model)]
    assert rows == [("DIPConvTranspose2d", 3), ("DIPLinear", 100)]
    x = torch.randn(2, 3, 5)
    lstm = dip.convert(nn.LSTM(5, 7, batch_first=True), before=[""], batches=[x])
    assert lstm.log_variance.shape == (5,)
    lstm(x)[0].sum().backward()
    assert bool(lstm.log_variance.grad.any())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.off, self.ids = Router(), Router(), nn.Embedding(9, 8)

    def forward(self, x):
        self.a(self.ids(torch.zeros(3, dtype=torch.long)))
        return self.a(x)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.any, self.head = nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.any(x)) + self.any(x[:, :4]).sum()


def at(*names):
    return {"before": list(names), "batches": [X]}


def at_dimension(dim):
    return {"before": {"*.experts": dim}, "batches": [X]}


def starting(init_variance):
    return {"init_variance": init_variance, **ALL}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Net(), {"before": ["*.experts"]}, "^batches: expected a batch"),
        (Net(), {"before": ["*.experts"], "batches": []}, "^batches: expected at least one"),
        (Net(), {"batches": [X]}, "^batches: expected None"),
        (Net(), at_dimension(2), r"before: expected a dimension .*\(6, 8\), got 2"),
        (Net(), at_dimension("last"), r"before\['\*.experts'\]: expected an integer, got 'last'"),
        (Net(), at("blocks"), "before: .*'blocks' .*: its forward takes no first argument"),
        (Twice(), at("off"), r"before: .*none reached \['off'\]"),
        (Twice(), at("ids"), "before: expected a floating tensor .*'ids', got torch.int64"),
        (Wide(), at("any"), "before: expected one number of features.*8 and 4"),
        (nn.Sequential(Net()), at(""), "before: .*calls every child.*its first module"),
        (nn.MultiheadAttention(8, 2), at(""), "before: .*three inputs"),
        (dip.DIPLinear(8, 8), at(""), "before: .*a DIP layer already"),
        (Net(), starting({"blocks.*": 0.1}), r"init_variance: .*none that matches \['head'\]"),
        (
            Net(),
            starting({"x": 0.2, "*": 0.1}),
            r"^init_variance: .*a layer to convert, got \['x'\] that match none$",
        ),
        (
            Net(),
            starting({"*": 0.1, "head": 0.2}),
            r"^init_variance: expected narrow patterns before wide ones, got \['head'\] behind",
        ),
        (Net(), starting({"head": torch.ones(3), "*": 0.2}), r"init_variance: .*\(8,\).*\(3,\)"),
        (Net(), starting({"*.experts": torch.ones(3), "*": 1}), r"init_variance: .*\(8,\).*\(3,\)"),
        (Net(), starting({"*": -1}), "^init_variance: "),
        (
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            {"init_variance": {"0": 0.1, "*": 0.2}, "share": [("0", "1")]},
            r"init_variance: expected one value .*\['0', '1'\]; let one pattern",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::dipkernels.DIPConversionWarning")
def test_bad_requests_are_named_and_change_nothing(model, options, message):
    kinds, state = [type(m) for m in model.modules()], model.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        dip.convert(model, **options)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("name", ["draw", "feature_dim", "keep", "noisy", "share", "_seed"])
def test_a_name_that_a_dip_layer_uses_is_refused(name):
    module = nn.Identity()
    setattr(module, name, 8)
    with pytest.raises(ValueError, match=rf"before: .*\['{name}'\] of its own"):
        dip.convert(nn.Sequential(module, nn.Linear(8, 4)), **at("0"))


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(model.experts, accelerate.hooks.ModelHook())
    return model


def replaced(model):
    model.experts.forward = lambda *args: args[0]
    return model


@pytest.mark.parametrize(
    ("change", "message"), [(dispatched, "accelerate dispatched it"), (replaced, "was replaced on")]
)
def test_noise_before_a_module_whose_forward_is_not_its_classs_is_refused(change, message):
    with pytest.raises(ValueError, match=f"before: .*'experts'.*{message}"):
        dip.convert(change(Block()), before=["experts"], batches=[X])
    # what accelerate leaves behind is the class's own
    model = Block()
    model.experts.forward = model.experts.forward
    dip.convert(model, 0.25, before=["experts", "router"], batches=[X])
    assert not torch.equal(model(X), model(X))


# ---- what holds weights and is no layer ----------------------------------------------------------


class PygLinear(nn.Module):
    """torch_geometric's: weight and bias of its own, no subclass of nn.Linear."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights, a real input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 4, dtype=torch.complex64))

    def forward(self, x):
        y = torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., :4], self.weight)
        return torch.fft.irfft(y, n=x.shape[-1])


class Recurrent(nn.Module):
    """A linear recurrent unit: complex matrices beside a layer, real input and output."""

    def __init__(self):
        super().__init__()
        self.B = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))
        self.C = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out((x.to(self.B.dtype) @ self.B.mT @ self.C.mT).real)


class HandsOn(PygLinear):
    def forward(self, *args):
        return super().forward(*args)


class Kernel(nn.Module):
    """A convolution of another package."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, x):
        return F.conv1d(x, self.weight)


class NormedLinear(PygLinear):
    """Of unit vectors, by its name no norm."""

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Modulated(nn.Module):
    """StyleGAN2's: one weight for the whole batch, which each example's style scales."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8, 8, 3, 3))

    def forward(self, x, style):
        weights = (self.weight * style[:, None, :, None, None]).flatten(0, 1)
        y = F.conv2d(x.flatten(0, 1)[None], weights, padding=1, groups=len(x))
        return y.view_as(x)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])

    def forward(self, x):
        return x @ self.experts[0]


class InEightBits(nn.Module):
    """A weight that was quantised by hand, beside its scale and a mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("w8", torch.ones(8, 8, dtype=torch.int8))
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool))
        self.register_buffer("scale", torch.ones(8, 1))


def beside_a_head(module, features=8):
    return nn.ModuleDict({"odd": module, "head": nn.Linear(features, features)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Net,
            r"(?s)4 module\(s\).*blocks\.\*\.router \(Router, 2 of them\): \d"
            r".*blocks\.\*\.experts \(Experts, 2 of them\): 9\d\.\d%",
        ),
        (lambda: beside_a_head(PygLinear(8, 4), 4), r"odd \(PygLinear\): 66\.7%.*\(weight\)"),
        (lambda: beside_a_head(Modulated()), r"odd \(Modulated\): 90\.0%.*\(weight\)"),
        (lambda: beside_a_head(NormedLinear(8, 8)), r"odd \(NormedLinear\): 50\.0%"),
        (lambda: beside_a_head(Listed()), r"odd \(Listed\): 66\.7%.*experts\.0, experts\.1"),
        (lambda: beside_a_head(InEightBits()), r"odd \(InEightBits\): 50\.0%.*\(w8\)"),
        (
            lambda: nn.Sequential(nn.Sequential(InEightBits()), nn.Linear(8, 8)),
            r"(?s)1 module\(s\).*0\.0 \(InEightBits\)",
        ),
        (lambda: beside_a_head(nn.GRU(8, 8)), r"odd \(GRU\)"),
        (
            lambda: nn.Sequential(nn.Linear(200, 200), nn.LSTM(4, 4)),
            r"1 \(LSTM\): 0\..*weight_ih_l0",
        ),
        (lambda: nn.Sequential(nn.Linear(200, 200), nn.GRUCell(4, 4)), r"1 \(GRUCell\)"),
        (lambda: beside_a_head(nn.Bilinear(8, 8, 8)), r"odd \(Bilinear\)"),
        (lambda: beside_a_head(nn.ConvTranspose1d(8, 8, 3)), r"odd \(ConvTranspose1d\)"),
        (
            lambda: beside_a_head(weight_norm(nn.ConvTranspose1d(8, 8, 3))),
            r"odd \(ParametrizedConvTranspose1d\): 75\.0%.*\(weight\.original1\)",
        ),
        (lambda: beside_a_head(Spectral()), r"odd \(Spectral\): 80.0%"),
        (
            lambda: beside_a_head(HandsOn(8, 8)),
            r"odd \(HandsOn\): 50\.0%.*a DIPInput in front.*: its forward takes no first argument$",
        ),
        (lambda: beside_a_head(Recurrent()), r"odd \(Recurrent\): 42\.9%.*\(B, C\)"),
        # no pattern that would name the layers between
        (
            lambda: nn.Sequential(nn.Linear(8, 8), Kernel(), nn.ReLU(), Kernel()),
            r"1, 3 \(Kernel, 2 of them\): .*before=\['1', '3'\].*; \{pattern: dimension\} says",
        ),
    ],
)
def test_weights_that_are_in_no_layer_are_named_with_their_share(make, message):
    with pytest.warns(dip.DIPConversionWarning, match=message) as caught:
        dip.convert(make())
    assert len(caught) == 1
    with pytest.warns(dip.DIPConversionWarning, match=message):
        dip.convert(make(), filter=lambda module, name: not name.startswith("another"))
    # a filter says which
    dip.convert(make(), filter=lambda module, name: isinstance(module, nn.Linear))
    dip.convert(make(), filter=lambda module, name: module.in_features > 0)


class Masked(nn.Module):
    """A causal mask as it was before torch had bool."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x.masked_fill(self.mask == 0, 0.0)


def test_a_mask_of_bytes_is_no_weight_and_bytes_that_are_not_loaded_are_one():
    ones = torch.ones(8, 8, dtype=torch.uint8)
    with no_warning():
        dip.convert(beside_a_head(Masked(ones.tril())))
        dip.convert(beside_a_head(Masked(ones.triu(1).contiguous())))
    for weight in (ones * 7, ones * 0, ones.to("meta")):
        with pytest.warns(dip.DIPConversionWarning, match=r"odd \(Masked\): 50\.0%"):
            dip.convert(beside_a_head(Masked(weight)))


class PositionalEncoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(17, 8))

    def forward(self, x):
        return x + self.weight


class Bias(nn.Module):
    """A table that takes no input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self):
        return self.weight


def test_what_is_no_weight_is_not_named():
    class Quiet(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.positions = nn.Parameter(torch.randn(1, 9, 8))
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.table = nn.Parameter(torch.randn(7, 3))
            self.place = nn.Parameter(torch.zeros(17, 8))
            self.words, self.norm = nn.Embedding(99, 8), nn.LayerNorm([4, 8])
            self.head, self.lazy = nn.Linear(8, 999), nn.LazyBatchNorm1d()
            self.encoder, self.bias = PositionalEncoding(), Bias()

    dip.convert(Quiet())
    with pytest.raises(ValueError, match="let through"):
        dip.convert(nn.Sequential(Experts()))
    # types that were left out on purpose are not named
    dip.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), types=(nn.Linear,))


def test_a_model_of_another_packages_layers_is_refused_with_the_way_out():
    kind = type("Linear", (PygLinear,), {"__module__": "graphs.dense"})
    model = nn.Sequential(kind(8, 8), nn.ReLU(), kind(8, 8))
    said = r"2 module\(s\) .*: 0, 2 \(graphs's Linear, 2 of them\): 100.0% .*before=\['0', '2'\]"
    with pytest.raises(ValueError, match=said):
        dip.convert(model)
    with pytest.raises(ValueError, match=r"let through$"):
        dip.convert(model, exclude=["*"])
    dip.convert(model, before=["0", "2"], batches=[X])
    assert list(dip_layers(model)) == ["0", "2"]


class LazyKernel(nn.Module):
    """As torch_geometric's Linear(-1, ...): no class of torch's for lazy layers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.UninitializedParameter()

    def forward(self, x):
        if nn.parameter.is_lazy(self.weight):
            self.weight.materialize((8, x.shape[-1]))
            nn.init.ones_(self.weight)
        return F.linear(x, self.weight)


@pytest.mark.parametrize("make", [LazyKernel, lambda: nn.LazyConvTranspose2d(3, 3)])
def test_layers_without_a_first_batch_are_named(make):
    model = nn.ModuleDict({"odd": make(), "head": nn.Linear(8, 8)})
    with pytest.warns(dip.DIPConversionWarning, match=r"odd \(Lazy\w*\): lazy: run one batch"):
        dip.convert(model)
    dip.convert(nn.ModuleDict({"odd": make(), "head": nn.Linear(8, 8)}), exclude=["odd"])
    linear = nn.ModuleDict({"odd": make(), "head": nn.Linear(8, 8)})
    dip.convert(linear, filter=lambda module, name: isinstance(module, nn.Linear))
    assert list(dip_layers(linear)) == ["head"]


# ---- weights that are read past their layer ------------------------------------------------------


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.inner, self.called = (nn.Linear(8, 8) for _ in range(3))
        self.handed, self.looked = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.zeros_(self.qkv.weight)
        self.qkv.requires_grad_(False)  # as a low-rank adapter freezes it
        self.inner.requires_grad_(False)

    def step(self, layer, x):
        return layer(x)

    def forward(self, x):
        x = F.linear(x, self.qkv.weight, self.qkv.bias)
        x = (lambda x: F.linear(x, self.inner.weight))(x)
        x = self.called(x.to(self.called.weight.dtype)) + F.linear(x, self.called.weight)
        x = self.step(self.handed, x) + self.handed.weight.sum()
        return self.looked(x) if self.looked.weight.shape[0] else x


class Inherits(Reads):
    pass


@pytest.mark.parametrize("kind", [Reads, Inherits])
def test_a_layer_that_its_parent_only_reads_is_named_and_left_alone(kind):
    said = rf"qkv \(Linear\): {kind.__name__} reads its weight"
    with pytest.warns(dip.DIPConversionWarning, match=said) as caught:
        model = dip.convert(nn.Sequential(kind()))
    assert "2 module(s)" in str(caught[0].message) and "0.inner (Linear)" in str(caught[0].message)
    assert [n.rpartition(".")[2] for n in dip_layers(model)] == ["called", "handed", "looked"]
    assert dip.check(model, X)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.qkv(x))


class Reimplements(Calls):
    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))


class Adds(Calls):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.qkv.weight)


class AddsByName(Calls):
    def forward(self, x):
        return Calls.forward(self, x) + F.linear(x, self.qkv.weight)


class AddsElsewhere(Calls):
    def forward(self, x):
        return self.inner(x) + F.linear(x, self.qkv.weight)

    def inner(self, x):
        return super().forward(x)


class AddsLater(Calls):
    def forward(self, x):
        late = lambda: sum(Calls.forward(self, x) for _ in range(1))  # noqa: E731
        return late() + F.linear(x, self.qkv.weight)


class Steps(Reimplements):
    def step(self, x):
        return self.forward(x).sum()


def test_a_method_that_a_subclass_replaces_calls_nothing():
    with pytest.warns(dip.DIPConversionWarning, match=r"qkv \(Linear\): Steps reads"):
        assert [*dip_layers(dip.convert(Steps()))] == ["out"]
    with pytest.warns(dip.DIPConversionWarning, match=r"qkv \(Linear\): Reimplements reads"):
        assert [*dip_layers(dip.convert(Reimplements()))] == ["out"]
    for kind in (Adds, AddsByName, AddsElsewhere, AddsLater):
        with no_warning():
            assert [*dip_layers(dip.convert(kind()))] == ["qkv", "out"]


class LowRank(nn.Module):
    """A parametrisation with weights of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))

    def forward(self, weight):
        return weight + (self.a @ self.b)[..., None]


def test_a_parametrisation_is_counted_with_the_module_whose_weight_it_computes():
    conv = nn.ConvTranspose1d(8, 8, 3)
    nn.utils.parametrize.register_parametrization(conv, "weight", LowRank())
    said = r"^convert: 1 module.*\n.* 1 \(ParametrizedConvTranspose1d\): 77\.8%.*original, weight\.0\.a"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(nn.Sequential(nn.Linear(8, 8), conv))


class Vocoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList(weight_norm(nn.ConvTranspose1d(8, 8, 4, 2, 1)) for _ in range(2))
        self.convs = nn.ModuleList(weight_norm(nn.Conv1d(8, 8, 3, padding=1)) for _ in range(2))

    def forward(self, x):
        for up, conv in zip(self.ups, self.convs):
            x = conv(up(x).relu())
        return x


def test_a_pattern_for_parametrised_layers_passes_over_what_computes_their_weights():
    x = torch.randn(2, 8, 5)
    with pytest.raises(ValueError, match=r"4 module\(s\) cannot be converted: .*before") as raised:
        dip.convert(Vocoder())
    for said in ("convs.* (ParametrizedConv1d, 2 of them)", "before=['ups.*'] with batches"):
        assert said in str(raised.value)
    model = dip.convert(Vocoder(), before=["ups.*", "convs.*"], batches=[x])
    assert [*dip_layers(model)] == ["ups.0", "ups.1", "convs.0", "convs.1"]
    assert dip.check(model, x)


class Tied(nn.Module):
    """The decoder of an encoder's layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.linear(x, self.layer.weight.t())


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
        self.decoder = nn.Sequential(Tied(self.encoder[2]), nn.Tanh(), Tied(self.encoder[0]))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_a_layer_that_one_module_calls_and_another_reads_is_noised_where_it_is_called():
    said = r"2 module\(s\).*\n.*decoder\.2, decoder\.0 \(Tied, 2 of them\): it reads the weight"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        model = dip.convert(Autoencoder())
    assert list(dip_layers(model)) == ["encoder.0", "encoder.2"]
    assert dip.check(model, X)
    with no_warning(dip.DIPConversionWarning):
        model = dip.convert(Autoencoder(), **at("decoder.0", "decoder.2"))
    assert list(dip_layers(model)) == ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]
    assert dip.check(model, X)
    with pytest.warns(dip.DIPConversionWarning, match=r"layer \(Linear\): Tied reads its weight"):
        dip.convert(nn.ModuleList([Tied(nn.Linear(8, 8)), nn.Linear(8, 8)]))


def test_the_way_out_for_what_reads_a_convolutions_weight_says_how_to_name_its_channels():
    channels = r"; \{pattern: dimension\} says"
    conv = nn.Conv2d(8, 8, 1)
    for model in ([Tied(nn.Conv2d(8, 8, 1))], [Tied(conv), conv]):
        with pytest.warns(dip.DIPConversionWarning, match=rf"reads .*{channels}"):
            dip.convert(nn.ModuleList([*model, nn.Linear(8, 8)]))


class NormLinear(nn.Sequential):
    """timm's: nn.Sequential calls the layer, and what fuses the two for export reads its weight."""

    def __init__(self):
        super().__init__()
        self.add_module("norm", nn.BatchNorm1d(8))
        self.add_module("linear", nn.Linear(8, 8))

    def fuse(self):
        return self.linear.weight * self.norm.weight


def test_a_sequential_calls_the_layers_whose_weight_its_methods_read():
    with no_warning(dip.DIPConversionWarning):
        model = dip.convert(nn.Sequential(NormLinear()))
    assert list(dip_layers(model)) == ["0.linear"]
    assert dip.check(model, X)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13")
def test_torchs_fused_loss_is_named_and_can_be_noised_as_a_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.loss = nn.Linear(8, 8), nn.LinearCrossEntropyLoss(8, 4)

        def forward(self, x, y):
            return self.loss(self.body(x), y)

    y = torch.arange(6) % 4
    said = r"loss\.linear \(Linear\): LinearCrossEntropyLoss reads"
    with pytest.warns(dip.DIPConversionWarning, match=said):
        model = dip.convert(Model())
    assert dip.check(model, (X, y)).checked == 1
    dip.convert(model, before=["loss"], exclude=["loss.linear"], batches=[{"x": X, "y": y}])
    assert dip.check(model, (X, y)).checked == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [4, 9]),
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
    ],
)
def test_torchs_own_modules_call_what_is_converted(make):
    model = dip.convert(make())
    y = torch.tensor([0, 5, 10, 15, 1, 19])
    batch = (X, y) if isinstance(model, nn.AdaptiveLogSoftmaxWithLoss) else (X[None], X[None])
    assert dip.check(model, batch)


# ---- variances by name ---------------------------------------------------------------------------


def test_the_first_pattern_that_matches_a_layers_name_sets_its_variance():
    model = dip.convert(
        Net(),
        {"blocks.0.*": 0.04, "*.router": 0.09, "head": torch.arange(1.0, 9.0), "*": 0.01},
        **ALL,
    )
    sigmas = [layer.variance.sigma for layer in dip_layers(model).values()]
    assert [s[0].item() for s in sigmas] == pytest.approx([0.2, 0.2, 0.3, 0.1, 1.0])
    torch.testing.assert_close(sigmas[-1].square(), torch.arange(1.0, 9.0))
    model.head.reset_parameters()
    torch.testing.assert_close(model.head.variance.sigma.square(), torch.arange(1.0, 9.0))
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    dip.convert(encoder, {"*.in_proj": 0.04, "*.out_proj": 0.25, "*": 0.01})
    sigma = {row.name.rpartition(".")[2]: row.sigma_mean for row in dip.summary(encoder)}
    want = {"in_proj": 0.2, "out_proj": 0.5, "linear1": 0.1, "linear2": 0.1}
    assert sigma == pytest.approx(want)
    cross = dip.convert(nn.MultiheadAttention(8, 2, kdim=4), {"q_proj": 0.04, "*": 0.01})
    assert [row.sigma_mean for row in dip.summary(cross)] == pytest.approx([0.1, 0.2, 0.1, 0.1])


# ---- features and where they are ----------------------------------------------------------------


def test_noise_before_a_convolution_is_one_for_each_channel_unless_another_dimension_is_given():
    parametrised = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 3, 3))
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), parametrised)
    model = dip.convert(net, before=["0", "1"], batches=[torch.randn(2, 3, 4, 4)])
    assert [row.features for row in dip.summary(model)] == [3, 4]
    assert model.train()(torch.randn(2, 3, 5, 6)).isfinite().all()  # any other width
    image = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    dip.convert(image, before=["0"], batches=[torch.randn(3, 4, 4)])  # without a batch
    assert [row.features for row in dip.summary(image)] == [3]
    rows = nn.Sequential(nn.Conv1d(3, 4, 1))
    dip.convert(rows, before={"0": -1}, batches=[torch.randn(2, 3, 7)])
    assert [row.features for row in dip.summary(rows)] == [7]


def test_noise_before_what_has_no_weights_lies_where_its_input_does():
    """As on a GPU; the meta device stands for one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to("meta")
    dip.convert(model, before=["1"], batches=[X.to("meta")])
    assert model[1].log_variance.is_meta and not model[0].log_variance.is_meta


def test_what_before_already_noises_is_not_named():
    with no_warning(dip.DIPConversionWarning):
        model = dip.convert(nn.Sequential(Reads(), Reads()), **at("0", "1"))
    assert dip.check(model, X)


class Mixture(nn.Module):
    """Routes by a layer that reads the block's own input, and has another that does not."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(8, 3), nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        rows = x.view(-1, 8)
        weights = self.gate(rows).softmax(-1)
        return self.out(torch.einsum("ne,nk,ekd->nd", weights, rows, self.experts)).view(x.shape)


@pytest.mark.parametrize(("device", "asked"), [("cpu", []), ("meta", []), ("cpu", ["1.gate"])])
def test_a_layer_that_would_get_the_noise_of_before_and_its_own_is_named(device, asked):
    with torch.inference_mode(device == "cpu"):  # which keeps no record of views
        batches = [X.view(2, 3, 8).to(device).clone()]
    given = {"before": ["1"], "batches": batches}
    said = r"convert: 1 module\(s\) would get noise twice: 1.gate\. "
    with pytest.warns(dip.DIPConversionWarning, match=said) as caught:
        dip.convert(
            nn.Sequential(nn.Linear(8, 8), Mixture()).to(device),
            before=["1", *asked],
            batches=batches,
        )
    assert len(caught) == 1
    with no_warning():
        model = nn.Sequential(nn.Linear(8, 8), Mixture()).to(device)
        dip.convert(model, exclude=["1.gate"], **given)
    assert list(dip_layers(model)) == ["0", "1", "1.out"]


def test_a_class_keeps_its_own_private_methods():
    class Private(Router):
        def _call(self, x):
            return F.linear(x, self.weight)

        def _plain(self, x):
            return self._call(x)

        def forward(self, x):
            return self._plain(x)

    plain = Private()
    y = plain(X)
    dip.convert(plain, before=[""], batches=[X])
    assert torch.equal(plain.eval()(X), y) and not torch.equal(plain.train()(X), y)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.bfloat16).float(),
        lambda x: x.clone().view(-1, 8),
        lambda x: x[:, 1:],
        lambda x: x[:, 0].double().float(),
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.reshape(-1, 8).clone().double().contiguous(),
    ],
)
def test_a_part_a_copy_or_a_cast_hides_no_noise_that_would_come_twice(read, device):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.rest = nn.Linear(8, 3), nn.Linear(8, 8)

        def forward(self, x):
            u = read(x)
            return self.gate.to(u.dtype)(u), self.rest(x * 2), self.rest((x * 1).clone())

    batch = X.view(2, 3, 8).to(device)
    with pytest.warns(dip.DIPConversionWarning, match="get noise twice: 0.gate\\. "):
        dip.convert(nn.Sequential(Reads()).to(device), before=["0"], batches=[batch])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_another_part_of_the_tensor_that_a_module_gets_has_no_noise(dim):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, q, k):
            return self.a(q * 2) + self.b(k)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = Heads()

        def forward(self, x):
            return self.heads(*x.chunk(2, dim))

    x = torch.randn(4, 4, 16 if dim == 2 else 8)
    with no_warning(dip.DIPConversionWarning):
        dip.convert(Both(), before=["heads"], batches=[x])


@pytest.mark.parametrize("options", [{"before": ["1"]}, {"place": "producer"}])
def test_what_a_module_compiles_by_itself_is_probed_uncompiled(options):
    class Compiles(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.rest = nn.Linear(8, 8), nn.Linear(8, 8)
            self.run = torch.compile(self.both, backend="eager", fullgraph=True)

        def both(self, x):
            return self.rest(2 * x) + self.gate(x)

        def forward(self, x):
            return self.run(x)

    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(8), Compiles())
    model(X)
    if "before" in options:
        with pytest.warns(dip.DIPConversionWarning, match="get noise twice: 1.gate\\. "):
            dip.convert(model, batches=[X], **options)
    else:
        dip.convert(model, batches=[X], **options)
        assert "reads it" in str(dip.summary(model).plan)
    dip.calibrate(model, [X])
    assert dip.check(model, X)
    assert torch.isfinite(model.train()(X)).all()
