"""P and Q on DTensors: each rank treats its shard with the noise of the whole tensor.
docs/cluster.md.

`perturb` and `perturb_bwd` have the signatures of those in perturb.py and run the operation on the
local shard, at its rows and columns. They communicate nothing but dsigma, and sigma where its own
layout differs from what x needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import worlds
from ..worlds import is_dtensor
from . import registry
from .draw import Draw, check_projection

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_agreed: set[DeviceMesh] = set()  # meshes whose ranks were seen to hold one seed


def local(x: Tensor) -> Tensor:
    """x itself, or this rank's part of a DTensor."""
    return x.to_local() if is_dtensor(x) else x


def full(x: Tensor) -> Tensor:
    """x itself, or the whole of a DTensor on every rank (a collective)."""
    return x.full_tensor() if is_dtensor(x) else x


def laid_out_as(values: Tensor, like: Tensor, device: torch.device | None = None) -> Tensor:
    """values, the same on every rank, with the layout of `like`, and on its device unless another
    is named."""
    if not is_dtensor(like):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh, values = like.device_mesh, values.to(device or like.device)
    whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


# ---- where a shard lies --------------------------------------------------------------------------


def _window(x: DTensor) -> tuple[list[int], list[int]]:
    """Offset and size of the local shard along each dimension: torch.chunk's, one mesh dimension
    after another."""
    offset, size = [0] * x.ndim, list(x.shape)
    for i, placement in enumerate(x.placements):
        if placement.is_shard():
            d: int = placement.dim  # type: ignore[attr-defined]
            chunk = -(-size[d] // x.device_mesh.size(i))
            first = min(chunk * x.device_mesh.get_local_rank(i), size[d])
            offset[d] += first
            size[d] = min(chunk, size[d] - first)
    return offset, size


def _blocks(x: DTensor, draw: Draw) -> list[tuple[tuple[slice, ...], Draw]]:
    """(index, draw) of the parts of the local shard whose rows follow one another in the whole
    tensor."""
    dim = draw.dim % x.ndim
    offset, size = _window(x)

    def at(row: int) -> Draw:
        return draw._replace(row0=draw.row0 + row, col0=draw.col0 + offset[dim])

    rows = [d for d in range(x.ndim) if d != dim]
    stride, first, count = [0] * x.ndim, 0, 1
    for d in reversed(rows):
        stride[d], first, count = count, first + offset[d] * count, count * x.shape[d]
    cut = max([d for d in rows if size[d] != x.shape[d]], default=0)
    # [B, S, K] cut along S: each entry of the batch is a block. Cut along the leading dimension
    # only, all is one block.
    outer = [d for d in rows if d < cut]
    if all([size[d] == 1 for d in outer]):
        return [((), at(first))]
    blocks = []
    for place in itertools.product(*(range(size[d]) for d in outer)):
        index, row = [slice(None)] * cut, first
        for d, i in zip(outer, place, strict=True):
            index[d] = slice(i, i + 1)
            row += i * stride[d]
        blocks.append((tuple(index), at(row)))
    return blocks


def _sigma_of_shard(sigma: Tensor, x: DTensor, dim: int) -> Tensor:
    """The entries of sigma [K] that belong to the local shard's features."""
    if is_dtensor(sigma):
        from torch.distributed.tensor import Replicate, Shard

        want = [Shard(0) if p.is_shard(dim) else Replicate() for p in x.placements]
        return sigma.redistribute(x.device_mesh, want).to_local()
    offset, size = _window(x)
    return sigma.narrow(0, offset[dim], size[dim])


# ---- the operations ------------------------------------------------------------------------------


def perturb(
    x: DTensor, sigma: Tensor, seed: Tensor, draw: Draw, out_dtype: torch.dtype | None
) -> DTensor:
    """u, laid out as x."""
    from torch.distributed.tensor import DTensor

    shard, dim = x.to_local(), draw.dim % x.ndim
    scale, blocks = _sigma_of_shard(sigma, x, dim), _blocks(x, draw)
    run = registry.kernel("perturb", shard.device.type)
    check_projection(shard, scale, seed, draw, out_dtype)
    if len(blocks) == 1:
        u = run(shard, scale, seed, *blocks[0][1], out_dtype)
    else:
        u = torch.empty_like(shard, dtype=out_dtype)
        for index, part in blocks:
            u[index] = run(shard[index], scale, seed, *part, out_dtype)
    like = x if u.stride() == shard.stride() else torch.empty(x.shape, device="meta")
    return DTensor.from_local(
        u, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=like.stride()
    )


def perturb_bwd(du: DTensor, sigma: Tensor, seed: Tensor, draw: Draw) -> Tensor:
    """dsigma, laid out as sigma. du may be a sum still to be made over ranks (Partial): dsigma is
    linear in it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    du, dim = _with_linear_partials(du), draw.dim % du.ndim
    shard, scale = du.to_local(), _sigma_of_shard(sigma, du, dim)
    run = registry.kernel("perturb_bwd", shard.device.type)
    parts = [run(shard[index], scale, seed, *part) for index, part in _blocks(du, draw)]
    dsigma = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    layout = [
        Shard(0) if p.is_shard(dim) else Partial() if p.is_shard() else p for p in du.placements
    ]
    mesh, shape = du.device_mesh, torch.Size((du.shape[dim],))
    dsigma = DTensor.from_local(dsigma, mesh, layout, run_check=False, shape=shape, stride=(1,))
    if is_dtensor(sigma):
        return dsigma.redistribute(placements=sigma.placements)
    return dsigma.redistribute(placements=[Replicate()] * mesh.ndim).to_local()


def _with_linear_partials(x: DTensor) -> DTensor:
    """x with partial maxima and the like reduced; partial sums and means stay."""
    from torch.distributed.tensor import Partial, Replicate

    kept = [
        p if not isinstance(p, Partial) or p.reduce_op in ("sum", "avg") else Replicate()
        for p in x.placements
    ]
    return x.redistribute(placements=kept)


def new_zeros(
    h: Tensor, shape: Sequence[int], dtype: torch.dtype, like_dtensor: tuple[DeviceMesh] | None
) -> Tensor:
    """Zeros on h's device; a replicated DTensor on like_dtensor = (mesh,) where that is given."""
    zeros = local(h).new_zeros(shape, dtype=dtype)
    if like_dtensor is None:
        return zeros
    from torch.distributed.tensor import DTensor, Replicate

    (mesh,) = like_dtensor
    return DTensor.from_local(zeros, mesh, [Replicate()] * mesh.ndim, run_check=False)


# ---- checks --------------------------------------------------------------------------------------


def prepare(x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """(x, seed) for the functions above: partial sums reduced, the seed a plain tensor.

    Raises TypeError, ValueError or RuntimeError for layouts and seeds that cannot be right, naming
    the rank. The first time that a mesh is seen outside torch.compile its ranks compare seeds, a
    collective of 16 bytes a rank.
    """
    if not is_dtensor(x):
        assert is_dtensor(sigma)  # one of the two is, or this is not called
        raise TypeError(
            f"sigma: {_rank(sigma)} holds a DTensor of placements {tuple(sigma.placements)} on "
            f"{sigma.device_mesh} while x is a plain tensor; a log_variance is split over ranks by "
            "mistake, or its layer was called outside the forward of the module that FSDP or "
            "tensor parallelism wrapped (dip.check_ranks names the layers)"
        )
    draw.check(x.ndim)
    dim = draw.dim % x.ndim
    if any(type(p).__name__ not in ("Shard", "Replicate", "Partial") for p in x.placements):
        raise ValueError(
            f"x: expected placements Shard, Replicate or Partial, got {tuple(x.placements)}"
        )
    if any(p.is_partial() for p in x.placements):
        from torch.distributed.tensor import Replicate

        x = x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
    _check_features(x, sigma, dim)
    if is_dtensor(sigma):
        _check_layout(x, sigma, dim)
    seed = local(seed)
    if not worlds.tracing() and x.device_mesh not in _agreed:
        check_agreement(seed, x.device_mesh)
        _agreed.add(x.device_mesh)
    return x, seed


def _rank(x: DTensor) -> str:
    from torch.distributed import get_rank

    return f"rank {get_rank()} ({x.device_mesh.get_coordinate()} of its mesh)"


def _check_features(x: DTensor, sigma: Tensor, dim: int) -> None:
    if sigma.shape != (x.shape[dim],):
        ranks = math.prod(
            x.device_mesh.size(i) for i, p in enumerate(x.placements) if p.is_shard(dim)
        )
        why = ""
        if ranks > 1:
            why = (
                f"; {_rank(x)} holds {x.to_local().shape[dim]} features, one of {ranks} ranks: a "
                "mesh that does not divide the features needs DTensor.from_local with the whole "
                "shape"
            )
        raise ValueError(
            f"sigma: expected shape (K,) = ({x.shape[dim]},), got {tuple(sigma.shape)}{why}"
        )
    if list(x.to_local().shape) != _window(x)[1]:
        raise ValueError(
            f"x: expected a shard of shape {tuple(_window(x)[1])} on {_rank(x)}, got "
            f"{tuple(x.to_local().shape)}; x is {tuple(x.shape)} with placements "
            f"{tuple(x.placements)} on {x.device_mesh}"
        )


def _check_layout(x: DTensor, sigma: DTensor, dim: int) -> None:
    if sigma.device_mesh != x.device_mesh:
        raise ValueError(
            f"sigma: expected x's mesh {x.device_mesh}, got {sigma.device_mesh} on {_rank(x)}"
        )
    pairs = zip(sigma.placements, x.placements)
    if not all(p.is_replicate() or (p.is_shard() and of_x.is_shard(dim)) for p, of_x in pairs):
        raise ValueError(
            "sigma: expected a log_variance whole on every rank (Replicate), or split where x's "
            f"features are, got placements {tuple(sigma.placements)} for x {tuple(x.placements)} "
            f"on {_rank(x)} (dip.check_ranks names the layers)"
        )


def check_agreement(seed: Tensor, mesh: DeviceMesh) -> None:
    """Raises RuntimeError unless every rank of the mesh holds the same seed. A collective."""
    from torch import distributed

    for i in range(mesh.ndim):
        group = mesh.get_group(i)
        seeds = [torch.empty_like(seed) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(seeds, seed.contiguous(), group=group)
        pairs = [tuple(s.tolist()) for s in seeds]
        if len(set(pairs)) > 1:
            ranks = distributed.get_process_group_ranks(group)
            got = ", ".join(f"rank {r}: {pair}" for r, pair in zip(ranks, pairs, strict=True))
            raise RuntimeError(
                "seed: expected the same (key, stream) on every rank that shares a tensor, got "
                f"{got}; seed these ranks alike with torch.manual_seed, or give fixed_noise the "
                "same key on each"
            )
