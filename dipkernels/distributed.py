"""Many processes: shard the variances by one call; check what ranks must and must not share.
docs/cluster.md."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .nn.numbering import dip_layers, need_layers, require_module, warn_of_equal_numbers
from .nn.variance import Variance
from .noise import contexts, guards
from .ops.dtensor import local
from .worlds import has_ranks, is_dtensor

_HALF = (torch.bfloat16, torch.float16)


def shard_variances(
    module: nn.Module, *, reshard_after_forward: bool = False, **fsdp: Any
) -> nn.Module:
    """Shard every variance inside the module by fully_shard, as one group of its own in float32,
    before the module itself is sharded.

    FSDP2 wants one type in each group, and its mixed precision would compute log_variance in half
    precision. A model that is all float32 does not need this. They are gathered where the module
    is called, so what is compiled or checkpointed inside it holds none of FSDP's own operations.

        for block in model.blocks:
            fully_shard(dip.shard_variances(block, mesh=mesh), mesh=mesh, mp_policy=bf16)
        fully_shard(dip.shard_variances(model, mesh=mesh), mesh=mesh, mp_policy=bf16)

    Args:
        module: A module that is not sharded yet. Variances that are sharded already stay as they
            are.
        reshard_after_forward: Whether the group is gathered a second time in backward. It is small,
            so by default it is not.
        fsdp: mesh, offload_policy and other arguments of torch.distributed.fsdp.fully_shard.

    Returns:
        The module.

    Raises:
        ValueError: There are no DIP layers, or mp_policy is of half precision.
    """
    require_module(module)
    from torch.distributed.fsdp import FSDPModule, fully_shard

    variances = [m for m in module.modules() if isinstance(m, Variance)]
    if not variances:
        raise ValueError("module: expected DIP layers, found none; convert it first")
    policy = fsdp.get("mp_policy")
    if policy is not None and policy.param_dtype in _HALF:
        raise ValueError(
            f"mp_policy: expected variances to stay float32, got param_dtype={policy.param_dtype}"
        )
    fresh = [m for m in variances if not isinstance(m, FSDPModule)]
    if fresh:
        fully_shard([*fresh], reshard_after_forward=reshard_after_forward, **fsdp)
        module.register_forward_pre_hook(torch.compiler.disable(_gather_before(fresh)))
    return module


def _gather_before(variances: list[Variance]) -> Callable[..., None]:
    """A hook of the module around them: FSDP gathers them there, as it does its weights, and not
    inside, where torch.compile and selective checkpoints would meet FSDP's own hooks."""
    for v in variances:
        v.gathered_with = tuple(variances)

    def gather(*_: Any) -> None:
        if contexts.MODE == "on" or any(v.training for v in variances):
            for v in variances:
                v.gathered = v()

    return gather


def parallelize_module(
    module: nn.Module, device_mesh: Any, parallelize_plan: Any = None, **options: Any
) -> nn.Module:
    """Do for a converted model what torch.distributed.tensor.parallel.parallelize_module does for a
    plain one. Variances stay whole on every rank.

    The styles are torch's own. They cut every parameter that they find inside a layer, so the
    variances are taken out meanwhile.

        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        dip.parallelize_module(model, mesh["tp"], plan)

    Args:
        module, parallelize_plan, options: As for torch's function.
        device_mesh: As for torch's function; it must be given.

    Returns:
        What torch's function returns.
    """
    from torch.distributed.tensor.parallel import parallelize_module as torchs

    owners = [layer for layer in dip_layers(module).values() if "variance" in layer._modules]
    variances = [layer._modules.pop("variance") for layer in owners]
    try:
        parallel = torchs(module, device_mesh, parallelize_plan, **options)
    finally:
        for layer, variance in zip(owners, variances):
            layer._modules["variance"] = variance
    for layer, variance in zip(owners, variances):
        of_weights = [p.device_mesh for p in layer.parameters() if is_dtensor(p)]
        if isinstance(variance, Variance) and (
            of_weights or getattr(layer, "_distribute_module_applied", False)
        ):
            replicate_variance(variance, (of_weights or [device_mesh])[0])
    return parallel


def replicate_variance(variance: Variance, mesh: Any) -> None:
    """Its tensors as DTensors that are whole on every rank of the mesh. A collective."""
    from torch.distributed.tensor import distribute_module

    if not any(is_dtensor(t) for t in variance._tensors().values()):
        trained = {name: p.requires_grad for name, p in variance.named_parameters()}
        distribute_module(variance, mesh)
        for name, p in variance.named_parameters():
            p.requires_grad_(trained[name])  # torch 2.10 makes each of them trained


def check_ranks(model: nn.Module, tensor_parallel: Any = None) -> None:
    """Check the ranks of the default process group: what must be equal is equal, and what must
    differ differs.

    This is a collective: every rank must call it. Call it before training, or now and then. Inside
    the fixed_noise context of a step it compares keys instead of generators. Without a process
    group it looks at the model only.

    Args:
        model: A model with DIP layers, wrapped as for training.
        tensor_parallel: The DeviceMesh, such as mesh["tp"], over which layers are split. Its ranks
            must draw the same noise.

    Raises:
        ValueError: There are no DIP layers.
        RuntimeError: A fault, with the names of layers and ranks. A log_variance is in half
            precision, in an FSDP group of half precision (shard_variances), or split over ranks
            although the layer's weight has all input features. Or ranks number their layers
            differently, have different priors, or draw different noise although they are
            tensor-parallel.

    Warns:
        UserWarning: Ranks that hold different examples would draw the same noise.

    Examples:
        >>> dip.check_ranks(dip.convert(nn.Sequential(nn.Linear(4, 2))))
    """
    layers = need_layers(model)
    warn_of_equal_numbers(model)
    variances = {name: layer.variance for name, layer in layers.items()}
    mine = {
        "faults": _faults(model),
        "numbers": {name: layer.number for name, layer in layers.items()},
        "priors": {name: _digest(v.log_prior) + _digest(v.pull) for name, v in variances.items()},
        "noise": _noise_now(next(iter(variances.values())).log_variance.device),
        # the ranks that draw as this one does, where it is one of several
        "place": None if tensor_parallel is None else tensor_parallel.mesh.flatten().tolist(),
    }
    ranks: list[Any] = [mine]
    if has_ranks():
        ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
    problems = [f"rank {r}: {fault}" for r, each in enumerate(ranks) for fault in each["faults"]]
    problems += [
        f"rank {rank} numbers the layers {names} differently from rank 0; call dip.number_layers "
        "on each"
        for rank, names in _differing(ranks, "numbers").items()
    ]
    problems += [
        f"rank {rank} has other priors than rank 0 at {names}; calibrate every rank on the same "
        "batches"
        for rank, names in _differing(ranks, "priors").items()
    ]
    for rank, each in enumerate(ranks):
        first = each["place"][0] if each["place"] else rank
        if each["noise"] != ranks[first]["noise"]:
            problems.append(
                f"rank {rank} would draw other noise than rank {first}, with which it shares "
                f"tensors: {_shown(each)}, {_shown(ranks[first])}"
            )
    if problems:
        raise RuntimeError("check_ranks:\n  " + "\n  ".join(problems))
    _warn_equal(ranks)


def _faults(model: nn.Module) -> list[str]:
    faults: list[str] = []
    if not torch.distributed.is_available():
        return faults
    from torch.distributed.fsdp import FSDPModule

    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    for name, layer in dip_layers(model).items():
        parameter = layer.variance.log_variance
        full_name = f"{name}.variance.log_variance".lstrip(".")
        if parameter.dtype in _HALF:
            faults.append(f"{full_name}: expected float32, got {parameter.dtype}")
        around = [n for n in wrapped if not n or full_name.startswith(f"{n}.")]
        if around:
            policy = wrapped[max(around, key=len)]._get_fsdp_state()._mp_policy
            if policy.param_dtype in _HALF:
                faults.append(
                    f"{full_name}: FSDP would compute it in {policy.param_dtype}; call "
                    "dip.shard_variances first"
                )
        elif is_dtensor(parameter):
            weight, mesh = getattr(layer, "weight", None), parameter.device_mesh
            split = [w.is_shard(1) for w in weight.placements] if is_dtensor(weight) else []
            split = split or [False] * mesh.ndim
            if not all(p.is_replicate() or s for p, s in zip(parameter.placements, split)):
                faults.append(
                    f"{full_name}: expected it whole on every rank (Replicate), got "
                    f"{tuple(parameter.placements)} on {mesh}"
                )
    return faults


def _noise_now(device: torch.device) -> tuple[object, ...]:
    """What decides the next draw: (key, row0) under fixed_noise, else a digest of the generator's
    state."""
    if contexts.KEY is not None:
        return "key", int(contexts.KEY[0]) % 2**64, contexts.row0()
    return "generator", guards.generator_digest(device)[:16]


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(repr(local(values).tolist()).encode()).hexdigest()[:16]


def _shown(each: dict[str, Any]) -> str:
    kind, *values = each["noise"]
    if kind == "key":
        return f"fixed_noise(key, row0) = {tuple(values)}"
    return f"generator state {values[0]}"


def _differing(ranks: list[dict[str, Any]], what: str) -> dict[int, list[str]]:
    """{rank: names of the layers where it differs from rank 0}."""
    first = ranks[0][what]
    # Pipeline stages hold different layers: only what both hold is compared.
    found = [[n for n, v in each[what].items() if first.get(n, v) != v] for each in ranks]
    return {rank: names for rank, names in enumerate(found) if names}


def _warn_equal(ranks: list[dict[str, Any]]) -> None:
    groups: dict[tuple[object, ...], list[int]] = {}
    for rank, each in enumerate(ranks):
        if each["place"] is None or each["place"][0] == rank:
            groups.setdefault(each["noise"], []).append(rank)
    equal = [group for group in groups.values() if len(group) > 1]
    if equal:
        warnings.warn(
            f"dipkernels: ranks {equal} draw the same noise for different examples; "
            "torch.manual_seed(seed + rank), or fixed_noise(key, row0=index of the rank's first "
            "example)",
            stacklevel=3,
        )
