"""dip_linear(activation, estimator): S samples behind an activation, their exact mean, and what
memory they take.  docs/maths.md, sections 4, 7."""

import math

import pytest
import timing
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dipkernels as dip
from dipkernels import functional, library, reference, worlds
from dipkernels.ops import row_blocks
from dipkernels.ops.activations import ACTIVATIONS, BACKWARDS
from dipkernels.ops.draw import Draw

SEED = torch.tensor([91, 4])
NAMES = list(ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def inputs(m=40, k=24, n=12, dtype=torch.float32, lead=()):
    generator = torch.Generator().manual_seed(m + k + n)
    x, dy = (torch.randn(*lead, m, size, generator=generator).to(dtype) for size in (k, n))
    weight = (torch.randn(n, k, generator=generator) / math.sqrt(k)).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    return x, weight, bias, torch.rand(k, generator=generator) + 0.1, dy


def layer(x, weight, bias, sigma, dy=None, **options):
    return functional.dip_linear(x, weight, bias, sigma, options.pop("seed", SEED), **options)


def run(x, weight, bias, sigma, dy, **options):
    leaves = clones(x, weight, bias, sigma)
    y = layer(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def clones(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_near(got, want, plain, like, slack):
    """At most twice the error of the same expression in plain PyTorch, + what the draws may differ
    by."""
    allowed = (
        2 * (plain.double() - want).abs().max() + (4 * EPS[like] + slack) * want.abs().max() + 1e-6
    )
    assert (got.double() - want).abs().max() <= allowed


# ---- "sample" and "mean" -------------------------------------------------------------------------


@pytest.mark.parametrize("activation", NAMES)
def test_sample_is_the_activation_of_one_draw(activation):
    tensors = inputs()
    for options in ({}, {"num_samples": 4}, {"keep": "x"}, {"row0": 7, "sample": 2}):
        y = layer(*tensors, activation=activation, **options)
        assert torch.equal(y, ACTIVATIONS[activation](layer(*tensors, **options)))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_variance", [False, True])
def test_mean_equals_explicit_calls(activation, dtype, log_variance):
    """With its four gradients; rows cross 2^32, samples start at 3, columns inside a group."""
    x, weight, bias, sigma, dy = inputs(dtype=dtype, lead=(2,))
    where = {"row0": 2**32 - 9, "col0": 5, "log_variance": log_variance}
    options = {"activation": activation, "estimator": "mean", "num_samples": 5, "sample": 3}
    got = run(x, weight, bias, sigma, dy, **options, **where)

    def explicit(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)] + [
            sigma.double().requires_grad_()
        ]
        scale = torch.exp(leaves[3] / 2) if log_variance else leaves[3]
        y = 0
        for s in range(3, 8):
            z = reference.noise(SEED, x.shape, -1, 2**32 - 9, 5, s).double()
            h = F.linear((leaves[0] + scale * z).to(dtype), leaves[1], leaves[2])
            y = y + ACTIVATIONS[activation](h) / 5
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    for ours, want, plain in zip(got, explicit(torch.float64), explicit(dtype), strict=True):
        assert_near(ours, want, plain, dtype, 2e-5)


@pytest.mark.parametrize("namespace", ["dipkernels", "dipkernels_reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_mean_by_row_blocks_matches_reference(namespace, bias, monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU_ROWS", (7, 7))  # several blocks, the last one short
    x, weight, b, sigma, dy = (t.double() for t in inputs(23, 9, 5))
    how = (weight, b if bias else None, sigma, SEED, 2, 3, 1, 0.5, True, 4, "silu")
    linear = getattr(torch.ops, namespace).linear(x, *how, None)
    grads = getattr(torch.ops, namespace).linear_bwd(dy, x, *how)
    torch.testing.assert_close(linear, reference.linear(x, *how, None), rtol=1e-5, atol=1e-5)
    want = reference.linear_bwd(dy, x, *how)
    torch.testing.assert_close(grads, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("namespace", ["dipkernels", "dipkernels_reference"])
def test_mean_without_an_activation_is_one_sample(namespace):
    x, weight, bias, sigma, dy = inputs(5, 8, 3)
    how = (weight, bias, sigma, SEED, 0, 0, 0, 0.5, False, 2, "identity")
    ops = getattr(torch.ops, namespace)
    for call in (lambda: ops.linear(x, *how, None), lambda: ops.linear_bwd(dy, x, *how)):
        said = "num_samples: expected 1 with activation 'identity', got 2"
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("namespace", ["dipkernels", "dipkernels_reference"])
def test_mean_of_no_features_is_that_of_the_bias(namespace):
    x, weight, bias, sigma, dy = inputs(6, 0, 3, lead=(2,))
    how = (weight, bias, sigma, SEED, 0, 0, 0, 1.0, False, 2, "tanh")
    ops = getattr(torch.ops, namespace)
    torch.testing.assert_close(ops.linear(x, *how, None), torch.tanh(bias).expand(dy.shape))
    dbias = ops.linear_bwd(dy, x, *how)[2]
    want = dy.flatten(0, 1).sum(0) * (1 - torch.tanh(bias) ** 2)
    torch.testing.assert_close(dbias, want)


@pytest.mark.parametrize(
    "options", [{}, {"num_samples": 3}, {"num_samples": 3, "activation": "gelu"}]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torch_counts_every_product(device, options):
    """FlopCounterMode sees no product inside one of our operations; the numbers stay the same."""
    x, weight, bias, sigma, dy = inputs(dtype=torch.bfloat16)
    estimator = "mean" if "activation" in options else "sample"
    plain = run(x, weight, bias, sigma, dy, estimator=estimator, **options)
    tensors = [t.to(device) for t in (x, weight, bias, sigma, dy)]
    with FlopCounterMode(display=False) as counter:
        counted = run(*tensors, seed=SEED.to(device), estimator=estimator, **options)
    products = 3 * (options["num_samples"] if estimator == "mean" else 1)  # forward, dx, dweight
    assert counter.get_total_flops() == products * 2 * x.numel() * len(weight)
    if device == "cpu":
        for got, want in zip(counted, plain):
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_mean_refuses_samples_beyond_the_contract():
    options = {"activation": "relu", "estimator": "mean", "num_samples": 2, "sample": 65535}
    said = r"sample: expected sample \+ num_samples <= 65536, got 65535 \+ 2"
    with pytest.raises(ValueError, match=said):
        layer(*inputs(5, 8, 3), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_is_the_same_in_one_block_and_in_many(dtype, monkeypatch):
    tensors = inputs(41, 24, 12, dtype)
    options = {"activation": "tanh", "estimator": "mean", "num_samples": 10}
    whole = run(*tensors, **options)
    monkeypatch.setattr(row_blocks, "_CPU_ROWS", (32, 32))  # several samples in a product
    monkeypatch.setattr(row_blocks, "_ELEMENTS", 1)
    monkeypatch.setattr(row_blocks, "_CPU_PART", 5 * 24)  # 12 rows of a weight's gradient: 5, 5, 2
    # dsigma in float32 is a sum of numbers that are larger by up to the root of the samples
    allowed = [8, 8, 8, 8, 8 * 10**0.5 if dtype is torch.float32 else 8]
    for got, want, eps in zip(run(*tensors, **options), whole, allowed, strict=True):
        assert (got.double() - want.double()).norm() <= eps * EPS[dtype] * want.double().norm()


class Products(TorchDispatchMode):
    """Of each matrix product its result's shape and type, and how many multiplications it takes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            inner = next(t for t in reversed(args) if isinstance(t, torch.Tensor)).shape[0]
            self.found.append((tuple(result.shape), result.dtype, result.numel() * inner))
        return result


@pytest.mark.parametrize("num_samples", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_multiplies_as_often_as_the_loop_in_float32(dtype, num_samples, monkeypatch):
    """And once more in 16 bits. The first sample's pre-activation is kept."""
    monkeypatch.setattr(row_blocks, "_CPU_ROWS", (7, 7))
    monkeypatch.setattr(row_blocks, "_ELEMENTS", 1)
    x, weight, bias, sigma, dy = inputs(23, 24, 12, dtype)
    how = (weight, bias, sigma, SEED, 0, 0, 0, 1.0, False, num_samples, "gelu")
    first = F.linear(torch.ops.dipkernels.perturb(x, sigma, SEED, *Draw(), None), weight, bias)
    with Products() as products:
        row_blocks.linear_bwd(dy, x, *how, first)
    multiplications = sum(count for _, _, count in products.found)
    assert multiplications == (2 * num_samples + (dtype.itemsize < 4)) * x.numel() * len(weight)


SAPPHIRE_RAPIDS = {"avx512_bf16": True, "avx512_fp16": True, "cpu_name": "Intel Xeon"}


@pytest.mark.parametrize(
    "told, fast",
    [
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_fp16": True}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "avx512_fp16": True, "cpu_name": "AMD EPYC"}, True),
        # Sapphire Rapids, and what a virtual machine may leave of it
        (SAPPHIRE_RAPIDS | {"amx_bf16": True}, True),
        (SAPPHIRE_RAPIDS | {"amx_bf16": False}, False),
        ({"neon": True, "bf16": True}, True),  # no x86 processor
        ({}, True),
    ],
)
def test_products_are_torchs_where_it_names_no_lack_of_instructions(told, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert row_blocks._multiplies_fast.__wrapped__(torch.bfloat16) is fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert row_blocks._multiplies_fast.__wrapped__(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_multiplies_in_float32_without_instructions_for_16_bits(dtype, monkeypatch):
    x, weight, bias, sigma, dy = inputs(41, 24, 12, dtype)
    how = (weight, bias, sigma, SEED, 0, 0, 0, 1.0, False, 10, "gelu")
    whole, parts = [], []
    monkeypatch.setattr(row_blocks, "_TILE", 10)
    for found, fast in ((whole, True), (parts, False)):
        monkeypatch.setattr(row_blocks, "_multiplies_fast", lambda _, fast=fast: fast)
        with Products() as products, torch.device("meta"):
            found += row_blocks.linear(x, *how, None), *row_blocks.linear_bwd(dy, x, *how)
        assert {kind for _, kind, _ in products.found} == {dtype if fast else torch.float32}
    for got, want in zip(parts, whole, strict=True):
        assert (got.double() - want.double()).norm() <= 4 * EPS[dtype] * want.double().norm()


@pytest.mark.parametrize("activation", [*NAMES, "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_by_row_blocks_does_without_the_library(activation, dtype, monkeypatch):
    x, weight, bias, sigma, dy = inputs(dtype=dtype)
    samples = 1 if activation == "identity" else 10
    how = (weight, bias, sigma, SEED, 2, 3, 1, 0.5, True, samples, activation)

    def results():
        yield from (row_blocks.linear(x, *how, None), *row_blocks.linear_bwd(dy, x, *how))

    compiled = list(results())
    # that of a tree where nothing was built
    monkeypatch.setattr(library, "load", library.Library)
    monkeypatch.setattr(row_blocks, "_CPU_ROWS", (40, 40))  # a sample after another
    monkeypatch.setattr(row_blocks, "_ELEMENTS", 1)
    for name in ("act_add", "act_add_bwd", "draw_samples"):
        monkeypatch.setattr(torch.ops.dipkernels, name, None)
    for got, want in zip(results(), compiled, strict=True):
        if dtype is torch.float32:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        else:  # PyTorch rounds act(h) and act'(h) to bfloat16
            assert (got.float() - want.float()).norm() <= 0.01 * want.float().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_rounds_no_part_of_the_product_that_a_variances_gradient_is_made_of(dtype):
    """cuBLAS adds parts of a product over many rows up in its result's type. Here meta tensors,
    which are not a CPU's either."""
    with torch.device("meta"):
        x, weight, bias, dy = (torch.empty(s, dtype=dtype) for s in ((9, 8), (5, 8), 5, (9, 5)))
        sigma, seed = torch.empty(8), torch.empty(2, dtype=torch.int64)
    with Products() as products:
        how = (weight, bias, sigma, seed, 0, 0, 0, 1.0, True, 3, "gelu")
        grads = row_blocks.linear_bwd(dy, x, *how)
    assert {kind for shape, kind, _ in products.found if shape == (5, 8)} == {torch.float32}
    assert [g.dtype for g in grads] == [dtype, dtype, dtype, torch.float32]


@pytest.mark.parametrize("activation", NAMES)
def test_slopes_of_the_largest_numbers_of_16_bits(activation):
    largest = torch.finfo(torch.float16).max
    h, dy = torch.tensor([-largest, largest]).half(), torch.ones(2).half()
    assert BACKWARDS[activation](dy, h).tolist() == [0, activation != "tanh"]


def test_mean_is_the_same_bits_again_and_whatever_the_batch_is_split_into():
    x, weight, bias, sigma, dy = inputs(64, 40, 16)
    options = {"activation": "gelu", "estimator": "mean", "num_samples": 6}
    first, second = (run(x, weight, bias, sigma, dy, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    parts = ((i, x[i : i + 16]) for i in range(0, 64, 16))
    rows = [layer(part, weight, bias, sigma, row0=i, **options) for i, part in parts]
    torch.testing.assert_close(torch.cat(rows), first[0], rtol=1e-6, atol=1e-6)


def test_mean_takes_the_memory_of_one_sample():
    x, weight, bias, sigma, dy = inputs(1024, 64, 48)
    leaves = [t.requires_grad_() for t in (x, weight, bias, sigma)]

    def forward(count):
        return layer(*leaves, activation="gelu", estimator="mean", num_samples=count)

    def peak(call):
        return timing.peak_bytes(timing.backward_step(call, dy, leaves), torch.device("cpu"))

    def kept(count):
        return timing.saved_bytes(lambda: forward(count))

    # as one layer keeps it, the pre-activation of one sample
    assert kept(5) == kept(33) == sum(t.nbytes for t in (*leaves, dy)) + SEED.nbytes
    peaks = [peak(lambda count=count: forward(count)) for count in (5, 16, 33)]
    assert 0 < peaks[2] <= 1.02 * peaks[1]  # several products each
    assert peaks[2] <= 1.06 * peaks[0]  # one product
    with torch.no_grad():
        assert kept(9) == 0
    leaves[0], dy = x.detach().repeat(16, 1).requires_grad_(), dy.repeat(16, 1)
    one = peak(lambda: F.gelu(layer(*leaves)))
    # two of a block's z, h and dh, in float32
    assert peak(lambda: forward(33)) <= one + 2 * 4 * row_blocks._ELEMENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_a_wide_layer_peaks_little_above_one_draw(dtype):
    """But for what oneDNN takes for a block's product: float32 copies, where the processor has no
    instruction for bfloat16."""
    *leaves, dy = inputs(4096, 128, 1024, dtype)
    leaves = [t.requires_grad_() for t in leaves]
    one, mean = (
        timing.peak_bytes(timing.backward_step(call, dy, leaves), torch.device("cpu"))
        for call in (
            lambda: F.gelu(layer(*leaves)),
            lambda: layer(*leaves, activation="gelu", estimator="mean", num_samples=8),
        )
    )
    x, weight, bias, *_ = (t.detach() for t in leaves)
    block = timing.peak_bytes(lambda: F.linear(x[:1024], weight, bias), torch.device("cpu"))
    copies = block - dy[:1024].nbytes
    assert mean <= one + copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_that_is_not_the_last_leaves_what_is_kept(dtype, monkeypatch):
    """The last one writes over the first sample's pre-activation."""
    monkeypatch.setattr(row_blocks, "_CPU_ROWS", (7, 7))  # several blocks
    monkeypatch.setattr(row_blocks, "_ELEMENTS", 1)
    x, weight, bias, sigma, dy = inputs(dtype=dtype)
    how = {"activation": "gelu", "estimator": "mean", "num_samples": 5}
    want = run(x, weight, bias, sigma, dy, **how)[1:]

    leaves, kept = clones(x, weight, bias, sigma), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(*leaves, **how)
    first = next(t for t in kept if t.shape == y.shape)
    before = first.clone()
    for again in (True, True, False):
        assert torch.equal(first, before)
        got = torch.autograd.grad(y, leaves, dy, retain_graph=again)
        assert all(map(torch.equal, got, want))
    assert not torch.equal(first, before)

    # a captured graph of the backward pass may be replayed twice after one of the forward pass
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(*leaves, **how)
    with monkeypatch.context() as captured:
        captured.setattr(worlds, "capturing", lambda device: True)
        torch.autograd.grad(y, leaves, dy)
    assert torch.equal(next(t for t in kept if t.shape == y.shape), before)

    y, several = layer(*leaves, **how), torch.stack([dy, 2 * dy])
    got = torch.autograd.grad(y, leaves, several, is_grads_batched=True)
    for ours, grad in zip(got, want, strict=True):
        torch.testing.assert_close(ours[0], grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], 2 * grad, rtol=0.02, atol=0.02)


# ---- "analytic" ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("log_variance", [False, True])
def test_analytic_gradients_match_reference(activation, dtype, log_variance):
    x, weight, bias, sigma, dy = inputs(50, 40, 20, dtype, (2,))
    sigma = sigma.double() if dtype is torch.float64 else sigma
    options = {"activation": activation, "log_variance": log_variance}
    got = run(x, weight, bias, sigma, dy, **options, estimator="analytic")
    x, weight, bias, sigma, dy = (t.double() for t in (x, weight, bias, sigma, dy))
    mu, v = F.linear(x, weight, bias), reference.affine_variance(weight, sigma, log_variance)
    dmu, dv, dbias = reference.expectation_bwd(dy, mu, v, activation)
    dweight = dmu.flatten(0, 1).t() @ x.flatten(0, 1)
    dweight, dsigma = reference.affine_variance_bwd(dv, weight, sigma, log_variance, dweight)
    want = (reference.expectation(mu, v, activation), dmu @ weight, dweight, dbias, dsigma)
    eps = EPS.get(dtype, 2**-24)
    for ours, theirs in zip(got, want, strict=True):
        # PyTorch's own layer rounds mu and every sum to the data's type; the mixture for 16 bits
        # adds its bound.
        assert (ours.double() - theirs).abs().max() <= (8 * eps + 2e-5) * (1 + theirs.abs().max())


def test_analytic_without_noise_or_activation_is_the_plain_layer():
    x, weight, bias, sigma, _ = inputs()
    plain = F.linear(x, weight, bias)
    assert torch.equal(layer(x, weight, bias, sigma, estimator="analytic"), plain)
    for activation in NAMES:
        y = layer(x, weight, bias, 0 * sigma, activation=activation, estimator="analytic")
        torch.testing.assert_close(y, ACTIVATIONS[activation](plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [None, (), (2, 3), (0,)])
def test_analytic_takes_a_row_and_leading_dimensions(lead):
    x, weight, bias, sigma, dy = inputs(4, 24, 12, lead=lead or ())
    x, dy = (x[0], dy[0]) if lead is None else (x, dy)
    options = {"activation": "gelu", "estimator": "analytic"}
    y, dx, *grads = run(x, weight, bias, sigma, dy, **options)
    assert y.shape == dy.shape and dx.shape == x.shape
    flat = run(x.reshape(-1, 24), weight, bias, sigma, dy.reshape(-1, 12), **options)
    ours = y.reshape(-1, 12), dx.reshape(-1, 24), *grads
    torch.testing.assert_close(ours, flat, rtol=1e-5, atol=1e-5)


def test_analytic_keeps_no_more_than_the_plain_layer():
    """x and mu, as act(nn.Linear), and v; under autocast the narrow x."""
    x, weight, bias, sigma, _ = (t.requires_grad_() for t in inputs(64, 40, 24))
    for dtype, size in ((None, 4), (torch.bfloat16, 2)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            held = sum(t.nbytes for t in (weight, bias, sigma))
            saved = timing.saved_bytes(
                lambda: layer(x, weight, bias, sigma, activation="gelu", estimator="analytic")
            )
            assert saved == held + size * 64 * (40 + 24) + 4 * 24


def test_analytic_refuses_a_weight_of_another_type():
    x, *parameters = inputs()
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.bfloat16, as x"):
        layer(x.bfloat16(), *parameters, activation="relu", estimator="analytic")


ANALYTIC = {"activation": "gelu", "estimator": "analytic"}


def test_analytic_under_autocast_and_vmap():
    tensors = inputs()[:4]
    want = layer(*tensors, **ANALYTIC)
    grads = []
    for enabled in (False, True):
        leaves = clones(*tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(*leaves, **ANALYTIC)
        assert y.dtype is (torch.bfloat16 if enabled else torch.float32)
        torch.testing.assert_close(y.float(), want, rtol=0.03, atol=0.03)
        grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for ours, theirs in zip(*reversed(grads), strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03 * theirs.abs().max().item())
    rows = torch.func.vmap(lambda row: layer(row, *tensors[1:], **ANALYTIC))(tensors[0])
    torch.testing.assert_close(rows, want, rtol=1e-5, atol=1e-5)


# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("estimator", functional.ESTIMATORS)
def test_layer_in_eval_mode_is_the_plain_layer_to_the_bit(activation, estimator):
    samples = 3 if estimator == "mean" else 1
    layer = dip.DIPLinear(24, 12, activation=activation, estimator=estimator, num_samples=samples)
    x = torch.randn(5, 24)
    y = layer(x)
    assert y.shape == (5, 12) and layer.weight.grad is None
    y.sum().backward()
    assert layer.log_variance.grad is not None
    assert torch.equal(
        layer.eval()(x), ACTIVATIONS[activation](F.linear(x, layer.weight, layer.bias))
    )
    assert f"activation={activation}" in repr(layer)


def test_layer_means_what_the_function_means():
    x = torch.randn(5, 24)
    layer = dip.DIPLinear(
        24, 12, activation="silu", estimator="mean", num_samples=3, init_variance=0.2
    )
    dip.number_layers(layer)
    with dip.fixed_noise(11, row0=4):
        got = layer(x)
    seed = torch.tensor([11, 0])
    options = {"log_variance": True, "activation": "silu", "row0": 4}
    parts = [
        functional.dip_linear(
            x, layer.weight, layer.bias, layer.log_variance, seed, sample=s, **options
        )
        for s in range(3)
    ]
    torch.testing.assert_close(got, sum(parts) / 3)
    analytic = dip.DIPLinear(24, 12, activation="silu", estimator="analytic")
    state = torch.get_rng_state()
    # nothing is drawn
    assert torch.equal(analytic(x), analytic(x)) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"activation": "selu"}, "activation: expected None or one of"),
        ({"estimator": "median"}, "estimator: expected one of"),
        (
            {"estimator": "analytic", "num_samples": 2},
            "num_samples: expected 1 with estimator='analytic', got 2",
        ),
        ({"estimator": "analytic", "keep": "u"}, "keep: expected 'auto' or 'x'"),
    ],
)
def test_averaging_names_what_is_wrong(change, match):
    x, weight, bias, sigma, _ = inputs()
    with pytest.raises(ValueError, match=match):
        functional.dip_linear(x, weight, bias, sigma, SEED, **change)
    with pytest.raises(ValueError, match=match):
        dip.DIPLinear(4, 4, **change)


def test_to_plain_refuses_a_layer_with_an_activation_inside():
    with pytest.raises(ValueError, match=r"got \['0'\] with an activation inside"):
        dip.to_plain(nn.Sequential(dip.DIPLinear(4, 4, activation="relu")))
