"""What compiled code lets one expect of a GPU: arithmetic, nothing is measured.  --docs writes
docs/measured_gpu_expectation.md.

SLOTS are what tests print: pytest -s -m "slow or not slow" -k slots tests/test_cuda_compile.py
tests/test_triton_compiles.py tests/test_triton_expectation.py tests/test_triton_producers.py.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured_gpu_expectation.md"


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


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def page() -> str:
    counted = table(
        ["pass", *(f"{kernel}, slots" for kernel in KERNELS)],
        [[NAMES[form], *(f"{SLOTS[form, kernel]:.1f}" for kernel in KERNELS)] for form in TRAFFIC],
    )
    h100, h200 = GPUS["H100"], GPUS["H200"]
    return f"""# GPU: expectation, not measured

Nothing on this page was timed. It is arithmetic from the compiled code, written by
`python benchmarks/gpu_expectation.py --docs`. `make gpu-check` measures ([GPU](gpu.md)). P adds the
noise, Q is the gradient of sigma ([section 1](maths.md#1-the-projection-and-its-adjoint)).

- **P** should take as long as a copy of the same tensor on an H100, and a little longer on an H200.
- **A large layer** (8192 x 8192 x 8192) should take 1.03 to 1.04 times `nn.Linear`, forward and
  backward.
- **A layer behind a LayerNorm** (8192 x 4096 x 4096, H100) should take 1.02 times the plain two where the
  norm draws the noise, 1.07 times where a pass of its own does.
- **Small layers** are bound by the number of kernels: 8 instead of 4.

## The passes

A pass is bound by memory or by the issue of instructions. An issue slot is one instruction, other than
NOP, of the inner loop. Slots per element are counted for sm_90 and bfloat16 by
tests/test_cuda_compile.py (nvcc 13.0) and tests/test_triton_compiles.py (Triton 3.7.1), which allow two
slots more or less. None of these passes spills registers. A few of Triton's do in odd sizes: P over images
of 7 x 7, P and Q in one over 10 x 6, and LayerNorm's backward for K = 1000. CUDA's and Triton's kernels
draw the same bits.

{counted}

Both GPUs issue {MULTIPROCESSORS} x 4 warp instructions in a cycle. At {CLOCK / 1e9} GHz one slot per
element of an 8192 x 8192 matrix is {1e6 * SIZE / h100.issues:.2f} us. A copy is taken to move
{h100.bytes / 1e12} TB/s (H100) and {h200.bytes / 1e12} TB/s (H200). The larger of the two bounds is
expected, here for 8192 x 8192 in bfloat16. Memory bounds P on an H100, and P with Q on both. Issue
bounds Q, which reads half as much, and P on an H200:

{passes_table()}

## The layer

Forward and backward over nn.Linear, at {h100.flops / 1e12:.0f} (H100) and {h200.flops / 1e12:.0f} (H200)
TFLOP/s. Launches and overlap are left out:

{layers_table()}

Small layers are bound by the number of kernels. nn.Linear has 4: three products, and the sum for the
bias. P, product and Q add the draw of the seed, P, and two kernels of Q: 8. The fused form has 6: the
draw of the seed, the forward product, dx with its partial sums, their sum, dweight, and the sum for the
bias. If every kernel of 32x1024x1024 took the same time inside a CUDA graph, that would be 2.0 and 1.5
times nn.Linear. The aim, 1.3, is not reached by this count. Outside of a graph the host's time for each
launch decides; this page says nothing about it.

Q's second kernel could be saved: the last block of each column of the grid would add the partial sums
up (`one_launch` of csrc/launch.h: 7 kernels, 1.75). In its place come one ticket, read and written, and
at most 25 loads for each thread. A grid with one row of blocks does so already; for the others it waits
to be measured. [What the switches decide](gpu.md#what-the-switches-decide) says so of this and other
choices, and why the draw of the seed stays a kernel of its own.

## Sampling inside the product

`registry.fuses` rests on this section. The fused form draws the noise inside the matrix product. It
neither writes nor reads u, but it draws again for every tile of columns, in the forward and in the
weight's product. Each kernel is taken to need, per element of x and with many rows, the longest of its
memory traffic, its matrix product and its issue slots, as if these overlapped completely. The table has
the time of the fused form over P, product and Q ("step" is forward and backward):

{crossover_table()}

Tiles are {TILE_N} columns wide, the widest in triton_kernels/blocks.py. One tile pays, in the forward
and in a step. Two tiles pay nowhere; one tile of 256 would. So `FUSED_COLUMNS = {TILE_N}`. A small
product (`FUSED_WORK`) is fused because this saves two kernels. `make gpu-check` times both forms on both
sides of these bounds.

## The noise drawn where the input is made

place="producer" in bfloat16: the slots of Triton's passes, counted by tests/test_triton_producers.py, and
the time of forward and backward of f and a layer over f and nn.Linear, M x K x N. Plain f is taken to
need the time of its memory traffic. "P behind f" has P and Q as passes of their own, by CUDA's kernels; in
"f draws" f's own passes draw. Launches, overlap and special functions are left out. Plain gelu may be
bound by issue itself, so its row may look worse than it is:

{producers_table()}

## Real samples behind an activation

The forward of one sample with estimator="mean" in bfloat16, in picoseconds per element of x, in three
forms:

- fused: nothing of a sample passes through memory, but each tile of columns draws its noise
- row blocks (dipkernels/ops/row_blocks.py): the draw, the vendor's product, the activation and the sum
  are passes of their own
- calls written out: they draw by randn_like and keep what backward needs

{samples_table()}

So row blocks run above `FUSED_MEAN_COLUMNS` columns, if the CUDA library is built. There the product
dominates. Averaging then costs about as much time as the calls, and the memory of one.

## The exact mean

estimator="analytic" in bfloat16: the slots of Triton's two passes, counted by
tests/test_triton_expectation.py, and the time of forward and backward over act(nn.Linear), M x K x N.
The passes over the weight are counted, for the variance and its gradient. So is the gradient of the
plain layer's bias, which a DIP layer sums in its pass over dy. Launches, overlap and what a program does
before its loop are left out. The special functions, two for each element, take the time of 16 slots. The
aim is 1.10.

{means_table()}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", action="store_true", help="write the page instead of printing it")
    if parser.parse_args().docs:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
