"""A user's own subclasses of DIP layers: what is known of a DIP layer is not taken for what her
forward computes."""

import abc
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from warning_support import no_warning

import dipkernels as dip


class Normed(dip.DIPLinear):
    """Noises what it makes of its input."""

    def forward(self, input):
        return super().forward(F.normalize(input, dim=-1))


class Conditioned(dip.DIPLinear):
    """Noises its second argument."""

    def __init__(self, features):
        super().__init__(features, features)
        self.gate = nn.Parameter(torch.ones(features))

    def forward(self, context, x):
        return super().forward(x) * self.gate + context.mean()


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Conditioned(8)

    def forward(self, x):
        return self.layer(1000 * x, x)


class Mixed(dip.DIPInput):
    """Noise, and what reads it."""

    def __init__(self, features, out):
        super().__init__(features)
        self.linear = nn.Linear(features, out)

    def forward(self, input):
        return self.linear(super().forward(input))


class PlainMixed(nn.Module):
    def forward(self, input):
        return self.linear(input)


class MixedAndPlain(Mixed):
    plain_type = PlainMixed


class Started(dip.DIPInput):
    """Nothing of its own but the constructor."""

    def __init__(self):
        super().__init__(8)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 100 * weight, bias)


class DIPStandardised(dip.DIPConv2d, Standardised):
    plain_type = Standardised


class OwnConvolution(dip.DIPConv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 100 * weight, bias)


def test_calibrate_measures_what_a_subclass_noises():
    x = 100 * torch.randn(64, 8)
    model = nn.Sequential(Normed(8, 3))
    row = dip.calibrate(model, [x], ratio=0.5)[0]
    spread = F.normalize(x, dim=-1).std(0, correction=0)
    torch.testing.assert_close(model[0].variance.spread, spread.double(), rtol=1e-5, atol=0)
    assert row.ratio == pytest.approx(0.5, rel=0.3)
    model = Calls()
    dip.calibrate(model, [x])
    torch.testing.assert_close(
        model.layer.variance.spread, x.double().std(0, correction=0), rtol=1e-5, atol=0
    )


def test_calibrate_names_a_subclass_that_draws_in_training_alone():
    class Early(dip.DIPInput):
        def forward(self, input):
            return super().forward(input) if self.training else input

    with pytest.raises(ValueError, match=r"\['0'\].*call super\(\)\.forward in eval mode too"):
        dip.calibrate(nn.Sequential(Early(8), nn.Linear(8, 2)), [torch.randn(4, 8)])


def test_a_network_of_subclasses_trains_replays_and_is_saved():
    model, x = Calls(), torch.randn(6, 8)
    dip.number_layers(model)
    loss = dip.objective(dip.trajectories(model, x, m=2), x, F.mse_loss, model)
    loss.backward()
    assert dip.check(model) and dip.check(model, x)
    with dip.fixed_noise(3):
        y = model(x)
    again = Calls()
    again.load_state_dict(model.state_dict())
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), dip.number_layers(again))
    for other in copies:
        with dip.fixed_noise(3):
            assert torch.equal(other(x), y)


@pytest.mark.parametrize("layer", [lambda: Normed(8, 8), lambda: Mixed(8, 8)])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity()])
def test_analytic_takes_no_subclass_for_the_layer_itself(layer, activation):
    model, x = nn.Sequential(layer(), activation, nn.Linear(8, 2)).eval(), torch.randn(4, 8)
    if isinstance(activation, nn.Identity):  # linear: the mean is the plain network's
        got = dip.predict(model, x, method="analytic", average="logits")
        assert torch.allclose(got, model(x), atol=1e-6)
        return
    with pytest.raises(ValueError, match="that of '0' goes into relu, and its variance"):
        dip.predict(model, x, method="analytic")


def test_analytic_refuses_an_activation_inside_a_subclass():
    class Activated(dip.DIPLinear):
        def forward(self, input):
            return super().forward(input)

    model = nn.Sequential(Activated(8, 4, activation="relu"), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="that of '0' goes into relu, and its variance"):
        dip.predict(model, torch.randn(4, 8), method="analytic")


def test_certify_looks_at_what_a_subclass_noises():
    class Skips(dip.DIPInput):
        def forward(self, input):
            return super().forward(input) + input

    class Scaled(dip.DIPInput):
        def forward(self, input):
            return super().forward(input / 100)

    x = torch.randn(4, 8)
    for layer, message in ((Scaled(8), "read x itself, once"), (Skips(8), "depends on x without")):
        with pytest.raises(ValueError, match=message):
            dip.certify(nn.Sequential(layer, nn.Linear(8, 3)), x, k=20)
    dip.certify(nn.Sequential(Mixed(8, 3)), x, k=20)


def test_to_plain_keeps_what_a_subclass_computes():
    x = torch.randn(4, 8)
    for kind, args in ((Normed, (8, 4)), (Mixed, (8, 4))):
        model = nn.Sequential(kind(*args))
        with pytest.raises(
            ValueError, match=r"subclasses of them: \['0'\].*plain_type = the class"
        ):
            dip.to_plain(model)
        assert type(model[0]) is kind
    model = nn.Sequential(MixedAndPlain(8, 4), dip.DIPInput(4)).eval()
    y = model(x)
    dip.to_plain(model)
    assert [type(m) for m in model] == [PlainMixed, nn.Identity] and torch.equal(model(x), y)
    assert list(model.state_dict()) == ["0.linear.weight", "0.linear.bias"]
    assert type(dip.to_plain(MixedAndPlain(8, 4))) is PlainMixed
    assert type(dip.to_plain(nn.Sequential(Started()))[0]) is nn.Identity


@pytest.mark.parametrize("kind", [OwnConvolution, DIPStandardised])
def test_a_convolution_of_its_own_convolves_so_in_training_too(kind):
    """The first layer, whose input needs no gradient, has a kernel of its own."""
    layer, x = kind(3, 4, 3, bias=False, init_variance=1e-12), torch.randn(2, 3, 8, 8)
    noisy, plain = layer(x), layer.eval()(x)
    torch.testing.assert_close(noisy, plain, rtol=1e-3, atol=1e-3)


def test_a_convolution_set_on_the_object_convolves_so_in_training_too():
    layer, x = dip.DIPConv2d(3, 4, 3, bias=False, init_variance=1e-12), torch.randn(2, 3, 8, 8)
    layer._conv_forward = lambda input, weight, bias: F.conv2d(input, 100 * weight)
    noisy, plain = layer(x), layer.eval()(x)
    torch.testing.assert_close(noisy, plain, rtol=1e-3, atol=1e-3)


def test_a_forward_that_noisy_passes_would_not_call_is_refused():
    class Own(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Attends(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Counts:
        def forward(self, *args, **kwargs):
            self.__dict__["calls"] = vars(self).get("calls", 0) + 1
            return super().forward(*args, **kwargs)

    class Counted(Counts, dip.DIPLinear):
        pass

    class Interface(nn.Module):
        @abc.abstractmethod
        def forward(self, input): ...

    class Implements(dip.DIPInput, Interface):
        pass

    for bases in ((dip.DIPLinear, Own), (dip.DIPMultiheadAttention, Attends)):
        with pytest.raises(TypeError, match=f"^Both: .* got that of {bases[1].__name__}, which"):
            type("Both", bases, {})
        with pytest.raises(TypeError, match=r"^Both: "):
            type("Both", bases, {"forward": lambda self, input: input})
    layer = Counted(4, 4)
    layer(torch.randn(2, 4))
    assert layer.calls == 1
    assert Implements(4)(torch.zeros(2, 4)).abs().max() > 0


class Bilinear(nn.Module):
    """Weights of its own behind a DIPInput."""

    def __init__(self, features, out):
        super().__init__()
        self.noise = dip.DIPInput(features)
        self.weight = nn.Parameter(torch.randn(out, features, features))

    def forward(self, x):
        u = self.noise(x)
        return torch.einsum("...i,oij,...j->...o", u, self.weight, u)


def test_convert_names_no_weights_behind_a_users_own_noise():
    with no_warning():
        model = dip.convert(nn.Sequential(Bilinear(8, 16), nn.ReLU(), nn.Linear(16, 2)))
    assert len(dip.summary(model)) == 2
    with pytest.raises(ValueError, match=r"1 layer\(s\) are DIP layers already$"):
        dip.convert(nn.Sequential(Bilinear(8, 16)))


def test_a_class_that_exec_has_made_is_followed():
    names = {"dip": dip}
    exec(
        "class Own(dip.DIPLinear):\n    def forward(self, x):\n        return super().forward(x)",
        names,
    )
    model, x = nn.Sequential(names["Own"](8, 4), nn.Linear(4, 2)).eval(), torch.randn(3, 8)
    got = dip.predict(model, x, method="analytic", average="logits")
    assert torch.allclose(got, model(x), atol=1e-6)


def test_a_table_of_classes_with_long_names_stays_in_columns():
    model = nn.Sequential(DIPStandardised(3, 4, 3), dip.DIPMultiheadAttention(8, 2), Started())
    lines = str(dip.summary(model)).splitlines()
    assert len({len(line) for line in lines}) == 1, lines
