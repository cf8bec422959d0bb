"""torch.fx keeps every DIP layer as a leaf; torch.jit and ONNX take the plain network, and refuse
noise with the way out."""

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dipkernels as dip
from dipkernels import functional
from dipkernels.nn.numbering import dip_layers
from dipkernels.nn.sharing import share_noise
from dipkernels.nn.twin import twin_type
from dipkernels.noise.contexts import fixed_noise


class Scaled(nn.Module):
    """A class of another package: the input first, and more."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x, factor=1.0, *, shift=0.0):
        return x * self.weight * factor + shift


class Everything(nn.Module):
    """Each kind of DIP layer, called in every form."""

    def __init__(self):
        super().__init__()
        self.input = dip.DIPInput(3, dim=1)
        self.conv, self.norm = dip.DIPConv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.attention = dip.DIPMultiheadAttention(4, 2, batch_first=True)
        self.twin = twin_type(Scaled, -1)()
        self.twin._set_up(4, 0.01, 1, "cpu")
        self.mean = dip.DIPLinear(4, 6, num_samples=2, activation="gelu", estimator="mean")
        self.exact = dip.DIPLinear(6, 5, activation="relu", estimator="analytic")
        self.conv1d = dip.DIPConv1d(2, 3, 1)
        self.heads = nn.ModuleList([dip.DIPLinear(5, 2), dip.DIPLinear(5, 2)])
        share_noise(list(self.heads))
        dip.number_layers(self)

    def forward(self, x):
        h = self.norm(self.conv(self.input(x))).flatten(2).transpose(1, 2)
        h = self.attention(h, h, h, need_weights=False)[0]
        h = self.exact(input=self.mean(self.twin(h, 2.0, shift=1.0)))
        h = self.conv1d(h[:, :2])
        return self.heads[0](h) + self.heads[1](h)


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("traced_in_training", [True, False])
def test_fx_keeps_every_layer_and_its_noise(x, traced_in_training):
    model = Everything().train(traced_in_training)
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    inside = ("attention.in_proj", "attention.out_proj")
    assert set(dip_layers(model)) - set(inside) | {"attention", "norm"} == called
    assert all(graph.get_submodule(name) is model.get_submodule(name) for name in called)
    graph.train(), model.train()
    assert not torch.equal(graph(x), graph(x))
    with fixed_noise(3):
        assert torch.equal(graph(x), model(x))
    graph(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    graph.eval(), model.eval()
    assert torch.equal(graph(x), model(x))


def test_a_graph_lives_on_as_the_model_does(x):
    """Traced again, transformed, copied, pickled: the noise is that of the model."""
    model = Everything()
    graph = fx.symbolic_trace(model)
    others = [fx.symbolic_trace(graph), fx.Transformer(graph).transform(), copy.deepcopy(graph)]
    others.append(pickle.loads(pickle.dumps(graph)))
    with fixed_noise(3):
        for other in others:
            # the statistics of BatchNorm move in each pass
            model.load_state_dict(other.state_dict())
            assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_hooks_on_a_layer_run_once(before, after):
    model = nn.Sequential(dip.DIPLinear(4, 2))
    if after:
        model[0].register_forward_hook(lambda module, args, y: 2 * y)
    if before:
        model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    with fixed_noise(3):
        assert torch.equal(graph(torch.ones(3, 4)), model(torch.ones(3, 4)))
    assert not torch.equal(graph(torch.ones(3, 4)), graph(torch.ones(3, 4)))


@pytest.mark.parametrize(
    "layer", [dip.DIPLinear(4, 2), dip.DIPInput(4), dip.DIPMultiheadAttention(4, 2)]
)
def test_a_layer_alone_is_no_graph(layer):
    said = r"dipkernels: torch\.fx keeps DIP.*torch\.nn\.Sequential\(layer\)"
    with pytest.raises(RuntimeError, match=said):
        fx.symbolic_trace(layer)


def test_functions_are_calls_in_the_graph():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("sigma", torch.rand(4))
            self.register_buffer("seed", torch.tensor([1, 2]))
            self.weight = nn.Parameter(torch.rand(2, 4))

        def forward(self, x):
            u = functional.perturb(x, self.sigma, self.seed)
            y = functional.dip_linear(u, self.weight, None, self.sigma, self.seed)
            return functional.expectation(y, self.sigma[:2], "gelu")

    model = Functions()
    graph = fx.symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert called >= {functional.perturb, functional.dip_linear, functional.expectation}
    assert torch.equal(graph(torch.ones(3, 4)), model(torch.ones(3, 4)))


def test_make_fx_records_the_draw():
    layer, x = dip.DIPLinear(4, 2), torch.ones(3, 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            graph = make_fx(layer)(x)
            assert not torch.equal(graph(x), graph(x))
    graph = make_fx(torch.func.grad(lambda x: layer(x).square().sum()))(x)
    assert not torch.equal(graph(x), graph(x))
    # nor what reads the seed to recognise it
    assert not [node for node in graph.graph.nodes if "slice" in node.name]


def test_make_fx_records_a_mean_and_its_gradients():
    """Its graph calls the operations themselves, with gradients on."""
    layer, x = (
        dip.DIPLinear(4, 2, num_samples=3, activation="gelu", estimator="mean"),
        torch.ones(3, 4),
    )

    def gradients(x):
        return torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))

    with dip.fixed_noise(3):
        graph = make_fx(gradients)(x)
        for found, expected in zip(graph(x), gradients(x), strict=True):
            torch.testing.assert_close(found, expected)


# ---- torch.jit -----------------------------------------------------------------------------------

LAYERS = [
    pytest.param(lambda: dip.DIPLinear(4, 4), id="linear"),
    pytest.param(lambda: dip.DIPInput(4), id="input"),
    pytest.param(lambda: dip.DIPConv1d(3, 4, 1), id="conv"),
    pytest.param(lambda: dip.DIPMultiheadAttention(4, 2), id="attention"),
    pytest.param(
        lambda: dip.convert(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), id="encoder"
    ),
    pytest.param(lambda: Everything(), id="everything"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", LAYERS)
def test_script_names_the_way_out(make, training):
    model = nn.Sequential(nn.ReLU(), make()).train(training)
    before = [(name, type(module)) for name, module in model.named_modules()]
    said = r"dipkernels: torch\.jit\.script .*to_plain.*torch\.export"
    with pytest.raises(RuntimeError, match=said):
        torch.jit.script(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_the_way_out_of_script_works():
    model = dip.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    scripted = torch.jit.script(dip.to_plain(copy.deepcopy(model)))
    assert torch.equal(scripted(torch.ones(3, 4)), model.eval()(torch.ones(3, 4)))


@pytest.mark.parametrize("how", ["training", "fixed_noise", "sampling_on", "no_grad"])
def test_trace_refuses_to_freeze_noise(how):
    model, x = nn.Sequential(nn.ReLU(), dip.DIPLinear(4, 2)), torch.ones(3, 4)
    contexts = {
        "fixed_noise": fixed_noise(3),
        "sampling_on": dip.sampling_on(),
        "no_grad": torch.no_grad(),
    }
    model.train(how != "sampling_on")
    with (
        contexts.get(how, torch.enable_grad()),
        pytest.raises(RuntimeError, match=r"dipkernels: torch\.jit\.trace .*eval\(\).*to_plain"),
    ):
        torch.jit.trace(model, x)


def test_trace_in_eval_mode_is_the_plain_network(x):
    model = Everything().eval()
    # The check compares graphs, and fails for nn.MultiheadAttention itself, whose fast path depends
    # on gradients.
    traced = torch.jit.trace(model, x, check_trace=False)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced), saved)
    saved.seek(0)
    assert torch.equal(traced(x), model(x))
    torch.testing.assert_close(torch.jit.load(saved)(x), model(x))


# ---- ONNX ----------------------------------------------------------------------------------------


def small_network():
    return dip.convert(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)))


@pytest.mark.slow
def test_onnx_in_eval_mode_is_the_plain_network(x):
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference")
    model = small_network().eval()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = evaluator.ReferenceEvaluator(program.model_proto)
    (y,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_in_training_mode_names_the_way_out(x, dynamo):
    pytest.importorskip("onnxscript")
    how = {} if dynamo else {"training": torch.onnx.TrainingMode.TRAINING}
    said = r"dipkernels: ONNX has no operation .*eval\(\), without predict .*to_plain"
    with pytest.raises(Exception, match=said):
        torch.onnx.export(small_network(), (x,), io.BytesIO(), dynamo=dynamo, verbose=False, **how)
