"""Training steps of whole models: forward, loss, backward, AdamW."""

import models
import networks
import peers
import pytest
import timing
import torch

CASES = networks.MODELS


@pytest.mark.parametrize("name", peers.NAMES)
def bench_model_step(name, device, case, build, timed):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain, x, target = models.inputs_of(case, dtype, device)
    model = build(name, plain)
    if name == "dip":
        peers.check_converted(model, x[:1] if case.classes and case.name != "ResNet-18" else x)
    step = models.step_of(model, x, target)
    timed(step, name, "model training step", peak_bytes=timing.peak_bytes(step, device))
