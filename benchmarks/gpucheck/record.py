"""The JSON file of a run. Every change is on disk, whole, before the next row begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

NO_TIME = "no time was left"


class Record:
    """`data` and the file that holds it. One process writes at a time."""

    def __init__(self, path: Path, data: dict) -> None:
        self.path, self.data = path, data

    @classmethod
    def load(cls, path: Path) -> Record:
        return cls(path, json.loads(path.read_text()))

    def save(self) -> None:
        """Replace the file in one step: a reader, or a kill, finds the old text or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)

    def section(self, name: str) -> dict:
        return self.data["sections"].setdefault(name, {"status": "waiting", "rows": []})


def row_errors(row: dict) -> list[str]:
    """Why a row failed: its own error, and those of its variants."""
    errors = [row["error"]] if "error" in row else []
    variants = row.get("variants", {}).items()
    return errors + [f"{name}: {entry['error']}" for name, entry in variants if "error" in entry]


def not_reached(section: dict) -> list[str]:
    """The rows that the section meant to run and did not."""
    ran = {row["name"] for row in section["rows"] if "skipped" not in row}
    return [name for name in section.get("planned", []) if name not in ran]


def status(section: dict) -> str:
    """ok, failed, missing (a tool is not there), or cut short (rows for which no time was left)."""
    if "error" in section or any(row_errors(row) for row in section["rows"]):
        return "failed"
    if any("missing" in row for row in section["rows"]):
        return "missing"
    if not_reached(section):
        return "cut short"
    return "ok"
