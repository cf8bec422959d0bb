"""`python -m dipkernels` prints the environment report."""

import io
import sys

from .env_report import env_report

if __name__ == "__main__":
    # a variable may hold what the terminal cannot show
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(env_report())
