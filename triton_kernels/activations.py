"""triton_kernels/activations.py: act(h) and act'(h) of a tile."""

import triton
import triton.language as tl


@triton.jit
def within(x, bound: tl.constexpr):
    """x, or the end of [-bound, bound]; a NaN stays one. tl.clamp does not compile for float64 on
    sm_90."""
    x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(h):
    return 2.0 * tl.sigmoid(2.0 * h) - 1.0


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = 0.5 * h * (1.0 + _tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    elif ACTIVATION == "silu":
        h = h * tl.sigmoid(h)
    elif ACTIVATION == "tanh":
        h = _tanh(h)
    return h


@triton.jit
def slope(h, ACTIVATION: tl.constexpr):
    """d act / dh"""
    if ACTIVATION == "relu":
        d = tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(
            -0.5 * h * h
        )
    elif ACTIVATION == "gelu_tanh":
        h = within(h, 6.0)  # 0 or 1 beyond: _plain in expectation.py
        t = _tanh(0.7978845608028654 * (h + 0.044715 * h * h * h))
        d = 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * 0.7978845608028654 * (
            1.0 + 0.134145 * h * h
        )
    elif ACTIVATION == "silu":
        h = within(h, 20.0)
        s = tl.sigmoid(h)
        d = s * (1.0 + h * (1.0 - s))
    else:
        t = _tanh(h)
        d = 1.0 - t * t
    return d
