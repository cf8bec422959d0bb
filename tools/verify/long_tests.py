"""The slow tests of the promises, file by file.  docs/reliability.md.

python tools/verify/long_tests.py                    # all of them
python tools/verify/long_tests.py --only properties  # of files whose path says so
python tools/verify/long_tests.py --record
    # runs nothing: the last results, kept in out/, go to docs/reliability.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from reliability import ROOT, command_line, record

STATE = ROOT / "out" / "long_tests.json"
FILES = {
    "tests/test_properties.py": "20,000 cases against the reference: 15,000 of perturb "
    "and its sums, 2,500 windows, 2,500 layers",
    "tests/test_fuzz.py": "40,000 calls of operations with any arguments; 223 values of each "
    "environment variable",
    "tests/test_fuzz_examples.py": "2,000 damaged checkpoints of recipes, 666 of the cluster "
    "example, 10,000 configurations, 10,000 lists of flags, 6,000 data files of each recipe",
    "tests/test_lifecycle.py": "spawned DataLoader workers",
    "tests/test_cluster_example.py": "workers killed under torchrun",
}


def main() -> int:
    parser = command_line(__doc__, "; runs nothing")
    parser.add_argument("--only", default="", help="part of a file's name")
    args = parser.parse_args()
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    for name in FILES if not args.record else ():
        if args.only not in name:
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "--durations=0", name]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        lines = done.stdout.strip().splitlines()
        print("\n".join(lines[-40:] if done.returncode else lines[-1:]), flush=True)
        state[name] = lines[-1].strip("= ") if lines else done.stderr[-200:]
        STATE.parent.mkdir(exist_ok=True)
        STATE.write_text(json.dumps(state, indent=1) + "\n")
    if args.record:
        rows = [
            f"| {name} | {what} | {state.get(name, 'not run yet')} |"
            for name, what in FILES.items()
        ]
        record(
            "long tests",
            "\n".join(["| file | what its slow tests do | the last run |", "|---|---|---|", *rows]),
        )
    return (
        0
        if all(
            " failed" not in state.get(name, "") and "error" not in state.get(name, "")
            for name in FILES
        )
        else 1
    )


if __name__ == "__main__":
    raise SystemExit(main())
