"""triton_kernels/tiles.py: how the rows and columns of strided tensors map to tiles and addresses.

The rows of a tensor are all its dimensions but one, flattened in order. Once neighbours that can be
merged are merged, a kernel sees at most two of them: `inner`, which tiles run along, and `outer`,
of which a tile holds one index. A row's number is outer * outer_step + inner * inner_step,
whichever of the two varies faster.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Of the noise contract: no product and sum are contracted behind our back.
EXACT = {"enable_fp_fusion": False}
TILE_ELEMENTS = 4096


class Origin(NamedTuple):
    """Where a draw begins, as kernels take it: col0 in two parts, so that the compiler knows a
    shift of 0."""

    row0: int
    group0: int  # col0 // 8
    shift: int  # col0 % 8
    sample: int


class Rows(NamedTuple):
    """What kernels walk through: of K columns, which come divided by VEC"""

    blocks: int  # over (outer, blocks of inner)
    num_outer: int
    num_inner: int
    outer_step: int
    inner_step: int
    K: int


class Operand(NamedTuple):
    """A tensor [rows, K] as kernels take it, with its strides; outer and inner come divided by
    VEC"""

    ptr: torch.Tensor | None
    outer: int
    inner: int
    col: int


# Triton's own take microseconds, as kernels may call them too, and a launch has several.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def origin(row0: int, col0: int, sample: int) -> Origin:
    return Origin(row0, col0 // 8, col0 % 8, sample)


@triton.jit
def tile_at(
    rows,
    row_block,  # scalar
    col,  # [BLOCK_K] int64
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The row numbers [BLOCK_R] of a row block, int64; and where a tile of it and the columns lies,
    for `load` and `store`: outer (scalar), inner [BLOCK_R], col, and the tile's mask"""
    # A size of one is a constant to the compiler: ordinary rows pay for no division.
    if rows.num_outer == 1:
        outer = tl.cast(0, tl.int64)
        inner = tl.cast(row_block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    else:
        num_blocks = tl.cdiv(rows.num_inner, BLOCK_R)
        outer = tl.cast(row_block // num_blocks, tl.int64)
        inner = tl.cast(row_block % num_blocks, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = outer * rows.outer_step + inner * rows.inner_step
    in_row, in_col = across(inner < rows.num_inner, (col >= 0) & (col < rows.K * VEC), ROWS_LAST)
    return row, (outer, inner, col, in_row & in_col)


@triton.jit
def columns_at(
    col_block,  # scalar
    origin,  # the first tile starts `shift` columns before the first column
    BLOCK_K: tl.constexpr,
):
    """Philox groups [BLOCK_K / 8] and columns [BLOCK_K] of a column block, int64; a column may be
    negative"""
    first = tl.cast(col_block, tl.int64) * BLOCK_K
    group = origin.group0 + first // 8 + tl.arange(0, BLOCK_K // 8)
    return group, first + tl.arange(0, BLOCK_K) - origin.shift


@triton.jit
def across(row, col, ROWS_LAST: tl.constexpr):
    """row [R] and col [C] shaped to broadcast to [R, C], or to [C, R] if ROWS_LAST"""
    if ROWS_LAST:
        return row[None, :], col[:, None]
    else:
        return row[:, None], col[None, :]


@triton.jit
def _offsets(x, outer, inner, col, ROWS_LAST: tl.constexpr, VEC: tl.constexpr):
    """In elements, int64"""
    row = outer * (x.outer * VEC) + inner * (x.inner * VEC)
    row, col = across(row, col * x.col, ROWS_LAST)
    return row + col


@triton.jit
def load(x, place, dtype: tl.constexpr, ROWS_LAST: tl.constexpr, VEC: tl.constexpr):
    """A tile of an Operand, where `tile_at` says"""
    outer, inner, col, mask = place
    off = _offsets(x, outer, inner, col, ROWS_LAST, VEC)
    return tl.load(x.ptr + off, mask=mask, other=0.0).to(dtype)


@triton.jit
def store(x, place, tile, ROWS_LAST: tl.constexpr, VEC: tl.constexpr):
    outer, inner, col, mask = place
    off = _offsets(x, outer, inner, col, ROWS_LAST, VEC)
    tl.store(x.ptr + off, tile.to(x.ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tiling:
    """One kernel's view of its tensors: sizes, steps of the row number, strides and the tile."""

    k: int
    num_outer: int
    outer_step: int
    num_inner: int
    inner_step: int
    strides: tuple[tuple[int, int, int], ...]  # of each operand: outer, inner, column
    rows_last: bool  # tiles are [columns, rows]: memory is contiguous along the rows
    # 8: K and the row strides are multiples of 8 and are passed divided by it, so that the compiler
    # knows
    vec: int
    col0: int
    block_r: int
    block_k: int

    @property
    def row_blocks(self) -> int:
        return self.num_outer * cdiv(self.num_inner, self.block_r)

    @property
    def col_blocks(self) -> int:
        return cdiv(self.k + self.col0 % 8, self.block_k)

    def grid(self, device: torch.device) -> tuple[int, int]:
        """(column blocks, row programs): four tiles a program, which keeps key and sigma, once the
        device is full."""
        fill = 8 * num_multiprocessors(device) // self.col_blocks
        row_programs = max(cdiv(self.row_blocks, 4), fill)
        return self.col_blocks, min(self.row_blocks, row_programs, 65535)

    def sum_grid(self, device: torch.device) -> tuple[int, int]:
        """The same where every row program leaves a partial sum: four programs a multiprocessor."""
        fill = cdiv(4 * num_multiprocessors(device), self.col_blocks)
        return self.col_blocks, min(self.row_blocks, fill)

    def operands(self, *tensors: torch.Tensor | None) -> list[Operand]:
        """In the order of `tiling`"""
        vec, strides = self.vec, zip(tensors, self.strides, strict=True)
        return [Operand(t, outer // vec, inner // vec, col) for t, (outer, inner, col) in strides]

    def rows(self) -> Rows:
        sizes = (self.num_outer, self.num_inner, self.outer_step, self.inner_step)
        return Rows(self.row_blocks, *sizes, self.k // self.vec)

    def constants(self) -> dict[str, int | bool]:
        """What every kernel takes by name, the compiler's option too"""
        block = {"BLOCK_R": self.block_r, "BLOCK_K": self.block_k}
        return {"ROWS_LAST": self.rows_last, "VEC": self.vec, **block, **EXACT}


def _merged_rows(shape, dim: int, tensors) -> list[tuple[int, int, tuple[int, ...]]]:
    """(size, step of the row number, strides of the tensors) of the row dimensions, outermost
    first"""
    rows: list[tuple[int, int, tuple[int, ...]]] = []
    step = 1
    for axis in reversed([axis for axis in range(len(shape)) if axis != dim]):
        size, strides = shape[axis], tuple(t.stride(axis) for t in tensors)
        if size == 1:
            continue
        if rows and strides == tuple(rows[0][0] * stride for stride in rows[0][2]):
            rows[0] = (size * rows[0][0], rows[0][1], rows[0][2])
        else:
            rows.insert(0, (size, step, strides))
        step *= size
    return rows


def block_shape(
    num_inner: int,
    k: int,
    rows_last: bool,
    elements: int = TILE_ELEMENTS,
) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_K): 256 elements along contiguous memory, so that a warp reads whole lines;
    fewer rows in a tile of under 1,024, which would have no 8 columns else"""
    if rows_last:
        block_r = min(next_power_of_2(num_inner), 256, max(elements // 4, 64))
        block_k = min(next_power_of_2(k), elements // block_r)
    else:
        block_k = min(next_power_of_2(k), 256)
        block_r = min(next_power_of_2(num_inner), max(1, elements // max(block_k, 8)))
    return block_r, max(block_k, 8)


def tiling(dim: int, col0: int, elements: int, *operands: torch.Tensor | None) -> Tiling | None:
    """How to address tensors of one shape together; None where more than two row dimensions stay
    apart. An operand that is None has strides of 0."""
    tensors = [t for t in operands if t is not None]
    shape, lead = tensors[0].shape, tensors[0]
    dim %= len(shape)
    rows = _merged_rows(shape, dim, tensors)
    if len(rows) > 2:
        return None
    nothing = (1, 0, (0,) * len(tensors))
    outer, inner = [nothing] * (2 - len(rows)) + rows
    k, shift = shape[dim], col0 % 8
    # The first tensor decides the orientation: it is the one that is written, or the only large
    # one.
    contiguous = [row for row in (inner, outer) if row[2][0] == 1 and row[0] > 1]
    rows_last = bool(contiguous) and not (lead.stride(dim) == 1 and k > 1)
    if (rows_last and contiguous[0] is outer) or (not rows_last and outer[0] > inner[0]):
        outer, inner = inner, outer
    strides = [(outer[2][i], inner[2][i], t.stride(dim)) for i, t in enumerate(tensors)]
    # A kernel multiplies again what was divided by 8, in 32 bits: K and strides have to fit them.
    vectors = not rows_last and shift == 0 and k % 8 == 0 and k < 2**31
    vectors = vectors and all(
        col == 1 and (out | inn) % 8 == 0 and max(out, inn) < 2**31 for out, inn, col in strides
    )
    # Single loads need more registers: the ordinary tile would spill.
    block_r, block_k = block_shape(
        inner[0], k + shift, rows_last, elements if vectors or rows_last else elements // 2
    )
    of_tensors = iter(strides)
    of_operands = tuple((0, 0, 0) if t is None else next(of_tensors) for t in operands)
    layout = (of_operands, rows_last, 8 if vectors else 1)
    return Tiling(k, *outer[:2], *inner[:2], *layout, col0, block_r, block_k)


@triton.jit
def load_matrix(ptr, row, col, mask, row_stride, dtype: tl.constexpr):
    """A tile [R, C] of columns side by side; zeros outside"""
    return tl.load(ptr + (row * row_stride)[:, None] + col[None, :], mask=mask, other=0.0).to(dtype)


def dense(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors contiguous, None as it is"""
    return [None if t is None else t.contiguous() for t in tensors]


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of columns side by side; copied only where no view is"""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # of what is empty too
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device as the current one; a CPU tensor only under Triton's interpreter."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"expected CUDA tensors for the Triton kernels, got {tensor.device}: move them to a "
            "GPU, or start Python with TRITON_INTERPRET=1"
        )
    return contextlib.nullcontext()


def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # under Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
