"""Types of PTX and the NumPy types that hold them. A register holds bits: an unsigned type, or
truths for predicates."""

import re

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

WARP = 32
# Where generic addresses of memory that is no tensor begin; those of tensors lie far below.
WINDOWS = {"variable": 1 << 60, "shared": 1 << 61, "local": 1 << 62}

UNSIGNED = {1: u8, 2: u16, 4: u32, 8: u64}
# Two halves of a word, and bfloat16, stay bits.
KINDS = {
    **{"u8": u8, "u16": u16, "u32": u32, "u64": u64},
    **{"s8": i8, "s16": i16, "s32": i32, "s64": i64},
    **{"b8": u8, "b16": u16, "b32": u32, "b64": u64},
    **{"f16": f16, "f32": f32, "f64": f64, "bf16": u16, "f16x2": u32, "bf16x2": u32, "tf32": u32},
}
NAMES = {
    **{u8: "u8", u16: "u16", u32: "u32", u64: "u64"},
    **{i8: "i8", i16: "i16", i32: "i32", i64: "i64"},
    **{f16: "f16", f32: "f32", f64: "f64"},
}
FLOATS = ("f16", "bf16", "f32", "f64")
_SIZED = re.compile(r"^[busf](8|16|32|64|128)$")


class PTXError(Exception):
    """The kernel did what no GPU lets it do, or what this interpreter does not know."""


def width_of(kind: str) -> int:
    """Bytes of a type; 0 for a predicate."""
    if kind == "pred":
        return 0
    if kind in KINDS:
        return np.dtype(KINDS[kind]).itemsize
    if match := _SIZED.match(kind):
        return int(match[1]) // 8
    raise PTXError(f"type .{kind} is not implemented")


def name_of(kind: str) -> str:
    """The name that generated code has for the NumPy type of a PTX type."""
    return NAMES[KINDS[kind]]
