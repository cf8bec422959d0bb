"""Many small calls in one process: memory stays flat, results stay the same.  docs/reliability.md.

    python tools/verify/soak.py --calls 2000000
        # layers' forward passes, backward too in every fourth
    python tools/verify/soak.py --minutes 120  # training steps for as long
    python tools/verify/soak.py --record  # the same, and the figures go to docs/reliability.md

Memory is sampled a hundred times; the slope is fitted to the last half: before, the marks of drawn
seeds (guards.py) fill their 2^16 places, and Python's allocator finds room for their changes. It
fails above one byte for each call.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import torch
from reliability import command_line, record

import dipkernels as dip


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(samples: list[tuple[int, int]]) -> float:
    """Bytes for each call, by least squares over the last half."""
    tail = samples[len(samples) // 2 :]
    n, b = zip(*tail)
    mean_n, mean_b = sum(n) / len(n), sum(b) / len(b)
    spread = sum((i - mean_n) ** 2 for i in n)
    return sum((i - mean_n) * (j - mean_b) for i, j in tail) / spread if spread else 0.0


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--calls", type=int, default=2_000_000, help="of a layer (2,000,000)")
    parser.add_argument("--minutes", type=float, help="instead of a number of calls: this long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = dip.convert(
        torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    )
    layers = len(dip.summary(model))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x = torch.randn(8, 16)
    with dip.fixed_noise(1):
        first = dip.functional.noise((8, 16), torch.tensor([1, 2]))
    calls = steps = 0
    samples: list[tuple[int, int]] = []
    start = time.monotonic()
    rounds_done = 0
    while (
        calls < args.calls if args.minutes is None else time.monotonic() - start < 60 * args.minutes
    ):
        for i in range(50):
            if i % 4:
                with torch.no_grad():
                    model(x)
            else:
                optimizer.zero_grad()
                with dip.fixed_noise(steps):
                    model(x).square().mean().backward()
                optimizer.step()
                steps += 1
            calls += layers
        rounds_done += 1
        step = max(1, args.calls // layers // 50 // 100) if args.minutes is None else 200
        if rounds_done % step == 0:
            samples.append((calls, resident()))
    seconds = time.monotonic() - start
    gc.collect()
    same = torch.equal(dip.functional.noise((8, 16), torch.tensor([1, 2])), first)
    growth = samples[-1][1] - samples[len(samples) // 2][1]
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    text = (
        f"{calls:,} forward passes of a layer, {steps:,} training steps among them, in "
        f"{seconds / 60:.1f} minutes on one thread: memory "
        f"{samples[0][1] / 2**20:.1f} MiB at the first of {len(samples)} samples, "
        f"{samples[-1][1] / 2**20:.1f} MiB at the last; {growth / 2**10:+.0f} KiB over the last "
        f"half, {slope(samples):+.4f} bytes a call by least squares. The same key gave the same "
        f"bits before and after: {'yes' if same else 'NO'}."
    )
    print(text)
    if args.record:
        record("soak", text)
    return 0 if same and finite and slope(samples) < 1.0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
