"""The root of the checkout; modules that no installed package holds, by their files."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def module_at(path):
    """The module in a file, which is named from the root."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_at", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
