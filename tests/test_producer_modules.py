"""DIPLayerNorm, DIPRMSNorm, DIPActivation, DIPGatedActivation: plain in eval mode to the bit, f(x)
+ sigma z in training."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from variance_support import trains_alike_in_shards

import dipkernels as dip
from dipkernels import functional
from dipkernels.nn.activation import ActivationProducer, GatedActivation, QuickGELU
from dipkernels.nn.norm import NormProducer
from dipkernels.nn.numbering import dip_layers, number_layers
from dipkernels.nn.twin import made_type
from dipkernels.noise.contexts import fixed_noise, noise_off, sampling_on

K = 12


class Gemma(nn.Module):
    """An RMSNorm whose weight is added to one."""

    def __init__(self):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.randn(K)), 1e-3

    def forward(self, hidden):
        h = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return h * (1 + self.weight)


def gemma(**options):
    """The twin of another package's class, as convert makes it."""
    twin = made_type(NormProducer, Gemma, kind="rms", offset=1.0, eps_name="epsilon")
    return made(Gemma(), twin, **options)


def relu_in_place(**options):
    twin = made_type(ActivationProducer, nn.ReLU, kind="relu", feature_dim=-3)
    return made(nn.ReLU(inplace=True), twin, **options)


def made(module, twin, init_variance=0.01, num_samples=1):
    module.__class__ = twin
    module._set_up(K, init_variance, num_samples, None)
    return module


def layer_norm(**options):
    norm = dip.DIPLayerNorm(K, eps=1e-3, **options)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def bare_norm(**options):
    return dip.DIPLayerNorm(K, elementwise_affine=False, **options)


ROWS, BATCH, IMAGES = (5, K), (2, 5, K), (2, K, 3, 4)
activation, gated = functools.partial(dip.DIPActivation, K), dip.DIPGatedActivation
CASES = {  # how to make it, f of plain operations, shapes of its inputs
    "layer": (layer_norm, lambda m, x: F.layer_norm(x, (K,), m.weight, m.bias, m.eps), [BATCH]),
    "layer-bare": (bare_norm, lambda m, x: F.layer_norm(x, (K,)), [ROWS]),
    "rms": (
        lambda **o: dip.DIPRMSNorm(K, **o),
        lambda m, x: F.rms_norm(x, (K,), m.weight),
        [BATCH],
    ),
    "gemma": (gemma, lambda m, x: Gemma.forward(m, x), [BATCH]),
    "relu": (lambda **o: activation("relu", 1, **o), lambda m, x: F.relu(x), [IMAGES]),
    "relu-in-place": (relu_in_place, lambda m, x: F.relu(x), [IMAGES]),
    "gelu": (lambda **o: activation("gelu", **o), lambda m, x: F.gelu(x), [BATCH]),
    "gelu_tanh": (
        lambda **o: activation("gelu_tanh", **o),
        lambda m, x: F.gelu(x, approximate="tanh"),
        [ROWS],
    ),
    "quick_gelu": (
        lambda **o: activation("quick_gelu", **o),
        lambda m, x: x * torch.sigmoid(1.702 * x),
        [BATCH],
    ),
    "tanh": (lambda **o: activation("tanh", **o), lambda m, x: torch.tanh(x), [ROWS]),
    "gate": (lambda **o: gated(K, **o), lambda m, a, b: F.silu(a) * b, [BATCH] * 2),
    "gate-gelu": (
        lambda **o: gated(K, "gelu", 0, **o),
        lambda m, a, b: F.gelu(a) * b,
        [(K, 5)] * 2,
    ),
}
ALL = pytest.mark.parametrize("name", CASES)


def make(name, **options):
    """The module in training mode, f, and its inputs."""
    torch.manual_seed(0)
    build, f, shapes = CASES[name]
    return build(**options), f, [torch.randn(shape) for shape in shapes]


def call(module, inputs):
    return module(*(x.clone() for x in inputs))  # one of them works in place


@ALL
def test_eval_mode_and_noise_off_are_f_to_the_bit(name):
    module, f, inputs = make(name)
    want = f(module, *inputs)
    with noise_off():
        assert torch.equal(call(module, inputs), want)
    assert torch.equal(call(module.eval(), inputs), want)


@ALL
@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_with_hardly_any_noise_is_f_of_any_type_and_size(name, dtype, scale):
    module, f, inputs = make(name, init_variance=1e-30)
    module, inputs = module.to(dtype), [(scale * x).to(dtype) for x in inputs]
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    got, want = call(module, inputs), f(module, *inputs)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6)


@ALL
def test_training_is_f_and_the_projection_behind_it(name):
    """u = f(x) + sigma z, z of the layer's stream, rows and columns where they are in f(x); samples
    averaged."""
    module, f, inputs = make(name, init_variance=torch.linspace(0.1, 2, K), num_samples=4)
    module.number = 5
    with fixed_noise(9, row0=3):
        u = call(module, inputs)
    y = f(module, *inputs)
    rows = y[0].numel() // K if module.feature_dim % y.ndim else y[0].numel()
    want = functional.perturb(
        y, module.variance.sigma / 2, torch.tensor([9, 5]), dim=module.feature_dim, row0=3 * rows
    )
    torch.testing.assert_close(u, want, rtol=1e-5, atol=1e-5)
    assert u.dtype is y.dtype
    assert not torch.equal(call(module, inputs), call(module, inputs))
    module.eval()
    with sampling_on(), fixed_noise(9, row0=3):
        assert torch.equal(call(module, inputs), u)


@ALL
def test_gradients_are_those_of_f_and_the_projection(name):
    module, f, inputs = make(name, init_variance=0.3)
    inputs = [x.requires_grad_() for x in inputs]
    weights = torch.randn_like(f(module, *inputs))
    tensors = [*inputs, *module.parameters()]
    with fixed_noise(2):
        got = torch.autograd.grad((call(module, inputs) * weights).sum(), tensors)
    seed = torch.tensor([2, module.number])
    y = f(module, *inputs)
    u = functional.perturb(y, module.log_variance, seed, dim=module.feature_dim, log_variance=True)
    want = torch.autograd.grad((u * weights).sum(), tensors)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@ALL
def test_copies_pickles_casts_and_state_dicts(name):
    module, _, inputs = make(name, init_variance=0.3)
    module.number = 4
    with fixed_noise(1):
        u = call(module, inputs)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(again) is type(module) and torch.equal(call(again, inputs), u)
    state = module.state_dict()
    plain = dip.to_plain(nn.ModuleList([copy.deepcopy(module)]))[0]
    own = ["variance.log_variance", "variance.log_prior", "variance.pull"]
    assert list(state) == [*plain.state_dict(), *own]
    module.load_state_dict({n: t for n, t in state.items() if n not in own})  # a plain checkpoint
    module.bfloat16()
    assert module.log_variance.dtype is torch.float32
    assert call(module, [x.bfloat16() for x in inputs]).dtype is torch.bfloat16


@ALL
def test_to_plain_computes_f(name):
    module, f, inputs = make(name)
    model = dip.to_plain(nn.Sequential(module))
    assert not dip_layers(model) and not list(model[0].children())
    assert torch.equal(call(model[0], inputs), f(module, *inputs))
    assert type(model[0]).__module__.split(".")[0] in ("torch", __name__, "dipkernels")


def test_to_plain_of_activations_is_torchs_class():
    kinds = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": nn.GELU, "silu": nn.SiLU}
    kinds |= {"quick_gelu": QuickGELU, "tanh": nn.Tanh}
    for kind in functional.ACTIVATIONS:
        (module,) = dip.to_plain(nn.Sequential(dip.DIPActivation(4, kind)))
        assert type(module) is kinds[kind]
    assert type(dip.to_plain(dip.DIPGatedActivation(4))) is GatedActivation
    assert dip.to_plain(dip.DIPActivation(4, "gelu_tanh")).approximate == "tanh"


class Net(nn.Module):
    """One of each, in front of plain layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.rms = dip.DIPLayerNorm(8), dip.DIPRMSNorm(8, eps=1e-6)
        self.act, self.gate = dip.DIPActivation(8, "gelu"), dip.DIPGatedActivation(8)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        number_layers(self)

    def forward(self, x):
        x = self.a(self.norm(x))
        x = self.b(self.act(x))
        return self.d(self.rms(self.gate(x, self.c(x))))


def net():
    torch.manual_seed(0)
    return Net(), torch.randn(4, 6, 8)


def test_calibrate_measures_what_is_noised():
    model, x = net()
    rows = {row.name: row for row in dip.calibrate(model, [x], ratio=0.5)}
    numbers = {name: row.number for name, row in rows.items()}
    assert numbers == {"norm": 0, "rms": 1, "act": 2, "gate": 3}
    y = model.eval().norm(x).flatten(0, 1)
    want = 0.5 * y.var(0, unbiased=False).mean().sqrt()
    assert rows["norm"].sigma_mean == pytest.approx(want.item(), rel=1e-5)
    spread = model.gate.variance.spread
    h = model.b(model.act(model.a(model.norm(x))))
    got = (F.silu(h) * model.c(h)).flatten(0, 1).std(0, unbiased=False)
    torch.testing.assert_close(spread.float(), got, rtol=1e-4, atol=1e-5)


def test_everything_that_works_on_dip_layers_works():
    model, x = net()
    model(x).square().sum().backward()
    assert dip.check(model) and dip.check(model, x) and dip.check(model).checked == 4
    groups = {g["name"]: g["params"] for g in dip.param_groups(model, 1e-3)}
    assert len(groups["variances"]) == 4
    assert dip.trajectories(model, x, m=3).shape == (3, 4, 6, 8)
    assert dip.predict(model, x, k=2, average="logits").shape == x.shape
    state = dip.variances(model)
    dip.load_variances(model, {n: t + 1 for n, t in state.items()})
    assert torch.equal(model.act.log_variance, state["act.variance.log_variance"] + 1)
    said = r"method='analytic'.*\['norm', 'rms', 'act', 'gate'\] that noise their output"
    with pytest.raises(ValueError, match=said):
        dip.predict(model, x, method="analytic", average="logits")
    with pytest.raises(ValueError, match="noises its output"):
        dip.certify(nn.Sequential(dip.DIPActivation(8, "relu"), nn.Linear(8, 3)), x[:, 0])
    with pytest.warns(UserWarning, match="decays the log_variance of 4"):
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()


def test_traced_by_fx_it_is_a_leaf():
    model, x = net()
    graph = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert leaves == ["norm", "a", "act", "b", "c", "gate", "rms", "d"]
    with fixed_noise(7):
        assert torch.equal(graph(x), model(x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_fsdp_and_bfloat16_autocast(one_rank):
    model, x = net()
    plain = trains_alike_in_shards(model, lambda each: each(x))
    with torch.autocast("cpu", torch.bfloat16):
        # one rounding, to what the layers behind it multiply in
        assert plain.norm(x).dtype is torch.bfloat16
        plain(x).float().square().sum().backward()
    assert plain.norm.log_variance.grad.dtype is torch.float32


def test_gated_product_of_two_dtypes_is_of_the_wider():
    gate = gated(8)
    a, b = torch.randn(5, 8).bfloat16(), torch.randn(5, 8)
    with fixed_noise(7):
        u, want = gate(a, b), gate(a.float(), b)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = gate(b, a)
    assert u.dtype is gate.eval()(a, b).dtype is torch.float32 and torch.equal(u, want)
    assert rounded.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: dip.DIPLayerNorm((4, 5)), r"normalized_shape: expected one dimension.*\(4, 5\)"),
        (lambda: dip.DIPRMSNorm([4, 5]), "normalized_shape: expected one dimension"),
        (lambda: dip.DIPActivation(4, "softmax"), "^kind: expected one of"),
        (lambda: gated(4)(torch.ones(2, 4), torch.ones(3, 4)), "b: expected shape"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
