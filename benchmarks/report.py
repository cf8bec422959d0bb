"""Writing what was measured: tables, the marked places in documents, runs and records, comparison
with an earlier run."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from machine import ROOT, kind_of

MEASURED = ROOT / "docs" / "measured.md"
RUNS = ROOT / "out" / "benchmarks"  # whole runs; git ignores them
# what summary.py makes of them, one file a release and kind of machine
RECORDS = ROOT / "benchmarks" / "results"


def at_least(least: float) -> Callable[[str], float]:
    """A flag's number, whole where `least` is."""

    def number(text: str) -> float:
        if (value := type(least)(text)) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def stored_run(text: str) -> Path:
    """A flag's file."""
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"expected a stored run, found no file {path}")
    return path


def command_line(doc: str, program: str, device: str = "cpu") -> argparse.ArgumentParser:
    """The options that programs share: --threads, --quick, --out and --docs."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--threads", type=at_least(1), default=2, help="torch's threads (2)")
    add("--quick", action="store_true", help="tiny sizes, whose figures mean nothing: does it run?")
    where = f"out/benchmarks/{program}-{device}-<date>.json"
    add("--out", type=Path, help=f"where to write ({where})")
    add("--docs", action="store_true", help="write tables and plots into the documents")
    return parser


def refuse_part(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *choices: str, part: bool = False
) -> None:
    """No --docs of a quick run, of one where any of these options chose what to measure, or of one
    that is a part for another reason."""
    chosen = any(getattr(args, name) != parser.get_default(name) for name in choices)
    if args.docs and (args.quick or chosen or part):
        parser.error(
            "--docs: expected a full run of at least 5 rounds, whose figures mean something"
        )


def publish(
    program: str,
    run: dict,
    text: str,
    args: argparse.Namespace,
    pages: Sequence[Path] | None = None,
    place: str = "",
) -> None:
    """Print what a program found, store its run, and with --docs fill its place in the pages: by
    default in that of the machine's kind."""
    print(text)
    store(program, {"quick": args.quick, **run}, args.out)
    if not args.docs:
        return
    for page in (page_of(run["machine"]),) if pages is None else pages:
        fill(page, place or program, text)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown, columns aligned so that it reads in a terminal too."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def fill(path: Path, name: str, text: str) -> None:
    """Put text between the lines `<!-- name:begin -->` and `<!-- name:end -->` of a document.

    Raises ValueError where it does not have both, once and in this order.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    document = path.read_text()
    if (
        document.count(begin) != 1
        or document.count(end) != 1
        or document.index(begin) > document.index(end)
    ):
        raise ValueError(f"{path.name}: expected one line {begin.strip()!r}, and {end!r} after it")
    before, rest = document.split(begin)
    path.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{rest.split(end)[1]}")


def page_of(found: dict) -> Path:
    """Where the tables of a machine stand: docs/measured_<kind>.md, or for a kind without a page of
    its own docs/measured.md."""
    own = MEASURED.with_name(f"measured_{kind_of(found)}.md")
    return own if own.exists() else MEASURED


def has_place(path: Path, name: str) -> bool:
    return path.exists() and f"<!-- {name}:begin -->" in path.read_text()


def store(program: str, run: dict, path: Path | None) -> Path:
    """As JSON in out/benchmarks/<program>-<device>-<date and time>.json, or at path."""
    if path is None:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
        path = RUNS / f"{program}-{run['machine']['device']}-{now}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"program": program, **run}, indent=1) + "\n")
    return path


def load(path: Path, program: str) -> dict:
    """A stored run of a program, alone or as a record of summary.py holds it.

    Raises:
        ValueError: the file is a record without a run of this program.
    """
    found = json.loads(path.read_text())
    if "release" not in found:
        return found
    if program not in found:
        raise ValueError(f"{path.name}: expected a run of {program}, found {', '.join(found)}")
    return found[program]


def compact(value: object, indent: int = 0, row: bool = False) -> str:
    """JSON with a row a line: what stands in a list, or holds no row itself, stands on one."""
    items = (
        list(value.values())
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    )
    inner = [item for item in items if isinstance(item, (dict, list))]
    if all(isinstance(part, (int, float, str, type(None))) for item in inner for part in item) and (
        row or not (any(isinstance(item, dict) for item in inner) or len(inner) > 3)
    ):
        return json.dumps(value)
    pad, end = " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict):
        parts = [
            f"{pad}{json.dumps(key)}: {compact(item, indent + 1)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(parts) + end + "}"
    return "[\n" + ",\n".join(pad + compact(item, indent + 1, True) for item in value) + end + "]"


KEYS = ("section", "dtype", "shape", "what", "variant")


def _key(row: dict) -> str:
    return " ".join(str(row[key]) for key in KEYS if row.get(key) is not None)


def moved(new: dict, old: dict) -> list[str]:
    """The rows whose ratio moved beyond the spread, each median outside the other run's quartiles;
    the rest counted."""
    before = {_key(row): row for row in old["rows"] if "ratio" in row}
    lines, same, only_new = [], 0, []
    for row in new["rows"]:
        earlier = before.pop(_key(row), None)
        if "ratio" not in row:
            if earlier is not None:
                lines.append(
                    f"failed   {_key(row)}: was {earlier['ratio']:.3f}, now "
                    f"{row.get('error', 'missing')}"
                )
            continue
        if earlier is None:
            only_new.append(_key(row))
            continue
        low, high = row["quartiles"]
        old_low, old_high = earlier["quartiles"]
        if low <= earlier["ratio"] <= high or old_low <= row["ratio"] <= old_high:
            same += 1
            continue
        word = "slower" if row["ratio"] > earlier["ratio"] else "faster"
        lines.append(
            f"{word:8} {_key(row)}: {earlier['ratio']:.3f} [{old_low:.3f}, {old_high:.3f}]"
            f" -> {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        )
    differs = [
        k
        for k in ("cpu", "gpu", "threads", "torch")
        if old["machine"].get(k) != new["machine"].get(k)
    ]
    if differs:
        said = ", ".join(f"{k} {old['machine'].get(k)} -> {new['machine'].get(k)}" for k in differs)
        lines.insert(0, f"not the same machine or versions: {said}")
    lines.append(f"{same} rows moved within their spread")
    lines += [f"only in this run: {key}" for key in only_new] + [
        f"only in the earlier run: {key}" for key in before
    ]
    return lines


# ---- words for figures ---------------------------------------------------------------------------


def ratio(row: dict | None, spread: bool = False) -> str:
    if row is None:
        return ""
    if "ratio" not in row:
        return "missing" if "missing" in row else "failed"
    digits = 2 if row["ratio"] < 10 else 1
    text = f"{row['ratio']:.{digits}f}"
    return (
        f"{text} [{row['quartiles'][0]:.{digits}f}, {row['quartiles'][1]:.{digits}f}]"
        if spread
        else text
    )


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
