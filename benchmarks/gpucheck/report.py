"""What a run found, as text and, last of all, as a plot."""

from __future__ import annotations

from pathlib import Path

from gpucheck.child import Check, Rows
from gpucheck.record import NO_TIME, not_reached, row_errors

PROSE = (
    "error",
    "missing",
    "skipped",
    "outcomes",
    "collected",
    "bytes_per_s",
    "flop_per_s",
    "gpu",
    "found",
)


def _variant(name: str, entry: dict) -> str:
    if "error" in entry:
        return f"    {name:28s} {entry['error'].splitlines()[0]}"
    text = f"    {name:28s} {entry['seconds'] * 1e6:10.1f} us"
    if "ratio" in entry:
        low, high = entry["quartiles"]
        text += f"   x {entry['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    if "share_of_copy" in entry:
        text += f"   {entry['share_of_copy']:.0%} of the copy's rate"
    if entry.get("expected_s"):
        text += f"   expected {entry['expected_s'] * 1e6:.0f} us"
    if entry.get("peak_bytes") is not None:
        text += f"   peak {entry['peak_bytes'] / 2**20:.0f} MiB"
    return text


def _row(row: dict) -> list[str]:
    lines = [f"  {row['name']}"]
    for key in PROSE:
        if key in row:
            value = f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]).strip()
            lines.append(f"    {key}: " + value.replace("\n", "\n    "))
    lines += [_variant(name, entry) for name, entry in row.get("variants", {}).items()]
    for name, kept in row.get("memory", {}).items():
        lines.append(f"    {name:28s} saved {kept['saved_bytes']} bytes, peak {kept['peak_bytes']}")
    return lines


def text(data: dict) -> str:
    lines = (
        ["A REHEARSAL ON A CPU: nothing here is a measurement of anything."]
        if data["rehearsal"]
        else []
    )
    lines.append(
        ", ".join(
            f"{key} {value}" for key, value in data["machine"].items() if value not in (None, "")
        )
    )
    for name, section in data["sections"].items():
        lines.append(f"\n{name}: {section['status']}, {section.get('elapsed_s', 0):.0f} s")
        for key in ("error", "note"):
            if key in section:
                lines.append("  " + section[key].strip().replace("\n", "\n  "))
        for row in section["rows"]:
            lines += _row(row)
        if left := not_reached(section):
            lines.append(f"  not reached: {', '.join(left)}")
    return "\n".join(lines) + "\n"


def verdict(data: dict) -> tuple[int, list[str]]:
    """(exit code, lines). 0: all passed. 1: something failed. 3: nothing failed, and something was
    not proven."""
    by_status: dict[str, list[str]] = {}
    for name, section in data["sections"].items():
        by_status.setdefault(section["status"], []).append(name)
    lines = []
    for name in by_status.get("failed", []):
        section = data["sections"][name]
        errors = [section["error"]] if "error" in section else []
        errors += [
            f"{row['name']}: {error}" for row in section["rows"] for error in row_errors(row)
        ]
        lines += [f"FAILED {name}: {error.splitlines()[0]}" for error in dict.fromkeys(errors)]
    for name in by_status.get("missing", []):
        missing = [row["missing"] for row in data["sections"][name]["rows"] if "missing" in row]
        lines.append(f"NOT PROVEN {name}: {missing[0]}")
    for name in by_status.get("cut short", []):
        section = data["sections"][name]
        reasons = [row["skipped"] for row in section["rows"] if "skipped" in row] or [NO_TIME]
        lines.append(
            f"NOT REACHED {name}: {', '.join(not_reached(section))} "
            f"({', '.join(dict.fromkeys(reasons))})"
        )
    for name in (*by_status.get("running", []), *by_status.get("waiting", [])):
        lines.append(f"NOT REACHED {name}: the run ended before")
    if problem := data["machine"].get("interpreter_problem"):
        lines.append(f"not rehearsed: Triton's kernels: {problem}")
    if left_out := by_status.get("skipped"):
        lines.append(f"left out, as asked: {', '.join(left_out)}")
    if "failed" in by_status:
        return 1, lines
    return (0 if by_status.keys() <= {"ok", "skipped"} else 3), lines


# ---- the plot ------------------------------------------------------------------------------------


def draw(data: dict, path: Path) -> dict:
    """The layer's forward and training step over nn.Linear, shape by shape."""
    try:
        import matplotlib
    except ImportError:
        return {"found": "no matplotlib: no plot"}
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in data["sections"].get("layers", {}).get("rows", []) if "variants" in row]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for axis, what in zip(axes, ("forward", "step")):
        chosen = [row for row in rows if row["name"].startswith(what)]
        names = list(
            dict.fromkeys(name for row in chosen for name in row["variants"] if name != "linear")
        )
        width = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            points = [
                (j + width * i, row["variants"][name]["ratio"])
                for j, row in enumerate(chosen)
                if "ratio" in row["variants"].get(name, {})
            ]
            axis.bar([p[0] for p in points], [p[1] for p in points], width=width, label=name)
        labels = [row["name"].split()[1] for row in chosen]
        axis.set_xticks([j + 0.35 for j in range(len(chosen))], labels, rotation=20, fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{what}, time over nn.Linear")
    if rows:
        axes[0].legend(fontsize=7)
    machine = data["machine"]
    title = [str(machine.get(key)) for key in ("gpu", "torch", "date")]
    figure.suptitle(", ".join(["REHEARSAL"] * data["rehearsal"] + title))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return {"found": path.name}


def plot(check: Check) -> Rows:
    return [("plot", lambda: draw(check.record.data, check.record.path.with_suffix(".png")))]
