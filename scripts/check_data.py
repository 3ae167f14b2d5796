"""Go through all files of a data set, and list what is wrong: missing and broken images, empty captions, bad lines.

python scripts/check_data.py --dataset coco --dataset_root DATA
python scripts/check_data.py --annotations photos.csv --num_workers 8

Each problem is a line on standard output. The exit code is 2 if there is any.
"""

import sys

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions
from clip_retrieval.run.merge import settle


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(DataOptions,))
    options = settle(vars(parser.parse_args())).data

    from clip_retrieval.check_data import check_data
    from clip_retrieval.log import start_log

    start_log()
    check_data(options)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
