"""What more than one trainer needs: the config of a run, an optimiser's groups, one start for all
ranks, m trajectories of a step."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .. import worlds
from ..config import DIPConfig, config_of, require_order
from ..models.check import check
from ..models.parameters import load_variances, param_groups, variances
from ..nn.numbering import dip_layers
from ..nn.variance import Variance
from ..noise.contexts import GOLDEN
from ..training.trajectories import trajectories


def config_of_run(model: nn.Module, asked: DIPConfig | None, argument: str) -> DIPConfig | None:
    """The config of the model, or else the one that was asked for by the argument.

    Raises:
        ValueError: The two differ, or one was asked for beside DIP layers without a config.
    """
    require_order(model)
    own = config_of(model)
    if own is None or asked is None:
        if asked is not None and dip_layers(model):
            raise ValueError(
                f"model: expected a plain model beside {argument}, got DIP layers; call "
                "dip.to_plain(model) first"
            )
        return own or asked
    if own != asked:
        raise ValueError(
            f"{argument}: expected the model's config or None, got one that differs in "
            f"{_differing(own, asked)} (the model's, the one given)"
        )
    return own


def learning_variances(model: nn.Module) -> dict[str, nn.Parameter]:
    """The log_variance Parameters that learn, each once, by name."""
    own = {id(p) for m in model.modules() if isinstance(m, Variance) for p in m.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own and p.requires_grad}


def own_group(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Move the variances of a new optimiser into a group of their own: that of `param_groups`."""
    group = next((group for group in param_groups(model, lr) if group["name"] == "variances"), None)
    if group is None:
        return
    moved = {id(p) for p in group["params"]}
    for other in optimizer.param_groups:
        other["params"] = [p for p in other["params"] if id(p) not in moved]
    optimizer.param_groups[:] = [other for other in optimizer.param_groups if other["params"]]
    if not all("name" in other for other in optimizer.param_groups):
        del group["name"]
    optimizer.add_param_group(group)


def require_groups(model: nn.Module, optimizer: Any, way_out: str) -> None:
    """Raise ValueError unless every variance that learns is in a group of the optimiser that has no
    weight decay."""
    names = {id(p): name for name, p in learning_variances(model).items()}
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    decaying = [group for group in optimizer.param_groups if group.get("weight_decay", 0)]
    decayed = {id(p) for group in decaying for p in group["params"]}
    for which, ids in (("lacks", names.keys() - kept), ("decays", names.keys() & decayed)):
        if ids:
            example = min(names[each] for each in ids)
            raise ValueError(
                "optimizer: expected one made from dip.param_groups(model, lr) of "
                f"the converted model, got one that {which} {len(ids)} variance(s), such as "
                f"{example}; {way_out}"
            )


def one_start(model: nn.Module) -> None:
    """Every rank takes the variances and priors of the first, for each may have been calibrated on
    other batches."""
    if worlds.has_ranks() and torch.distributed.get_world_size() > 1:
        state = [variances(model)]
        torch.distributed.broadcast_object_list(state, src=0)
        load_variances(model, state[0])


def on_trajectories(
    run: Callable[[Any], Any], batch: Any, m: int, output_of: Callable[[Any], Any] = lambda _: None
) -> tuple[Any, Any]:
    """run(the batch with every example m times), and what output_of takes of that, as [m, B, ...].

    Raises:
        ValueError: m > 1 and its tensors have not all the examples first.
    """
    if m == 1:
        answer = run(batch)
        return answer, output_of(answer)
    answers: list[Any] = []

    def folded(repeated: Any) -> Any:
        answers.append(run(repeated))
        return output_of(answers[0])

    output = trajectories(folded, _with_lists_repeated(batch, m), m=m)
    return answers[0], output


def _with_lists_repeated(batch: Any, m: int) -> Any:
    """The batch for `trajectories`, which repeats tensors: a mapping as a dict, and each number or
    string of a list that has one for each example m times."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    leaves = pytree.tree_leaves_with_path(batch)
    sizes = {
        pytree.keystr(path): tuple(leaf.shape) for path, leaf in leaves if isinstance(leaf, Tensor)
    }
    if len({shape[:1] for shape in sizes.values()}) != 1 or () in sizes.values():
        raise ValueError(
            "m: expected 1, because not all tensors of the batch have the examples first, got "
            f"{m} and {sizes or type(batch)}"
        )
    examples = next(iter(sizes.values()))[0]

    def is_listed(part: Any) -> bool:
        return (
            isinstance(part, (list, tuple))
            and len(part) == examples
            and all(isinstance(each, (str, int, float)) for each in part)
        )

    return pytree.tree_map(
        lambda part: [each for each in part for _ in range(m)] if is_listed(part) else part,
        batch,
        is_leaf=is_listed,
    )


def warn_of_another(stored: DIPConfig, own: DIPConfig, where: str) -> None:
    """Warn where a checkpoint was trained by another config than this run's, which holds."""
    if stored != own:
        warnings.warn(
            f"dipkernels: {where} was trained by another config: {_differing(stored, own)} (the "
            "checkpoint's, this run's). This run's holds; give the run the checkpoint's to take "
            "that",
            stacklevel=3,
        )


def warn_of_faults(model: nn.Module) -> None:
    """Warn of what `check` finds after the first step, unless a tool keeps the gradients to itself:
    DeepSpeed, LOMO."""
    if all(p.grad is None for p in model.parameters()):
        return
    if not (report := check(model, strict=False)):
        warnings.warn(
            f"dipkernels: after the first step {report}\n  An expert that the batch did not reach "
            "is no fault. Leave out layers that the loss reads past: exclude=[...] in the config",
            stacklevel=3,
        )


def _differing(first: DIPConfig, second: DIPConfig) -> dict[str, tuple[Any, Any]]:
    """{field: (the first's, the second's)} where they differ."""
    a, b = first.to_dict(), second.to_dict()
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def size_of_batches(loader: Any) -> int | None:
    """Of a DataLoader's batches but the last; None where each may have another, as those of a
    sampler that counts tokens, or of a data set that makes batches."""
    own = getattr(loader, "batch_size", None)
    return own or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)


def _tensors(batch: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]


def _size_of(batch: Any) -> int:
    """The first size of its first tensor, of a mapping of one that is not in a list, which may be
    an example's; or of both parts of a pair, which ORPO puts into one batch; 0 where there is no
    tensor."""
    given = dict(batch) if isinstance(batch, Mapping) else {}
    pair = [given[n] for n in ("chosen_input_ids", "rejected_input_ids") if n in given]
    whole = [v for v in given.values() if isinstance(v, Tensor) and v.ndim] or _tensors(batch)
    return sum(len(part) for part in pair or whole[:1])


def step_of(step: int, batch: Any) -> int:
    """What `config.noise` takes for a micro-batch of a step: another number where its examples have
    other sizes.

    A layer has a row of noise for each token of an example. So those of long examples would run
    into the next ones of short examples, in another micro-batch or on another rank.
    """
    sizes = [tuple(each.shape[1:]) for each in _tensors(batch) if each.ndim > 1]
    return step + (zlib.crc32(repr(sizes).encode()) * GOLDEN if sizes else 0)


_APART = 2**20  # rows between the micro-batches of a step, where their sizes are not known


def noise_of_step(
    config: DIPConfig,
    step: int,
    batch: Any,
    place: tuple[int, int, int],
    batch_size: int | None,
) -> contextlib.AbstractContextManager[object]:
    """The noise of a micro-batch, by its place in the batch of an optimiser step: of all
    micro-batches of all ranks.

    place: the number of the micro-batch, the rank, and how many ranks there are. batch_size: of a
    whole micro-batch, the same everywhere; the last one may be smaller, and a preference batch has
    two rows for each example. None where they are of any size: then no two have a row in common,
    and that is all.
    """
    (micro, rank, world), rows = place, _size_of(batch)
    each = _APART if batch_size is None else batch_size * max(1, -(-rows // batch_size))
    first = (micro * world + rank) * each
    return config.noise(step_of(step, batch), first * config.m, rows * config.m)
