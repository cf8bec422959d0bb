"""What the recipes share: workers under torchrun, precision, a training loop with checkpoints,
resume and metrics.

A step's random numbers (noise, dropout, augmentation) depend on (seed, rank, step) alone, so that a
resumed run goes on as if it had not been stopped, and a checkpoint needs no generator states: it
loads with weights_only=True.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from tqdm import tqdm

import dipkernels as dip

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = ("plain", "input", "fixed", "dip")
MAX_SEED = 2**27  # a step's own seed is this times 2^36: see Trainer.run


def checked(kind: type, wanted: str, allowed: Callable) -> Callable[[str], float]:
    """The type of a flag: a number of this kind for which allowed(number)."""

    def parse(text: str) -> float:
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {value}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


COUNT = checked(int, "at least 1", lambda n: n >= 1)
AMOUNT = checked(float, "a finite number >= 0", lambda x: 0 <= x < math.inf)
SHARE = checked(float, "a share of the steps, 0 to 1", lambda x: 0 <= x <= 1)
RATIO = checked(float, "0 to 1e15", lambda x: 0 <= x <= 1e15)
SEED = checked(int, f"0 to {MAX_SEED - 1}", lambda n: 0 <= n < MAX_SEED)


def make_parser(doc: str, data: str) -> argparse.ArgumentParser:
    """A parser that shows the recipe's docstring and has the flags of every recipe; data: which
    files --data wants."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    add, kinds = parser.add_argument, "plain; noise at the input only; fixed variance; dip (dip)"
    kept = "folder for last.pt, metrics.jsonl and results.json"
    add("--data", type=Path, required=True, help=data)
    add("--out", type=Path, required=True, help=kept)
    add("--resume", action="store_true", help="go on from OUT/last.pt")
    add("--method", choices=METHODS, default="dip", help=kinds)
    add("--init-sigma", type=AMOUNT, default=0.1, help="sigma that every variance starts at (0.1)")
    add("--calibrate", type=RATIO, help="instead: sigma over each layer's input spread, in a batch")
    add("--m", type=COUNT, default=1, help="trajectories per example (1)")
    add("--kl", type=AMOUNT, help="weight of the pull of the variances to where they start (0.4)")
    add(
        "--lambda-s", type=AMOUNT, default=0.0, help="of the variance over trajectories, m >= 2 (0)"
    )
    add("--epochs", type=COUNT, default=1, help="passes over the training set (1)")
    add("--batch", type=COUNT, default=64, help="examples in a step on each worker (64)")
    add("--accumulate", type=COUNT, default=1, help="parts that a step's batch is computed in (1)")
    add("--lr", type=AMOUNT, default=1e-4, help="learning rate after warm-up; cosine to 0 (1e-4)")
    add("--variance-lr", type=AMOUNT, help="learning rate of log_variance (10 lr)")
    add("--weight-decay", type=AMOUNT, default=0.01, help="of weight matrices (0.01)")
    add("--warmup", type=SHARE, default=0.05, help="share of the steps (0.05)")
    add("--clip", type=AMOUNT, default=1.0, help="largest norm of the gradient (1)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of matrix products (bf16)")
    add("--device", choices=("cuda", "cpu"), help="cuda, cpu (cuda where there is one)")
    add("--seed", type=SEED, default=0, help="of data order, initial weights and noise (0)")
    add("--save-every", type=COUNT, default=500, help="steps between checkpoints (500)")
    add("--log-every", type=COUNT, default=10, help="steps between lines of metrics.jsonl (10)")
    add("--stop-after", type=COUNT, help="stop after this many steps in all, with a checkpoint")
    return parser


@contextlib.contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What is wrong with a file that a flag names is said in a line, as what is wrong with the flag
    is."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if not str(error).startswith("--"):
            raise
        parser.error(str(error))


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and folders that are none."""
    if args.method in ("fixed", "dip") and not 1e-15 < args.init_sigma < 1e15:
        parser.error(
            f"--init-sigma: expected 1e-15 to 1e15 with --method {args.method}, got "
            f"{args.init_sigma}"
        )
    if args.batch % args.accumulate:
        parser.error(
            f"--accumulate: expected a divisor of --batch {args.batch}, got {args.accumulate}"
        )
    if args.lambda_s > 0 and args.m < 2:
        parser.error(
            f"--lambda-s: expected 0 with --m 1 (a variance needs m >= 2), got {args.lambda_s}"
        )
    if args.method != "dip" and (args.kl is not None or args.variance_lr is not None):
        parser.error(
            f"--kl, --variance-lr: expected with --method dip only, got --method {args.method}"
        )
    if not args.data.is_dir():
        parser.error(f"--data: expected a folder, got {args.data}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {args.out}")
    if args.resume and not (args.out / "last.pt").exists():
        parser.error(f"--resume: expected {args.out / 'last.pt'}, found none")


# ---- workers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """One process: alone, or one of `torchrun --nproc-per-node N`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over the workers."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()


@contextlib.contextmanager
def workers(device: str | None) -> Iterator[Worker]:
    """This process's place, from torchrun's environment; the process group lives as long as the
    context."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "--device: expected a device of this machine, got cuda, which torch does not find here"
        )
    if "RANK" not in os.environ:
        yield Worker(0, 1, torch.device(kind))
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Worker(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


# ---- the method ----------------------------------------------------------------------------------


class InputNoise:
    """Noise of one fixed sigma on what a module returns, in training mode: randomised smoothing at
    the input."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return torch.add(out, torch.randn_like(out), alpha=self.sigma) if module.training else None


def apply_method(
    model: nn.Module, entry: nn.Module, args: argparse.Namespace, batch: dict | None, **kwargs
) -> None:
    """Give the model its noise: --method, --init-sigma, --calibrate. entry: whose output counts as
    the input."""
    if args.method == "input":
        entry.register_forward_hook(InputNoise(args.init_sigma))
    if args.method not in ("fixed", "dip"):
        return
    dip.convert(model, args.init_sigma**2, **kwargs)
    if args.calibrate:
        dip.calibrate(model, [batch], ratio=args.calibrate)
    if args.method == "fixed":
        for module in model.modules():
            if isinstance(module, dip.Variance):
                module.requires_grad_(False)


# ---- training ------------------------------------------------------------------------------------


class Trainer:
    """Steps, checkpoints and metrics of one model.

    run(batch_of, loss_of) takes a step for loss_of(model, batch_of(indices)), this worker's mean
    loss.
    """

    def __init__(
        self,
        model: nn.Module,
        worker: Worker,
        args: argparse.Namespace,
        num_examples: int,
        settings: dict,
    ) -> None:
        self.raw, self.worker, self.args, self.num_examples = model, worker, args, num_examples
        # what a checkpoint must agree with
        shared = {name: getattr(args, name) for name in ("method", "batch", "seed", "epochs", "m")}
        self.settings = {**shared, "workers": worker.size, **settings}
        rates = {"weight_decay": args.weight_decay, "variance_lr": args.variance_lr}
        self.optimizer = torch.optim.AdamW(dip.param_groups(model, args.lr, **rates))
        self.steps_per_epoch = num_examples // (args.batch * worker.size)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"--batch: expected at most {num_examples // worker.size} (examples / workers), "
                f"got {args.batch}"
            )
        self.num_steps = self.steps_per_epoch * args.epochs
        warmup = max(1, round(args.warmup * self.num_steps))
        up = lr_scheduler.LinearLR(self.optimizer, 1 / warmup, total_iters=warmup)
        down = lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, self.num_steps - warmup))
        self.schedule = lr_scheduler.SequentialLR(self.optimizer, [up, down], [warmup])
        self.scaler = torch.amp.GradScaler(worker.device.type, enabled=args.precision == "fp16")
        self.step = 0
        if args.resume:
            self.load(args.out / "last.pt")
        ids = [worker.device.index] if worker.device.type == "cuda" else None
        self.model = DistributedDataParallel(model, device_ids=ids) if worker.size > 1 else model

    def autocast(self):
        kind = PRECISIONS[self.args.precision]
        return torch.autocast(self.worker.device.type, kind, enabled=kind is not torch.float32)

    def indices(self, step: int) -> Tensor:
        """This worker's examples of a step: every epoch shuffles anew, every worker takes its
        share."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.args.seed * 100003 + epoch)
        order = torch.randperm(self.num_examples, generator=generator)
        start = (place * self.worker.size + self.worker.rank) * self.args.batch
        return order[start : start + self.args.batch]

    def run(
        self, batch_of: Callable[[Tensor], object], loss_of: Callable[[nn.Module, object], Tensor]
    ) -> bool:
        """Train to the end, or to --stop-after; true when the end was reached."""
        args, worker = self.args, self.worker
        args.out.mkdir(parents=True, exist_ok=True)
        last = min(self.num_steps, args.stop_after or self.num_steps)
        start, first, losses = time.perf_counter(), self.step, []
        shown = {"unit": "step", "disable": not worker.is_first, "dynamic_ncols": True}
        with tqdm(total=self.num_steps, initial=first, **shown) as bar:
            while self.step < last:
                torch.manual_seed((args.seed * 1_000_003 + self.step) * 65_537 + worker.rank)
                losses.append(self.one_step(batch_of, loss_of))
                self.step += 1
                bar.update()
                if self.step % args.log_every == 0 or self.step == last:
                    seen = (self.step - first) * args.batch * worker.size
                    self.log(sum(losses) / len(losses), seen / (time.perf_counter() - start))
                    losses.clear()
                if self.step % args.save_every == 0 or self.step == last:
                    self.save(args.out / "last.pt")
        return self.step == self.num_steps

    def one_step(self, batch_of, loss_of) -> float:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.indices(self.step).chunk(self.args.accumulate)
        mean = 0.0
        for number, part in enumerate(parts):
            waits = self.worker.size > 1 and number < len(parts) - 1
            with self.model.no_sync() if waits else contextlib.nullcontext():
                with self.autocast():
                    loss = loss_of(self.model, batch_of(part))
                    if self.args.method == "dip":
                        weight = {} if self.args.kl is None else {"kl": self.args.kl}
                        loss = loss + dip.kl_penalty(self.raw, **weight)
                    loss = loss / len(parts)
                self.scaler.scale(loss).backward()
            mean += loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(
            [p for p in self.raw.parameters() if p.grad is not None], self.args.clip
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        mean = float(mean)
        if not mean < float("inf"):
            raise RuntimeError(f"loss: expected a finite number, got {mean} at step {self.step}")
        return mean

    def log(self, loss: float, speed: float) -> None:
        loss = self.worker.total(loss)[0] / self.worker.size
        if not self.worker.is_first:
            return
        line = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "loss": round(loss, 5),
            "lr": self.optimizer.param_groups[0]["lr"],
            "examples_per_second": round(speed, 2),
        }
        if any(isinstance(module, dip.Variance) for module in self.raw.modules()):
            try:
                rows = dip.summary(self.raw)
            except ValueError as error:
                raise RuntimeError(
                    "--lr, --variance-lr: expected rates that leave the variances finite, got "
                    f"{self.args.lr} and {self.args.variance_lr} ({error})"
                ) from error
            line["sigma"] = {row.name: round(row.sigma_mean, 5) for row in rows}
        with (self.args.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- checkpoints: what learns, and where its optimiser stands ----

    def content(self) -> dict:
        learning = {name for name, p in self.raw.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in self.raw.named_buffers()}
        whole = self.raw.state_dict()
        return {
            "settings": self.settings,
            "step": self.step,
            "model": {k: v for k, v in whole.items() if k in learning or k in buffers},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def save(self, path: Path) -> None:
        if not self.worker.is_first:
            return
        part = path.with_suffix(".part")
        try:
            torch.save(self.content(), part)
            part.replace(path)
        except BaseException as error:  # the last checkpoint stays, half a one does not
            part.unlink(missing_ok=True)
            if isinstance(error, (OSError, RuntimeError)):
                raise OSError(
                    f"{path}: could not be written, a full disk? What was there stays: {error}"
                ) from error
            raise

    def read(self, path: Path) -> dict:
        expected = f"--resume: expected a checkpoint of this recipe in {path}"
        try:
            content = torch.load(path, map_location=self.worker.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{expected}, got a file that cannot be read: {error}") from error
        whole = isinstance(content, dict) and content.keys() == self.content().keys()
        if not whole or not isinstance(content["settings"], dict):
            raise ValueError(
                f"{expected}, got something else: a damaged file, or another program's"
            )
        return content

    def load(self, path: Path) -> None:
        content = self.read(path)
        then = content["settings"]
        differing = [k for k, v in self.settings.items() if _difference(v, then.get(k))]
        if differing:
            told = ", ".join(
                f"{k} {self.settings[k]!r} against {_kind(then.get(k))}" for k in differing
            )
            raise ValueError(
                f"--resume: expected the settings that {path} was made with, got {told}"
            )
        if differs := self.difference(content):
            raise ValueError(
                f"--resume: expected this model's checkpoint in {path}, got another, or a damaged "
                f"one: {differs}"
            )
        self.raw.load_state_dict(content["model"], strict=False)
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]

    def difference(self, content: dict) -> str | None:
        """Where the content is not built as this trainer's own, before anything of it is taken
        over; None where it is."""
        own = self.content()
        optimizer = content["optimizer"]
        state = optimizer.get("state") if isinstance(optimizer, dict) else None
        # of the parameters that had a gradient; ours is empty before the first step
        if isinstance(state, dict):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            own["optimizer"]["state"] = {
                i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
                for i, p in enumerate(parameters)
                if i in state
            }
        differs = _difference(own, content)
        if differs is None and not 0 <= content["step"] <= self.num_steps:
            differs = f"step: expected 0 to {self.num_steps}, got {content['step']}"
        return differs


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"keys {list(value)}"[:200] if isinstance(value, dict) else f"{value!r}"[:200]


# Of a checkpoint's numbers, those that a step moves; the others follow from the flags.
MOVING = {"step", "lr", "_last_lr", "last_epoch", "_step_count", "_get_lr_called_within_step"}
MOVING |= {"scale", "_growth_tracker"}


def _difference(own: object, other: object, where: str = "", moves: bool = False) -> str | None:
    """The first place where two nests of dicts, lists, tensors and numbers are not of one run; None
    where there is none."""
    pairs = []
    if isinstance(own, Tensor):
        alike = isinstance(other, Tensor) and (own.dtype, own.shape) == (other.dtype, other.shape)
        alike = alike and other.layout is torch.strided
    elif type(own) is not type(other):
        alike = False
    elif isinstance(own, dict):
        alike = own.keys() == other.keys()
        pairs = [(own[k], other.get(k), f"{where}.{k}".lstrip("."), k in MOVING) for k in own]
    elif isinstance(own, (list, tuple)):
        alike = len(own) == len(other)
        pairs = [(a, b, f"{where}[{i}]", moves) for i, (a, b) in enumerate(zip(own, other))]
    else:
        alike = abs(other) < 2**53 if moves else own == other
    if not alike:
        return f"{where}: expected {_kind(own)}, got {_kind(other)}"
    return next((found for pair in pairs if (found := _difference(*pair))), None)


def write_results(worker: Worker, args: argparse.Namespace, results: dict) -> None:
    if worker.is_first:
        content = {"environment": dip.env_report(), "workers": worker.size, "flags": vars(args)}
        text = json.dumps(content | results, indent=1, default=str) + "\n"
        (args.out / "results.json").write_text(text, encoding="utf-8")
        print(json.dumps(results, indent=1))
