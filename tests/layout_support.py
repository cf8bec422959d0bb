"""Every operation on tensors in all kinds of layouts: torch.compile hands over what it has."""

import itertools

import torch

from dipkernels.ops import registry

SHAPE, FEATURES, OUT = (4, 6, 8), 8, 5


def layouts(device):
    """Tensors of SHAPE in every order of the dimensions, with gaps, and with one row repeated."""
    for order in itertools.permutations(range(3)):
        dense = torch.rand([SHAPE[d] for d in order], device=device)
        yield dense.permute([order.index(d) for d in range(3)])
    yield torch.rand(4, 6, 11, device=device)[..., 2:10]
    yield torch.rand(8, 6, 8, device=device)[::2]
    yield torch.rand(1, 6, 8, device=device).expand(SHAPE)


def cases(device):
    """(operation, its arguments): all but `noise`, which takes a shape."""
    vector = torch.rand(FEATURES, device=device)
    weight, bias = torch.rand(OUT, FEATURES, device=device), torch.rand(OUT, device=device)
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    draw = (vector, seed, -1, 0, 0, 0, 1.0, True)
    mean = (vector, seed, 0, 0, 0, 1.0, True, 2, "gelu")
    for x, y in itertools.product(layouts(device), repeat=2):
        yield "perturb_replay", (x, y, *draw, None)
        yield "gate", (x, y, *draw, "silu", None)
        yield "gate_bwd", (x, y, x, *draw, "silu")
        yield "gate_bwd", (x, y, None, *draw, "relu")
        yield "expectation_bwd", (x, y, vector, "gelu")
        for kind, stats in (("layer", 2), ("rms", 1)):
            sums = torch.ones(stats, 24, device=device)
            yield "norm_bwd", (x, y, sums, vector, None, *draw, kind, 0.0)
    dense = torch.rand(2, FEATURES, 3, 5, device=device)
    images = (
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        dense[:1].expand(dense.shape),
    )
    channels = (vector, seed, 1, *draw[3:])
    for x, y in itertools.product(images, repeat=2):
        yield "perturb", (x, *channels, None)
        yield "perturb_bwd", (x, *channels)
        yield "perturb_replay", (x, y, *channels, None)
        yield "gate", (x, y, *channels, "silu", None)
        yield "gate_bwd", (x, y, x, *channels, "silu")
    for x in layouts(device):
        yield "perturb", (x, *draw, None)
        yield "perturb", (x, *draw, torch.bfloat16)
        yield "perturb_bwd", (x, *draw)
        yield "gate", (x, None, *draw, "relu", torch.bfloat16)
        yield "expectation", (x, vector, "gelu")
        yield "norm", (x, vector, vector, *draw, "layer", 1e-5, 0.0, None)
        yield "norm", (x, None, None, *draw, "rms", 1e-5, 1.0, torch.bfloat16)
        yield "linear", (x, weight, bias, *mean, torch.float32)
        yield "linear_bwd", (x[..., :OUT], x, weight, bias, *mean)
    for w in (weight, torch.rand(FEATURES, OUT, device=device).t()):
        yield "affine_variance", (w, vector, True)
        yield "affine_variance_bwd", (bias, w, vector, True, None)


def kinds_of(results):
    """What a fake has to say of each result; strides that no element needs say nothing."""
    results = results if isinstance(results, tuple) else (results,)
    return [(r.shape, r.dtype, r.numel() and r.stride()) for r in results]


def _without_data(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def fake_of(op, arguments):
    """What the operation's fake makes of these, without data."""
    meta = [_without_data(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    return kinds_of(getattr(torch.ops.dipkernels, op).default(*meta))


ALL = set(registry.SCHEMAS) - {"noise"}
