"""Breaks the code on purpose, one fault at a time, and sees whether the tests notice.
docs/reliability.md.

    python tools/verify/mutants.py  # every drawn fault, in a copy of the working tree
    python tools/verify/mutants.py --minutes 30  # what fits; the next run goes on
    python tools/verify/mutants.py --only functional  # of files whose path says so
    python tools/verify/mutants.py --list  # what is drawn, and what is known of it; runs nothing
    python tools/verify/mutants.py --record
        # writes the figures into docs/reliability.md; runs nothing

mutations.py finds the faults in the syntax; a seed draws of each file one for LINES_EACH lines, of
all kinds in turn. The working tree is never touched: the faults live in a copy, which is built and
tested there. One is killed when a test of its area fails, and survives when all pass; one that does
not compile is replaced by the next. To add a file, add nothing: AREAS are globs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401  for the forks
from mutations import Mutation, found_table, mutations, shuffled, sources
from reliability import ROOT, command_line, record, tree

STATE = ROOT / "out" / "mutants.json"
PYTHON = sys.executable
SEED = 0
LINES_EACH = 120  # of a file, for one fault
LEAST, MOST = 1, 6  # faults of a file
TIMEOUT = 300.0  # seconds of processor time for one test file
KILLED, SURVIVED, EQUIVALENT, INVALID = "killed", "survived", "equivalent", "does not build"


# Files, and the tests that must notice a fault in them, a row each. The first row whose pattern
# fits is a file's. For a module of dipkernels tests/test_<module>.py comes first, and tests that do
# not exist are passed over: both may move. The tests of csrc/cuda need nvcc, those of the
# integrations the tools of requirements-tools.txt: without them they are skipped, and everything
# survives.
AREAS = """
csrc/cuda/*: ptx_cuda sanitize_cuda
csrc/philox.h csrc/noise.h: noise perturb
csrc/**/activation* csrc/**/expectation*: expectation samples
csrc/**/norm* csrc/**/gate*: producers
csrc/cpu/samples* csrc/cpu/vector_math*: samples averaging
csrc/cpu/convert*: noise perturb samples
csrc/cpu/dispatch*: backends.py::TestDispatch
csrc/cpu/*: perturb noise guard_pages properties samples producers
csrc/perturb_op.cpp: cuda_glue perturb noise ops fuzz
csrc/**/*: perturb ops noise samples expectation producers fuzz
triton_kernels/perturb.py triton_kernels/noise.py: ptx_triton
triton_kernels/norm.py triton_kernels/gate.py triton_kernels/activations.py: ptx_producers
    ptx_triton
triton_kernels/linear.py: ptx_triton triton_interpreter
triton_kernels/tiles.py: ptx_triton ptx_producers
triton_kernels/expectation.py triton_kernels/mixtures.py: expectation ptx_triton
    triton_interpreter
dipkernels/reference.py: noise perturb linear expectation producers properties
dipkernels/**/seeds.py dipkernels/noise/*.py: seeds layers trajectories lifecycle faults worlds
    checkpointing keys arguments distributed
dipkernels/**/row_blocks.py dipkernels/**/expectation.py: averaging properties
dipkernels/**/functional.py: perturb linear averaging layers properties seeds worlds
    first_mistakes
dipkernels/**/norm.py dipkernels/**/gate.py dipkernels/**/producer*.py: producers producer_modules
    ops compile producer_plan producer_norms gated_products
dipkernels/**/activation*.py: producers producer_modules averaging producer_plan gated_products
dipkernels/**/attention.py: attention layers
dipkernels/**/tracing.py: tracing worlds
dipkernels/**/decay.py: user_code_variance layers
dipkernels/**/twin.py: before convert layers
dipkernels/**/sharing.py: models user_code_variance
dipkernels/nn/*.py: layers seeds inputs user_code_variance user_code_loaders faults convert
    averaging first_mistakes
dipkernels/**/dtensor.py: tensor_parallel
dipkernels/**/distributed.py: distributed tensor_parallel user_code_loaders
dipkernels/**/analytic.py: analytic
dipkernels/**/trajectories.py dipkernels/**/predict.py: trajectories objective
dipkernels/training/*.py: objective trajectories recipe
dipkernels/**/probe.py dipkernels/**/check.py: check before convert
dipkernels/**/place.py dipkernels/**/forms.py dipkernels/**/readers.py dipkernels/**/gated.py
    dipkernels/**/marks.py: producer_plan producer_norms gated_products producer_modules before
    models
dipkernels/**/convert.py dipkernels/**/convertible.py dipkernels/models/*.py: convert calibrate
    before first_mistakes recipe user_code_variance check user_code_loaders models adapters config
dipkernels/integrations/accelerate.py: integration_accelerate
dipkernels/integrations/lightning.py: integration_lightning
dipkernels/integrations/peft.py: integration_peft adapters user_code_loaders
dipkernels/integrations/transformers/*.py: integration_transformers integration_trl
    integration_deepspeed
dipkernels/integrations/*.py: integration_accelerate integration_lightning
    integration_transformers
dipkernels/ops/*.py: ops perturb linear averaging noise backends compile check
dipkernels/**/backends.py dipkernels/**/library.py dipkernels/**/gpus.py dipkernels/**/sizes.py:
    backends ops env_report wheel first_mistakes
dipkernels/**/worlds.py: compile layers tensor_parallel
dipkernels/**/*.py: layers convert
"""
# Sizes of tiles and blocks, chosen for speed: by contract they change no result. And what holds no
# code.
LEFT_OUT = (
    "triton_kernels/blocks.py",
    "dipkernels/__init__.py",
    "dipkernels/__main__.py",
    "triton_kernels/__init__.py",
)
# Drawn faults that no test can notice, by their key: (what they change, why nothing can tell).
EQUIVALENTS: dict[str, tuple[str, str]] = {
    "7f3c6b6c38": (
        "samples.cpp: how many runs of columns a thread takes at a time",
        "Every run writes elements of its own alone, so their share-out changes the speed only.",
    ),
    "cbf92af4a7": (
        "launch.h: the stride of an operand that is absent",
        "An operand with data is always given its strides, and one without is never read.",
    ),
    "db2264e6bb": (
        "torch.h: the stride of rows that are one row",
        "It multiplies the row's index, which is 0; channels are only tried where there are more.",
    ),
    "3459ddd317": (
        "norm.cpp: what is asked for ahead of the next row",
        "A prefetch changes the speed only.",
    ),
    "c480220bea": (
        "draw.h: how many lines are asked for ahead",
        "A prefetch changes the speed only.",
    ),
    "132efe5dff": (
        "expectation.cpp: a thread also takes the first tile of the next part",
        "Both compute it from the same numbers; past the last part there are no rows.",
    ),
    "5d37fa844b": (
        "forms.py: the size of the rows on which a norm's eps is seen",
        "Any size near the root of eps shows it, and 0.505 for its power is as near.",
    ),
    "44d64b0f6b": (
        "row_blocks.py: the dimension of the features of what is flat",
        "It has two dimensions, so 1 and -1 are one.",
    ),
    "521baf5800": (
        "contexts.py: 2^63 taken away in place of added, before mod 2^64",
        "They differ by 2^64.",
    ),
    "cd2dbd47e8": (
        "loose_weights.py: [1, N] is no matrix for another reason",
        "It has one dimension of a size above 1, so it was none before.",
    ),
    "e279abc937": (
        "noise.py: a difference times 0 in place of a sum times 0",
        "It is there for its shape.",
    ),
    "b771450330": (
        "tiles.py: how many processors the interpreter is said to have",
        "It shares out the work.",
    ),
    "03d1f5ae3f": (
        "dtensor.py: run_check=False left out",
        "False is torch's default.",
    ),
    "faf2418a10": (
        "seeds.py: the int64 of torch.randint left out",
        "It is torch's default.",
    ),
    "7307fa891c": (
        "variance.py: a strict zip of two lists of one length",
        "The second is made from the first.",
    ),
    "36ef7395ed": (
        "registry.py: a fake is registered without the library",
        "torch then makes a library for it, and keeps it as long as we keep ours.",
    ),
}


class Drawn(NamedTuple):
    path: str
    mutation: Mutation
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.mutation.key

    @property
    def name(self) -> str:
        return f"{self.path}:{self.mutation.line} {self.mutation.kind}: {self.mutation.text}"


def areas(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every source file with the tests of its area, those of its own name first."""
    seen = {root / name for name in LEFT_OUT}
    for row in re.split(r"\n(?! )", AREAS.strip()):
        patterns, tests = (words.split() for words in row.split(":", 1))
        for path in sources(root, patterns):
            if path not in seen and path.suffix in (".py", ".h", ".cpp", ".cu"):
                seen.add(path)
                own = (path.stem,) if path.is_relative_to(root / "dipkernels") else ()
                named = dict.fromkeys((*own, *tests))
                files = [f"tests/test_{name}" + ("" if ".py" in name else ".py") for name in named]
                yield path, tuple(name for name in files if (root / name.split("::")[0]).exists())


def draw(root: Path, seed: int, only: str = "") -> dict[str, list[Drawn]]:
    """By file, all faults in the order in which they are drawn, the file's share first."""
    found = {}
    for path, tests in areas(root):
        name = path.relative_to(root).as_posix()
        if only in name:
            found[name] = [
                Drawn(name, mutation, tests) for mutation in shuffled(mutations(path), seed)
            ]
    return {name: listed for name, listed in found.items() if listed}


def share(root: Path, name: str, lines_each: int) -> int:
    return min(
        MOST, max(LEAST, round((root / name).read_text(encoding="utf-8").count("\n") / lines_each))
    )


def wanted(root: Path, drawn: dict[str, list[Drawn]], state: dict, lines_each: int) -> list[Drawn]:
    """The share of each file, without those that are known not to build."""
    builds = {
        name: [d for d in listed if status(d, state) != INVALID] for name, listed in drawn.items()
    }
    return [d for name, listed in builds.items() for d in listed[: share(root, name, lines_each)]]


def status(drawn: Drawn, state: dict) -> str | None:
    return EQUIVALENT if drawn.key in EQUIVALENTS else state.get(drawn.key, {}).get("status")


class Copy:
    """The tree, copied to a folder of its own and built there, without optimisation to speak of:
    -O1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for name in names:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "dipkernels" / "triton_kernels").symlink_to("../triton_kernels")
        setup = folder / "setup.py"
        setup.write_text(setup.read_text().replace("-O3 -fPIC", "-O1 -fPIC"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "DIPKERNELS_CUDA": "0",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / ".hypothesis"),
        }
        where = self.python("-c", "import dipkernels; print(dipkernels.__file__)").stdout.strip()
        assert Path(where).is_relative_to(folder), f"the tests would run on {where}"

    def python(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess:
        return subprocess.run(
            [PYTHON, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def build(self) -> str | None:
        """None, or the compiler's words."""
        written = list(self.folder.glob("build/temp*/ninja"))
        if not written:
            done = self.python("setup.py", "-q", "build_ext", "--inplace")
        else:  # setup.py has written what ninja does, and would take seconds to import torch again
            ninja = shutil.which("ninja") or str(Path(PYTHON).parent / "ninja")
            done = subprocess.run(
                [ninja, "-C", str(written[0]), "-j", "2"], capture_output=True, text=True
            )
        if done.returncode:
            return (done.stdout + done.stderr)[-2000:]
        if written:
            new = next(self.folder.glob("build/lib*/dipkernels/_C.so"))
            (self.folder / "dipkernels" / "_C.so").unlink()
            shutil.copy2(new, self.folder / "dipkernels" / "_C.so")
        return None

    def test(self, names: Iterable[str], timeout: float) -> tuple[str, str]:
        """("killed" | "survived" | "error", the first failing test or the reason); in a fork, which
        has torch already."""
        output = self.folder / "output.txt"
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(timeout), int(timeout) + 5))
            os.chdir(self.folder)
            os.environ.update(self.environment)
            sys.path.insert(0, str(self.folder))
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1), os.dup2(to, 2)
            code = pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--tb=line", *names]
            )
            sys.stdout.flush()
            os._exit(int(code))
        end = time.monotonic() + 10 * timeout  # a machine may be busy: processor time tells a loop
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "killed", f"no end within {timeout:.0f} s"
            time.sleep(0.1)
        if os.WIFSIGNALED(status):
            return "killed", f"signal {os.WTERMSIG(status)}"
        code, text = os.WEXITSTATUS(status), output.read_text(errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        if code == 0:
            return "survived", ""
        return ("killed", failed.group(1)) if failed else ("error", text[-800:])


def needs_build(path: str) -> bool:
    return path.startswith("csrc/") and not path.startswith("csrc/cuda/")


def load() -> dict:
    return json.loads(STATE.read_text()) if STATE.exists() else {}


def save(state: dict) -> None:
    """Beside what another run has left meanwhile."""
    STATE.parent.mkdir(exist_ok=True)
    part = STATE.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(load() | state, indent=1) + "\n")
    part.replace(STATE)


# ---- report --------------------------------------------------------------------------------------


def report(chosen: list[Drawn], state: dict, seed: int) -> str:
    run = [d for d in chosen if status(d, state)]
    by_status = {
        what: [d for d in run if status(d, state) == what]
        for what in (KILLED, SURVIVED, EQUIVALENT, "error")
    }
    judged = len(by_status[KILLED]) + len(by_status[SURVIVED])
    commits = sorted({state[d.key]["commit"] for d in run if d.key in state})
    rate = f", {len(by_status[KILLED]) / judged:.1%} of those that could be" if judged else ""
    lines = [
        f"Seed {seed}: {len(run)} of {len(chosen)} drawn faults run (trees at "
        f"{', '.join(commits)}): {len(by_status[KILLED])} killed{rate}, "
        f"{len(by_status[SURVIVED])} survived, {len(by_status[EQUIVALENT])} equivalent, "
        f"{len(by_status['error'])} could not be run.",
        "",
    ]
    counted = [d for d in run if status(d, state) in (KILLED, SURVIVED)]

    def killed(drawn: Drawn) -> bool:
        return status(drawn, state) == KILLED

    lines += [*found_table("folder", counted, lambda d: str(Path(d.path).parent), killed), ""]
    lines += [*found_table("what was changed", counted, lambda d: d.mutation.kind, killed), ""]
    for what in (SURVIVED, EQUIVALENT, "error"):
        for d in by_status[what]:
            why = f" ({EQUIVALENTS[d.key][1]})" if what == EQUIVALENT else ""
            lines.append(
                f"- {what}, {d.mutation.kind}, {d.key}: {d.path}: `{d.mutation.text}`{why}"
            )
    return "\n".join(lines)


# ---- run -----------------------------------------------------------------------------------------


class Runner:
    """Faults, one after another, in one copy of the tree."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.state: dict = {}  # of this run
        self.stale = False  # whether the library is still that of a fault
        self.commit = tree()

    def try_one(self, drawn: Drawn) -> str:
        path = self.copy.folder / drawn.path
        before = path.read_text(encoding="utf-8")
        found, why = SURVIVED, ""
        try:
            path.write_text(drawn.mutation.applied(before), encoding="utf-8")
            if self.stale or needs_build(drawn.path):
                self.stale = needs_build(drawn.path)
                if problem := self.copy.build():
                    found, why = INVALID, problem[-300:]
            for name in drawn.tests:
                if found == SURVIVED:
                    found, why = self.copy.test([name], TIMEOUT)
        finally:
            path.write_text(before, encoding="utf-8")
        self.state[drawn.key] = {
            "name": drawn.name,
            "status": found,
            "why": why,
            "commit": self.commit,
        }
        save(self.state)
        return found

    def check_killers(self) -> None:
        """What killed a fault has to pass where nothing is broken; what does not, killed
        nothing."""
        if self.stale and self.copy.build():
            raise SystemExit("the copy no longer builds")
        killers = {
            row["why"]
            for row in self.state.values()
            if row["status"] == KILLED and "::" in row["why"]
        }
        while killers:
            found, why = self.copy.test(sorted(killers), 10 * TIMEOUT)
            if found == SURVIVED:
                break
            print(f"fails unbroken too: {why}")
            if why not in killers:
                raise SystemExit(f"the killing tests on the unbroken copy: {why}")
            killers.discard(why)
            for row in self.state.values():
                if row["why"] == why:
                    row.update(status="error", why=f"fails unbroken too: {why}")
        save(self.state)


def run(drawn: dict[str, list[Drawn]], args: argparse.Namespace) -> None:
    """Until every file's share is done, or the time is."""
    start = time.monotonic()
    again: set[str] = set()
    rank = {
        d.key: i for listed in drawn.values() for i, d in enumerate(listed)
    }  # of every file the first one first
    with tempfile.TemporaryDirectory(prefix="mutants") as temporary:
        runner = Runner(Copy(Path(temporary)))
        if problem := runner.copy.build():
            raise SystemExit(f"the unchanged copy does not build:\n{problem}")
        while True:
            state = load() | runner.state
            todo = [
                d
                for d in wanted(runner.copy.folder, drawn, state, args.lines_each)
                if status(d, state) in (None, "error", SURVIVED) and d.key not in again
            ]
            if not todo or time.monotonic() - start > 60 * args.minutes:
                if todo:
                    print(f"{len(todo)} left for the next run")
                break
            chosen = min(
                todo, key=lambda d: (rank[d.key], needs_build(d.path), status(d, state) is not None)
            )
            again.add(chosen.key)
            found = runner.try_one(chosen)
            why = " ".join(runner.state[chosen.key]["why"].split())[:90]
            print(
                f"{found:14s} {chosen.name[:170]}  [{why}] {time.monotonic() - start:.0f} s",
                flush=True,
            )
        runner.check_killers()


def main() -> int:
    parser = command_line(__doc__, "; runs nothing")
    add = parser.add_argument
    add("--minutes", type=float, default=1e9, help="stop after this long; the next run goes on")
    add("--only", default="", help="part of a file's path")
    add("--seed", type=int, default=SEED, help="draws other faults (%(default)s)")
    add(
        "--lines-each",
        type=int,
        default=LINES_EACH,
        help="lines of a file for one fault (%(default)s)",
    )
    add(
        "--list",
        action="store_true",
        help="show what is drawn and what is known of it; runs nothing",
    )
    args = parser.parse_args()
    if args.lines_each < 1:
        parser.error(f"--lines-each: expected at least 1, got {args.lines_each}")
    drawn = draw(ROOT, args.seed, args.only)
    if not drawn:
        parser.error(f"--only: expected part of a file's path, got {args.only!r}")
    if not (args.list or args.record):
        run(drawn, args)
    state = load()
    chosen = wanted(ROOT, drawn, state, args.lines_each)
    if args.list:
        for d in chosen:
            print(f"{status(d, state) or 'not run':14s} {d.key} {d.name[:170]}")
    if not args.only:
        known = {d.key for listed in drawn.values() for d in listed}
        for key in EQUIVALENTS.keys() - known:
            print(f"EQUIVALENTS: {key} is no fault of this tree any more: {EQUIVALENTS[key][0]}")
    text = report(chosen, state, args.seed)
    print(text)
    if args.record:
        record("mutants", text)
    return 0 if all(status(d, state) in (KILLED, EQUIVALENT) for d in chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
