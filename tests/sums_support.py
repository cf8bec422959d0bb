"""Terms whose sum over rows tells how a CPU's kernel cuts the rows into blocks: docs/maths.md,
section 5."""

import torch

LARGE = 2.0**80  # added to it, a number of ordinary size is lost in float64 too


def block_rows(rows, unit=64):
    """Rows of a block: at most 32 blocks, each of a multiple of `unit` rows."""
    return unit * -(-rows // (32 * unit))


def telling_rows(rows, unit=64):
    """The last row of the first block, and the first and the last one of the second block.

    With a small number in the first of them, LARGE in the second and -LARGE in the third, the
    blocks' sums are the small number and 0. Any other cut loses the small number.
    """
    block = block_rows(rows, unit)
    assert rows >= 2 * block
    return block - 1, block, 2 * block - 1


def telling_terms(rows, columns, dtype=torch.float32, unit=64):
    """[rows, columns]; the sum is 1 where the cut is as stated, else 0."""
    terms = torch.zeros(rows, columns, dtype=dtype)
    terms[list(telling_rows(rows, unit))] = torch.tensor([[1.0], [LARGE], [-LARGE]], dtype=dtype)
    return terms
