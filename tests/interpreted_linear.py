"""The fused linear in Triton's interpreter against the float64 reference; started by
test_triton_interpreter.py."""

import pytest
import torch
import torch.nn.functional as F
from triton_support import load_kernels, load_reference, patch_interpreter

patch_interpreter()
noise, perturb, linear, blocks = load_kernels("noise", "perturb", "linear", "blocks")
reference = load_reference()

SEED = torch.tensor([0x0123456789ABCDEF, 3])
ACTIVATIONS = {
    None: lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def make(lead, k, n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(k * n)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, weight, bias, dy = draw(*lead, k), draw(n, k) / k**0.5, draw(n), draw(*lead, n)
    return (
        *(t.to(dtype) for t in (x, weight, bias)),
        torch.rand(k, generator=generator) + 0.1,
        dy.to(dtype),
    )


def expected(
    x, weight, bias, sigma, row0, col0, sample, factor, log_variance, num_samples, activation, dtype
):
    """mean over s of act((x + factor s z_s) W^T + b) in plain PyTorch, u and h rounded to dtype"""
    s = torch.exp(sigma / 2) if log_variance else sigma
    outputs = []
    for i in range(num_samples):
        z = reference.noise(SEED, x.shape, -1, row0, col0, sample + i).double()
        u = x.to(dtype) + (factor * s * z).to(dtype)
        outputs.append(
            ACTIVATIONS[activation](
                F.linear(u, weight.to(dtype), None if bias is None else bias.to(dtype))
            )
        )
    return sum(outputs) / len(outputs)


def gradients(tensors, dy, *how, dtype):
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    y = expected(*leaves, *how, dtype)
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(dtype))


def assert_close(got, want, eager, name):
    """At most twice the error of the same expression in plain PyTorch at that dtype; z may add its
    4e-6."""
    error, eager_error = ((t.double() - want.double()).abs().max().item() for t in (got, eager))
    scale = max(1.0, want.abs().max().item())
    assert error <= 2 * eager_error + 5e-6 * scale, (
        f"{name}: error {error:.2e}, PyTorch's {eager_error:.2e}"
    )


@pytest.mark.parametrize(
    "lead, k, n, col0, num_samples, activation, dtype, log_variance",
    [
        ((1,), 1, 1, 0, 1, None, torch.float32, False),  # the smallest
        ((5,), 24, 10, 0, 1, None, torch.float32, False),  # rows aligned to eight elements
        # nothing aligned, columns from inside a group; real samples
        ((3, 7), 37, 19, 53, 2, "gelu", torch.float32, True),
        ((33,), 40, 72, 0, 1, None, torch.float16, True),  # more than one tile each way
        ((17,), 21, 33, 35, 2, "silu", torch.float16, False),
        ((4,), 16, 8, 0, 1, "relu", torch.float32, True),
        ((4,), 16, 8, 0, 2, "tanh", torch.float32, False),
        ((4,), 16, 8, 0, 2, "gelu_tanh", torch.float32, False),
    ],
)
def test_linear_and_its_gradients_match_reference(
    lead, k, n, col0, num_samples, activation, dtype, log_variance
):
    x, weight, bias, sigma, dy = make(lead, k, n, dtype)
    how = (2**32 - 2, col0, 1, 0.5, log_variance, num_samples)  # rows cross 2^32
    y = linear.linear(x, weight, bias, sigma, SEED, *how, activation)
    grads = linear.linear_bwd(dy, x, weight, bias, sigma, SEED, *how, activation)
    tensors = (x, weight, bias, sigma)
    want_y, want = gradients(tensors, dy, *how, activation, dtype=torch.float64)
    eager_y, eager = gradients(tensors, dy, *how, activation, dtype=dtype)
    assert y.dtype == dtype
    assert_close(y, want_y, eager_y, "y")
    for name, got, tensor, w, e in zip(
        ("dx", "dweight", "dbias", "dsigma"), grads, tensors, want, eager, strict=True
    ):
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        # Autograd hands the eager gradient back in float64: round it as PyTorch would.
        assert_close(got, w, e.to(tensor.dtype), name)


def test_linear_without_an_activation_is_one_sample():
    x, weight, bias, sigma, dy = make((5,), 8, 3)
    with pytest.raises(
        ValueError, match="num_samples: expected 1 with activation 'identity', got 2"
    ):
        linear.linear(x, weight, bias, sigma, SEED, 0, 0, 0, 1.0, False, 2)
    with pytest.raises(
        ValueError, match="num_samples: expected 1 with activation 'identity', got 2"
    ):
        linear.linear_bwd(dy, x, weight, bias, sigma, SEED, 0, 0, 0, 1.0, False, 2)


def test_linear_of_the_identity_is_perturb():
    x, _, _, sigma, _ = make((20,), 24, 24)
    how = (5, 3, 0, 1.0, False)
    u = perturb.perturb(x, sigma, SEED, -1, *how, None)
    assert torch.equal(linear.linear(x, torch.eye(24), None, sigma, SEED, *how), u)


def test_linear_backward_redraws_the_noise_of_the_forward_pass():
    """With dy = 1 and W = 0 but one column, dsigma counts exactly the draws that y saw."""
    sigma = make((19,), 11, 1)[3]
    how = (0, 2, 0, 1.0, False)
    weight = torch.ones(1, 11)
    _, dsigma = linear.linear_bwd_x(torch.ones(19, 1), weight, sigma, SEED, *how)
    z = noise.noise(SEED, (19, 11), -1, 0, 2, 0)
    assert torch.allclose(dsigma, z.sum(0), rtol=0, atol=1e-5)


def test_linear_ignores_the_tiles_of_rows_and_outputs(monkeypatch):
    x, weight, bias, sigma, _ = make((37,), 40, 24)
    how = (0, 0, 0, 1.0, True)
    results = []
    for rows, outs in [(16, 16), (64, 32)]:
        tile = blocks.Blocks(rows, outs, 32, 4, 2)
        monkeypatch.setattr(linear, "blocks", lambda *args, tile=tile: tile)
        results.append(linear.linear(x, weight, bias, sigma, SEED, *how))
    # The interpreter multiplies with NumPy, which on some processors adds up in an order of its own
    # for each size of the tile.
    assert all(torch.allclose(result, results[0], rtol=0, atol=1e-5) for result in results)


def test_linear_bwd_weight_splits_the_rows_in_a_fixed_order(monkeypatch):
    x, _, _, sigma, dy = make((150,), 24, 17)
    how = (0, 0, 0, 1.0, False)
    whole = linear.linear_bwd_weight(dy, x, sigma, SEED, *how)
    monkeypatch.setattr(linear, "splits", lambda *sizes: 3)
    parts = [linear.linear_bwd_weight(dy, x, sigma, SEED, *how) for _ in range(2)]
    assert torch.equal(parts[0][0], parts[1][0])
    assert torch.allclose(parts[0][0], whole[0], rtol=0, atol=1e-4) and torch.equal(
        parts[0][1], whole[1]
    )


def test_linear_bwd_weight_gives_the_type_that_is_asked_for(monkeypatch):
    x, _, _, sigma, dy = make((70,), 24, 17, torch.float16)
    how = (0, 0, 0, 1.0, False)
    for count in (1, 3):
        monkeypatch.setattr(linear, "splits", lambda *sizes, count=count: count)
        for asked in (None, torch.float32):
            results = linear.linear_bwd_weight(dy, x, sigma, SEED, *how, out_dtype=asked)
            assert all(t.dtype is (asked or torch.float16) for t in results)


def test_linear_takes_strided_inputs():
    x, weight, bias, sigma, _ = make((6, 9), 20, 12)
    how = (0, 0, 0, 1.0, True)
    want = linear.linear(x, weight, bias, sigma, SEED, *how)
    padded = torch.zeros(6, 9, 27)
    padded[..., 3:23] = x
    for same_x, same_weight in [
        (padded[..., 3:23], weight.t().contiguous().t()),
        (x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([weight, weight], 1)[:, :20]),
    ]:
        assert torch.equal(linear.linear(same_x, same_weight, bias, sigma, SEED, *how), want)
    row = x[:1].expand(6, 9, 20)
    assert torch.equal(
        linear.linear(row, weight, bias, sigma, SEED, *how),
        linear.linear(row.clone(), weight, bias, sigma, SEED, *how),
    )


def test_linear_without_rows_or_bias():
    x, weight, _, sigma, dy = make((0, 4), 8, 3)
    how = (0, 0, 0, 1.0, False)
    assert linear.linear(x, weight, None, sigma, SEED, *how).shape == (0, 4, 3)
    dx, dweight, dbias, dsigma = linear.linear_bwd(dy, x, weight, None, sigma, SEED, *how)
    assert dx.shape == x.shape and not dbias.any() and not dweight.any() and not dsigma.any()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"activation": "selu"}, ValueError, "activation: expected one of"),
        (
            {"sigma": torch.ones(7)},
            ValueError,
            r"sigma: expected shape \(K,\) = \(8,\), got \(7,\)",
        ),
        (
            {"weight": torch.ones(3, 7)},
            ValueError,
            r"weight: expected shape \(N, K = 8\), got \(3, 7\)",
        ),
        (
            {"x": torch.ones(2, 8, dtype=torch.float64)},
            TypeError,
            "x: expected one of .* got torch.float64",
        ),
    ],
)
def test_linear_names_what_is_wrong(change, error, match):
    arguments = {
        "x": torch.ones(2, 8),
        "weight": torch.ones(3, 8),
        "sigma": torch.ones(8),
        "activation": None,
    }
    arguments.update(change)
    x, weight, sigma, activation = (
        arguments[name] for name in ("x", "weight", "sigma", "activation")
    )
    with pytest.raises(error, match=match):
        linear.linear(x, weight, None, sigma, SEED, 0, 0, 0, 1.0, False, 1, activation)
