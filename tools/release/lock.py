"""Writes requirements-dev.lock: every package of the development environment at one version, with
the hash of each of its files.

    make lock  # needs uv, which asks the index for hashes without downloading the files

pip resolves requirements-dev.txt, requirements-docs.txt and requirements-release.txt together;
torch itself is left out, for which build of it (CPU, CUDA) is the machine's choice, and with it
what only its CUDA build needs. For Python 3.11 and newer.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = (
    "# Written by `make lock` from requirements-*.txt. Install with --require-hashes --no-deps.\n"
)


def resolved(folder: Path) -> list[str]:
    """name==version of everything that pip would install."""
    report = folder / "report.json"
    files = [
        argument
        for name in ("dev", "docs", "release")
        for argument in ("-r", str(ROOT / f"requirements-{name}.txt"))
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        report,
        *files,
    ]
    subprocess.run(command, check=True)
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    ours = [
        item
        for item in found
        if item["name"] != "torch" and not item["name"].startswith(("nvidia-", "cuda-"))
    ]
    return sorted(f"{item['name']}=={item['version']}" for item in ours)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        pins = Path(name) / "pins.in"
        pins.write_text("\n".join(resolved(Path(name))) + "\n")
        command = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-config",
            "--no-header",
            "--no-annotate",
            "--no-deps",
            "--generate-hashes",
        ]
        version = ".".join(map(str, sys.version_info[:3]))
        lock = Path(name) / "lock"
        subprocess.run(
            [*command, "--python-version", version, "--output-file", lock, pins],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (ROOT / "requirements-dev.lock").write_text(HEADER + lock.read_text())


if __name__ == "__main__":
    main()
