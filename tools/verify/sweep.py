"""Converts a small model of every architecture of transformers, in both places, and checks what
docs/models.md promises of all models.

    make sweep  # every type of model that transformers knows, tens of minutes
    python tools/verify/sweep.py --only llama  # types whose name says so
    python tools/verify/sweep.py --minutes 10  # what fits; the next run goes on
    python tools/verify/sweep.py --record  # writes the figures into docs/models.md; runs nothing

Each type runs in a fork with a time limit, so a crash or a hang is a row in out/sweep.jsonl and not
the end. small_models.py builds the first class of the type that it can; what it cannot is counted,
with the reason in its row. A type that was done on this commit is not run again.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import torch
import transformers
from reliability import ROOT, command_line, record, tree
from small_models import NotBuilt, build, classes, run
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

ROWS = ROOT / "out" / "sweep.jsonl"
PLACES = ("input", "producer")
GOOD = ("passed", "not built", "refused")
REFUSED = "convert refuses it"
SECONDS = 45  # for one type

# ---- checks --------------------------------------------------------------------------------------


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """To the bit; NaN equals NaN."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b)
    )


def learn(model: nn.Module, batch: dict[str, Any]) -> None:
    """The backward pass of a loss that has a random weight for each output."""
    outs = [out for out in run(model, batch) if out.requires_grad]
    sum((out.float() * torch.randn(out.shape)).mean() for out in outs).backward()


def check_place(
    plain: nn.Module, batch: dict[str, Any], place: str
) -> tuple[list[str], dict[str, int]]:
    """The faults of a converted copy, and what the table counts.

    What the plain model does not do itself (repeat to the bit, train) is not asked of the copy.
    """
    faults: list[str] = []
    model = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dip.DIPConversionWarning)
        try:
            dip.convert(model, place=place, batches=[batch] if place == "producer" else None)
        except ValueError as problem:
            return [f"{REFUSED}: {str(problem).split(';')[0]}"[:200]], {}
    with torch.no_grad():
        before = run(plain.eval(), batch)
        if same(before, run(plain, batch)) and not same(before, run(model.eval(), batch)):
            faults.append("the eval output is not the plain model's")
    try:
        with torch.no_grad():
            trained = run(plain.train(), batch)
            repeats = same(trained, run(plain, batch))
            steady = same(trained, run(plain, batch, seed=1))
        learn(plain, batch)
        slopes = [p.grad for p in plain.parameters() if p.grad is not None]
        trains = all(bool(slope.isfinite().all()) for slope in slopes)
    except Exception:  # by its own class: it has no training pass, or no gradient
        trains = False
    if trains:
        model.train()
        with torch.no_grad():
            with dip.noise_off():
                if repeats and not same(trained, run(model, batch)):
                    faults.append("without noise the training pass is not the plain model's")
            if same(run(model, batch), run(model, batch, seed=1)):
                faults.append("two noisy passes are equal")
            with dip.fixed_noise(key=7):
                first = run(model, batch)
            with dip.fixed_noise(key=7):
                if steady and not same(first, run(model, batch, seed=1)):
                    faults.append("fixed_noise does not repeat")
        learn(model, batch)
        # its own step may route tokens to other experts
        named = dip.check(model, strict=False).faults | dip.check(model, batch, strict=False).faults
        for name, layer in dip_layers(model).items():
            slope = layer.log_variance.grad
            if name not in named and (slope is None or not slope.isfinite().all()):
                faults.append(f"{name}: no finite gradient, and check does not name it")
    facts = {"trains": int(trains)}
    if plan := dip.summary(model).plan:
        for key, lines in (("moved", plan.moved), ("left", plan.left)):
            facts[key] = sum(len(line.layers) for line in lines)
    model.load_state_dict(plain.state_dict())  # training changes statistics
    dip.to_plain(model)
    if list(model.state_dict()) != list(plain.state_dict()):
        faults.append("to_plain does not give the plain state dict")
    with torch.no_grad():
        after = run(plain.eval(), batch)
        if same(after, run(plain, batch)) and not same(after, run(model.eval(), batch)):
            faults.append("after to_plain the output is not the plain model's")
    return faults, facts


def examine(kind: str) -> Iterator[dict[str, Any]]:
    """Build and check one type: its row; before it, one for a process that ends in the checks."""
    try:
        model, batch = build(kind)
    except NotBuilt as problem:
        yield {"status": "not built", "why": str(problem)}
        return
    row: dict[str, Any] = {"class": type(model).__name__}
    yield {**row, "status": "fault", "faults": []}
    faults = []
    for place in PLACES:
        try:
            found, facts = check_place(model, batch, place)
            row |= facts
        except Exception as problem:
            found = [f"{type(problem).__name__}: {problem}"[:300]]
        faults += [f"{place}: {fault}" for fault in found]
    other = [fault for fault in faults if REFUSED not in fault]
    status = "fault" if other else "refused" if faults else "passed"
    yield {**row, "status": status, "faults": faults}


# ---- run -----------------------------------------------------------------------------------------


def load() -> dict[str, dict[str, Any]]:
    """The rows by type, of each the last."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {row["type"]: row for row in map(json.loads, lines)}


def start(kind: str) -> tuple[int, IO[str]]:
    """Examine a type in a fork: its process, and the file that will hold its rows."""
    out = tempfile.TemporaryFile("w+")  # noqa: SIM115
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
            signal.alarm(SECONDS)
            for row in examine(kind):
                print(json.dumps(row), file=out, flush=True)
            code = 0
        finally:
            os._exit(code)
    return child, out


def finish(kind: str, out: IO[str], status: int) -> dict[str, Any]:
    """The row of a process that has ended, which may have ended in the middle."""
    out.seek(0)
    lines = out.read().splitlines()
    row = json.loads(lines[-1]) if lines else {"status": "not built", "why": ""}
    if status:
        code = os.waitstatus_to_exitcode(status)
        why = "out of time" if code == -signal.SIGALRM else f"its process ended with {code}"
        row |= {"faults": [why]} if row["status"] == "fault" else {"why": why}
    return {"type": kind, **row}


def sweep(kinds: list[str], jobs: int, minutes: float, commit: str) -> None:
    """Until every type is done, or the time is."""
    end = time.monotonic() + 60 * minutes
    todo, running = kinds[::-1], {}
    while running or todo:
        while todo and len(running) < jobs and time.monotonic() < end:
            kind = todo.pop()
            child, out = start(kind)
            running[child] = kind, out
        if not running:
            print(f"{len(todo)} left for the next run")
            break
        child, status = os.wait()
        row = finish(*running.pop(child), status)
        with ROWS.open("a") as file:
            print(json.dumps({**row, "commit": commit}), file=file)
        said = row.get("why") or "; ".join(row["faults"])
        print(f"{row['status']:9s} {row['type']:30s} {said[:100]}", flush=True)


def report(kinds: list[str], rows: dict[str, dict[str, Any]]) -> str:
    """The table, and a line for whatever did not pass."""
    done = [rows[kind] for kind in kinds if kind in rows]
    counts = Counter(row["status"] for row in done)
    sums = {key: sum(row.get(key, 0) for row in done) for key in ("trains", "moved", "left")}
    lines = [
        "| package | types | run | built | and train | passed in both places | projections moved |",
        "|---|---|---|---|---|---|---|",
        f"| transformers {transformers.__version__} | {len(kinds)} | {len(done)} | "
        f"{len(done) - counts['not built']} | {sums['trains']} | {counts['passed']} | "
        f"{sums['moved']} of {sums['moved'] + sums['left']} |",
    ]
    faults = [(row["type"], fault) for row in done for fault in row.get("faults", ())]
    said = "\n".join(f"- {kind}, {fault}" for kind, fault in faults)
    trees = ", ".join(sorted({row["commit"] for row in done}))
    return "\n\n".join(filter(None, ("\n".join(lines), said, f"Trees at {trees}.")))


def main() -> int:
    parser = command_line(__doc__, "; runs nothing", page="docs/models.md")
    add = parser.add_argument
    add("--only", default="", help="part of a type's name")
    add("--jobs", type=int, default=2, help="processes (%(default)s)")
    add("--minutes", type=float, default=1e9, help="stop after this long; the next run goes on")
    args = parser.parse_args()
    kinds = [k for k in sorted(CONFIG_MAPPING_NAMES) if args.only in k and classes(k)]
    if not kinds:
        parser.error(f"--only: expected part of a type's name, got {args.only!r}")
    commit, rows = tree(), load()
    if not args.record:
        ROWS.parent.mkdir(exist_ok=True)
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        todo = [k for k in kinds if rows.get(k, {}).get("commit") != commit]
        sweep(todo, args.jobs, args.minutes, commit)
        rows = load()
    text = report(kinds, rows)
    print(text)
    if args.record:
        record("sweep", text, page="docs/models.md")
    return 0 if all(rows.get(k, {}).get("status") in GOOD for k in kinds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
