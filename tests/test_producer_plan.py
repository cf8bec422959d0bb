"""convert(place="producer"): who reads what, what moves, what is left and why; the law is that of
share=."""

import copy
import pickle
import random
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_support import assert_plain
from plan_support import Net, X, having, left, moved, net
from torch import nn
from warning_support import no_warning

import dipkernels as dip
from dipkernels import functional
from dipkernels.models.marks import noised_where_made
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import dip_layers
from dipkernels.noise.contexts import fixed_noise, noise_off

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# ---- the law -------------------------------------------------------------------------------------


def test_a_function_that_is_compiled_inside_the_model_is_watched_as_it_is():
    class Compiled(nn.Sequential):
        scaled = staticmethod(torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True))

        def forward(self, x):
            return self[2](self[1](self.scaled(self[0](x))))

    model = Compiled(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    plan = dip.producer_plan(model, [X])
    assert [(move.producer, list(move.layers)) for move in plan.moved] == [("1", ["2"])]


class LayerNorm2d(nn.LayerNorm):
    """timm's and torchvision's: nn.LayerNorm over the channels."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)
        return y * self.weight[:, None, None]


class WiderRMSNorm(ChannelRMSNorm):
    """Over the channels and something else."""

    def __init__(self, width, dims):
        super().__init__(width)
        self.dims = dims

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(self.dims, keepdim=True) + self.eps)
        return y * self.weight.view(-1, *[1] * (x.ndim - 2))


@pytest.mark.parametrize(
    "layer, dims",
    [(nn.Conv1d, (1, 2)), (nn.Conv2d, (1, 3)), (nn.Conv2d, (1, 2)), (nn.Conv3d, (1, 3, 4))],
)
def test_a_norm_over_more_than_the_channels_stays(layer, dims):
    model = nn.Sequential(layer(3, 4, 1), WiderRMSNorm(4, dims), layer(4, 2, 1))
    images = torch.randn(2, 3, *[5] * (model[0].weight.ndim - 2))
    plan = dip.producer_plan(model, [images])
    assert "WiderRMSNorm is not a LayerNorm" in left(plan)["2"]


@pytest.mark.parametrize("name, moves", [("ChannelRMSNorm2d", 1), ("ChannelRMS", 0)])
def test_a_norm_of_no_class_of_torchs_is_known_by_its_name(name, moves):
    norm = type(name, (ChannelRMSNorm,), {})(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1))
    assert len(dip.producer_plan(model, [torch.randn(2, 3, 5, 5)]).moved) == moves


def test_convolutions_and_attention_draw_the_noise_of_their_own_layers():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
    convolutions = nn.Sequential(*first, nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1))
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    over_channels = LayerNorm2d(6), nn.Conv2d(6, 4, 3), ChannelRMSNorm(4), nn.Conv2d(4, 2, 1)
    for plain, x, pairs in (
        (convolutions, IMAGES, {"2": "3", "4": "5"}),
        (nn.Sequential(nn.Conv2d(3, 6, 3), *over_channels), IMAGES, {"1": "2", "3": "4"}),
        (attention, X, {"norm1": "self_attn.in_proj", "norm2": "linear1"}),
    ):
        at_producer = dip.convert(copy.deepcopy(plain), 0.25, place="producer", batches=[x])
        at_layers = dip.convert(copy.deepcopy(plain), 0.25)
        numbers = {name: layer.number for name, layer in dip_layers(at_layers).items()}
        assert {pairs.get(name, name) for name in dip_layers(at_producer)} == set(numbers)
        assert moved(dip.summary(at_producer).plan).keys() == pairs.keys()
        for name, layer in dip_layers(at_producer).items():
            layer.number = numbers[pairs.get(name, name)]
        results = []
        for model in (at_producer, at_layers):
            with fixed_noise(3):
                y = model(x)
            y.square().sum().backward()
            slopes = {name: model.get_parameter(name).grad for name, _ in plain.named_parameters()}
            slopes |= {
                layer.number: layer.log_variance.grad for layer in dip_layers(model).values()
            }
            results.append({"y": y, **slopes})
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    """Two layers on one norm, one of them asked for by an argument."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, second=False):
        x = self.norm(x)
        return self.b(x) if second else self.a(x)


def test_a_layer_that_the_batches_do_not_reach_is_named_at_once():
    said = r"not reach 1 layer\(s\).*: b\. A layer that .* reads its weight without calling it, "
    with pytest.warns(dip.DIPConversionWarning, match=said):
        dip.convert(Experts(), place="producer", batches=[X])
    with no_warning(dip.DIPConversionWarning):
        dip.convert(Experts(), place="producer", batches=[X], exclude=["b"])
        both = [X, {"x": X, "second": True}]
        model = dip.convert(Experts(), place="producer", batches=both)
    assert list(dip_layers(model)) == ["a", "b"]  # which one reads depends on the call


def test_a_layer_behind_a_producer_is_plain_and_reads_one_draw():
    model = dip.convert(net(), 0.25, place="producer", batches=[X])
    assert type(model.a) is nn.Linear and list(dip_layers(model)) == ["stem", "norm", "act"]
    assert [row.type for row in dip.summary(model)] == ["DIPLinear", "DIPLayerNorm", "DIPGELU"]
    model.stem.eval()
    read = []
    for layer in (model.a, model.b):
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with fixed_noise(3):
        model(X)
    with noise_off():
        model(X)
    assert read[0].data_ptr() == read[1].data_ptr()
    assert (read[0] - read[2]).std().item() == pytest.approx(0.5, rel=0.2)


# ---- the plan ------------------------------------------------------------------------------------


def test_the_plan_prints_what_moves_and_what_stays():
    plan = dip.producer_plan(net(), [X])
    assert str(plan).splitlines() == [
        "plan: 3 of 4 projections move into 2 module(s) that make their input",
        "  moved  norm (LayerNorm) -> a, b",
        "  moved  act (GELU) -> head",
        "  left   stem: it reads the network's own input",
    ]
    model = dip.convert(net(), place="producer", batches=X)
    rows = dip.summary(model)
    assert rows.plan == plan and str(rows).endswith(str(plan))
    assert dip.summary(pickle.loads(pickle.dumps(model))).plan == plan
    assert dip.summary(dip.convert(net())).plan is None


def forward(method):
    return lambda: net(type("Variant", (Net,), {"forward": method}))


def between(method):
    return lambda: net(type("Variant", (Net,), {"between": method}))


def residual(self, x):
    y = self.norm(self.stem(x))
    return self.head(self.act(self.a(y) + self.b(y))) + y[..., :4]


def returned(self, x):
    y = self.norm(self.stem(x))
    return self.head(self.act(self.a(y) + self.b(y))), y


def returned_inside(self, x):
    """As the mean of a policy's distribution."""
    y = self.norm(self.stem(x))
    return self.head(self.act(self.a(y) + self.b(y))), types.SimpleNamespace(mean=y)


def kept(self, x):
    self.last = self.norm(self.stem(x))
    return self.head(self.act(self.a(self.last) + self.b(self.last)))


def made_once(self, x):
    """What an earlier pass made comes from outside of this one."""
    if not hasattr(self, "last"):
        self.last = self.norm(self.stem(x))
    return self.head(self.act(self.a(self.last) + self.b(self.last)))


def twice(self, x):
    y = self.norm(self.stem(x))
    return self.head(self.act(self.a(y) + self.a(y) + self.b(y)))


def two_places(self, x):
    y = self.norm(self.a(self.norm(x))[..., :8])
    return self.head(self.act(self.b(y)))


def jitter(self, y):
    return y * torch.ones(8) if self.training else y


def on_the_host(self, y):
    y.tolist()
    return y


def functional_gelu(self, x):
    y = self.norm(self.stem(x))
    return self.head(F.gelu(self.a(y) + self.b(y)))


def functional_gelu_dropped(self, x):
    y = self.norm(self.stem(x))
    return self.head(F.dropout(F.gelu(self.a(y) + self.b(y)), 0.1, self.training))


def two_dimensions(self, x):
    y = self.norm(self.stem(x))
    return self.head(self.act(self.a(y.transpose(-1, -2)) + self.b(y)))


def another_dimension(self, x):
    y = self.norm(self.stem(x)).transpose(-1, -2)
    return self.head(self.act(self.a(y) + self.b(y)))


def other_features(self, x):
    y = self.norm(self.stem(x)).unflatten(-1, (2, 4)).mT.flatten(-2)
    return self.head(self.act(self.a(y) + self.b(y)))


def in_place(self, y):
    return y.add_(1)


def through_its_input(self, x):
    """The activation works in place, and what it returns is dropped."""
    y = self.norm(self.stem(x))
    h = self.a(y) + self.b(y)
    self.act(h)
    return self.head(h)


def nested(self, y):
    offsets = torch.tensor([0, 3, 24])
    return torch.nested.nested_tensor_from_jagged(y.flatten(0, 1), offsets)


def nested_and_padded(self, y):
    return torch.nested.as_nested_tensor(list(y), layout=torch.strided).to_padded_tensor(0.0)


def changed_input(self, x):
    """relu keeps what it makes, its twin what it reads."""
    y = self.norm(self.stem(x))
    h = self.a(y) + self.b(y)
    y = self.head(self.act(h))
    h.add_(1)
    return y


def past_the_norms_hooks(self, x):
    h = self.stem(x)
    y = self.norm(h)
    return self.head(self.act(self.a(y) + self.b(y) + self.norm.forward(h).mean()))


def past_a_layers_hooks(self, x):
    h = self.stem(x)
    y = self.norm(h)
    return self.head(self.act(self.a(y) + self.a.forward(h) + self.b(y)))


def added_to_its_output(layer):
    model = net()
    getattr(model, layer).register_forward_hook(lambda module, args, out: out + args[0].mean())
    return model


def with_gradients(self, x):
    y = self.norm(self.stem(x))
    more = y.mean() if torch.is_grad_enabled() else 0
    return self.head(self.act(self.a(y) + self.b(y))) + more


def without_gradients(self, x):
    with torch.no_grad():
        y = self.norm(self.stem(x))
    return self.head(self.act(self.a(y) + self.b(y)))


def other_precision(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = self.norm(self.stem(x).float())
    return self.head(self.act(self.a(y) + self.b(y)))


def without_autocast(self, x):
    y = self.norm(self.stem(x).float())
    with torch.autocast("cpu", enabled=False):
        y = self.a(y) + self.b(y)
    return self.head(self.act(y))


class OneStays(Net):
    """A part that stays in eval mode, as a frozen one does."""

    stays = "norm"

    def train(self, mode=True):
        super().train(mode)
        getattr(self, self.stays).eval()
        return self


def repeated_rows(self, y):
    return y[:, :1].expand(-1, 5, -1)


class Callable(nn.Module):
    """An activation that no kernel knows."""

    def forward(self, x):
        return x.sigmoid()


class OwnSlope(nn.Module):
    """relu, whose derivative is another function's."""

    def forward(self, x):
        return x + (x.relu() - x).detach()


class OwnNorm(nn.Module):
    """RMSNorm, and what a subclass does with its scale and its output."""

    def __init__(self, slope=lambda scale: scale, out=lambda module, y: y):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5
        self.slope, self.out = slope, out

    def forward(self, x):
        scale = self.slope(torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
        return self.out(self, self.weight * (x * scale))


def hooked():
    model = net()
    model.norm.register_forward_hook(lambda module, args, out: out + 1)
    return model


class NormActivation(nn.Sequential):
    """torchvision's Conv2dNormActivation: named after a norm, it may hold none."""


def tied():
    model = net()
    model.again = model.norm
    return model


def mixed():
    model = net().bfloat16()
    model.norm.float()
    return model


def dropped(self, y):
    return F.dropout(y, 0.1, self.training)


def dropped_in_eval_mode_too(self, y):
    return F.dropout(y, 0.1)


@pytest.mark.parametrize(
    "make, layer, reason",
    [
        (forward(residual), "a", r"add in the model itself \(Variant\) reads it"),
        (forward(returned), "a", "the model returns it"),
        (forward(returned_inside), "a", "the model, a hook or its output keeps it"),
        (forward(kept), "b", "the model, a hook or its output keeps it"),
        (forward(made_once), "a", "it reads the network's own input"),
        (forward(twice), "a", "a layer reads it twice in a pass"),
        (forward(two_places), "b", "called in several places, and different layers read them"),
        (forward(two_dimensions), "b", "its layers read it along different dimensions"),
        (forward(another_dimension), "b", "it is a norm over the last dimension"),
        (forward(other_features), "b", r"a \(Linear\) reads it with other features"),
        (
            forward(functional_gelu),
            "head",
            r"a call of gelu in the model itself, not by a module: use nn\.GELU",
        ),
        (
            forward(functional_gelu_dropped),
            "head",
            "in more than one place: dropout in the model itself and gelu in the model itself",
        ),
        (between(jitter), "a", "mul in the model itself"),
        (between(on_the_host), "a", "tolist in the model itself"),
        (between(in_place), "a", "add_? in the model itself"),
        (between(repeated_rows), "a", "with other features, or some entries twice"),
        (between(dropped), "b", "dropout in the model itself"),
        (between(dropped_in_eval_mode_too), "b", "its input is made by dropout in the model"),
        (between(torch.detach), "b", "detach in the model itself"),
        (forward(past_the_norms_hooks), "a", "called in several places, and different layers"),
        (forward(past_a_layers_hooks), "a", "in more than one place: layer_norm .* linear in stem"),
        (lambda: added_to_its_output("a"), "b", "mean in the model itself"),
        (forward(with_gradients), "a", "mean in the model itself"),
        (forward(without_gradients), "a", r"a \(Linear\) reads it outside of its no_grad or"),
        (forward(other_precision), "b", r"\(Linear\) reads it outside of its no_grad or autocast"),
        (forward(without_autocast), "b", r"\(Linear\) reads it outside of its no_grad or autocast"),
        (lambda: net(OneStays), "a", r"one of it and a \(Linear\) stays in eval mode"),
        (
            lambda: net(type("Stays", (OneStays,), {"stays": "b"})),
            "a",
            r"one of it and b \(Linear\) stays in eval mode",
        ),
        (having(norm=OwnNorm(slope=torch.detach)), "a", "OwnNorm is not a LayerNorm"),
        (having(norm=OwnNorm(out=dropped)), "a", "OwnNorm is not a LayerNorm"),
        (between(nested), "a", "it reads the network's own input"),
        (between(nested_and_padded), "a", "to_padded_tensor in the model itself"),
        (
            having(act=nn.Sequential(nn.GELU(), nn.Dropout(0.1))),
            "head",
            r"dropout in act\.1 \(Dropout\) reads it",
        ),
        (having(act=Callable()), "head", "Callable is not a LayerNorm, RMSNorm or activation"),
        (having(act=nn.LeakyReLU()), "head", "LeakyReLU is not a LayerNorm"),
        (having(act=nn.PReLU()), "head", r"prelu in act \(PReLU\): .* that the kernels know"),
        (
            having(act=NormActivation(nn.GELU(), nn.Linear(12, 12))),
            "head",
            r"made by linear in act\.1 \(Linear\)",
        ),
        (having(act=nn.ReLU6()), "head", "ReLU6 is not a LayerNorm"),  # relu below 6
        (having(act=nn.Hardtanh(0, 1e5)), "head", "Hardtanh is not a LayerNorm"),
        (having(act=OwnSlope()), "head", "OwnSlope is not a LayerNorm"),
        (
            having(forward(through_its_input), act=nn.ReLU(inplace=True)),
            "head",
            r"head \(Linear\) reads what it wrote into its input, in place",
        ),
        (
            having(forward(changed_input), act=nn.ReLU()),
            "head",
            r"add_ in the model itself \(Variant\) changes its input, in place",
        ),
        (having(norm=nn.LayerNorm((8, 8))), "a", r"a norm over several dimensions, \(8, 8\)"),
        (having(norm=nn.GroupNorm(1, 8)), "a", "GroupNorm is not a LayerNorm"),
        (hooked, "a", "it has hooks"),
        (tied, "a", "it is tied, 2 names"),
        (mixed, "a", r"mixed types: \['torch.bfloat16', 'torch.float32'\]"),
    ],
)
def test_what_cannot_move_is_left_and_named(make, layer, reason):
    model = make()
    # square, so that a layer may read along either dimension
    x = torch.randn(3, 8, 8).to(model.stem.weight.dtype)
    found = left(dip.producer_plan(model, [x]))
    assert re.search(reason, found[layer]), found
    dip.convert(model, place="producer", batches=[x])
    assert isinstance(model.get_submodule(layer), DIPLinear)


def test_layers_outside_of_autocast_train_as_in_the_plain_network():
    @torch.autocast("cpu", enabled=False)
    def apart(self, x):
        return Net.forward(self, x.float())

    for its, count in ((without_autocast, 1), (apart, 3)):
        model = dip.convert(forward(its)(), place="producer", batches=[X])
        assert sum(len(row.layers) for row in dip.summary(model).plan.moved) == count
        with torch.autocast("cpu", torch.bfloat16):
            model(X).float().sum().backward()


def test_one_example_hides_no_entry_that_a_batch_reads_again():
    def across(self, y):
        return y[:1].expand_as(y)

    found = left(dip.producer_plan(between(across)(), [X[:1]]))
    assert "expand_as in the model itself" in found["a"] and found["b"] == found["a"]


class Images(nn.Module):
    """A convolution behind a norm over its channels, whose output is read as one row."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv, self.head = norm, nn.Conv2d(3, 2, 3), nn.Linear(72, 4)

    def forward(self, x):
        return self.head(self.conv(self.norm(x)).view(len(x), -1))


class Rows(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.head = norm, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(x.transpose(0, 1)).transpose(0, 1).view(-1, 8))


@pytest.mark.parametrize("kind, x", [(Images, IMAGES), (Rows, X)])
def test_an_own_norm_leaves_its_output_in_memory_as_it_was(kind, x):
    """An own LayerNorm is a chain of operations, each of which keeps its input's strides."""
    dim = 1 if kind is Images else -1

    class Norm(nn.Module):
        eps = 1e-5

        def forward(self, x):
            centred = x - x.mean(dim, keepdim=True)
            return centred / (centred.square().mean(dim, keepdim=True) + self.eps).sqrt()

    model = kind(Norm())
    want = model(x)
    dip.convert(model, 1e-6, place="producer", batches=[x])
    assert list(moved(dip.summary(model).plan)) == ["norm"]
    torch.testing.assert_close(model(x), want, rtol=0.02, atol=0.02)
    # of several variances in one pass, as of an ensemble
    variances = {"norm.variance.log_variance": torch.full((2, x.shape[dim]), -20.0)}
    each = torch.vmap(lambda v: torch.func.functional_call(model, v, (x,)), randomness="different")
    torch.testing.assert_close(each(variances), torch.stack([want] * 2), rtol=0.02, atol=0.02)


def test_layers_that_torch_func_calls_stay_and_the_reason_says_so():
    class Forces(nn.Sequential):
        def forward(self, x):
            return torch.func.grad(lambda x: nn.Sequential.forward(self, x).sum())(x)

    model = Forces(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    plan = dip.producer_plan(model, [torch.randn(4, 8)])
    (row,) = plan.left
    assert not plan.moved and row.layers == ("0", "2", "4")
    assert row.reason == "torch.func calls it, which hides what makes its input"


class Reshaped(Net):
    """Views, copies and casts on the way, and one row of all."""

    def forward(self, x):
        y = self.norm(self.stem(x)).flatten(0, 1).t().contiguous().t()
        a = self.a(y.to(torch.float64).float()[None, :, None])
        h = a + self.b(y.unflatten(0, (3, -1))[:, 0])[:, None, None]
        return self.head(self.act(h).transpose(0, 1).reshape(-1, 12))


@pytest.mark.parametrize("kind", functional.ACTIVATIONS)
def test_another_packages_activation_is_known_by_what_it_computes(kind):
    forward = {"forward": lambda self, x: functional.ACTIVATIONS[kind](x)}
    model = having(act=type("Another", (nn.Module,), forward)())()
    dip.convert(model, place="producer", batches=[X])
    assert model.act.kind == kind and moved(dip.summary(model).plan)["act"] == ("head",)


def test_views_copies_casts_and_slices_are_followed():
    plan = dip.producer_plan(net(Reshaped), [X])
    assert moved(plan) == {"norm": ("a", "b"), "act": ("head",)}


class Permuted(nn.Module):
    """ConvNeXt's way: a norm over channels that come last, and convolutions whose channels do
    not."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(3), nn.Conv2d(3, 4, 1)
        self.act, self.out = nn.SiLU(), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.out(self.act(y).permute(0, 2, 3, 1))


class FirstToken(nn.Module):
    """A head that reads one row of what a norm makes, as in a ViT."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(8))
        self.mix, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.cat([0.1 * x.mean(1, keepdim=True) + self.first, x], 1)
        return self.head(self.norm(x + self.mix(x))[:, 0])


@pytest.mark.parametrize("place", ["alone", "inside", "copied"])
def test_calibrate_measures_what_the_layers_read(place):
    """Of a module that noises what it makes, too: not rows that none of them reads."""
    torch.manual_seed(0)
    plain = FirstToken()
    at_layers = dip.convert(copy.deepcopy(plain))
    at_producer = dip.convert(copy.deepcopy(plain), place="producer", batches=[X])
    if place == "inside":
        at_producer = dip.number_layers(nn.Sequential(at_producer))
    elif place == "copied":
        at_producer = pickle.loads(pickle.dumps(at_producer))
    want, got = (dip.calibrate(model, [X, X + 1]) for model in (at_layers, at_producer))
    for row, other in zip(got, want, strict=True):
        assert row.sigma_mean == pytest.approx(other.sigma_mean, rel=1e-5)
        assert row.ratio == pytest.approx(other.ratio, rel=1e-5)
    pulls = [next(iter(dip_layers(m).values())).variance.pull for m in (at_layers, at_producer)]
    assert torch.equal(*pulls)


def test_the_feature_dimension_is_followed_through_a_permutation():
    torch.manual_seed(0)
    model = dip.convert(Permuted(), 0.25, place="producer", batches=[IMAGES])
    assert moved(dip.summary(model).plan) == {"norm": ("conv",), "act": ("out",)}
    assert (model.norm.feature_dim, model.act.feature_dim) == (-1, -3)
    assert (model.norm.log_variance.numel(), model.act.log_variance.numel()) == (3, 4)
    model(IMAGES).sum().backward()
    assert bool(model.act.log_variance.grad.any())


@pytest.mark.parametrize("size", [5, 1])
def test_an_activation_of_a_single_channel_moves(size):
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 2, 1))
    images = IMAGES[..., :size, :size]
    dip.convert(model, 0.25, place="producer", batches=[images])
    assert moved(dip.summary(model).plan) == {"1": ("2",)}
    assert model[1].feature_dim == -3
    with fixed_noise(3):
        model(images).sum().backward()
    assert bool(model[1].log_variance.grad.any())


class Recurrent(Net):
    """One block called three times: its readers are the same each time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 8)

    def forward(self, x):
        for _ in range(3):
            x = super().forward(x)
        return x


def test_a_block_that_is_called_again_moves_and_draws_afresh():
    model = net(Recurrent)
    assert moved(dip.producer_plan(model, [X])) == {"norm": ("a", "b"), "act": ("head",)}
    dip.convert(model, 0.25, place="producer", batches=[X])
    seen = []
    model.a.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(torch.zeros_like(X))
    assert len(seen) == 3 and not torch.equal(seen[1] - seen[0], seen[2] - seen[1])


class Skipping(nn.Module):
    """LayerDrop: training skips blocks at random, and the head reads the norm of the last that
    ran."""

    def __init__(self, draw):
        super().__init__()
        self.blocks, self.head, self.draw = nn.ModuleList(map(block, range(4))), block(4), draw

    def forward(self, x):
        for layer in self.blocks:
            if not self.training or self.draw() < 0.5:
                x = layer(x)
        return self.head(x)


def block(_):
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


@pytest.mark.parametrize(
    "draw", [lambda: float(torch.rand([])), random.random, lambda: np.random.uniform()]
)
def test_what_training_skips_at_random_is_planned_alike_every_time(draw):
    plans = set()
    for seed in range(8):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        plans.add(dip.producer_plan(Skipping(draw), [X]))
    assert len(plans) == 1
    several = dip.producer_plan(Skipping(draw), [X] * 4)  # each is another draw
    assert "head.0" in left(several)


def test_the_probe_changes_nothing():
    torch.manual_seed(0)
    body = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()
    model = nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(8, 2)).train()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    x = X.flatten(0, 1)
    model(x).sum().backward()

    def everything():
        grads = [(p.grad, p.requires_grad) for p in model.parameters()]
        modules = [(type(m), m.training) for m in model.modules()]
        states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        return pickle.dumps([model.state_dict(), grads]), modules, states, random.getstate()

    before = everything()
    plan = dip.producer_plan(model, [x])
    assert "dropout in 3 (Dropout) reads it" in left(plan)["4"]
    assert everything() == before
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


def test_a_pass_that_fails_leaves_no_hook_and_no_mode():
    model = net().eval()
    with pytest.raises(RuntimeError):
        dip.convert(model, place="producer", batches=[X[..., :3]])
    for m in model.modules():
        assert not (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or m.training)
    assert all(p.requires_grad for p in model.parameters())
    assert not dip_layers(model) and torch.equal(model(X), net().eval()(X))


# ---- what convert's other arguments do -----------------------------------------------------------


def test_filter_exclude_types_share_and_variances_by_name():
    plan = dip.producer_plan(net(), [X], exclude=["b"])
    assert "linear in b (Linear) reads it" in left(plan)["a"]
    assert left(dip.producer_plan(net(), [X], exclude=["norm"]))["a"] == "it is excluded"
    assert "act" in moved(dip.producer_plan(net(), [X], filter=lambda module, name: name == "head"))
    producer = {"place": "producer", "batches": [X]}
    variances = {"norm": 0.04, "act": torch.full((12,), 0.09), "*": 1.0}
    model = dip.convert(net(), variances, **producer, share=[("a", "b")])
    sigma = {row.name: row.sigma_mean for row in dip.summary(model)}
    assert sigma == pytest.approx({"stem": 1.0, "norm": 0.2, "act": 0.3})
    model = dip.convert(forward(residual)(), **producer, share=[("a", "b")])
    assert model.a.share is model.b.share is not None  # what is left shares as asked
    model = dip.convert(net(), place="producer", batches=iter([X]), before=["norm"])
    assert type(model.norm).__name__ == "DIPLayerNorm" and not model.norm.noises_output
    assert isinstance(model.a, DIPLinear)


def at_producers(batches, **options):
    return {"place": "producer", "batches": batches, **options}


BY_NAME, WRONG_SIZE = {"norm": 1.0}, {"act": torch.ones(3), "*": 1.0}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"place": "output"}, r"place: expected one of \('input', 'producer'\), got 'output'"),
        (
            at_producers(None),
            "batches: expected a batch, on which place='producer' sees who reads what, got None",
        ),
        (at_producers([]), "batches: expected at least one batch"),
        (at_producers([X], init_variance=BY_NAME), "init_variance: expected a pattern for every"),
        (at_producers([X], init_variance=WRONG_SIZE), "init_variance: expected .*12"),
        (at_producers([X], num_samples=0), "num_samples"),
        ({"batches": [X]}, "batches: expected None without before"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(options, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        dip.convert(model, **options)
    assert not dip_layers(model)


def test_converting_again_gives_no_layer_its_noise_twice():
    model = dip.convert(net(), **at_producers([X]), filter=lambda module, name: name != "stem")
    assert list(dip_layers(model)) == ["norm", "act"]
    dip.convert(copy.deepcopy(model))
    dip.convert(model)
    assert list(dip_layers(model)) == ["stem", "norm", "act"]
    with pytest.raises(ValueError, match="3 layer"):
        dip.convert(model)


class ByHand(nn.Module):
    """A SwiGLU whose author wrote its noise."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = dip.DIPRMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.down = dip.DIPGatedActivation(8), nn.Linear(8, 8)
        self.gelu, self.head = dip.DIPActivation(8, "gelu"), nn.Linear(8, 2)

    def forward(self, x):
        h = self.norm(x)
        return self.head(self.gelu(self.down(self.act(self.gate(h), self.up(h)))))


def test_what_reads_a_producer_made_by_hand_gets_no_second_noise():
    model = ByHand()
    plan = dip.producer_plan(model, [X])
    rows = [(row.producer, row.layers) for row in plan.moved]
    assert rows == [("norm", ("gate", "up")), ("act", ("down",)), ("gelu", ("head",))]
    assert not plan.left
    want = [m for m in model.modules() if isinstance(m, dip.Variance)]
    dip.convert(model, place="producer", batches=[X])  # nothing is left to noise
    assert [m for m in model.modules() if isinstance(m, dip.Variance)] == want
    outer = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), model)
    dip.convert(outer, place="producer", batches=[X], init_variance={"0": 0.5})
    assert list(dip_layers(outer)) == ["0", "2.norm", "2.act", "2.gelu"]
    dip.calibrate(outer, [X])
    dip.check(outer, X)


@pytest.mark.parametrize("makers", [1, 2])
def test_no_second_noise_behind_a_dropout_or_two_producers_made_by_hand(makers):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.acts = nn.ModuleList(dip.DIPActivation(8, "gelu") for _ in range(makers))
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = self.up(self.norm(x))
            return sum(self.head(self.drop(act(h))) for act in self.acts)

    model = dip.convert(Mlp(), place="producer", batches=[X])
    assert moved(dip.summary(model).plan) == {"norm": ("up",), "acts.0": ("head",)}
    assert type(model.head) is nn.Linear


def test_an_adapter_put_around_a_plain_reader_is_not_noised_again():
    peft = pytest.importorskip("peft")
    model = dip.convert(net(), place="producer", batches=[X])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["a", "stem"]))
    dip.convert(adapted)
    names = {name.removeprefix("base_model.model.") for name in dip_layers(adapted)}
    assert names == {"stem", "norm", "act"}


def test_to_plain_copies_and_state_dicts():
    plain = net()
    model = dip.convert(copy.deepcopy(plain), 0.3, place="producer", batches=[X])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.load_state_dict(model.state_dict())
        with fixed_noise(1):
            assert torch.equal(again(X), model(X))
    assert {name.partition(".")[0] for name in dip.variances(model)} == {"stem", "norm", "act"}
    assert_plain(dip.to_plain(model), plain)
    assert torch.equal(model(X), plain(X))
    assert list(dip_layers(dip.convert(model))) == ["stem", "a", "b", "head"]


def test_check_names_a_producer_that_was_replaced():
    model = dip.convert(net(), place="producer", batches=[X])
    assert dip.check(model, X)
    model.norm = nn.LayerNorm(8)
    assert "was replaced since it was converted" in dip.check(model, X, strict=False).faults["norm"]
    model.act = nn.Identity()  # without weights, and its readers have no noise of their own
    assert list(dip.check(model, X, strict=False).faults) == ["norm", "act"]


def test_check_passes_a_layer_that_was_taken_out_beside_producers():
    """As timm's reset_classifier(0) does, for a layer whose input no module of the plan makes."""
    model = dip.convert(forward(functional_gelu)(), place="producer", batches=[X])
    model.head = nn.Identity()
    assert dip.check(model, X)


PLACES = pytest.mark.parametrize("options", [{}, at_producers([X])], ids=["input", "producer"])


@pytest.mark.parametrize("wrapped", [lambda model: model, torch.compile], ids=["", "compiled"])
@PLACES
@pytest.mark.parametrize(
    "head", [lambda: nn.Linear(12, 3), lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 3))]
)
def test_a_new_head_behind_a_producer_is_not_noised_again(options, head, wrapped):
    plain = net()
    model = dip.convert(wrapped(plain), **at_producers([X]), exclude=["stem"])
    plain.head = head()
    dip.convert(model, **options)
    assert list(dip_layers(plain)) == ["stem", "norm", "act"]
    assert moved(dip.summary(model, [X]).plan) == {"norm": ("a", "b"), "act": ("head",)}


class Heads(nn.Module):
    """A trunk and one head for each task."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 6), nn.GELU())
        self.heads = nn.ModuleList([nn.Linear(6, 2)])

    def forward(self, x, task=0):
        return self.heads[task](self.trunk(x))


def test_a_head_that_is_added_behind_a_producer_is_not_noised_twice_unsaid():

    def grown():
        model = dip.convert(net(Heads), **at_producers([X]))
        model.heads.append(nn.Linear(6, 2))
        return model

    with no_warning():
        model = dip.convert(grown(), **at_producers([{"x": X, "task": 1}]))
        assert list(dip_layers(model)) == ["trunk.0", "trunk.1"]
        # of a layer that was there at the first conversion is known what it reads
        dip.convert(dip.convert(net(), **at_producers([X]), exclude=["stem"]))
        dip.convert(nn.Sequential(grown().heads, nn.Linear(2, 2)))  # without the producer
        model = grown()
        model.trunk[1] = nn.GELU()  # nor is one left that draws
        dip.convert(model)
    for options, said in (
        ({}, r"^convert: 1 layer\(s\) that the model got after .*: heads\.1\. One"),
        (at_producers([X]), r"do not reach 1 layer\(s\), .*: heads\.1\. "),
    ):
        with pytest.warns(dip.DIPConversionWarning, match=said) as warned:
            dip.convert(grown(), **options)
        assert len(warned) == 1
    model = grown()
    model.more = nn.Linear(2, 2)
    # excluded at first: still nobody has watched it
    for options, said in (({"exclude": ["heads.1"]}, "more"), ({}, r"heads\.1")):
        with pytest.warns(dip.DIPConversionWarning, match=f"of their own: {said}\\. One"):
            dip.convert(model, **options)
    # in a new model around what is left of the first
    model = nn.Sequential(dip.convert(net(Heads), **at_producers([X])).trunk, nn.Linear(6, 2))
    with no_warning():
        assert list(dip_layers(dip.convert(copy.deepcopy(model), **at_producers([X])))) == [
            "0.0",
            "0.1",
        ]
    with pytest.warns(dip.DIPConversionWarning, match=r"of their own: 1\. One"):
        dip.convert(model)
    outer = nn.ModuleDict({"net": grown(), "new": nn.Linear(2, 2)})
    with pytest.warns(dip.DIPConversionWarning, match=r"of their own: net\.heads\.1\. One"):
        dip.convert(outer)


@PLACES
def test_a_producer_that_was_replaced_leaves_its_readers_to_the_next_conversion(options):
    model = dip.convert(net(), **at_producers([X]), exclude=["stem"])
    model.act = nn.SiLU()
    dip.convert(model, **options)
    assert list(dip_layers(model)) == ["stem", "norm", "act" if options else "head"]
    assert dip.check(model, X)
    with pytest.raises(ValueError, match="3 layer"):
        dip.convert(model)
    dip.to_plain(model)
    assert list(dip_layers(dip.convert(model))) == ["stem", "a", "b", "head"]


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.act, self.head = nn.GELU(), nn.Linear(8, 2)

    def forward(self, x):
        h = self.norm(x)
        return self.head(self.act(self.attn(h, h, h)[0]))


@PLACES
def test_an_attention_whose_producer_was_replaced_is_noised_again(options):
    plain = Attends()
    model = dip.convert(copy.deepcopy(plain), **at_producers([X]))
    assert list(dip_layers(model)) == ["norm", "attn.out_proj", "act"]
    with pytest.raises(ValueError, match="found none"):
        dip.convert(model)
    with pytest.raises(ValueError, match="found none"):
        dip.convert(copy.deepcopy(model.attn))  # in another model too
    model.norm = copy.deepcopy(plain.norm)
    with pytest.raises(ValueError, match="norm: was replaced"):
        dip.check(model, X)
    dip.convert(model, **options)
    parts = ["norm"] if options else ["attn.in_proj"]
    assert sorted(dip_layers(model)) == sorted([*parts, "attn.out_proj", "act"])
    assert dip.check(model, X)
    assert torch.equal(dip.to_plain(model)(X), plain(X))


def test_a_layer_left_out_when_its_producer_was_replaced_is_noised_later():
    model = dip.convert(net(), **at_producers([X]), exclude=["stem"])
    model.act = nn.SiLU()
    dip.convert(model, **at_producers([X]), exclude=["head"])
    assert list(dip_layers(model)) == ["stem", "norm"]
    assert list(dip_layers(dip.convert(model))) == ["stem", "norm", "head"]


@PLACES
@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_whose_producer_left_a_list_is_named_and_noised_again(options, copied):
    layers = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Flatten(1, 1), nn.Linear(8, 8)
    plain = nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 2))
    model = dip.convert(plain, **at_producers([X]))
    model = copy.deepcopy(model) if copied else model
    # Now the last layer has the name of the one that read the GELU, which 2 was, as is that one.
    del model[2:4]
    report = dip.check(model, X, strict=False)
    assert list(report.faults) == ["2"] and "left the model" in report.faults["2"]
    part = copy.deepcopy(model[2])
    dip.convert(model, **options)
    assert list(dip_layers(model)) == ["0", "2", "3"]
    assert dip.check(model, X)
    with pytest.raises(ValueError, match="found none"):  # it alone is known to read a producer
        dip.convert(part)


def test_a_producer_may_be_put_in_place_of_another():
    model = dip.convert(net(), **at_producers([X]), exclude=["stem"])
    model.act = copy.deepcopy(model.act)
    assert dip.check(model, X)
    assert list(dip_layers(dip.convert(model))) == ["stem", "norm", "act"]


def test_a_part_that_is_converted_forgets_no_producer_outside():
    model = dip.convert(net(), **at_producers([X]))
    model.head = nn.Sequential(model.head, nn.Linear(3, 2))
    dip.convert(model.head)
    assert noised_where_made(model)[model.head[0]] is model.act


def test_modules_that_are_compiled_one_by_one_keep_their_plan():
    model = dip.convert(net(), **at_producers([X]), exclude=["stem"])
    for name in ("act", "head"):
        setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    dip.convert(model, **at_producers([X]))
    assert list(dip_layers(model)) == ["stem", "norm", "act._orig_mod"]
    assert moved(dip.summary(model, [X]).plan) == {"norm": ("a", "b"), "act": ("head",)}
    found = noised_where_made(model)
    assert found[model.head._orig_mod] is model.act._orig_mod and found[model.a] is model.norm


def test_a_part_of_the_model_knows_that_its_layers_read_noise():
    model = dip.convert(net(), **at_producers([X]))
    for part in (model.head, copy.deepcopy(model.head), nn.Sequential(model.head, nn.ReLU())):
        with pytest.raises(ValueError, match="found none"):
            dip.convert(part)


def test_layers_that_an_insertion_renames_read_noise_as_before():
    layers = nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 8)
    model = dip.convert(nn.Sequential(*layers), **at_producers([X]))
    for _ in range(2):  # the second norm's layer has the name now that the first one's had
        model.insert(0, nn.Identity())
    with pytest.raises(ValueError, match="found none"):
        dip.convert(model)
    spreads = [row.ratio for row in dip.summary(model, [X])]
    assert len(spreads) == 2 and dip.check(model, X)


# ---- blocks of torch -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_layer(norm_first):
    torch.manual_seed(0)
    options = dict(dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), **options)
    model = dip.convert(copy.deepcopy(plain), 0.04, place="producer", batches=[X])
    plan = dip.summary(model).plan
    found = moved(plan)
    assert found.pop("activation") == ("linear2",)
    if norm_first:
        assert found == {"norm1": ("self_attn",), "norm2": ("linear1",)}
        assert "self_attn.in_proj" not in dip_layers(model)
        assert "self_attn.out_proj" in dip_layers(model)
    else:
        assert not found and "add in the model itself" in left(plan)["linear1"]
    assert torch.equal(model.eval()(X), plain.eval()(X))
    model.train()(X).square().sum().backward()
    for name, layer in dip_layers(model).items():
        assert name == "norm2" or bool(layer.log_variance.grad.any()), name
    assert_plain(dip.to_plain(model), plain)


def test_attention_on_several_tensors_keeps_its_projection():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = model, nn.LayerNorm(8)

        def forward(self, x):
            return self.layer(x, self.norm(x))

    plan = dip.producer_plan(Wrapped(), [X])
    assert "tensors that differ" in left(plan)["layer.multihead_attn"]
    assert moved(plan) == {"layer.norm1": ("layer.self_attn",), "layer.norm3": ("layer.linear1",)}
