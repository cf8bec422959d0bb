"""The passes of "mean" on a CPU, in the compiled library alone: draws of several samples, their activations summed, and back.  docs/maths.md, section 4."""

import pytest
import torch
from capability_support import OFFERED

from dipkernels import backends
from dipkernels.ops.activations import ACTIVATIONS

OPS = torch.ops.dipkernels
SEED = torch.tensor([17, 2**33 + 5])
NAMES = list(ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}
CODE_ERROR = 0.0025 + 1e-6  # half a step of 1 / 200


def forward(h, activation, slopes=None, first=0, out=None, factor=1.0):
    total = torch.ones(h.shape[1:])
    OPS.act_add(total, h, activation, slopes, first, out, factor)
    return total


def back(h, dy, activation, bias=None, slopes=None, first=0, samples=None, out=None, factor=1.0):
    """(dh [samples, rows, columns], total [columns, rows]) for dy [rows, columns], h [samples, columns, rows]"""
    total = torch.ones(dy.t().shape)
    how = (activation, slopes, first, h.shape[0] if samples is None else samples, out, factor)
    return OPS.act_add_bwd(total, h, bias, dy, *how).permute(1, 2, 0), total


def by_columns(h):
    """[samples, rows, columns] as backward has it: [samples, columns, rows], columns outermost in memory"""
    return h.permute(2, 0, 1).contiguous().transpose(0, 1)


def exact(h, dy, activation):
    """(values, gradients) in float64"""
    leaf = h.double().requires_grad_()
    values = ACTIVATIONS[activation](leaf)
    return values.detach(), torch.autograd.grad(values, leaf, dy.double().expand_as(leaf))[0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("x_dtype, z_dtype", [(torch.float32, None), (None, None), (None, torch.float32)])
def test_samples_are_the_draws_of_perturb(capability, dtype, x_dtype, z_dtype):
    for rows, columns, col0 in ((1, 1, 0), (13, 136, 8), (300, 64, 0), (9, 37, 3)):
        x, sigma = torch.randn(rows, columns).to(x_dtype or dtype), torch.rand(columns)
        u, z = (torch.empty(3, rows, columns, dtype=of) for of in (dtype, z_dtype or dtype))
        alone = torch.empty_like(u), torch.empty_like(z)
        how = (x, sigma, SEED, 2**32 - 4, col0, 6, 0.5)
        OPS.draw_samples(u, z, *how)
        OPS.draw_samples(alone[0], None, *how)
        OPS.draw_samples(None, alone[1], *how)
        for s in range(3):
            where = (-1, 2**32 - 4, col0, 6 + s, 1)
            assert torch.equal(u[s], OPS.perturb(x, sigma, SEED, *where, 0.5, False, dtype))
            assert torch.equal(z[s], OPS.noise(SEED, x.shape, *where).to(z.dtype))
        assert torch.equal(u, alone[0]) and torch.equal(z, alone[1])


@pytest.mark.parametrize("activation", [*NAMES, "identity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_behind_an_activation_and_back(capability, dtype, activation):
    act = ACTIVATIONS | {"identity": lambda h: h}
    for samples, rows, columns in ((1, 1, 1), (3, 5, 700), (9, 300, 37), (2, 90, 1024)):
        h, dy = (torch.randn(samples, rows, columns) * 4).to(dtype), torch.randn(rows, columns).to(dtype)
        leaf = h.double().requires_grad_()
        values = act[activation](leaf)
        (want,) = torch.autograd.grad(values, leaf, dy.double().expand_as(leaf))
        wide = torch.empty(rows, columns + 3, dtype=dtype)
        total = forward(h, activation, out=wide[:, 3:], factor=0.25)
        torch.testing.assert_close(total.double(), 1 + values.sum(0), rtol=2e-6, atol=4e-6)
        assert torch.equal(wide[:, 3:], (0.25 * total).to(dtype))
        out = torch.empty(columns, rows)
        dh, total = back(by_columns(h), dy.repeat(1, 2)[:, :columns], activation, out=out, factor=0.5)
        torch.testing.assert_close(dh.double(), want, rtol=2 * EPS[dtype], atol=2e-6)
        torch.testing.assert_close(total.t().double(), 1 + want.sum(0), rtol=2e-6, atol=4e-6)
        assert torch.equal(out, 0.5 * total)
        bias = torch.randn(columns).to(dtype)
        with_bias, _ = back(by_columns(h), dy, activation, bias)
        (want,) = torch.autograd.grad(act[activation](leaf + bias.double()), leaf, dy.double().expand_as(leaf))
        torch.testing.assert_close(with_bias.double(), want, rtol=2 * EPS[dtype], atol=4e-6)


@pytest.mark.parametrize("activation, as_bytes", [(a, b) for a in NAMES for b in (True, False) if b or a != "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_of_samples_are_kept_for_backward(capability, dtype, activation, as_bytes):
    for first, samples, num_kept in ((0, 3, 2), (5, 7, 9), (2, 4, 1), (0, 9, 9)):
        for rows, columns in ((7, 40), (70, 33), (270, 20)):
            h, dy = torch.randn(samples, rows, columns).mul_(3).to(dtype), torch.randn(rows, columns).to(dtype)
            _, want = exact(h, torch.ones_like(dy), activation)
            held = -(-(first + samples) // 8) if activation == "relu" else num_kept
            wide = torch.zeros(held, rows + 2, columns, dtype=torch.uint8 if as_bytes else dtype)
            slopes = wide[:, 1:-1]  # rows of a whole tensor, as the layers have it
            given = samples if activation == "relu" else min(max(num_kept - first, 0), samples)
            assert torch.equal(forward(h, activation, slopes, first), forward(h, activation))
            assert not wide[:, 0].any() and not wide[:, -1].any()
            got = slopes[first : first + given].double()
            if activation == "relu":
                bits = [slopes[i // 8] >> i % 8 & 1 for i in range(first + samples)]
                assert not any(bit.any() for bit in bits[:first])
                got = torch.stack(bits[first:]).double()
            elif as_bytes:
                got = (got - 26) / 200
            slack = CODE_ERROR if as_bytes and activation != "relu" else 2 * EPS[dtype] + 1e-6
            assert given == 0 or (got - want[:given]).abs().max() <= slack
            dh, total = back(by_columns(h[given:]), dy, activation, slopes=slopes, first=first, samples=samples)
            by_slopes = torch.cat([got, want[given:]])
            torch.testing.assert_close(dh.double(), dy.double() * by_slopes, rtol=2 * EPS[dtype], atol=2e-6)
            torch.testing.assert_close(total.t().double(), 1 + (dy.double() * by_slopes).sum(0), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("activation", NAMES)
def test_a_slope_in_a_byte_is_exact_where_saturated_and_keeps_a_nan(capability, activation):
    limits = {"relu": (0.0, 1.0), "tanh": (0.0, 0.0)}.get(activation, (0.0, 1.0))
    h = torch.tensor([-80.0, 80.0, float("nan")]).repeat(11).view(1, 1, 33)
    slopes = torch.zeros(1, 1, 33, dtype=torch.uint8)
    forward(h, activation, slopes)
    dh, _ = back(h[:0].transpose(1, 2), torch.full((1, 33), 3.0), activation, slopes=slopes, samples=1)
    # behind relu a NaN is in y, and passes dy on as PyTorch's own does
    want = torch.tensor([3 * limits[0], 3 * limits[1], 3.0 if activation == "relu" else float("nan")]).repeat(11)
    assert torch.equal(dh.flatten().nan_to_num(7), want.nan_to_num(7))
    if activation != "relu":  # the whole range of the slopes fits
        h = torch.linspace(-12, 12, 4001).view(1, 1, -1)
        slopes = torch.zeros(1, 1, 4001, dtype=torch.uint8)
        forward(h, activation, slopes)
        _, want = exact(h, torch.ones(1, 4001), activation)
        assert ((slopes.double() - 26) / 200 - want).abs().max() <= CODE_ERROR


def test_relu_of_a_sample_and_back(capability):
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    for dtype in DTYPES:
        h = torch.randn(2, 40, 700).to(dtype)
        h.view(-1)[::5] = special.to(dtype).repeat(h.numel() // 25)
        bits, dy = torch.full((1, 40, 700), 2, dtype=torch.uint8), torch.randn(40, 700).to(dtype)
        total = forward(h, "relu", bits, 5)
        assert torch.equal(total.nan_to_num(7), (1 + torch.relu(h[0]).float() + torch.relu(h[1]).float()).nan_to_num(7))
        wants = [torch.where(part <= 0, 0, 1 << 5 + i) for i, part in enumerate(h)]
        assert torch.equal(bits[0], (2 + wants[0] + wants[1]).to(torch.uint8))
        dh, total = back(by_columns(h[:0]), dy, "relu", slopes=bits, first=5, samples=2)
        assert torch.equal(dh, torch.where(h <= 0, 0, dy))
        assert torch.equal(total.t(), 1 + dh[0].float() + dh[1].float())


@pytest.mark.parametrize("activation", NAMES)
def test_samples_ignore_instruction_set_and_threads(activation):
    h, dy = torch.randn(3, 90, 1000) * 6, torch.randn(90, 1000)
    before, threads, results = backends.cpu_capability(), torch.get_num_threads(), []
    try:
        for name in OFFERED:
            backends.cpu_capability(name)
            for n in (1, 3):
                torch.set_num_threads(n)
                slopes = torch.zeros(2 if activation != "relu" else 1, 90, 1000, dtype=torch.uint8)
                total = forward(h, activation, slopes)
                given = 3 if activation == "relu" else 2
                dh, sums = back(by_columns(h[given:]), dy, activation, slopes=slopes, samples=3)
                results.append(torch.cat([total[None], sums.t()[None], dh, slopes]))
    finally:
        backends.cpu_capability(before)
        torch.set_num_threads(threads)
    assert len(results) > 2 and all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("activation", NAMES)
def test_samples_far_out_and_not_numbers(activation):
    far, infinity, nan = (60.0, 300.0, 3e4, 1e38), float("inf"), float("nan")
    h = torch.tensor([1e-30, -1e-30, 3e-5, -3e-5, *far, *(-x for x in far), infinity, nan]).view(1, 1, -1)
    want = ACTIVATIONS[activation](h[0].double()).float()
    total = torch.zeros_like(h[0])
    OPS.act_add(total, h, activation, None, 0, None, 1.0)
    torch.testing.assert_close(total, want, rtol=2e-6, atol=0, equal_nan=True)
    lowest = torch.full_like(h, float("-inf"))
    torch.testing.assert_close(forward(lowest, activation), 1 + ACTIVATIONS[activation](lowest[0]), equal_nan=True)


def test_passes_over_samples_stay_inside_their_buffers():
    h, dy, total, byte = torch.randn(2, 4, 6), torch.randn(6, 4), torch.zeros(4, 6), torch.uint8
    slopes, slopes_back = torch.zeros(1, 4, 6, dtype=byte), torch.zeros(1, 6, 4, dtype=byte)
    for changed, match in [
        ({"total": torch.zeros(4, 5)}, "h: expected shape .samples, 4, 5."),
        ({"total": torch.zeros(4, 6).double()}, "total: expected shape .outer, inner., contiguous, float32"),
        ({"total": torch.zeros(6, 4).t()}, "total: expected shape .outer, inner., contiguous"),
        ({"h": h[0]}, "h: expected shape"),
        ({"h": h.repeat(1, 1, 2)[:, :, ::2]}, "h: expected shape .* elements side by side"),
        ({"h": h.double()}, "h: expected float32, float16 or bfloat16, got float64"),
        ({"activation": "elu"}, "activation: expected relu, gelu, gelu_tanh, silu or tanh, got elu"),
        ({"slopes": slopes[:, :3]}, "slopes: expected shape .samples, "),
        ({"slopes": slopes.int()}, "slopes: expected uint8, or h's dtype"),
        ({"slopes": slopes.half()}, "slopes: expected uint8, or h's dtype"),
        ({"slopes": slopes.float(), "activation": "relu"}, "slopes: expected uint8, or h's dtype but for relu"),
        ({"first": -1}, "first: expected 0 to 65536, got -1"),
        ({"out": torch.zeros(4, 5)}, "out: expected shape .4, 6."),
        ({"out": torch.zeros(6, 4).t()}, "out: expected shape .4, 6. and elements side by side"),
        ({"dy": dy[:5]}, "dy: expected shape .6, 4."),
        ({"dy": dy.half()}, "dy: expected h's dtype"),
        ({"samples": 0}, "num_samples: expected 1 to 65536, got 0"),
        ({"samples": 3}, "h: expected the 2 samples without slopes, got 1"),
        ({"bias": torch.zeros(5)}, "bias: expected shape .4,."),
        ({"bias": torch.zeros(4).double()}, "bias: expected shape .4,., contiguous, float32, float16 or bfloat16"),
    ]:
        how = {"total": total, "h": h, "activation": "gelu", "slopes": slopes, "first": 0, "out": None, **changed}
        if not {"dy", "samples", "bias"} & set(changed):
            with pytest.raises(RuntimeError, match=match):
                OPS.act_add(*(how[name] for name in ("total", "h", "activation", "slopes", "first", "out")), 1.0)
        how = {"bias": None, "dy": dy, "samples": 2, **how, "h": changed.get("h", h[:1])}
        if "slopes" not in changed:
            how["slopes"] = slopes_back
        elif changed["slopes"].shape == slopes.shape:
            how["slopes"] = changed["slopes"].transpose(1, 2).contiguous()
        names = ("total", "h", "bias", "dy", "activation", "slopes", "first", "samples", "out")
        with pytest.raises(RuntimeError, match=match):
            OPS.act_add_bwd(*(how[name] for name in names), 1.0)


def test_draws_of_samples_stay_inside_their_buffers():
    x, sigma, u = torch.randn(4, 6), torch.rand(6), torch.zeros(2, 4, 6)
    for to, rows, match in [
        ((None, None), x, "u, z: expected one of them at least"),
        ((u[:, :3], None), x, "u: expected shape .samples, rows, K., contiguous"),
        ((u, torch.zeros(3, 4, 6)), x, "z: expected shape .samples, rows, K., contiguous"),
        ((u.transpose(1, 2), None), x.t(), "x: expected shape .rows, K., contiguous"),
        ((u, None), x[0], "x: expected shape .rows, K., contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            OPS.draw_samples(*to, rows, sigma, SEED, 0, 0, 0, 1.0)
    for changed, match in [
        ({"sigma": sigma[:5]}, "sigma: expected shape"),
        ({"seed": SEED.int()}, "seed: expected dtype int64"),
        ({"sample": 65535}, "sample: expected sample . num_samples <= 65536"),
    ]:
        how = {"sigma": sigma, "seed": SEED, "sample": 0, **changed}
        with pytest.raises(RuntimeError, match=match):
            OPS.draw_samples(u, None, x, how["sigma"], how["seed"], 0, 0, how["sample"], 1.0)
