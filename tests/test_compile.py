"""torch.compile, torch.export, AOTInductor and torch.func: whole graphs, one compilation, the noise
of eager mode."""

import contextlib
import copy
import json
import warnings

import pytest
import torch
import trainer_support
from graph_support import Compiler
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.compilers import nop
from torch.autograd import forward_ad
from variance_support import gradients

import dipkernels as dip
from dipkernels.nn.conv import DIPConv1d, DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers
from dipkernels.noise.contexts import fixed_noise, sampling_on

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.input, self.linear = DIPInput(8), DIPLinear(8, 12, num_samples=2)
        self.conv, self.head = DIPConv2d(3, 4, 2), nn.Linear(4, 3)
        number_layers(self)

    def forward(self, x):
        h = torch.tanh(self.linear(self.input(x)))
        return self.head(self.conv(h.unflatten(-1, (3, 2, 2))).flatten(-3))


def layers():
    return Layers(), torch.randn(4, 8)


def vit():
    return dip.convert(trainer_support.vit(layers=1)), torch.randn(2, 1, 8, 8)


def llama():
    model = trainer_support.llama(num_key_value_heads=1, use_cache=False)
    return dip.convert(model), torch.randint(0, 32, (2, 7))


def one():
    return number_layers(nn.Sequential(DIPLinear(8, 12), nn.GELU())), torch.randn(4, 8)


class Producers(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


def producers():
    kinds = [nn.Linear(8, 8), dip.DIPLayerNorm(8), dip.DIPRMSNorm(8), dip.DIPActivation(8, "silu")]
    return number_layers(Producers(*kinds)), torch.randn(4, 8)


MODELS = {"layers": layers, "vit": vit, "llama": llama, "one": one, "producers": producers}


def make(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.train(), x


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


# ---- torch.compile -------------------------------------------------------------------------------


WHOLE = [
    "layers",
    "producers",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "llama")),
]


def eager_and_compiled(name):
    """(eager model, compiled model, input, the compiler)"""
    model, x = make(name)
    eager, compiler = copy.deepcopy(model), Compiler()
    model.compile(backend=compiler, fullgraph=True)
    return eager, model, x, compiler


@pytest.mark.parametrize("name", WHOLE)
def test_compile_is_whole_equals_eager_and_happens_once(name):
    """fullgraph; outputs, gradients; one graph for all keys."""
    eager, model, x, compiler = eager_and_compiled(name)
    for key in (1, 2, 2**64 - 1):
        for each in (eager, model):
            each.zero_grad()
            with dip.fixed_noise(key):
                output(each, x).square().mean().backward()
        torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-4, atol=1e-5)
    assert compiler.count == 1


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_seeds_follow_the_generator(name):
    eager, model, x, compiler = eager_and_compiled(name)
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(output(model, x))
        drawn[-1].sum().backward()
    torch.manual_seed(0)
    torch.testing.assert_close(output(eager, x), drawn[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert compiler.count == 1


@pytest.mark.parametrize("name", WHOLE)
def test_compile_follows_batch_and_mode(name):
    """Other batch sizes: one more graph, of symbolic shape, as for the plain model."""
    eager, model, x, compiler = eager_and_compiled(name)
    for rows in (2, 3, 5, 6):
        more = x[:1].expand(rows, *x.shape[1:]).contiguous()
        with dip.fixed_noise(1):
            torch.testing.assert_close(
                output(model, more), output(eager, more), rtol=1e-4, atol=1e-5
            )
    assert compiler.count == 2
    model.eval(), eager.eval()
    torch.testing.assert_close(output(model, x), output(eager, x), rtol=1e-4, atol=1e-5)
    with dip.sampling_on(), dip.fixed_noise(1):
        torch.testing.assert_close(output(model, x), output(eager, x), rtol=1e-4, atol=1e-5)


def test_row0_and_noise_off_compile_whole():
    model, x = make("layers")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with dip.fixed_noise(3):
        whole = model(x)
    for first in (1, 2):
        with dip.fixed_noise(3, row0=first):
            torch.testing.assert_close(compiled(x[first:]), whole[first:], rtol=1e-4, atol=1e-5)
    with dip.noise_off():
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.sum().backward()
    assert not any(g.any() for n, g in gradients(model).items() if "log_variance" in n)


def test_a_compiled_step_may_enter_fixed_noise_with_another_key_each_time():
    """By Inductor: the second key is a symbol to torch.compile, in int64."""
    model, x = make("one")

    def step(x, key, row0):
        with dip.fixed_noise(key, row0=row0):
            return model(x)

    compiled = torch.compile(step, fullgraph=True)
    for key in (7, 8, -3, 2**63 - 1, -(2**63), 2**64 - 5, 2**63 + 1):
        torch.testing.assert_close(compiled(x, key, abs(key) % 5), step(x, key, abs(key) % 5))


@pytest.mark.parametrize("options", [{}, {"share": [("0", "1")]}, {"place": "producer"}])
def test_rows_of_many_micro_batches_compile_once(options):
    """Gradient accumulation gives each micro-batch a row0 of its own; torch stops compiling at the
    eighth graph of a module."""

    class Branches(nn.ModuleList):
        def forward(self, x):
            h = self[2](x)
            return self[0](h) + self[1](h)

    x = torch.randn(4, 8)
    model = Branches([nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)])
    batches = {"batches": [x]} if "place" in options else {}
    eager, compiler = dip.convert(model, 0.04, **options, **batches), Compiler()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for micro in range(12):
        with dip.fixed_noise(3, row0=4 * micro):
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    assert compiler.count <= 2  # one of row 0, one of any other


def test_a_training_step_compiles_with_its_optimiser():
    model, x = make("one")
    finals = []
    for compiled in (False, True):
        m = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(dip.param_groups(m, lr=1e-2), foreach=True)

        def step(m=m, optimizer=optimizer):
            out = dip.trajectories(m, x, m=2)
            loss = out.square().mean() + dip.penalty(m, 1e-3, 1e-4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for key in range(3):
            with dip.fixed_noise(key):
                run()
        finals.append([p.detach() for p in m.parameters()])
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["one", *WHOLE[2:]])
def test_inductor_equals_eager(name):
    model, x = make(name)
    eager = copy.deepcopy(model)
    model.compile(fullgraph=True)
    with dip.fixed_noise(3):
        for each in (eager, model):
            output(each, x).square().mean().backward()
    torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-3, atol=1e-4)
    assert not torch.equal(output(model, x), output(model, x))


def compiled_strides(model, x, path, names):
    """{operation: {shape of its first tensor: strides}} of one training step under Inductor."""
    compiled = torch.compile(model, fullgraph=True)
    # which knows a graph by the operations' names alone
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled(x).sum().backward()
    with torch.profiler.profile(record_shapes=True) as profile:
        compiled(x).sum().backward()
    profile.export_chrome_trace(str(path))
    strides = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["name"] in names:
            shape = event["args"]["Input Dims"][0]
            strides.setdefault(event["name"], {})[tuple(shape)] = event["args"]["Input Strides"][0]
    return strides


def test_a_compiled_convolutions_layout_is_the_noises_too(tmp_path):
    """Inductor makes convolutions channels-last: the noise takes their tensors as they are, and
    nothing is copied for it."""
    model = dip.convert(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)))
    names = ("aten::convolution", "dipkernels::perturb", "dipkernels::perturb_bwd")
    strides = compiled_strides(model, torch.randn(2, 4, 8, 8), tmp_path / "trace.json", names)
    inner = (2, 6, 6, 6)  # the first layer's input is the caller's
    assert strides["dipkernels::perturb"][inner] == strides["aten::convolution"][inner]
    assert strides["dipkernels::perturb_bwd"] == {inner: strides["aten::convolution"][inner]}
    assert strides["aten::convolution"][inner] == [216, 1, 36, 6]


def test_a_compiled_linear_layer_between_convolutions_noises_rows(tmp_path):
    """ConvNeXt's: Inductor takes any four dimensions in front of a convolution for images, and
    would turn each layer's input around and back."""

    class Block(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    block = Block(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    model = dip.convert(nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.Conv2d(4, 2, 1)))
    names = ("dipkernels::perturb", "dipkernels::perturb_replay")
    strides = compiled_strides(model, torch.randn(2, 3, 5, 5), tmp_path / "trace.json", names)
    for name in names:
        rows = {shape: found for shape, found in strides[name].items() if shape[-1] in (4, 6)}
        assert rows == {(50, 4): [4, 1], (50, 6): [6, 1]}


@pytest.mark.parametrize("kernel, stride", [(3, 1), (2, 2)])
def test_a_compiled_convolution_of_the_networks_own_input_asks_for_no_input_gradient(
    kernel, stride
):
    """The plain one computes none: it took a compiled patch embedding three times as long."""
    eager, x, found = dip.convert(nn.Conv2d(3, 4, kernel, stride)), torch.randn(2, 3, 6, 6), []

    def backward(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                found.append(node.args[-1][0])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=backward)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with dip.fixed_noise(3):
        for each in (eager, compiled):
            each(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(eager))
    assert not any(found) and all(gradients(model)["variance.log_variance"])


# ---- torch.export, AOTInductor -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layers", "vit", "llama"])
def test_export_of_the_eval_forward_is_the_plain_network(name):
    model, x = make(name)
    model.eval()
    program = torch.export.export(model, (x,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("dipkernels" in target or "randint" in target for target in targets)
    torch.testing.assert_close(output(program.module(), x), output(model, x))


def output_and_gradients(model, x, parameters):
    """Of one step; an exported model shares its parameters with the one that it was made from."""
    for p in parameters:
        p.grad = None
    torch.manual_seed(4)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["layers", "producers"])
def test_export_of_the_training_forward_draws_afresh_and_trains(name, strict):
    model, x = make(name)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert sum("dipkernels.noise" in str(node.target) for node in program.graph.nodes) == 3
    module = program.module()
    assert not torch.equal(module(x), module(x))
    outs = [
        output_and_gradients(each, torch.cat([x, x]), list(model.parameters()))
        for each in (model, module)
    ]
    assert all(grad.any() for grad in outs[0][1:])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_exact_mean_trains(strict):
    class Behind(nn.Linear):
        def forward(self, x):
            return dip.functional.expectation(super().forward(x), self.bias.square(), "tanh")

    affine = nn.Sequential(nn.Linear(8, 8), DIPLinear(8, 5, estimator="analytic"))
    for layer in (DIPLinear(8, 5, activation="silu", estimator="analytic"), Behind(8, 5), affine):
        x = torch.randn(3, 8)
        module = torch.export.export(layer, (x,), strict=strict).module()
        outs = [output_and_gradients(each, x, list(layer.parameters())) for each in (layer, module)]
        assert all(grad.any() for grad in outs[0][1:3])
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_export_under_fixed_noise_keeps_the_key():
    model, x = make("layers")
    with dip.fixed_noise(6):
        program = torch.export.export(model, (x,), strict=False)
        want = model(x)
    torch.testing.assert_close(program.module()(x), want)


@pytest.mark.parametrize("strict", [False, True])
def test_rows_of_a_sequence_of_any_length_export(strict):
    model = number_layers(nn.Sequential(DIPLinear(8, 12), dip.DIPLayerNorm(12))).train()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with dip.fixed_noise(3, row0=5):
        x = torch.randn(3, 5, 8)
        exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=strict)
        for shape in ((3, 5, 8), (2, 9, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_key_may_be_an_input_of_an_exported_program():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = DIPLinear(8, 4)

        def forward(self, x, key):
            with dip.fixed_noise(key):
                return self.layer(x)

    model, x, keys = Keyed(), torch.randn(3, 8), [torch.tensor([key]) for key in (4, -9)]
    program = torch.export.export(model, (x, keys[0]), strict=False).module()
    for key in keys:
        torch.testing.assert_close(program(x, key), model(x, key))
    assert not torch.equal(program(x, keys[0]), program(x, keys[1]))


def test_a_saved_export_loads_again(tmp_path):
    model, x = make("layers")
    torch.export.save(torch.export.export(model, (x,), strict=False), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.manual_seed(4)
    got = loaded(x)
    torch.manual_seed(4)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("options", [{"k": 4}, {"k": 4, "chunk": 2}, {"method": "analytic"}])
def test_predict_exports(options):
    class Server(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = dip.convert(
                nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), 0.1
            )

        def forward(self, x):
            return dip.predict(self.model, x, **options)

    server, x = Server(), torch.randn(3, 8)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(server, (x,), dynamic_shapes=({0: rows},)).module()
    assert torch.equal(exported(x), exported(x)) == ("method" in options)
    for each in (x, torch.randn(7, 8)):
        torch.manual_seed(4)
        got = exported(each)
        torch.manual_seed(4)
        torch.testing.assert_close(got, server(each))


@pytest.mark.parametrize("strict", [False, True])
def test_sampling_inside_what_is_traced_reaches_layers_behind_the_fast_path(strict):
    """In a whole graph of torch.compile, and in both kinds of export."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = dip.convert(nn.TransformerEncoder(block, 1, enable_nested_tensor=False), 0.1).eval()
    x = torch.randn(2, 3, 8)

    class Server(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with fixed_noise(3):
                return dip.predict(self.model, x, k=2, average="logits")

    server = Server()
    want = server(x)
    with torch.no_grad():
        assert not torch.allclose(want, model(x), atol=1e-3)
    exported = torch.export.export(server, (x,), strict=strict).module()
    compiled = torch.compile(server, backend="eager", fullgraph=True)
    for traced in (exported, compiled):
        torch.testing.assert_close(traced(x), want)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True])
def test_aot_inductor_packages_a_model(noisy, tmp_path):
    """An eval model needs nothing of this package at run time; one that samples needs its
    operations."""
    model, x = make("layers")
    model.eval()
    with torch.no_grad(), sampling_on() if noisy else contextlib.nullcontext(), dip.fixed_noise(6):
        program = torch.export.export(model, (x,), strict=False)
        want = model(x)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    got = torch._inductor.aoti_load_package(path)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_aot_inductor_keeps_drawn_noise(tmp_path):
    """As many draws as calls, of any batch, with the model's mean and spread."""
    model, x = dip.convert(nn.Sequential(nn.Linear(8, 4)), 0.1), torch.randn(3, 8)
    rows = torch.export.Dim("rows", min=2, max=512)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    path = str(tmp_path / "model.pt2")
    packaged = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    )
    draws = torch.stack([packaged(x[:1].expand(500, 8)) for _ in range(20)]).flatten(0, 1)
    assert len(draws.unique(dim=0)) == len(draws)
    spread = (0.1 * model[0].weight.square().sum(1)).sqrt()
    z = (draws - model.eval()(x[:1])) / spread
    assert (z.mean(0).abs() < 0.05).all() and ((z.std(0) - 1).abs() < 0.04).all()


# ---- torch.func ----------------------------------------------------------------------------------


def test_vmap_honours_its_randomness_argument():
    layer, x = DIPLinear(8, 8), torch.randn(8).expand(5, 3, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(layer)(x)
    same = torch.vmap(layer, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(layer, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with dip.fixed_noise(3):
        fixed = torch.vmap(layer)(x)
        torch.testing.assert_close(fixed[1], layer(x[1]))


def test_hessians_of_a_batch_have_one_noise_for_each_example():
    model = dip.convert(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), 0.1)
    f = torch.func.jacfwd(torch.func.jacrev(lambda x: model(x)[0]), randomness="same")
    each = torch.vmap(f, randomness="different")(torch.randn(2).expand(3, 2))
    torch.testing.assert_close(each, each.mT)
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize("transform", [True, False])
def test_parameters_cast_for_a_functional_call_stay_the_callers(transform):
    model = dip.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), 1.0)
    x = torch.randn(3, 6)  # and ln(1) is exact in any type
    parameters = dict(model.named_parameters())

    def loss(parameters):
        half = {name: p.bfloat16() for name, p in parameters.items()}
        y = torch.func.functional_call(model, half, (x.bfloat16(),)).float().square().sum()
        assert all(p.dtype is torch.bfloat16 for p in half.values())
        return y

    with dip.fixed_noise(1), warnings.catch_warnings():
        warnings.simplefilter("error")
        if transform:
            found = list(torch.func.grad(loss)(parameters).values())
        else:
            found = torch.autograd.grad(loss(parameters), list(parameters.values()))
    model.bfloat16()  # but for the variances
    with dip.fixed_noise(1):
        model(x.bfloat16()).float().square().sum().backward()
    for got, p in zip(found, model.parameters()):
        assert torch.allclose(got, p.grad.float(), rtol=0.02, atol=0.02)


def test_functional_call_with_jvp_vjp_and_ensembles():
    model, x = make("layers")
    model.double()
    x = x.double()
    parameters = dict(model.named_parameters())

    def f(parameters, x):
        with dip.fixed_noise(3):
            return torch.func.functional_call(model, parameters, (x,))

    torch.testing.assert_close(f(parameters, x), f(dict(parameters), x))
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    y, dy = torch.func.jvp(lambda p: f(p, x), (parameters,), (tangents,))
    _, pull = torch.func.vjp(lambda p: f(p, x), parameters)
    w = torch.randn_like(y)
    back = pull(w)[0]
    inner = sum((back[n] * tangents[n]).sum() for n in parameters)
    torch.testing.assert_close((dy * w).sum(), inner)
    step = {name: p + 1e-6 * tangents[name] for name, p in parameters.items()}
    torch.testing.assert_close(dy, (f(step, x) - y) / 1e-6, rtol=1e-3, atol=1e-4)
    stacked = {name: torch.stack([p, step[name]]) for name, p in parameters.items()}
    both = torch.vmap(lambda p: f(p, x))(stacked)
    torch.testing.assert_close(both, torch.stack([y, f(step, x)]))


def test_gradients_of_each_example():
    model, x = make("layers")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, one):
        return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

    with dip.fixed_noise(3):
        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        want = torch.func.grad(loss)(parameters, x[2])
    for name in want:
        torch.testing.assert_close(each[name][2], want[name], rtol=1e-4, atol=1e-5)


KINDS = {
    "layers": Layers,
    "keep": lambda: DIPLinear(8, 4, keep="x"),
    "mean": lambda: DIPLinear(8, 4, num_samples=2, activation="gelu", estimator="mean"),
    "analytic": lambda: DIPLinear(8, 4, activation="gelu", estimator="analytic"),
    "norm": lambda: dip.DIPLayerNorm(8),
    "activation": lambda: dip.DIPActivation(8, "silu"),
    "own input": lambda: nn.Sequential(
        nn.Unflatten(-1, (4, 2)), DIPConv1d(4, 4, 2, groups=2), nn.Flatten()
    ),
    "patches": lambda: nn.Sequential(
        nn.Unflatten(-1, (2, 4)), DIPConv1d(2, 3, 2, stride=2), nn.Flatten()
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_autograd_is_torch_funcs_jvp(kind):
    model, x, v = KINDS[kind](), torch.randn(4, 8), torch.randn(4, 8)
    with dip.fixed_noise(3):
        want = torch.func.jvp(model, (x,), (v,))[1]
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level(), dip.noise_off():
        assert forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent is not None


def test_linearize_is_the_jvp():
    model, x, v = Layers(), torch.randn(4, 8), torch.randn(4, 8)
    with dip.fixed_noise(3):
        _, push = torch.func.linearize(model, x)
        torch.testing.assert_close(push(v), torch.func.jvp(model, (x,), (v,))[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_several_outputs_at_once_are_those_of_each(kind):
    """is_grads_batched, by which autograd.functional.jacobian(vectorize=True) works."""
    model = KINDS[kind]()
    y = model(torch.randn(4, 8))
    parameters, slopes = list(model.parameters()), torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, parameters, slopes, is_grads_batched=True, retain_graph=True)
    for i, slope in enumerate(slopes):
        want = torch.autograd.grad(y, parameters, slope, retain_graph=True)
        torch.testing.assert_close([g[i] for g in got], list(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(4,), ()])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_several_outputs_at_once_have_derivatives(kind, order, rows):
    """A penalty on them: the gradient norms of several tasks, a Jacobian's, a Hessian's."""
    model, x, found = KINDS[kind](), torch.randn(*rows, 8), []
    parameters = list(model.parameters())
    for at_once in (True, False):
        with dip.fixed_noise(3):
            y = model(x).sin()
        if order == 2:
            parts = torch.autograd.grad(y.sum(), parameters, create_graph=True)
            y = torch.cat([part.flatten() for part in parts])
        slopes = torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)
        if at_once:
            made = torch.autograd.grad(
                y, parameters, slopes, is_grads_batched=True, create_graph=True
            )
        else:
            each = [torch.autograd.grad(y, parameters, s, create_graph=True) for s in slopes]
            made = [torch.stack(of_one) for of_one in zip(*each)]
        total = sum(g.square().sum() for g in made)
        found.append(torch.autograd.grad(total, parameters, allow_unused=True))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("transform", ["grad", "jvp", "each example"])
def test_transforms_compile_whole(transform):
    model, x = Layers(), torch.randn(4, 8)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def run(parameters, x):
        if transform == "grad":
            return torch.func.grad(loss)(parameters, x)
        if transform == "jvp":
            return torch.func.jvp(lambda x: loss(parameters, x), (x,), (x,))[1]
        return torch.vmap(torch.func.grad(loss), (None, 0), randomness="same")(parameters, x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with dip.fixed_noise(3):
        got, want = compiled(parameters, x), run(parameters, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layers", "vit"])
def test_double_backward_through_a_model(name):
    """The gradient of a gradient's norm against finite differences along a random direction."""
    model, x = make(name)
    model.double()
    x = x.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "vit":
        model.set_attn_implementation("eager")  # the fused attention has no second derivative

    def norm():
        with dip.fixed_noise(3):
            loss = output(model, x).pow(3).mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        return sum(g.square().sum() for g in grads if g is not None)

    second = torch.autograd.grad(norm(), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    want = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=step)
        want.append(norm().item())
    got = sum((g * d).sum() for g, d in zip(second, directions) if g is not None).item()
    assert got == pytest.approx((want[0] - want[1]) / 2e-5, rel=1e-4)
