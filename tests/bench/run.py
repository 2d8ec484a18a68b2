"""Runs the benchmarks and prints one table; ends with 1 when a row is above its limit.

usage: PYTHONPATH=tests python tests/bench/run.py [--runs N] [NAME...]; `make bench` runs all. NAME is that of a module
beside this one, without `bench_`. All but `flow` and `start` need the tree of GNU hello that `make demo` makes.
"""

import argparse
import importlib
import sys
from pathlib import Path

from table import table

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES])
    given = parser.parse_args()
    rows = []
    for name in given.names or NAMES:
        for row in importlib.import_module(f"bench_{name}").rows(given.runs):
            rows.append(row)
            print(table([row]), flush=True)
    print(f"\n{table(rows)}")
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
