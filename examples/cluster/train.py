"""A vision transformer with DIP layers, trained with FSDP2 on any number of processes; resumable.
docs/cluster.md.

    python examples/cluster/train.py examples/cluster/digits.json --out out/cluster  one process
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  for restarts: docs/cluster.md
    torchrun --standalone --nproc-per-node 2 --max-restarts 1 \\
        examples/cluster/train.py examples/cluster/digits.json
    mkdir -p out/cluster && sbatch examples/cluster/train.sbatch  many nodes

Data: scikit-learn's digits (8x8 scans). Every random choice is a function of the step, not of the
process: the order of examples of (seed, epoch), the noise of (key + step, the example's place in
the global batch). So a run that was killed and restarted, on the same number of processes, ends
with the same weights; on another number, with the same up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import dipkernels as dip

NUM_TEST, NUM_TRAIN = 297, 1500


# ---- the configuration ---------------------------------------------------------------------------

# Each number's type, its least and its largest value.
MODEL = {"width": (int, 1, 2**16), "depth": (int, 1, 2**10), "heads": (int, 1, 2**10)}
CONFIG = {
    "bfloat16": (bool, False, True),
    "batch": (int, 1, NUM_TRAIN),
    "steps": (int, 0, 2**40),
    "lr": (float, 0, 1e30),
    "weight_decay": (float, 0, 1e30),
    "variance_lr": (float, 0, 1e30),
    "seed": (int, 0, 2**62),
    "save_every": (int, 1, 2**40),
    "print_every": (int, 1, 2**40),
}


def check_config(config: dict) -> dict:
    """The configuration itself. Raises ValueError naming the first entry that is missing, unknown
    or out of its range."""
    _check_entries(config, "config", {**CONFIG, "model": None, "dip": None})
    _check_entries(config["model"], "model", MODEL)
    if config["model"]["width"] % config["model"]["heads"]:
        raise ValueError(f"width: expected a multiple of heads, got {config['model']}")
    try:
        dip.DIPConfig.from_dict(config["dip"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"dip: {error}") from error
    return config


def _check_entries(entries: object, name: str, expected: dict) -> None:
    if not isinstance(entries, dict) or entries.keys() != expected.keys():
        got = sorted(entries) if isinstance(entries, dict) else type(entries).__name__
        raise ValueError(f"{name}: expected the entries {sorted(expected)}, got {got}")
    for entry, (kind, least, most) in ((k, v) for k, v in expected.items() if v):
        value = entries[entry]
        typed = type(value) is kind or (kind is float and type(value) is int)
        if not (typed and least <= value <= most):
            raise ValueError(
                f"{entry}: expected {kind.__name__} from {least} to {most}, got {value!r}"
            )


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.movedim(-3, 0).transpose(-2, -3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 2x2 pixels of [B, 8, 8] images; logits [B, 10]."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(x[:, None], 2, stride=2).transpose(1, 2)  # [B, 16, 4]
        x = self.patches(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(-2))


def build(config: dict, device: torch.device, x: Tensor) -> nn.Module:
    torch.manual_seed(config["seed"])  # the same weights on every rank
    model, how = ViT(**config["model"]).to(device), dip.DIPConfig.from_dict(config["dip"])
    # The same examples on every rank, for a config with a ratio, so that every rank has one prior.
    dip.apply(model, how, [x[: config["batch"]]])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if config["bfloat16"] else None)
    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(dip.shard_variances(module, mesh=mesh), mesh=mesh, mp_policy=policy)
    return model


def load() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    return x[order], torch.tensor(digits.target)[order]


def examples_of(step: int, config: dict, count: int) -> Tensor:
    """Indices of the global batch of a step: a new order every epoch, the same on every rank."""
    steps = count // config["batch"]
    generator = torch.Generator().manual_seed(config["seed"] + step // steps)
    first = step % steps * config["batch"]
    return torch.randperm(count, generator=generator)[first : first + config["batch"]]


# ---- checkpoints: written whole before `latest` names them ---------------------------------------


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, out: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(out / f"step-{step}"))
    if distributed.get_rank() == 0:
        (out / "latest.new").write_text(str(step))
        os.replace(out / "latest.new", out / "latest")
    distributed.barrier()


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> int:
    """The step to go on from: 0, or that of the last whole checkpoint, whatever number of processes
    wrote it.

    Raises ValueError where `latest` or the checkpoint that it names cannot be read, or is another
    model's.
    """
    if not (out / "latest").exists():
        return 0
    latest = (out / "latest").read_bytes()
    if not latest.isdigit() or not (out / f"step-{int(latest[:20])}").is_dir():
        raise ValueError(
            f"--out: expected the step of a checkpoint in {out / 'latest'}, got {latest[:40]!r}"
        )
    step = int(latest)
    weights, state = get_state_dict(model, optimizer)
    folder = out / f"step-{step}"
    try:
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"--out: expected this model's checkpoint in {folder}, got another, or a damaged one: "
            f"{error!r}"
        ) from error
    return step


# ---- training ------------------------------------------------------------------------------------


def train(
    config: dict,
    out: Path,
    device: torch.device,
    after_step: Callable[[int], None] = lambda step: None,
) -> dict:
    """Train from the last checkpoint in `out` to the end. Returns the whole state dict on rank 0,
    {} elsewhere."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    check_config(config)
    if config["batch"] % world:
        raise ValueError(
            f"batch: expected a multiple of the {world} processes, got {config['batch']}"
        )
    each = config["batch"] // world
    x, y = (t.to(device) for t in load())
    count = len(x) - NUM_TEST
    model, how = build(config, device, x), dip.DIPConfig.from_dict(config["dip"])
    rates = {name: config[name] for name in ("lr", "weight_decay", "variance_lr")}
    optimizer = torch.optim.AdamW(dip.param_groups(model, **rates))
    out.mkdir(parents=True, exist_ok=True)
    start, loss = resume(model, optimizer, out), torch.zeros(())
    for step in range(start, config["steps"]):
        mine = examples_of(step, config, count)[rank * each : (rank + 1) * each].to(device)
        # trajectories folds m passes into the batch, so this rank's first row of it is rank * each
        # * m
        with how.noise(step, row0=rank * each * how.m):
            if step == start:
                dip.check_ranks(model)
            loss = how.objective(how.trajectories(model, x[mine]), y[mine], F.cross_entropy, model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config["save_every"] == 0:
            save(model, optimizer, step + 1, out)
        if rank == 0 and (step + 1) % config["print_every"] == 0:
            print(json.dumps({"step": step + 1, "loss": round(loss.item(), 4)}), flush=True)
        after_step(step + 1)
    model.eval()
    with torch.no_grad():  # every rank the whole test set: no rank waits for another's batches
        correct = (model(x[count:]).argmax(-1) == y[count:]).float().mean().item()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save(state, out / "final.pt")
        line = {"steps": config["steps"], "test_accuracy": round(correct, 4), "processes": world}
        print(json.dumps(line), flush=True)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, kept = parser.add_argument, Path("out/cluster")
    add("config", type=Path, help="JSON file of model and training, such as digits.json")
    add("--out", type=Path, default=kept, help="folder of the run (out/cluster)")
    add("--steps", type=int, help="instead of the configuration's")
    arguments = parser.parse_args()
    try:
        config = json.loads(arguments.config.read_text(encoding="utf-8"))
        if arguments.steps is not None and isinstance(config, dict):
            config["steps"] = arguments.steps
        check_config(config)
    except (OSError, ValueError, RecursionError) as error:
        parser.error(f"{arguments.config}: {error}")
    gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    place = {}
    if "RANK" not in os.environ:
        place = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("nccl" if gpu else "gloo", **place)
    train(config, arguments.out, device)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
