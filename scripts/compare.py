"""Compare two evaluations of the same split: differences with 95% intervals, and the queries won and lost.

python scripts/compare.py logs/a logs/b
python scripts/compare.py logs/a/eval_coco_test logs/b/eval_coco_test --queries 20 --output difference.json
"""

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.errors import UserError, run_with_exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in "AB":
        parser.add_argument(name, type=Path, help="folder of an evaluation, its results.json or its ranks.npz")
    parser.add_argument("--queries", type=int, default=0, metavar="N", help="list the N largest changes of rank")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the comparison to this file")
    args = parser.parse_args()
    if args.queries < 0:
        raise UserError(f"--queries {args.queries}: must be at least 0")
    if args.output is not None and args.output.is_dir():
        raise UserError(f"--output {args.output}: a folder; give the name of a file")

    from clip_retrieval.files import write_json
    from clip_retrieval.log import start_log
    from clip_retrieval.reporting.compare import compare, comparison_table

    start_log()
    comparison = compare(args.A, args.B, args.queries)
    counts = comparison["queries"]
    print(f"A: {args.A}\nB: {args.B}\n{counts['i2t']:,} images, {counts['t2i']:,} captions with a match\n")
    print(comparison_table(comparison))
    if args.output is not None:
        write_json(args.output, comparison)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
