"""A whole block, eager and under torch.compile, which may fuse eager noise into the LayerNorm or
GELU before it."""

import networks
import peers
import pytest
import timing
import torch

CASES = networks.BLOCKS


@pytest.mark.parametrize("name", (*peers.NAMES, *peers.COMPILED))
def bench_block_step(name, device, case, build, timed):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = case.make().to(device, dtype)
    x = torch.randn(case.shape, device=device, dtype=dtype, requires_grad=True)
    if name.startswith("dip"):
        peers.check_converted(build("dip", plain), x)
    module = build(name, plain)
    dy = torch.randn_like(x)
    step = timing.training_step(module, x, dy)
    step()
    saved = timing.saved_bytes(lambda: module(x), list(module.parameters()))
    timed(
        step,
        name,
        "block training step",
        saved_bytes=saved,
        peak_bytes=timing.peak_bytes(step, device),
    )
