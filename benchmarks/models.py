"""Training steps of whole models over the plain model's:

    python benchmarks/models.py [--docs] [--clock processor]
    python benchmarks/models.py --compiled [--docs]

Forward, loss, backward and AdamW, in turns within one process. Noise in front of every layer
("dip"), in the norm or activation that makes a layer's input where that can be ("dip, producer":
convert(place="producer")), and by the eager one-liner, also under torch.compile ("eager",
"eager, compiled"). --compiled: all of them, the plain model too, under torch.compile, which gets a
block that repeats once. --clock processor: one thread, and the time that it ran, for a machine that
is never quiet.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import machine
import networks
import peers
import report
import timing
import torch
import torch.nn.functional as F
from networks import Network
from torch import nn

import dipkernels as dip

VARIANTS = ("linear", "dip", "dip, producer", "eager", "eager, compiled")
COMPILED = tuple(f"{name}, compiled" for name in VARIANTS[:4])


CASES, QUICK = networks.MODELS["cpu"], networks.MODELS["quick"]


def build(variant: str, plain: nn.Module, x: torch.Tensor) -> nn.Module:
    """The model of a variant; the plain one is left as it is."""
    if not variant.startswith("dip, producer"):
        return peers.build(variant, plain)
    model = copy.deepcopy(plain).train()
    dip.convert(model, init_variance=peers.VARIANCE, place="producer", batches=[x])
    return peers.compiled_in_place(model) if variant.endswith(", compiled") else model


def inputs_of(
    case: Network, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The plain model, a batch of random inputs and its targets."""
    plain = case.make().to(device, dtype)
    x = torch.randn(case.shape, device=device).to(dtype)
    if case.classes is None:
        return plain, x, torch.randn_like(x)
    return plain, x, torch.randint(case.classes, case.shape[:1], device=device)


def step_of(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """One training step of the model on this batch; every variant's parameters decay alike, not at
    all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> None:
        y = model(x)
        loss = (
            F.mse_loss(y, target)
            if target.is_floating_point()
            else F.cross_entropy(y.float(), target)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    cases: list[Network],
    dtypes: list[torch.dtype],
    variants: tuple[str, ...],
    rounds: int,
    clock: str,
) -> list[dict]:
    """A row per model, dtype and variant; ratios are over the first variant."""
    from tqdm import tqdm  # the models are gpu_check's too, which asks for less

    rows, device = [], torch.device("cpu")
    with tqdm(total=len(cases) * len(dtypes), unit="model", dynamic_ncols=True) as bar:
        for dtype in dtypes:
            for case in cases:
                torch.manual_seed(0)
                plain, x, target = inputs_of(case, dtype)
                steps = {name: step_of(build(name, plain, x), x, target) for name in variants}
                timed = timing.interleave(
                    steps,
                    variants[0],
                    device,
                    budget_s=1e9,
                    rounds=(rounds, rounds),
                    always=variants,
                    clock=clock,
                )
                peers.forget_compiled()
                label = {
                    "model": case.name,
                    "shape": list(case.shape),
                    "dtype": str(dtype).removeprefix("torch."),
                }
                rows += [label | {"variant": name} | figures for name, figures in timed.items()]
                bar.update()
    return rows


def table(rows: list[dict]) -> str:
    """Ratios to the plain model's step, with quartiles."""
    plain, *others = dict.fromkeys(row["variant"] for row in rows)
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["model"], tuple(row["shape"]), row["dtype"]), {})[row["variant"]] = (
            row
        )
    lines = []
    for (name, shape, dtype), of in found.items():
        lines.append(
            [
                f"{name}, batch {shape[0]}",
                dtype,
                report.duration(of[plain]["seconds"]),
                *(report.ratio(of[v], spread=True) for v in others),
            ]
        )
    return report.table(["training step", "", plain.replace("linear", "plain"), *others], lines)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = report.command_line(__doc__, "models")
    parser.add_argument("--rounds", type=report.at_least(2), default=9, help="at least 2 (9)")
    parser.add_argument("--clock", default="wall", choices=timing.CLOCKS)
    parser.add_argument("--compiled", action="store_true", help="all under torch.compile")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16")
    )
    parser.add_argument("--only", default="", help="models whose name holds this")
    args = parser.parse_args(arguments)
    cases = [case for case in (QUICK if args.quick else CASES) if args.only in case.name]
    if not cases:
        parser.error(
            f"--only: expected a part of one of {sorted({case.name for case in CASES})}, got "
            f"{args.only!r}"
        )
    report.refuse_part(parser, args, "only", "dtypes", part=args.rounds < 5)
    torch.set_num_threads(args.threads if args.clock == "wall" else 1)
    program = "models-compiled" if args.compiled else "models"
    found, pages, place = machine.describe("cpu"), [], ""
    if args.docs:
        place = f"{program}-{machine.kind_of(found)}-{found['instruction_set'].lower()}"
        candidates = (report.page_of(found), machine.ROOT / "README.md")
        pages = [page for page in candidates if report.has_place(page, place)]
        if not pages:
            parser.error(
                "--docs: expected a place for this kind of processor in "
                f"docs/{report.page_of(found).name}, <!-- {place}:begin --> and {place}:end, "
                "found none"
            )
    start = time.perf_counter()
    dtypes = [getattr(torch, name) for name in args.dtypes]
    variants = COMPILED if args.compiled else VARIANTS
    rows = measure(cases, dtypes, variants, args.rounds, args.clock)
    took = time.perf_counter() - start
    text = (
        f"{machine.sentence(found)}. `python benchmarks/models.py{' --compiled' * args.compiled}`, "
        f"{args.rounds} rounds, {took:.0f} s: {args.clock} time over the plain model's, with "
        f"quartiles.\n\n{table(rows)}"
    )
    run = {"machine": found, "seconds": took, "quick": args.quick or args.rounds < 5, "rows": rows}
    report.publish(program, run, text, args, pages, place)
    return rows


if __name__ == "__main__":
    machine.restart_in_place()
    main()
