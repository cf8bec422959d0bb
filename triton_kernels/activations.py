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
    """To an error of 1e-7 beside 1: for 1 + tanh. Of a small h all digits are lost."""
    return 2.0 * tl.sigmoid(2.0 * h) - 1.0


@triton.jit
def _small_tanh(h):
    """tanh h for |h| < 1/2, to the last place of float64: Lambert's continued fraction"""
    square = h * h
    above = ((square + 378.0) * square + 17325.0) * square + 135135.0
    below = ((square * 28.0 + 3150.0) * square + 62370.0) * square + 135135.0
    return h * (above / below)


@triton.jit
def act(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = 0.5 * h * (1.0 + _tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    elif ACTIVATION == "silu":
        h = h * tl.sigmoid(h)
    elif ACTIVATION == "quick_gelu":
        h = h * tl.sigmoid(1.702 * h)
    elif ACTIVATION == "tanh":
        h = tl.where(tl.abs(h) < 0.5, _small_tanh(h), _tanh(h))
    return h


@triton.jit
def act_bwd(dy, h, ACTIVATION: tl.constexpr):
    """dy * d act / dh; relu's is 0 where h <= 0, whatever dy is"""
    if ACTIVATION == "relu":
        return tl.where(h <= 0.0, 0.0, dy)
    if ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(
            -0.5 * h * h
        )
    elif ACTIVATION == "gelu_tanh":
        # Beyond, it is 0 or 1 to the last place. power * s is 1 - s of all digits, where 1 / 1 is
        # not 1 too.
        h = within(h, 8.0)
        square = h * h
        power = tl.exp(h * (-1.5957691216057308 - 0.07135481627260025 * square))
        s = 1.0 / (1.0 + power)
        d = s + s * (power * s) * (h * (1.5957691216057308 + 0.21406444881780075 * square))
    elif ACTIVATION == "silu" or ACTIVATION == "quick_gelu":
        if ACTIVATION == "quick_gelu":  # silu(1.702 h) / 1.702
            h = 1.702 * h
        h = within(h, 60.0)
        power = tl.exp(-h)
        s = 1.0 / (1.0 + power)
        d = s + s * (power * s) * h
    else:
        t = _tanh(h)
        d = 1.0 - t * t
    return dy * d
