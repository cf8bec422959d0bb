"""Every study, as its table in docs/ was made, one process for each core.

    python studies/run_all.py         writes out/studies/run_all.md: what each took
    python studies/run_all.py --list  the commands

Stopped, it goes on where it was: what has ended is not started again, and a study goes on with its
next part. Times are processor time, of all runs until it ended. docs/ stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from tables import markdown
from tqdm import tqdm

FOLDER = Path(__file__).parent
# The longest first: then the cores end at about the same time. Two of one study write into two
# folders.
COMMANDS = (
    "images.py --model vit --out out/studies/images_vit",
    "vision.py --page out/vision/results.md",
    "arithmetic.py --page out/arithmetic/results.md",
    "images.py --model cnn",
    "defaults.py",
    "extrapolation.py",
    "held_back.py",
    "held_back.py --batch-norm --out out/studies/batch_norm",
    "features.py",
    "arithmetic_paired.py",
    "uncertainty.py",
    "where_to_average.py --networks ViT --epochs 3 --out out/where_to_average_vit",
    'held_back.py --tasks mnist1d hastie "friedman 3" --methods default "start 0.3" '
    '--trainings "SGD, 3 x" "AdamW, cosine, 3 x" --out out/studies/longer',
    "depth.py",
    'attacks.py --seeds 5 --tasks "digits MLP"',
    'defaults.py --trainings AdamW --seeds 2 --tasks friedman cover "digits MLP" --methods default '
    '"fixed 0.15" "fixed 0.3" "fixed 0.6" "fixed 1" "fixed 1.5" --out out/studies/ratio',
    "where_to_average.py --networks MLP",
)


def run(command: str, log: Path) -> tuple[int, float]:
    """Its exit status, and the processor seconds of it and its children."""
    script, *options = shlex.split(command)
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, FOLDER / script, *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(child.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def run_all(commands: Sequence[str], out: Path, workers: int) -> dict[str, Any]:
    """{command: its seconds so far, and the exit status of its last run}, as out/run_all.json has
    it; runs what has not ended well yet."""
    out.mkdir(parents=True, exist_ok=True)
    store, lock = out / "run_all.json", Lock()
    state: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    missing = [c for c in commands if state.get(c, {}).get("status") != 0]
    bar = tqdm(total=len(commands), initial=len(commands) - len(missing), unit="study")

    def one(number: int, command: str) -> None:
        status, seconds = run(command, out / f"run_all_{number}.log")
        with lock:
            before = state.get(command, {}).get("seconds", 0)
            state[command] = {"seconds": before + seconds, "status": status}
            store.write_text(json.dumps(state, indent=1) + "\n")
            bar.update()

    with bar, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(one, commands.index(command), command) for command in missing]
        try:
            for job in jobs:
                job.result()
        except KeyboardInterrupt:  # the studies have it too, and end
            pool.shutdown(cancel_futures=True)
            raise
    return state


def table(commands: Sequence[str], state: dict[str, Any]) -> str:
    rows = [[f"`{c}`", f"{state[c]['seconds'] / 60:.1f}"] for c in commands]
    hours = sum(state[c]["seconds"] for c in commands) / 3600
    return markdown(["command", "minutes of one core"], rows) + f"\n\n{hours:.2f} hours of one core"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/studies"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (the cores)")
    parser.add_argument("--list", action="store_true", help="print the commands, no more")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(f"python studies/{command}" for command in COMMANDS))
        return 0
    state = run_all(COMMANDS, args.out, args.workers)
    text = table(COMMANDS, state)
    (args.out / "run_all.md").write_text(text + "\n")
    print(text)
    failed = [command for command in COMMANDS if state[command]["status"] != 0]
    for command in failed:
        print(f"failed: {command}: {args.out}/run_all_{COMMANDS.index(command)}.log")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
