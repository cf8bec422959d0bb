"""The contract's raw words through dieharder, a standard battery of tests of random numbers.
docs/reliability.md.

    apt-get install dieharder
    python tools/verify/battery.py --minutes 10
        # what fits; every stream gets its share of the time
    python tools/verify/battery.py --record  # the same, and the figures go to docs/reliability.md

Streams: the words of one draw, row by row; and eight draws mixed word by word, which differ in the
layer, in the sample, in the step (keys one apart) or in the row (2^32 apart): correlated draws fail
there though each is good alone. dieharder calls a p-value below 1e-6 (or above 1 - 1e-6) FAILED and
below 0.005 WEAK; of good words one test in a hundred is WEAK.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from reliability import ROOT, command_line, record

STREAMS = ("layer", "layers", "samples", "steps", "rows")
# dieharder's numbers; those in doubt upstream (5, 6, 7, 14: OPSO, OQSO, DNA, sums) left out.
QUICK = (100, 101, 15, 0, 2, 3, *range(8, 14), 16, 17)
TESTS = (*QUICK, 1, 4, 102, *range(200, 203), *range(204, 210))


def build(folder: Path) -> Path:
    program = folder / "battery_words"
    source = ROOT / "tools" / "verify" / "battery_words.cpp"
    subprocess.run(
        ["g++", "-std=c++17", "-O3", "-ffp-contract=off", str(source), "-o", str(program)],
        check=True,
    )
    return program


def run_test(
    program: Path, folder: Path, stream: str, number: int, seconds: float
) -> tuple[list[tuple[str, float, str]], int] | None:
    """[(name, p, verdict)] and the bytes that went out; None where the time was up."""
    count = folder / "bytes"
    words = subprocess.Popen([str(program), stream, str(count)], stdout=subprocess.PIPE)
    command = ["dieharder", "-g", "200", "-d", str(number)]
    test = subprocess.Popen(command, stdin=words.stdout, stdout=subprocess.PIPE, text=True)
    words.stdout.close()
    try:
        text = test.communicate(timeout=seconds)[0]
        done = True
    except subprocess.TimeoutExpired:
        test.kill()
        test.communicate()
        done = False
    words.wait()
    if not done:
        return None
    found = re.findall(
        r"^\s*(\w+)\|\s*(\d+)\|\s*\d+\|\s*\d+\|([\d.]+)\|\s*(PASSED|WEAK|FAILED)",
        text,
        re.MULTILINE,
    )
    if not found:
        raise RuntimeError(
            f"dieharder -d {number}: expected a line with a verdict, got {text[-500:]!r}"
        )
    return [(f"{name} {n}", float(p), verdict) for name, n, p, verdict in found], int(
        count.read_text()
    )


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="time box (10)")
    args = parser.parse_args()
    if shutil.which("dieharder") is None:
        raise SystemExit("dieharder: expected on the PATH, found none: apt-get install dieharder")
    version = subprocess.run(["dieharder", "-l"], capture_output=True, text=True).stdout
    version = re.search(r"version ([\d.]+)", version)
    rows, weak, failed = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = build(folder)
        for stream in STREAMS:
            end = time.monotonic() + 60 * args.minutes / len(STREAMS)
            tests = verdicts = 0
            total, skipped = 0, []
            for number in TESTS:
                left = end - time.monotonic()
                result = run_test(program, folder, stream, number, left) if left > 0 else None
                if result is None:
                    skipped.append(number)
                    continue
                lines, sent = result
                tests, verdicts, total = tests + 1, verdicts + len(lines), total + sent
                for name, p, verdict in lines:
                    print(f"{stream:8s} {name:28s} p = {p:.6f} {verdict}", flush=True)
                    if verdict != "PASSED":
                        (weak if verdict == "WEAK" else failed).append(
                            f"{stream} {name}, p = {p:.6f}"
                        )
            rows.append((stream, tests, verdicts, total, len(skipped)))
            print(
                f"{stream}: {verdicts} p-values, {total / 2**30:.2f} GiB of words, {len(skipped)} "
                "tests past the time"
            )
    lines = [
        f"dieharder {version.group(1) if version else ''}, {args.minutes:g} minutes: "
        f"{sum(r[2] for r in rows)} p-values, {sum(r[3] for r in rows) / 2**30:.2f} GiB of words: "
        f"{len(failed)} FAILED, {len(weak)} WEAK.",
        "",
        "| words of | tests | p-values | bytes | tests that did not fit |",
        "|---|---|---|---|---|",
        *(f"| {s} | {t} | {v} | {b:,} | {k} |" for s, t, v, b, k in rows),
        *(f"\nFAILED: {name}" for name in failed),
        *(f"\nWEAK: {name}" for name in weak),
    ]
    print("\n".join(lines))
    if args.record:
        record("battery", "\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
