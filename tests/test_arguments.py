"""Every public door that takes a number takes the same kinds of numbers, and refuses the others by
the same errors and words."""

import io
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip
from dipkernels import functional, producers
from dipkernels.diagnostics import lipschitz, output_variance, predictor

X, Y, SEED = torch.rand(6, 4), torch.randint(3, (6,)), torch.tensor([7, 0])
SIGMA, WEIGHT = torch.full((4,), 0.1), torch.rand(3, 4)
MEAN = {"activation": "relu", "estimator": "mean"}


def net():
    return dip.convert(nn.Sequential(nn.Linear(4, 3)))


def certified(**options):
    model = nn.Sequential(dip.DIPInput(4), nn.Linear(4, 3))
    return dip.certify(model, X[:1], **{"k": 2, "k0": 2, **options})


def tuned(**options):
    def run(ratio, kl, budget):
        return {"clean": 0.9, "robust": 0.5}

    return dip.tune(
        run, **{"budget": 9, "ratios": (1.0,), "kls": (0.1,), **options}, progress=False
    )


def set_number(value):
    net()[0].number = value


def perturbed(**options):
    return functional.perturb(X, SIGMA, SEED, **options)


def layered(**options):
    return functional.dip_linear(X, WEIGHT, None, SIGMA, SEED, **options)


def activated(**options):
    return producers.activate(X, SIGMA, SEED, kind="gelu", **options)


# door: a call with the number; then the smallest and the largest that it takes, None for none
INTEGERS = {
    "noise, dim": ("dim", lambda v: functional.noise((2, 4), SEED, dim=v), -2, 1),
    "noise, row0": ("row0", lambda v: functional.noise((2, 4), SEED, row0=v), 0, 2**62),
    "perturb, col0": ("col0", lambda v: perturbed(col0=v), 0, 2**62),
    "perturb, sample": ("sample", lambda v: perturbed(sample=v), 0, 65535),
    "perturb": ("num_samples", lambda v: perturbed(num_samples=v), 1, None),
    "dip_linear": ("num_samples", lambda v: layered(num_samples=v), 1, None),
    "dip_linear, row0": ("row0", lambda v: layered(row0=v), 0, 2**62),
    "dip_linear, mean": ("row0", lambda v: layered(row0=v, **MEAN), 0, 2**62),
    "producers": ("row0", lambda v: activated(row0=v), 0, 2**62),
    "DIPLinear": ("num_samples", lambda v: dip.DIPLinear(4, 2, num_samples=v), 1, 65536),
    "convert": ("num_samples", lambda v: dip.convert(nn.Linear(4, 2), num_samples=v), 1, 65536),
    "Variance": ("num_features", lambda v: dip.Variance(v), 0, None),
    "DIPInput": ("dim", lambda v: dip.DIPInput(4, dim=v), None, None),
    "DIPActivation": ("dim", lambda v: dip.DIPActivation(4, "relu", dim=v), None, None),
    "number": ("number", set_number, 0, 65535),
    "fixed_noise, key": ("key", lambda v: dip.fixed_noise(v), None, None),
    "fixed_noise, row0": ("row0", lambda v: dip.fixed_noise(1, v), 0, 2**62),
    "trajectories": ("m", lambda v: dip.trajectories(net(), X, m=v), 1, None),
    "predict, k": ("k", lambda v: dip.predict(net(), X, k=v), 0, None),
    "predict, chunk": ("chunk", lambda v: dip.predict(net(), X, k=2, chunk=v), 1, None),
    "predict, dim": ("dim", lambda v: dip.predict(net(), X, k=2, dim=v), -1, 1),
    "certify, k": ("k", lambda v: certified(k=v), 1, None),
    "certify, k0": ("k0", lambda v: certified(k0=v), 1, None),
    "certify, chunk": ("chunk", lambda v: certified(chunk=v), 1, None),
    "tune": ("budget", lambda v: tuned(budget=v), 1, None),
    "progress": ("every", lambda v: dip.progress([X], net(), every=v, file=io.StringIO()), 1, None),
    "predictor": ("k", lambda v: predictor(net(), v), 0, None),
    "output_variance": ("k", lambda v: output_variance(net(), X, k=v), 2, None),
    "lipschitz": ("iterations", lambda v: lipschitz(net(), X, iterations=v), 1, None),
    "DIPConfig, m": ("m", lambda v: dip.DIPConfig(m=v), 1, None),
    "DIPConfig, k": ("k", lambda v: dip.DIPConfig(k=v), 0, None),
    "DIPConfig, key": ("key", lambda v: dip.DIPConfig(key=v), None, None),
    "DIPConfig, before": ("before['*']", lambda v: dip.DIPConfig(before={"*": v}), None, None),
    "convert, before": (
        "before['0']",
        lambda v: dip.convert(nn.Sequential(nn.Tanh()), before={"0": v}, batches=[X]),
        -2,
        1,
    ),
}


class OldBool:
    """As np.True_ before NumPy 2.3."""

    dtype = np.dtype(bool)

    def __index__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "OldBool()"


@pytest.mark.parametrize("door", INTEGERS)
@pytest.mark.parametrize(
    "value", [True, np.True_, OldBool(), torch.tensor(True), 2.0, "2", 1j, [2]], ids=repr
)
def test_what_is_no_integer_is_a_type_error(door, value):
    name, call, _, _ = INTEGERS[door]
    with pytest.raises(TypeError) as raised:
        call(value)
    assert str(raised.value).startswith(f"{name}: expected an int"), raised.value
    assert f"got {value!r}" in str(raised.value) or "got torch.bool" in str(raised.value)


@pytest.mark.parametrize(
    "door", [d for d in INTEGERS if not d.endswith("dim") and "before" not in d]
)
def test_an_integer_out_of_range_is_a_value_error_with_the_range(door):
    name, call, least, most = INTEGERS[door]
    for bad in ([] if least is None else [least - 1]) + ([] if most is None else [most + 1]):
        allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
        if door == "tune":
            allowed = "at least 1 units"
        with pytest.raises(ValueError) as raised:
            call(bad)
        words = str(raised.value)
        assert words.startswith(f"{name}: expected {allowed}") and words.endswith(f"got {bad}")


@pytest.mark.parametrize("door", INTEGERS)
def test_every_kind_of_integer_is_taken(door):
    _, call, least, most = INTEGERS[door]
    value = 1 if most == 1 else max(2, least or 0)
    for each in (value, np.int64(value), np.int8(value), torch.tensor(value)):
        call(each)
    for edge in {least, most} - {None}:
        call(edge)


REALS = {
    "param_groups, lr": ("lr", lambda v: dip.param_groups(net(), v), ">= 0"),
    "weight_decay": ("weight_decay", lambda v: dip.param_groups(net(), 1, weight_decay=v), ">= 0"),
    "variance_lr": ("variance_lr", lambda v: dip.param_groups(net(), 1, variance_lr=v), ">= 0"),
    "calibrate": ("ratio", lambda v: dip.calibrate(net(), [X], v), "> 0"),
    "floor": ("floor", lambda v: dip.calibrate(net(), [X], floor=v), "> 0"),
    "init_variance": ("init_variance", lambda v: dip.Variance(4, v), "> 0"),
    "convert": ("init_variance", lambda v: dip.convert(nn.Linear(4, 2), v), "> 0"),
    "kl_penalty": ("kl", lambda v: dip.kl_penalty(net(), v), ">= 0"),
    "penalty, alpha": ("alpha", lambda v: dip.penalty(net(), v, 0), ">= 0"),
    "penalty, beta": ("beta", lambda v: dip.penalty(net(), 1, v), ">= 0"),
    "objective, kl": ("kl", lambda v: objective(kl=v), ">= 0"),
    "objective, alpha": ("alpha", lambda v: objective(alpha=v), ">= 0"),
    "lambda_s": ("lambda_s", lambda v: objective(lambda_s=v), ">= 0"),
    "tune, ratios": ("ratios", lambda v: tuned(ratios=[v]), "> 0"),
    "tune, kls": ("kls", lambda v: tuned(kls=[v]), ">= 0"),
    "tune, tolerance": ("tolerance", lambda v: tuned(tolerance=v), ">= 0"),
    "certify": ("confidence", lambda v: certified(confidence=v), "> 0 and < 1"),
    "lipschitz": ("tolerance", lambda v: lipschitz(net(), X, tolerance=v), ">= 0"),
    "DIPConfig, kl": ("kl", lambda v: dip.DIPConfig(kl=v), ">= 0"),
    "DIPConfig, lambda_s": ("lambda_s", lambda v: dip.DIPConfig(lambda_s=v), ">= 0"),
    "DIPConfig, start": ("start", lambda v: dip.DIPConfig(start=v), "> 0"),
    "DIPConfig, ratio": ("ratio", lambda v: dip.DIPConfig(ratio=v), "> 0"),
    "DIPConfig, init": ("init_variance", lambda v: dip.DIPConfig(init_variance={"*": v}), "> 0"),
}


def objective(**options):
    return dip.objective(torch.rand(2, 6, 3), Y, F.cross_entropy, net(), **options)


@pytest.mark.parametrize("door", REALS)
def test_a_number_that_is_none_not_finite_or_out_of_range_is_named(door):
    name, call, allowed = REALS[door]
    for kind, bad in [
        *(
            (TypeError, v)
            for v in (True, np.True_, torch.tensor(True), "0.5", 1j, torch.ones(2, 2))
        ),
        *((ValueError, v) for v in (-1, -0.5, float("nan"), float("inf"), 10**400)),
        *((ValueError, v) for v in (np.float32("nan"), torch.tensor(-1.0))),
    ]:
        if isinstance(bad, torch.Tensor) and bad.ndim and name == "init_variance":
            continue  # one for each feature
        with pytest.raises(kind, match=rf"^{name}: expected a finite number {allowed}"):
            call(bad)
    if ">=" not in allowed:
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number > 0"):
            call(0)
    if "< 1" in allowed:
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number {allowed}"):
            call(1)


@pytest.mark.parametrize("door", REALS)
def test_every_kind_of_number_is_taken(door):
    _, call, allowed = REALS[door]
    for value in (0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2), torch.tensor(0.5)):
        call(value)
    if ">=" in allowed:
        call(0)


def test_a_config_keeps_plain_numbers_which_json_takes():
    config = dip.DIPConfig(
        m=np.int64(3), key=torch.tensor(2), kl=np.float32(0.5), ratio={"*": torch.tensor(0.25)}
    )
    assert config == dip.DIPConfig(m=3, key=2, kl=0.5, ratio={"*": 0.25})
    assert dip.DIPConfig.from_dict(config.to_dict()) == config
    with pytest.raises(TypeError, match=r"^key: expected an integer or None, got '7'"):
        dip.DIPConfig(key="7")
    with pytest.raises(TypeError, match=r"^key: expected an integer or an int64 tensor of one "):
        dip.fixed_noise("7")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_learned_weight_of_the_penalty_keeps_its_gradient_and_the_loss_is_a_scalar(shape):
    weight = torch.full(shape, 0.5, requires_grad=True)
    model = net()
    model[0].log_variance.data += 1
    dip.kl_penalty(model, weight).backward()
    assert weight.grad > 0
    out = dip.trajectories(model, X, m=2)
    for terms in ({"kl": weight}, {"alpha": weight, "beta": weight}, {"lambda_s": weight}):
        assert dip.objective(out, Y, F.cross_entropy, model, **terms).shape == ()


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_torch_compile_traces_stays_one_graph(dynamic):
    """A row0 that changes is a SymInt there; a range is still a range."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=dynamic)
    def draw(x, row0):
        return functional.perturb(x, SIGMA, SEED, row0=row0) + producers.activate(
            x, SIGMA, SEED, kind="gelu", row0=row0
        )

    for row0 in (0, 3, 5, 2**40):
        want = functional.perturb(X, SIGMA, SEED, row0=row0)
        want = want + producers.activate(X, SIGMA, SEED, kind="gelu", row0=row0)
        assert torch.equal(draw(X, row0), want)

    model = net()

    @torch.compile(backend="eager", fullgraph=True)
    def step(x, y):
        out = dip.trajectories(model, x, m=2)
        return dip.objective(out, y, F.cross_entropy, model, kl=0.3)

    with dip.fixed_noise(1):
        out = dip.trajectories(model, X, m=2)
        want = dip.objective(out, Y, F.cross_entropy, model, kl=0.3)
        assert torch.allclose(step(X, Y), want)
