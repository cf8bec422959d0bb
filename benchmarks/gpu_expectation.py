"""What compiled code lets one expect of a GPU: arithmetic, nothing is measured.  --docs writes the
tables of docs/measured_gpu_expectation.md.

SLOTS are what tests print: pytest -s -m "slow or not slow" -k slots tests/test_cuda_compile.py
tests/test_triton_compiles.py tests/test_triton_expectation.py tests/test_triton_producers.py.
"""

import argparse
from dataclasses import dataclass

from report import MEASURED, fill, table

PAGE = MEASURED.with_name("measured_gpu_expectation.md")


@dataclass(frozen=True)
class Gpu:
    """Rates of copies and of bfloat16 products as others measured them; nothing here was."""

    bytes: float  # a second, read plus written
    flops: float  # a second

    @property
    def issues(self) -> float:
        """Instructions of one thread a second: multiprocessors x schedulers x lanes x clock."""
        return MULTIPROCESSORS * 4 * 32 * CLOCK


MULTIPROCESSORS, CLOCK = 132, 1.755e9
GPUS = {"H100": Gpu(3.0e12, 798e12), "H200": Gpu(4.3e12, 780e12)}
TILE_N = 128  # columns of a tile of the fused linear: triton_kernels/blocks.py, sm_90
# Issue slots per element of the inner loop on sm_90, bfloat16, by pass and kernel: P, Q, and both
# in one pass.
SLOTS = {
    ("P", "CUDA"): 31.4,
    ("P", "Triton"): 32.7,
    ("Q", "CUDA"): 30.7,
    ("Q", "Triton"): 31.8,
    ("PQ", "CUDA"): 34.1,
    ("PQ", "Triton"): 36.9,
}
# The same of Triton's expectation of an activation, forward and backward.
EXPECTATION_SLOTS = {
    "relu": (20.0, 27.2),
    "gelu": (21.2, 30.6),
    "gelu_tanh": (26.0, 46.0),
    "silu": (29.4, 44.0),
    "quick_gelu": (29.4, 44.0),
    "tanh": (30.6, 34.6),
}
# The same of Triton's producers, K = 4096.
PRODUCER_SLOTS = {
    "layer": (56.8, 50.1),
    "rms": (52.3, 46.6),
    "relu": (33.4, 36.3),
    "gelu": (64.4, 77.3),
    "silu": (50.3, 57.4),
    "gated silu": (52.4, 82.4),
}
KERNELS = ("CUDA", "Triton")
TRAFFIC = {"P": 4, "Q": 2, "PQ": 6}  # bytes per element: bfloat16 read and written
NAMES = {"P": "P, u = x + sigma z", "Q": "Q, dsigma", "PQ": "P and Q in one pass"}


def noise_pass(gpu: Gpu, form: str, kernel: str) -> float:
    """Seconds per element: memory or issue, whichever takes longer."""
    return max(TRAFFIC[form] / gpu.bytes, SLOTS[form, kernel] / gpu.issues)


def pass_seconds(name: str, form: str, kind: str, elements: int) -> float | None:
    """Of P, Q or both in bfloat16 by backend `kind` on the GPU of this name; None where nothing is
    expected of it."""
    gpu = next((gpu for short, gpu in GPUS.items() if short in name), None)
    kernel = {"cuda": "CUDA", "triton": "Triton"}.get(kind)
    return elements * noise_pass(gpu, form, kernel) if gpu and kernel else None


def product(gpu: Gpu, n: int, draws: float = 0.0) -> float:
    """Seconds per element of x of a product with n columns that also draws noise `draws` slots
    long."""
    return max(2 / gpu.bytes, 2 * n / gpu.flops, draws / gpu.issues)


def two_steps(gpu: Gpu, n: int, kernel: str) -> tuple[float, float]:
    """(forward, forward and backward) of P, the product, and Q, per element of x"""
    forward = noise_pass(gpu, "P", kernel) + product(gpu, n)
    return forward, forward + 2 * product(gpu, n) + noise_pass(gpu, "Q", kernel)


def fused(gpu: Gpu, n: int, tile_n: int = TILE_N) -> tuple[float, float]:
    """The same with the noise drawn inside the products, again for every tile of columns; dsigma in
    the epilogue of dx."""
    again = -(-n // tile_n) * SLOTS["P", "Triton"]
    step = 2 * product(gpu, n, again) + product(gpu, n, SLOTS["Q", "Triton"])
    return product(gpu, n, again), step


def over_linear(gpu: Gpu, m: int, k: int, n: int, kernel: str) -> float:
    """Forward and backward of the layer over nn.Linear's."""
    passes = noise_pass(gpu, "P", kernel) + noise_pass(gpu, "Q", kernel)
    return 1 + m * k * passes / (6 * m * k * n / gpu.flops)


def analytic_over_plain(gpu: Gpu, m: int, k: int, n: int, activation: str) -> float:
    """Forward and backward of the exact mean over act(nn.Linear)'s, whose own passes take the time
    of memory."""
    products, traffic = 6 * m * k * n / gpu.flops, (4, 6)  # bytes: mu and y; mu, dy and dmu
    # the bias's gradient reads dmu again; ours sums it on the way
    plain = m * n * (sum(traffic) + 2) / gpu.bytes
    passes = zip(traffic, EXPECTATION_SLOTS[activation], strict=True)
    ours = m * n * sum(max(b / gpu.bytes, slots / gpu.issues) for b, slots in passes)
    weights = n * k * (2 + 6) / gpu.bytes  # the variance; its gradient, added to the product's
    return (products + ours + weights) / (products + plain)


def producer_over_plain(gpu: Gpu, m: int, k: int, n: int, producer: str) -> tuple[float, float]:
    """Forward and backward of f and a layer over f and nn.Linear, f's passes taking the time of
    memory: with P behind f by CUDA's kernels, and with f's pass drawing."""
    # bytes: x and u, a gate's b; du, x and dx, b and db
    traffic = (6, 10) if producer.startswith("gated") else (4, 6)
    products = 6 * m * k * n / gpu.flops
    plain = products + m * k * sum(traffic) / gpu.bytes
    apart = m * k * (noise_pass(gpu, "P", "CUDA") + noise_pass(gpu, "Q", "CUDA"))
    passes = zip(traffic, PRODUCER_SLOTS[producer], strict=True)
    ours = m * k * sum(max(b / gpu.bytes, slots / gpu.issues) for b, slots in passes)
    return 1 + apart / plain, (products + ours) / plain


def sample_behind_activation(gpu: Gpu, n: int, k: int) -> tuple[float, float, float]:
    """Seconds per element of x of one sample's forward: fused, by row blocks, and written out with
    randn_like."""
    draws = -(-n // TILE_N) * SLOTS["P", "Triton"]
    of_output = n / k / gpu.bytes  # a byte per element of the output
    # act; the sum in float32
    blocks = noise_pass(gpu, "P", "CUDA") + product(gpu, n) + (4 + 10) * of_output
    calls = 12 / gpu.bytes + product(gpu, n) + (4 + 6) * of_output  # randn, *, +; act; the sum
    return product(gpu, n, draws), blocks, calls


SIZE = 8192 * 8192
LAYERS = (
    (8192, 8192, 8192),
    (8192, 4096, 8192),
    (8192, 4096, 4096),
    (8192, 4096, 2048),
    (8192, 4096, 1024),
)
PRODUCERS = ((8192, 4096, 4096), (4096, 1024, 1024))
MEANS = ((8192, 4096, 8192), (8192, 4096, 4096), (8192, 4096, 1024), (4096, 1024, 1024))


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def us(seconds_each: float) -> str:
    return f"{1e6 * SIZE * seconds_each:.0f} us"


def slots_table() -> str:
    rows = [
        [NAMES[form], *(f"{SLOTS[form, kernel]:.1f}" for kernel in KERNELS)] for form in TRAFFIC
    ]
    return table(["pass", *(f"{kernel}, slots" for kernel in KERNELS)], rows)


def rates_table() -> str:
    rows = [
        [
            name,
            f"{gpu.bytes / 1e12} TB/s",
            f"{gpu.flops / 1e12:.0f} TFLOP/s",
            f"{MULTIPROCESSORS} x 4 a cycle, {CLOCK / 1e9} GHz",
            f"{1e6 * SIZE / gpu.issues:.2f} us",
        ]
        for name, gpu in GPUS.items()
    ]
    return table(["GPU", "copy", "product", "warp instructions", "a slot, 8192 x 8192"], rows)


def passes_table() -> str:
    heads = [f"{what}, {kernel}" for what in ("issue", "expected") for kernel in KERNELS]
    rows = []
    for name, gpu in GPUS.items():
        for form, traffic in TRAFFIC.items():
            issue = [us(SLOTS[form, kernel] / gpu.issues) for kernel in KERNELS]
            expected = [us(noise_pass(gpu, form, kernel)) for kernel in KERNELS]
            rows.append([name, form, us(traffic / gpu.bytes), *issue, *expected])
    return table(["GPU", "pass", "memory", *heads], rows)


def layers_table() -> str:
    rows = [
        [name, name_of(shape), *(f"{over_linear(gpu, *shape, kernel):.3f}" for kernel in KERNELS)]
        for name, gpu in GPUS.items()
        for shape in LAYERS
    ]
    return table(["GPU", "M x K x N", *KERNELS], rows)


def crossover_table() -> str:
    heads = [f"{what}, over {kernel}" for kernel in KERNELS for what in ("forward", "step")]
    rows = []
    for name, gpu in GPUS.items():
        for n, tile_n in ((64, TILE_N), (128, TILE_N), (256, TILE_N), (512, TILE_N), (256, 256)):
            ours = fused(gpu, n, tile_n)
            both = [two_steps(gpu, n, kernel) for kernel in KERNELS]
            over = [f"{a / b:.2f}" for theirs in both for a, b in zip(ours, theirs, strict=True)]
            rows.append([name, str(n), str(tile_n), *over])
    return table(["GPU", "N", "columns of a tile", *heads], rows)


def samples_table() -> str:
    rows = [
        [name, str(n), str(k), *(f"{1e12 * t:.1f}" for t in sample_behind_activation(gpu, n, k))]
        for name, gpu in GPUS.items()
        for k in (1024, 4096)
        for n in (128, 256, 512, 1024, 4096)
    ]
    return table(["GPU", "N", "K", "fused", "row blocks", "calls written out"], rows)


def producers_table() -> str:
    rows = [
        [name, producer, *(f"{slots:.1f}" for slots in both)]
        + [
            f"{ratio:.3f}"
            for shape in PRODUCERS
            for ratio in producer_over_plain(gpu, *shape, producer)
        ]
        for name, gpu in GPUS.items()
        for producer, both in PRODUCER_SLOTS.items()
    ]
    shapes = [f"{name_of(s)}, {what}" for s in PRODUCERS for what in ("P behind f", "f draws")]
    return table(["GPU", "f", "forward, slots", "backward, slots", *shapes], rows)


def means_table() -> str:
    rows = [
        [name, activation, *(f"{slots:.1f}" for slots in both)]
        + [f"{analytic_over_plain(gpu, *shape, activation):.2f}" for shape in MEANS]
        for name, gpu in GPUS.items()
        for activation, both in EXPECTATION_SLOTS.items()
    ]
    return table(
        ["GPU", "activation", "forward, slots", "backward, slots", *map(name_of, MEANS)], rows
    )


# By the mark of its place in the page.
TABLES = {
    "slots": slots_table,
    "rates": rates_table,
    "passes": passes_table,
    "layers": layers_table,
    "crossover": crossover_table,
    "producers": producers_table,
    "samples": samples_table,
    "means": means_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", action="store_true", help="write the tables into the page")
    docs = parser.parse_args().docs
    for name, make in TABLES.items():
        if docs:
            fill(PAGE, name, make())
        else:
            print(f"{name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
