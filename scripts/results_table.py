"""Print a Markdown table of several results.json.

python scripts/results_table.py logs/*/results.json --output table.md
"""

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json files")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    from clip_retrieval.files import write_text
    from clip_retrieval.reporting.results import read_results
    from clip_retrieval.reporting.table import markdown_table

    table = markdown_table([read_results(path) for path in args.results])
    print(table, end="")
    if args.output is not None:
        write_text(args.output, table)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
