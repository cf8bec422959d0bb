"""One layer: its forward pass as training does it, and forward with backward."""

import peers
import pytest
import timing
import torch
from timing import Case

_SHAPES = [(4096, 1024, 1024), (512, 4096, 4096), (65536, 64, 64), (32, 128, 128)]
_FULL = [Case(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in _SHAPES]
_CUDA = [
    *_FULL,
    *(Case(torch.bfloat16, shape) for shape in [(8192, 4096, 4096), (8192, 4096, 1024)]),
]
CASES = {
    "cpu": _FULL,
    "cuda": _CUDA,
    "quick": [Case(torch.float32, (9, 24, 16)), Case(torch.bfloat16, (16, 8, 8))],
}


@pytest.mark.parametrize("what", ["forward", "training step"])
@pytest.mark.parametrize("name", peers.NAMES)
def bench_layer(name, what, device, case, build, timed):
    plain, x, dy = peers.inputs_of(case.shape, case.dtype, device)
    module = build(name, plain)
    peers.check_linear(name, module, plain, x, dy)
    saved = timing.saved_bytes(lambda: module(x), list(module.parameters()))
    call = timing.forward(module, x) if what == "forward" else timing.training_step(module, x, dy)
    timed(call, name, f"layer {what}", saved_bytes=saved)
