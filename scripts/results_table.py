"""Print a Markdown table of several runs.

python scripts/results_table.py logs --sort rsum
python scripts/results_table.py logs/*/results.json --output table.md
"""

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "results", nargs="+", type=Path, help="results.json files, folders of runs, or a folder with several"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort by this column, the highest number first")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    from clip_retrieval.files import write_text
    from clip_retrieval.log import start_log
    from clip_retrieval.reporting.results import read_runs
    from clip_retrieval.reporting.table import markdown_table, sort_rows

    start_log()
    rows = read_runs(args.results)
    table = markdown_table(sort_rows(rows, args.sort) if args.sort else rows)
    print(table, end="")
    if args.output is not None:
        write_text(args.output, table)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
