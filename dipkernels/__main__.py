"""`python -m dipkernels` prints the environment report."""

from .env_report import env_report

if __name__ == "__main__":
    print(env_report())
