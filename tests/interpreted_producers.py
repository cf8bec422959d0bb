"""Norms, activations and gates with noise in Triton's interpreter against the float64 reference;
started by test_triton_interpreter.py."""

import pytest
import torch
from triton_support import load_kernels, load_reference, patch_interpreter

patch_interpreter()
gate, norm, perturb = load_kernels("gate", "norm", "perturb")
reference = load_reference()

SEED = torch.tensor([0x0123456789ABCDEF, 3])
NAMES = ["relu", "gelu", "gelu_tanh", "silu", "tanh"]
DTYPES = [torch.float32, torch.float16, torch.float64]
EPS = {torch.float16: 2**-11, torch.float32: 2**-22, torch.float64: 1e-12}


def make(shape, dim, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    sigma = torch.rand(shape[dim], generator=generator, dtype=torch.float64) + 0.1
    return *tensors, sigma.to(torch.float64 if dtype is torch.float64 else torch.float32)


def draw(dim=-1, log_variance=False):
    return dim, 2**32 - 3, 53, 1, 0.5, log_variance  # rows cross 2^32, columns start inside a group


def assert_near(got, want, dtype, rows=1):
    """Rounded once; float32's own error in between; z to its tolerance."""
    want = want.double()
    assert got.shape == want.shape
    bound = (
        EPS[dtype] * (1 + want.abs()) + (4e-6 + 2e-6 * (dtype is not torch.float64)) * rows**0.5 * 2
    )
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize(
    "shape, dim",
    # (2, 150): a row of float64 fills a tile and more.
    [((3, 9), -1), ((5, 70), -1), ((2, 150), -1), ((2, 7, 17), 1), ((3, 4, 6, 5), 1)],
)
@pytest.mark.parametrize(
    "name, dtype", [(name, DTYPES[i % 3]) for i, name in enumerate(NAMES)] + [("silu", DTYPES[1])]
)
def test_activations_and_gates_match_reference(shape, dim, name, dtype):
    a, b, du, sigma = make(shape, dim, dtype)
    where = (sigma, SEED, *draw(dim, name == "silu"), name)
    exact = (sigma.double(), *where[1:])
    rows = a.numel() // shape[dim]
    assert_near(gate.activate(a, *where, None), reference.activate(a.double(), *exact, None), dtype)
    assert_near(
        gate.gate(a, b, *where, None), reference.gate(a.double(), b.double(), *exact, None), dtype
    )
    dx, dsigma = gate.activate_bwd(du, a, *where)
    want, want_dsigma = reference.activate_bwd(du.double(), a.double(), *exact)
    assert_near(dx, want, dtype)
    assert_near(dsigma, want_dsigma, sigma.dtype, rows)
    grads = gate.gate_bwd(du, a, b, *where)
    for got, want in zip(
        grads[:2], reference.gate_bwd(du.double(), a.double(), b.double(), *exact), strict=False
    ):
        assert_near(got, want, dtype)
    assert torch.equal(grads[2], dsigma)
    none = gate.gate_bwd(du, a, b, None, *where[1:])
    assert (
        torch.equal(none[0], grads[0]) and torch.equal(none[1], grads[1]) and none[2].numel() == 0
    )


# One row, past a block of rows, a prime, and rows of several column blocks.
@pytest.mark.parametrize(
    "shape, columns", [((1, 8), None), ((9, 40), None), ((2, 3, 61), None), ((3, 37), 16)]
)
@pytest.mark.parametrize(
    "kind, dtype", [("layer", torch.float32), ("rms", torch.float16), ("layer", torch.float64)]
)
def test_norm_and_its_gradients_match_reference(shape, columns, kind, dtype, monkeypatch):
    if columns:
        monkeypatch.setattr(norm, "TILE_ELEMENTS", columns)
        monkeypatch.setattr(norm, "MAX_WARPS", 4)
    x, _, du, sigma = make(shape, -1, dtype)
    weight, bias = (
        make(shape, -1, dtype)[1].reshape(-1, shape[-1])[0],
        make(shape, -1, torch.float32)[2].reshape(-1, shape[-1])[0],
    )
    for w, b in ((weight, bias), (None, None)):
        where = (sigma, SEED, *draw(), kind)
        u, stats = norm.norm(x, w, b, *where, 1e-5, 0.5, None)
        want, want_stats = reference.norm(x.double(), w, b, *where, 1e-5, 0.5, None)
        assert u.dtype is dtype
        assert_near(u, want, dtype)
        assert_near(stats, want_stats, stats.dtype)
        grads = norm.norm_bwd(du, x, stats, w, b, *where, 0.5)
        doubles = (None if t is None else t.double() for t in (w, b, sigma))
        wants = reference.norm_bwd(du.double(), x.double(), want_stats, *doubles, *where[1:], 0.5)
        spread = want_stats[-1].max().item()
        assert_near(grads[0].double() / spread, wants[0] / spread, dtype)
        for got, want, like in zip(grads[1:], wants[1:], (w, b, sigma), strict=True):
            assert got.dtype == (torch.float32 if like is None else like.dtype)
            assert_near(got, want, got.dtype, 4 * x.numel() // shape[-1])
        none = norm.norm_bwd(du, x, stats, w, b, None, *where[1:], 0.5)
        assert torch.equal(none[0], grads[0]) and none[3].numel() == 0


def test_producers_draw_what_perturb_draws_to_the_bit():
    x, _, _, sigma = make((5, 33), -1, torch.float32)
    want = perturb.perturb(x.relu(), sigma, SEED, *draw(), None)
    assert torch.equal(gate.activate(x, sigma, SEED, *draw(), "relu", None), want)
    assert torch.equal(gate.gate(x, torch.ones_like(x), sigma, SEED, *draw(), "relu", None), want)
    bias, zero = x[0], torch.zeros(33)
    want = perturb.perturb(bias.expand(5, 33).contiguous(), sigma, SEED, *draw(), None)
    assert torch.equal(
        norm.norm(x, zero, bias, sigma, SEED, *draw(), "layer", 1e-5, 0.0, None)[0], want
    )


def test_producers_take_any_strides_and_none():
    x, b, du, sigma = make((6, 24), -1, torch.float32)
    where = (sigma, SEED, *draw())
    u, stats = norm.norm(x, None, None, *where, "rms", 1e-5, 0.0, None)
    dx = norm.norm_bwd(du, x, stats, None, None, *where, "rms", 0.0)[0]
    product = gate.gate(x, b, *where, "silu", None)
    for strange in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :24]):
        assert torch.equal(norm.norm(strange, None, None, *where, "rms", 1e-5, 0.0, None)[0], u)
        assert torch.equal(norm.norm_bwd(du, strange, stats, None, None, *where, "rms", 0.0)[0], dx)
        assert torch.equal(gate.gate(strange, b, *where, "silu", None), product)
    four = torch.randn(24, 10, 2, 18).permute(0, 2, 1, 3)[::8, ::1, ::3]
    sigma = torch.rand(2)
    got = gate.activate(four, sigma, SEED, *draw(1), "tanh", None)
    assert torch.equal(got, gate.activate(four.contiguous(), sigma, SEED, *draw(1), "tanh", None))
    for shape in ((0, 4), (4, 0)):
        empty, sigma = torch.zeros(shape), torch.ones(shape[1])
        assert gate.activate_bwd(empty, empty, sigma, SEED, *draw(), "relu")[1].shape == sigma.shape
        u, stats = norm.norm(empty, sigma, None, sigma, SEED, *draw(), "layer", 1e-5, 0.0, None)
        grads = norm.norm_bwd(empty, empty, stats, sigma, None, sigma, SEED, *draw(), "layer", 0.0)
        assert u.shape == empty.shape and torch.equal(grads[1], torch.zeros(shape[1]))
