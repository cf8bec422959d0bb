"""Every operation of every namespace: schema, fake and implementation agree (opcheck); errors are
Python's."""

import functools
import hashlib
import itertools

import pytest
import torch
from layout_support import ALL, cases, fake_of, kinds_of
from torch.autograd import gradcheck, gradgradcheck

from dipkernels import functional, library, producers, testing
from dipkernels.ops import registry
from dipkernels.ops.activations import ACTIVATIONS
from dipkernels.ops.draw import DTYPES, Draw
from dipkernels.ops.expectation import expectation
from dipkernels.ops.linear import linear

SEED = torch.tensor([3, 1])
WHERE = (-1, 5, 3, 0)
NAMESPACES = ["dipkernels", "dipkernels_reference"]


def variants(op, overload, dtype):
    """Arguments for an operation: each that may be None is given, and in another call left out."""
    schema = overload._schema.arguments
    names = [a.name for a in schema if not a.has_default_value()]
    found = testing._inputs(names, [3, 2, 8], dtype, op)
    found |= {"row0": 5, "col0": 3, "factor": 0.5, "log_variance": True}
    whole = {name: found[name] for name in names}
    yield whole
    for argument in schema:
        if argument.name in whole and isinstance(argument.type, torch.OptionalType):
            other = {"out_dtype": torch.bfloat16, "given": torch.rand(11, 8).bfloat16()}
            yield {**whole, argument.name: other.get(argument.name)}
    if len(names) < len(schema) and overload.namespace == "dipkernels":
        yield {**whole, "first": torch.rand(3, 2, 11, dtype=dtype)}


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", registry.SCHEMAS)
def test_ops_pass_opcheck(op, dtype, namespace):
    overload = getattr(getattr(torch.ops, namespace), op).default
    checks = ["test_schema", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] * (dtype is torch.float32)
    for arguments in variants(op, overload, dtype):
        torch.library.opcheck(overload, (*arguments.values(),), test_utils=checks)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_ops_results_lie_as_their_fakes_say_in_every_layout(namespace):
    """torch.compile reads no more of them, and hands over its own layouts."""
    found = set()
    for op, arguments in cases("cpu"):
        overload = getattr(getattr(torch.ops, namespace), op).default
        assert kinds_of(overload(*arguments)) == fake_of(op, arguments), op
        assert torch.Tag.flexible_layout in overload.tags
        found.add(op)
    assert found == ALL


def empty(shape, dtype):
    """Every operation on a tensor of this shape without elements."""
    x, wide = torch.rand(shape).to(dtype), torch.promote_types(dtype, torch.float32)
    k, rows = shape[-1], x.shape[:-1].numel()
    sigma, column, bias = (
        torch.rand(k, dtype=wide),
        torch.rand(k).to(dtype),
        torch.rand(3).to(dtype),
    )
    draw = (sigma, SEED, *WHERE, 0.5, True)
    yield "perturb", (x, *draw, torch.bfloat16)
    yield "perturb_bwd", (x, *draw)
    yield "perturb_replay", (x, x, *draw, None)
    yield "gate", (x, x, *draw, "silu", None)
    yield "gate_bwd", (x, x, None, *draw, "silu")
    yield "expectation", (x, sigma, "gelu")
    yield "expectation_bwd", (x, x, sigma, "gelu")
    for kind, stats in (("layer", 2), ("rms", 1)):
        sums = torch.ones(stats, rows, dtype=wide)
        yield "norm", (x, column, None, *draw, kind, 1e-5, 0.0, None)
        yield "norm_bwd", (x, x, sums, column, column, *draw, kind, 0.0)
    for weight in (torch.rand(3, k).to(dtype), torch.rand(0, k).to(dtype)):
        mean = (weight, bias[: len(weight)], sigma, SEED, *WHERE[1:], 1.0, True, 2, "gelu")
        yield "linear", (x, *mean, dtype)
        yield "linear_bwd", (torch.rand(*shape[:-1], len(weight)).to(dtype), x, *mean)
        yield "affine_variance", (weight, sigma, True)
        yield "affine_variance_bwd", (bias[: len(weight)].to(wide), weight, sigma, True, None)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8), (2, 3, 0)])
def test_ops_results_of_no_elements_are_as_fake_and_reference_say(namespace, dtype, shape):
    found = set()
    for op, arguments in empty(shape, dtype):
        overload = getattr(getattr(torch.ops, namespace), op).default
        used = torch.full((k,), float("nan")) if (k := shape[-1]) else None
        del used  # memory that the next result may get
        got = overload(*arguments)
        assert kinds_of(got) == fake_of(op, arguments), op
        exact = getattr(torch.ops.dipkernels_reference, op).default(*arguments)
        torch.testing.assert_close(got, exact)
        found.add(op)
    assert found == ALL


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("noise", ([-1, 3], *WHERE), "shape: expected sizes >= 0, got -1"),
        ("noise", ([3, -2], *WHERE), "shape: expected sizes >= 0, got -2"),
        ("linear", (0, 0, None), "num_samples: expected 1 to 65536, got 0"),
        ("linear", (65535, 2, None), "sample: expected sample . num_samples <= 65536, got 65535"),
        ("linear", (65535, 2, 4), "sample: expected sample . num_samples <= 65536, got 65535"),
    ],
)
def test_ops_that_are_called_themselves_name_an_integer_that_makes_no_sense(op, arguments, message):
    if op == "noise":
        arguments = (SEED, *arguments)
    else:
        sample, num_samples, rows = arguments
        first = None if rows is None else torch.rand(rows, 3)
        draw = (torch.rand(6), SEED, 0, 0, sample, 1.0, True)
        matrices = (torch.rand(4, 6), torch.rand(3, 6), None)
        arguments = (*matrices, *draw, num_samples, "gelu", torch.float32, first)
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(torch.ops.dipkernels, op).default(*arguments)


def test_ops_namespaces_have_one_schema():
    for name in registry.SCHEMAS:
        texts = {
            str(getattr(getattr(torch.ops, n), name).default._schema).split("::")[1]
            for n in set(registry.NAMESPACES.values())
        }
        assert len(texts) == 1


LAYERS = {
    "keep": [{"keep": "x"}],
    "mean": [{"activation": a, "estimator": "mean", "num_samples": 2} for a in ACTIVATIONS],
    "analytic": [{"activation": a, "estimator": "analytic"} for a in ACTIVATIONS],
}


def linear_layer(x, w, b, s, how, most=None, **scale):
    some = LAYERS[how][:most]
    return sum(functional.dip_linear(x, w, b, s, SEED, **each, **scale) for each in some)


def of_log_variances(x, w, b, s):
    log = {"log_variance": True}
    y = functional.perturb(x @ w + b, s, SEED, **log)
    y = y + producers.norm(x, w[0], b, s, SEED, kind="layer", eps=1e-3, **log)
    y = y + producers.gate(x, x @ w + b, s, SEED, kind="silu", **log)
    return y + sum(linear_layer(x, w, b, s, how, 1, **log) for how in LAYERS)


# Each function with a backward pass of its own, of x, a matrix, and two vectors.
FUNCTIONS = {
    "perturb": lambda x, w, b, s: functional.perturb(x @ w + b, s, SEED),
    **{how: functools.partial(linear_layer, how=how) for how in LAYERS},
    "without a bias": lambda x, w, b, s: b * sum(linear_layer(x, w, None, s, h, 1) for h in LAYERS),
    "expectation": lambda x, w, b, s: functional.expectation(x @ w + b, s, "tanh"),
    "norm": lambda x, w, b, s: producers.norm(x, w[0], b, s, SEED, kind="layer", eps=1e-3),
    "rms": lambda x, w, b, s: producers.norm(x @ w, None, b, s, SEED, kind="rms", eps=1e-3),
    "activate": lambda x, w, b, s: producers.activate(x @ w + b, s, SEED, kind="tanh"),
    "gate": lambda x, w, b, s: producers.gate(x, x @ w + b, s, SEED, kind="silu"),
    "log variances": of_log_variances,
}


def leaves(dtype=torch.float64):
    shapes = (5, 4), (4, 4), (4,)
    return [*(torch.randn(shape, dtype=dtype) for shape in shapes), torch.rand(4, dtype=dtype)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_gradcheck_and_gradgradcheck(name):
    tensors = [t.requires_grad_() for t in leaves()]
    assert gradcheck(FUNCTIONS[name], tensors) and gradgradcheck(FUNCTIONS[name], tensors)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_give_the_gradients_that_are_wanted(name):
    tensors, every = leaves(torch.float32), None
    for needs in itertools.product((True, False), repeat=4):
        given = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs)]
        y = FUNCTIONS[name](*given)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.sin().sum().backward()
        every = every or [t.grad for t in given]
        for t, need, want in zip(given, needs, every):
            torch.testing.assert_close(t.grad, want if need else None, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_that_read_what_was_made_of_their_own_weights_have_one_gradient(name):
    """A layer that is called again, as a recurrent cell: under create_graph no gradient counts
    twice what reaches it through the input."""
    tensors = leaves()

    def loss(x, *rest):
        return FUNCTIONS[name](FUNCTIONS[name](x, *rest), *rest).square().sum()

    def penalty(grads):
        return sum((g * g).sum() for g in grads)

    each = tuple(range(4))
    want = torch.func.grad(loss, each)(*tensors)
    twice = torch.func.grad(lambda *p: penalty(torch.func.grad(loss, each)(*p)), each)(*tensors)
    tensors = [t.requires_grad_() for t in tensors]
    torch.testing.assert_close(torch.autograd.grad(loss(*tensors), tensors), want)
    got = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(penalty(got), tensors), twice)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_compile_whole(name):
    tensors, run = [t.requires_grad_() for t in leaves(torch.float32)], FUNCTIONS[name]
    outs = [
        each(*tensors) for each in (run, torch.compile(run, backend="aot_eager", fullgraph=True))
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), tensors) for y in outs))


def test_ops_meta_tensors_take_shapes_through():
    x, sigma = torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    u = functional.perturb(x, sigma, seed, dtype=torch.bfloat16)
    assert u.shape == x.shape and u.device.type == "meta" and u.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["weight", "bias", "sigma", "seed", "v"])
def test_ops_name_what_is_on_another_device(name):
    tensors = dict(
        weight=torch.randn(3, 4),
        bias=torch.randn(3),
        sigma=torch.rand(4),
        seed=SEED,
        v=torch.rand(4),
    )
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected device cpu, as .*, got meta"):
        if name == "v":
            expectation(torch.randn(2, 4), tensors["v"], "gelu")
        w, b, s, seed, _ = tensors.values()
        linear(torch.randn(2, 4), w, b, s, seed, Draw(), 2, "gelu", None)


def test_a_change_of_a_schema_asks_for_another_interface():
    """Else a library that was built before it is loaded, and fails at the first call. Operations
    made of others in Python are not in the library."""
    in_python = torch._C._dispatch_has_kernel_for_dispatch_key
    schemas = sorted(
        name + schema
        for name, schema in (registry.SCHEMAS | registry.PASSES).items()
        if not in_python(f"dipkernels::{name}", "CompositeExplicitAutograd")
    )
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:12]
    assert (library.INTERFACE, digest) == ("4", "136f9ab29e55"), (
        "raise library.INTERFACE and `interface` in csrc/perturb_op.cpp, and write both here"
    )
