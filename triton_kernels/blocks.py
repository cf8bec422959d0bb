"""triton_kernels/blocks.py: the tiles of the fused linear.  docs/maths.md, section 2."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Blocks:
    """Tile of a product: M rows, N out-features, K in-features; which of them is the loop depends
    on the operation."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


# Not measured yet: the largest tiles that compile without spills and fit the shared memory of the
# architecture. 16-bit data. Per architecture (the nearest one below counts): fwd, fwd over several
# samples, bwd_x, bwd_x with unaligned rows, bwd_weight.
TABLE = {
    80: {
        "fwd": Blocks(128, 128, 32, 8, 3),
        "fwd_mean": Blocks(64, 128, 32, 8, 3),
        "bwd_x": Blocks(128, 32, 128, 8, 3),
        "bwd_x_unaligned": Blocks(64, 32, 128, 8, 3),
        "bwd_weight": Blocks(32, 128, 128, 8, 3),
    },
    90: {
        "fwd": Blocks(128, 128, 64, 8, 3),
        "fwd_mean": Blocks(64, 128, 32, 8, 3),
        "bwd_x": Blocks(128, 64, 128, 8, 3),
        "bwd_x_unaligned": Blocks(64, 64, 128, 8, 3),
        "bwd_weight": Blocks(64, 128, 128, 8, 3),
    },
    100: {
        "fwd": Blocks(128, 128, 64, 8, 3),
        "fwd_mean": Blocks(64, 64, 64, 8, 3),
        "bwd_x": Blocks(128, 64, 128, 8, 3),
        "bwd_x_unaligned": Blocks(64, 64, 128, 8, 3),
        "bwd_weight": Blocks(64, 128, 128, 8, 3),
    },
}
# float32 in full precision has no tensor cores: fused multiply-adds, on tiles of 32 rows, because
# Triton 3.7 gives larger ones to sm_100's tf32 matrix unit in spite of input_precision="ieee".
FLOAT32 = {
    80: {
        "fwd": Blocks(32, 64, 16, 4, 2),
        "fwd_mean": Blocks(32, 32, 16, 8, 2),
        "bwd_x": Blocks(32, 32, 64, 4, 2),
        "bwd_x_unaligned": Blocks(32, 32, 64, 4, 2),
        "bwd_weight": Blocks(32, 32, 64, 4, 2),
    },
}
FLOAT32[90] = {**FLOAT32[80], "fwd_mean": Blocks(32, 32, 16, 4, 1)}
# Tiles from which a device is busy: about half of the 108 to 148 multiprocessors of the table's
# GPUs.
FULL = 64


def _fit(size: int, block: int) -> int:
    """The smallest power of two that holds `size`, from 16 (what a matrix instruction takes) to
    `block`."""
    return min(block, max(16, 1 << (size - 1).bit_length()))


def blocks(
    op: str, arch: int, m: int, n: int, k: int, itemsize: int, regular: bool = True
) -> Blocks:
    """The tile of op (a name of TABLE) on sm_<arch> for weights of itemsize bytes.

    regular: every row starts at a multiple of 8 elements and x is no wider than the weight. Other
    loads need registers.
    """
    table = FLOAT32 if itemsize >= 4 else TABLE
    chosen = table[max((a for a in table if a <= arch), default=80)][op]
    if not regular and itemsize < 4 and op == "bwd_weight":
        chosen = replace(chosen, BLOCK_M=max(16, chosen.BLOCK_M // 2), BLOCK_N=chosen.BLOCK_N // 2)
    elif not regular and itemsize < 4 and op in ("fwd", "fwd_mean"):
        chosen = replace(chosen, BLOCK_K=max(16, chosen.BLOCK_K // 2), BLOCK_N=chosen.BLOCK_N // 2)
    block_m, block_n, block_k = (
        _fit(m, chosen.BLOCK_M),
        _fit(n, chosen.BLOCK_N),
        _fit(k, chosen.BLOCK_K),
    )
    # Few tiles: narrower ones fill more of the device, and each draws its noise on a multiprocessor
    # of its own.
    rows = -(-m // block_m)
    if op in ("fwd", "fwd_mean"):
        while block_n > 32 and rows * -(-n // block_n) < FULL:
            block_n //= 2
    elif op in ("bwd_x", "bwd_x_unaligned"):
        while block_k > 32 and rows * -(-k // block_k) < FULL:
            block_k //= 2
    # A tile below a quarter of the table's leaves eight warps with too little to do.
    quarter = 4 * block_m * block_n * block_k < chosen.BLOCK_M * chosen.BLOCK_N * chosen.BLOCK_K
    num_warps = 4 if quarter else chosen.num_warps
    return replace(chosen, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)


def splits(tiles: int, m: int, multiprocessors: int) -> int:
    """Into how many row ranges bwd_weight splits: enough to fill the device, each of at least 512
    rows."""
    return max(1, min(multiprocessors // max(tiles, 1), m // 512))


def candidates(chosen: Blocks, op: str) -> list[Blocks]:
    """What DIPKERNELS_AUTOTUNE=1 tries: the table's tile and its neighbours; BLOCK_M stays, partial
    sums rest on it."""
    found = [chosen]
    for warps in (4, 8):
        for stages in (2, 3, 4):
            found.append(replace(chosen, num_warps=warps, num_stages=stages))
    if op == "fwd":
        found += [replace(b, BLOCK_N=max(16, b.BLOCK_N // 2)) for b in found]
    return list(dict.fromkeys(found))
