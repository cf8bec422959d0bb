"""The world of a call is told right, and no layer breaks or bends a graph in any of them."""

import re
from pathlib import Path

import pytest
import torch
from graph_support import (
    GPU_MODE,
    Compiler,
    compiled,
    module_on_gpu,
    no_workaround_of_dynamo,
    on_gpu,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dipkernels as dip
from dipkernels import backends, functional, worlds
from dipkernels.ops import registry

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
SOURCES = sorted(Path(dip.__file__).parent.rglob("*.py"))
FLOAT32, FLOAT16 = (pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))
DTYPES = (torch.float32, torch.bfloat16, FLOAT16)
NARROW = (torch.bfloat16, FLOAT32, FLOAT16)  # where the type decides little
MEAN = {"estimator": "mean", "num_samples": 4}
# name: (layer, shape of its input)
LAYERS = {
    "wide": (lambda: dip.DIPLinear(256, 512), (64, 256)),
    "narrow": (lambda: dip.DIPLinear(256, 64), (64, 256)),
    "mean": (lambda: dip.DIPLinear(32, 16, activation="gelu", **MEAN), (8, 32)),
    "relu mean": (lambda: dip.DIPLinear(32, 16, activation="relu", **MEAN), (8, 32)),
    "exact": (lambda: dip.DIPLinear(32, 16, activation="tanh", estimator="analytic"), (8, 32)),
    "keep x": (lambda: dip.DIPLinear(32, 16, keep="x"), (8, 32)),
    "keep u": (lambda: dip.DIPLinear(32, 16, keep="u"), (8, 32)),
    "conv": (lambda: dip.DIPConv2d(3, 4, 3), (2, 3, 8, 8)),
    "input": (lambda: dip.DIPInput(8), (4, 8)),
    "attention": (lambda: dip.DIPMultiheadAttention(16, 2, batch_first=True), (2, 4, 16)),
}


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """The choices of a GPU with Triton, made for CPU tensors; nothing of it is run."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_INTERPRETS", True)
    with backends.backend("triton"):
        yield
    monkeypatch.undo()
    registry.choose_all()


def make(name, dtype=torch.float32):
    layer, shape = LAYERS[name][0]().to(dtype), LAYERS[name][1]
    inputs = 3 if name == "attention" else 1
    return layer, [torch.randn(shape).to(dtype).requires_grad_() for _ in range(inputs)]


# ---- which world ---------------------------------------------------------------------------------


class Asks(nn.Module):
    """Adds a number that names the worlds of its call."""

    def forward(self, x):
        said = (worlds.tracing(), worlds.exporting(), worlds.transforming(), worlds.wants_pieces())
        return x + sum(2**i * answer for i, answer in enumerate(said))


TRACING, EXPORTING, TRANSFORMING, PIECES = (2**i for i in range(4))


def test_each_world_is_told_from_the_others():
    asks, x = Asks(), torch.zeros(3)
    whole = {"backend": "eager", "fullgraph": True}
    without = torch.compile(asks, backend="aot_eager", fullgraph=True)
    answers = {
        "eager": asks(x),
        "compile": torch.compile(asks, **whole)(x),
        "compile under no_grad": torch.no_grad()(without)(x),
        "vmap": torch.vmap(asks)(x),
        "compile of vmap": torch.compile(torch.vmap(asks), **whole)(x),
        "make_fx": make_fx(asks)(x)(x),
    }
    for strict in (False, True):
        program = torch.export.export(asks, (x,), strict=strict)
        answers[f"export, strict={strict}"] = program.module()(x)
        with torch.no_grad():
            program = torch.export.export(asks, (x,), strict=strict)
        answers[f"export under no_grad, strict={strict}"] = program.module()(x)
    exported = TRACING + EXPORTING
    assert {name: int(answer[0]) for name, answer in answers.items()} == {
        "eager": 0,
        "compile": TRACING,
        "compile under no_grad": TRACING,
        "vmap": TRANSFORMING + PIECES,
        "compile of vmap": TRACING + TRANSFORMING + PIECES,
        "make_fx": 0,
        "export, strict=False": exported + PIECES,
        "export under no_grad, strict=False": exported,
        "export, strict=True": exported + PIECES,
        "export under no_grad, strict=True": exported,
    }
    assert not worlds.exporting() and not worlds.tracing()


def test_no_other_module_asks_torch_for_its_world():
    asked = re.compile(
        r"is_exporting|is_compiling|is_dynamo_compiling|_are_functorch_transforms_active|_get_dispatch_mode"
    )
    found = [path.name for path in SOURCES if asked.search(path.read_text())]
    assert found == ["worlds.py"]


def test_sigma_is_checked_where_it_has_values_and_nowhere_else():
    x, seed = torch.randn(3, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="sigma: expected values >= 0"):
        functional.perturb(x, -torch.ones(8), seed)

    def run(x, sigma):
        return functional.perturb(x, sigma, seed)

    graph = make_fx(run)(x, torch.ones(8))
    assert torch.equal(graph(x, torch.ones(8)), run(x, torch.ones(8)))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert run(torch.randn(3, 8), torch.ones(8)).shape == (3, 8)


# ---- one whole graph -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_training_layer_is_one_graph_of_its_own_passes(name, dtype):
    check_passes(name, dtype)


UNFUSED = ("conv", "input", "attention", "keep u")  # whatever the type
ON_GPU = [
    pytest.param(name, dtype, marks=pytest.mark.slow if slow else ())
    for name in LAYERS
    for dtype, slow in (
        (torch.bfloat16, False),
        (torch.float32, name in UNFUSED),
        (torch.float16, True),
    )
]


@pytest.mark.parametrize("name, dtype", ON_GPU)
def test_so_it_is_with_the_choices_of_a_gpu(name, dtype, triton_on_cpu):
    check_passes(name, dtype, "dipkernels_triton", dtype is not torch.float32)


def test_torch_counts_the_product_of_a_layer_that_draws_inside_it(triton_on_cpu):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        layer = dip.DIPLinear(16, 8, dtype=torch.bfloat16)
        layer(torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 16 * 8


def check_passes(name, dtype, namespace="dipkernels", fuses=False):
    """P forward, Q backward (or both of a mean), and none of the pieces that torch.export is
    given. fuses: Whether a linear layer samples inside its product."""
    layer, inputs = make(name, dtype)
    graphs = compiled(layer, *inputs)
    assert len(graphs.forward) == len(graphs.backward) == 1
    forward, backward = set(graphs.forward[0]), set(graphs.backward[0])
    assert not any("noise" in op for op in forward | backward), (forward, backward)
    passes = {
        "mean": ({"linear"}, {"linear_bwd"}),
        "relu mean": ({"linear"}, {"linear_bwd"}),
        "exact": ({"expectation"}, {"expectation_bwd"}),
    }
    plain = {"perturb"}, {"perturb_bwd", "perturb_replay"}
    if fuses and name != "keep u" and isinstance(layer, nn.Linear):
        plain = {"linear"}, {"linear_bwd"}
    for ran, wanted in zip((forward, backward), passes.get(name, plain)):
        assert ran & {f"{namespace}.{op}.default" for op in wanted}, (ran, wanted)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_gpu_is_one_graph(name, dtype):
    layer, inputs = make(name, dtype)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    with GPU_MODE, torch.no_grad(), no_workaround_of_dynamo():
        layer, inputs = module_on_gpu(layer), [on_gpu(x) for x in inputs]
        torch.compile(layer, backend=backend, fullgraph=True)(*inputs)
    assert len(graphs) == 1
    assert any("dipkernels" in str(node.target) for node in graphs[0].graph.nodes)


def test_a_device_without_kernels_of_its_own_is_a_look_up(monkeypatch):
    """Such as xpu: a traced choice would read the library's folder."""
    chosen = {key: value for key, value in registry._chosen.items() if key[1] != "cpu"}
    monkeypatch.setattr(registry, "_chosen", chosen)
    layer, inputs = make("input")
    graphs = compiled(layer, *inputs)
    assert "dipkernels_reference.perturb.default" in graphs.forward[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_layer_keeps_no_noise_for_backward(dtype):
    """Beside its inputs: a seed, and of a convolution the input that the plain one keeps, in its
    own type."""
    for name in ("wide", "input", "conv"):
        layer, (x,) = make(name, dtype)
        plain = x.numel() * x.element_size() if name == "conv" else 0
        assert compiled(layer, x).saved[0] <= plain + 64, name


# ---- what keep="auto" keeps under torch.compile: docs/maths.md, section 2 ------------------------


class Readers(nn.Module):
    """DIP layers that read what `before` makes of the input."""

    def __init__(self, before, number):
        super().__init__()
        self.before = before
        self.layers = nn.ModuleList(dip.DIPLinear(64, 32) for _ in range(number))

    def forward(self, x):
        h = self.before(x)
        return sum(layer(h) for layer in self.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT32])
def test_compiled_keep_decides_between_x_and_u_by_these_bytes(dtype):
    x = torch.randn(128, 64, dtype=dtype)
    one = x.numel() * x.element_size()
    for before, number, by_x, by_u in [
        (nn.Linear(64, 64), 1, one, one),  # u takes x's place
        (nn.Tanh(), 1, one, 2 * one),  # whose own backward keeps x
        (nn.Linear(64, 64), 3, one, 3 * one),  # each reader has a u of its own
        (nn.Tanh(), 3, one, 4 * one),  # as the plain layers keep: what tanh made, once
    ]:
        model = Readers(before.requires_grad_(), number).to(dtype)
        for keep, wanted, backward in (("x", by_x, "perturb_replay"), ("u", by_u, "perturb_bwd")):
            with backends.compiled_keep(keep):
                graphs = compiled(model, x.requires_grad_())
            assert wanted <= graphs.saved[0] <= wanted + 128 * number, (before, number, keep)
            calls = [op for op in graphs.backward[0] if "dipkernels" in op]
            assert calls == [f"dipkernels.{backward}.default"] * number


class Autocast(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def test_compiled_keep_by_bytes_keeps_u_where_it_is_narrower():
    """float32 x behind a norm, under autocast: as the plain layer, which keeps its cast of x. Of
    one type: x."""
    x, cells = torch.randn(128, 64), 128 * 64
    for wrap, keep, bytes_kept in [
        (Autocast, "x", 4 * cells),
        (Autocast, "u", 2 * cells),
        (Autocast, "bytes", 2 * cells),
        (nn.Sequential, "bytes", 4 * cells),
    ]:
        model = wrap(Readers(nn.LayerNorm(64), 1))
        with backends.compiled_keep(keep):
            graphs = compiled(model, x.clone().requires_grad_())
        kept = graphs.saved[0]
        assert bytes_kept <= kept <= bytes_kept + 2 * 4 * 128 + 128 + 2 * 32 * 64, (keep, kept)
        op = "perturb_bwd" if (wrap, keep) in ((Autocast, "u"), (Autocast, "bytes")) else "replay"
        assert any(op in name for name in graphs.backward[0]), (wrap, keep)


def test_compiled_keep_changes_no_number_and_compiles_anew():
    layer, compiler, results = dip.DIPLinear(24, 12), Compiler(), {}
    compiled_layer = torch.compile(layer, backend=compiler, fullgraph=True)
    for keep in ("x", "u", "x"):
        x = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with backends.compiled_keep(keep), dip.fixed_noise(5):
            y = compiled_layer(x)
        results[keep] = (y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters())))
    assert compiler.count == 2
    assert torch.equal(results["x"][0], results["u"][0])
    torch.testing.assert_close(results["x"], results["u"], rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"keep: expected one of \('x', 'u', 'bytes'\), got 'both'"
    ):
        backends.compiled_keep("both")
    assert backends.kept_when_compiled == "x"
