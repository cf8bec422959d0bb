"""Every CUDA and Triton kernel on a device against the float64 reference, and what may not change a
result."""

import pytest
import torch
from torch import Tensor

from dipkernels import backends, library, reference
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import noise, perturb, perturb_bwd, perturb_replay

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ROWS, CHANNELS, CHANNELS_LAST = (257, 72), (3, 24, 10, 6), "channels_last"
BACKENDS = ("cuda", "triton")


@pytest.fixture(params=BACKENDS)
def kernels(request):
    try:
        with backends.backend(request.param):
            yield request.param
    except RuntimeError as missing:
        if "was asked for" not in str(missing):
            raise
        pytest.skip(str(missing))


def seed(device="cuda") -> Tensor:
    return torch.tensor([0x0123456789ABCDEF, 7], device=device)


def tensors(shape, dtype=F32, device="cuda"):
    g = torch.Generator(device).manual_seed(1)
    x, du = (torch.randn(shape, generator=g, device=device).to(dtype) for _ in range(2))
    sigma = torch.rand(shape[1], generator=g, device=device) + 0.1
    return x, du, sigma


def check(
    x, du, sigma, dim=1, row0=0, col0=0, sample=0, factor=1.0, log_variance=False, dtype=None
):
    where = (dim, row0, col0, sample, factor, log_variance)
    s = seed(x.device)
    u = perturb(x, sigma, s, Draw(*where), dtype)
    again = perturb_replay(du, x, sigma, s, Draw(*where), dtype)
    want = reference.perturb(x, sigma, s, *where, F64)
    spread = (
        (torch.exp(sigma / 2) if log_variance else sigma).max().item() if sigma.numel() else 0.0
    )
    eps = 0.0 if u.dtype is F64 else torch.finfo(u.dtype).eps
    assert torch.equal(u, again[0])
    assert u.dtype is (dtype or x.dtype) and not u.isnan().any()
    assert ((u.double() - want).abs() <= eps * want.abs() + 5e-6 * spread * factor + 1e-6).all()
    rows = x.numel() // max(x.shape[dim], 1)
    want = reference.perturb_bwd(du, sigma, s, *where)
    for dsigma in (perturb_bwd(du, sigma, s, Draw(*where)), again[1]):
        torch.testing.assert_close(dsigma, want, rtol=1e-4, atol=1e-4 * rows**0.5)
    return u


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
@pytest.mark.parametrize(
    "shape",
    [ROWS, (64, 512), (1, 1), (5, 9), (0, 8), (1000, 13), CHANNELS, (2, 13, 7, 7), (2, 16, 32)],
)
def test_kernels_match_reference(kernels, dtype, shape):
    check(*tensors(shape, dtype))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_kernels_round_once_to_another_type(kernels, dtype):
    x, du, sigma = tensors(ROWS)
    check(x, du.to(dtype), sigma, dtype=dtype)


@pytest.mark.parametrize(
    "window",
    [
        {"row0": 2**33 - 5},
        {"col0": 16},
        {"col0": 3},
        {"sample": 9},
        {"factor": 0.5, "log_variance": True},
    ],
)
@pytest.mark.parametrize("shape", [ROWS, CHANNELS])
def test_kernels_windows_and_scales(kernels, window, shape):
    x, du, sigma = tensors(shape)
    check(x, du, sigma.log() if window.get("log_variance") else sigma, **window)


def test_kernels_take_any_strides(kernels):
    x, du, sigma = tensors((33, 64), BF16)
    wide = torch.randn(33, 200, device="cuda").bfloat16()
    check(wide[:, 8:72], du, sigma)
    check(wide[:, 3:67], wide[:, 100:164], sigma)
    check(torch.randn(64, 33, device="cuda").t(), du, sigma)
    check(x, torch.ones((), device="cuda").expand(33, 64), sigma)
    image, grad, sigma = tensors(CHANNELS, BF16)
    u = check(image.to(memory_format=torch.channels_last), grad, sigma)
    assert u.is_contiguous(memory_format=torch.channels_last)
    check(image[:, :, 1:, ::2], grad[:, :, 1:, ::2], sigma)


def draw(shape=(300, 264), **kwargs):
    where = {"dim": 1, "row0": 2**32 - 100, "col0": 0, "sample": 3} | kwargs
    return noise(seed(), shape, Draw(**where))


def test_noise_is_one_for_all_backends():
    """CPU, CUDA and Triton to the bit; without the CPU's kernels, the reference within 4e-6."""
    to_the_bit = "portable" in library.load().cpu_capabilities
    with backends.backend("cpu" if to_the_bit else "reference"):
        want = noise(seed("cpu"), (300, 264), Draw(1, 2**32 - 100, 0, 3))
    for name in BACKENDS:
        if not backends.runs_on(name, "cuda"):
            continue
        with backends.backend(name):
            got = draw().cpu()
        assert (got - want).abs().max() <= (0 if to_the_bit else 4e-6), (
            f"{name}: {(got != want).sum()} differ"
        )


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_u_is_one_for_all_backends(kernels, dtype):
    """To the bit, where sigma is given as it is: exp of a log_variance may round differently."""
    if "portable" not in library.load().cpu_capabilities:
        pytest.skip("needs the CPU's kernels")
    x, _, sigma = tensors(ROWS, dtype)
    where = Draw(1, 2**32 - 100, 8, 3)
    got = perturb(x, sigma, seed(), where, None).cpu()
    with backends.backend("cpu"):
        assert torch.equal(got, perturb(x.cpu(), sigma.cpu(), seed("cpu"), where, None))


def test_noise_ignores_tile_shape_and_stride(kernels):
    """A window of a wider or taller noise is that window, and channels are rows."""
    whole = draw()
    assert torch.equal(draw((300, 17), col0=0), whole[:, :17])
    assert torch.equal(draw((3, 264), row0=2**32 - 100 + 7), whole[7:10])
    assert torch.equal(draw((300, 31), col0=8), whole[:, 8:39])
    channels = noise(seed(), (4, 264, 75), Draw(1, 2**32 - 100, 0, 3))
    assert torch.equal(channels.movedim(1, -1).reshape(300, 264), whole)


@pytest.mark.parametrize("shape", [(4096, 520), (8, 40, 33, 5)])
def test_results_repeat_to_the_bit(kernels, shape):
    x, du, sigma = tensors(shape, BF16)
    first = perturb_replay(du, x, sigma, seed(), Draw(1), None)
    for _ in range(10):
        again = perturb_replay(du, x, sigma, seed(), Draw(1), None)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_graph_replays_with_fresh_noise(kernels):
    x, du, sigma = tensors((128, 256), BF16)
    s = seed()

    def step():
        return perturb(x, sigma, s, Draw(1), None), perturb_bwd(du, sigma, s, Draw(1))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        u, dsigma = step()
    seen = []
    for key in (1, 2, 3):
        s[0] = key
        graph.replay()
        torch.cuda.synchronize()
        seen.append(u.clone())
        want = step()
        assert torch.equal(u, want[0]) and torch.equal(dsigma, want[1])
    assert not torch.equal(seen[0], seen[1])


def test_kernels_run_on_the_current_stream(kernels):
    """Enough work ahead of it on the side stream that a launch on another stream would read x
    before it is filled."""
    sigma, side = torch.zeros(1024, device="cuda"), torch.cuda.Stream()
    x = torch.zeros(1024, 1024, device="cuda")
    perturb(x, sigma, seed(), Draw(1), None)
    s = seed()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        u = perturb(x, sigma, s, Draw(1), None)
    side.synchronize()
    assert (u == 3.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_tensors_device(kernels):
    with torch.cuda.device(0):
        on_zero, on_one = (check(*tensors(ROWS, device=f"cuda:{i}")) for i in (0, 1))
        assert torch.cuda.current_device() == 0
    assert on_one.device.index == 1
    a, b = (noise(seed(f"cuda:{i}"), (65, 40), Draw(1)).cpu() for i in (0, 1))
    assert torch.equal(a, b)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        perturb(on_zero, torch.ones(72, device="cuda:1"), seed("cuda:0"), Draw(1), None)


def test_kernels_past_two_to_the_31_elements(kernels):
    m, k = 2**18 + 3, 2**13 + 8
    if torch.cuda.mem_get_info()[0] < 5 * m * k:
        pytest.skip("needs 11 GiB of free GPU memory")
    assert m * k > 2**31
    sigma = torch.ones(k, device="cuda")
    x = torch.zeros(m, k, dtype=BF16, device="cuda")
    u = perturb(x, sigma, seed(), Draw(1), None)
    tail = noise(seed(), (5, k), Draw(1, m - 5))
    assert torch.equal(u[-5:], tail.bfloat16())
    del x
    # The noise's own second moment: a wrapped offset would read what was never written, or the
    # wrong rows.
    dsigma = perturb_bwd(u, sigma, seed(), Draw(1))
    assert ((dsigma / m - 1).abs() < 0.02).all()


def test_wrong_devices_are_named():
    x, _, sigma = tensors(ROWS)
    with pytest.raises((ValueError, RuntimeError), match="sigma"):
        perturb(x, sigma.cpu(), seed(), Draw(1), None)
    with pytest.raises((ValueError, RuntimeError), match="seed"):
        perturb(x, sigma, seed("cpu"), Draw(1), None)
