"""`python -m dipkernels` prints the environment report."""

import io
import sys

from .env_report import env_report

if __name__ == "__main__":
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a variable may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    print(env_report())
