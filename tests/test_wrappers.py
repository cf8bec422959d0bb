"""Names are those of the plain model, whatever has wrapped it or a part of it."""

import copy

import pytest
import torch
from test_random_networks import Gated
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)

import dipkernels as dip

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
WRAPS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


def network():
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
    return nn.Sequential(block, nn.Linear(8, 4))


def whole(wrap):
    return wrap(network())


def parts(wrap):
    model = network()
    model[0][2] = wrap(model[0][2])
    return nn.Sequential(wrap(model[0]), wrap(model[1]))


def converted(model):
    """By every argument that takes patterns."""
    seen = []
    dip.convert(
        model,
        {"0.1": 0.04, "1": 0.25, "*": 0.01},
        exclude=["0.0"],
        before=["0.1"],
        share=[("0.2", "0.3")],
        filter=lambda module, name: seen.append(name) or True,
        batches=[X],
    )
    ratio = {"0.1": 0.5, "0.*": 2.0, "1": 1.0}
    rows = dip.calibrate(model, [X], ratio=ratio)
    start = {row.name: row.sigma_mean for row in dip.summary(model)}
    noises = [row.name for row in dip.diagnostics.signal_to_noise(model, [X])]
    faults = dip.check(model, X, strict=False).faults
    return seen, [row.name for row in rows], start, noises, faults, list(dip.variances(model))


@pytest.mark.parametrize("where", [whole, parts])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_patterns_match_and_tables_show_the_names_of_the_plain_model(wrap, where):
    torch.manual_seed(0)
    plain = converted(network())
    assert plain[1] == ["0.1", "0.2", "0.3", "1"]
    assert plain[4] == {}
    torch.manual_seed(0)
    assert converted(where(wrap)) == plain


@pytest.mark.parametrize("where", [whole, parts])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_what_was_wrapped_after_it_was_converted_has_the_same_names(wrap, where):
    model = where(lambda module: wrap(dip.convert(module)))
    assert [row.name for row in dip.calibrate(model, [X], {"0.*": 0.5, "1": 1.0})] == [
        *("0.0", "0.2", "0.3"),
        "1",
    ]
    assert not dip.check(model, X, strict=False).faults


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_layer_that_was_replaced_is_named_and_one_that_was_wrapped_is_none(wrap):
    model = dip.convert(network())
    model[0] = wrap(model[0])
    assert not dip.check(model, X, strict=False).faults
    model[1] = wrap(nn.Linear(8, 4))
    assert list(dip.check(model, X, strict=False).faults) == ["1"]
    model = dip.convert(whole(wrap))
    model.get_submodule(next(n for n, _ in model.named_children()))[1] = nn.Linear(8, 4)
    assert list(dip.check(model, X, strict=False).faults) == ["1"]


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_plan_of_a_wrapped_model_is_shown_and_known_to_a_second_conversion(wrap):
    model = whole(wrap)
    dip.convert(model, {"0.1": 0.04, "*": 0.01}, place="producer", batches=[X])
    summary = dip.summary(model)
    assert "0.1 (LayerNorm) -> 0.2" in str(summary)
    assert [row.name for row in summary] == ["0.0", "0.1", "0.3", "1"]
    assert str(dip.summary(checkpoint_wrapper(model))) == str(summary)
    with pytest.raises(ValueError, match="are DIP layers already"):
        dip.convert(model)


@pytest.mark.parametrize("where", [whole, parts])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_errors_and_warnings_have_the_names_of_the_plain_model(wrap, where):
    model = where(wrap)
    dip.convert(model)
    first, second, *_ = (m for m in model.modules() if isinstance(m, dip.DIPLinear))
    second.set_number(0, second._counted_in)
    one_number = r"layers '0\.0' and '0\.2' have one number"
    with dip.fixed_noise(1), pytest.warns(UserWarning, match=one_number):
        dip.predict(model, X, k=1)
    with torch.no_grad():
        first.log_variance.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"infinity in \['0\.0'\]"):
        dip.predict(model, X, k=1)
    nn.utils.parametrizations.weight_norm(first)
    with pytest.raises(ValueError, match=r"subclasses of them: \['0\.0'\]"):
        dip.to_plain(model)


def test_a_config_matches_the_names_of_the_plain_model():
    config = dip.DIPConfig(include=["0"], exclude=["0.3"], ratio={"0.0": 0.5, "0.2": 1.0})
    model = dip.apply(whole(WRAPS["compile"]), config, [X])
    assert [row.name for row in dip.summary(model)] == ["0.0", "0.2"]
    with pytest.raises(ValueError, match="names like them"):
        dip.convert(network(), exclude=["_orig_mod.0.3"])


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_config_is_that_of_the_model_inside_and_of_its_copies(wrap, tmp_path):
    config = dip.DIPConfig(init_variance=0.04)
    model = dip.apply(wrap(network()), config)
    inside = next(model.children())
    for each in (model, inside, copy.deepcopy(model), wrap(inside)):
        assert dip.config_of(each) == config
        dip.save(each, tmp_path)
        dip.load(each, tmp_path)


@pytest.mark.parametrize("where", [whole, parts])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_variances_by_the_names_of_a_wrapped_models_state_dict_load_into_the_plain_one(wrap, where):
    wrapped, plain = dip.convert(where(wrap), 0.25), dip.convert(network())
    state = {n: t for n, t in wrapped.state_dict().items() if ".variance." in n}
    dip.load_variances(plain, state)
    assert dip.variances(plain).keys() == dip.variances(wrapped).keys()
    assert plain[1].log_variance[0].exp().item() == pytest.approx(0.25)


@pytest.mark.parametrize("part", ["act", "down"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_gated_product_with_a_wrapped_part_moves_as_the_plain_one(wrap, part):
    plain, wrapped = nn.Sequential(Gated()), nn.Sequential(Gated())
    setattr(wrapped[0], part, wrap(getattr(wrapped[0], part)))
    for own, other in zip(wrapped.parameters(), plain.parameters()):
        own.data = other.data.clone()
    for model in (plain, wrapped):
        dip.convert(model, 0.25, place="producer", batches=[X])
    assert str(dip.summary(wrapped).plan) == str(dip.summary(plain).plan)
    assert "moved  0.act (SiLU) -> 0.down" in str(dip.summary(wrapped).plan)
    outputs = []
    for model in (plain, wrapped):
        with dip.fixed_noise(1):
            outputs.append(model(X))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(plain.eval()(X), wrapped.eval()(X))
    assert not torch.allclose(outputs[0], plain(X), atol=1e-2)


def test_a_part_whose_activations_are_offloaded_has_its_plain_names():
    model = dip.convert(parts(offload_wrapper))  # which runs on a GPU alone
    assert list(dip.variances(model)) == list(dip.variances(dip.convert(network())))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_model_that_fabric_has_set_up_moves_the_same_projections(precision):
    fabric = pytest.importorskip("lightning").Fabric(
        accelerator="cpu", devices=1, precision=precision
    )
    model = dip.convert(fabric.setup(network()), place="producer", batches=[X])
    assert "moved  0.1 (LayerNorm) -> 0.2" in str(dip.summary(model))


class Holds(nn.Module):
    """What has a child of a wrapper's name, and is none."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        setattr(self, name, network())

    def forward(self, x):
        return getattr(self, self.name)(x)


@pytest.mark.parametrize("wrap", [lambda model: model, *WRAPS.values()], ids=["plain", *WRAPS])
@pytest.mark.parametrize("name", ["_orig_mod", "module"])
def test_a_child_that_is_called_as_a_wrappers_keeps_its_name(name, wrap):
    model = dip.convert(wrap(Holds(name)))
    state = dip.variances(model)
    assert next(iter(state)) == f"{name}.0.0.variance.log_variance"
    dip.load_variances(model, state)


def test_a_model_whose_class_is_called_as_a_wrappers_is_a_model():
    namesake = type("AveragedModel", (Holds,), {})
    model = dip.convert(namesake("ema"))
    assert dip.summary(model)[0].name == "ema.0.0"
    assert not dip.check(model, X, strict=False).faults


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_to_plain_takes_noise_away_that_is_wrapped_by_itself(wrap):
    model = dip.number_layers(nn.Sequential(wrap(dip.DIPInput(8)), nn.Linear(8, 4)))
    assert not torch.equal(model(X), model(X))
    assert torch.equal(dip.to_plain(model)(X), model[1](X))
    assert isinstance(dip.to_plain(wrap(dip.DIPInput(8))), nn.Identity)
