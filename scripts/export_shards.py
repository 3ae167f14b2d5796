"""Write any data set as tar shards for `--dataset webdataset`.

python scripts/export_shards.py --dataset coco --dataset_root DATA --output DATA/coco-shards
python main.py --dataset webdataset --dataset_root DATA/coco-shards

A sample holds the bytes of an image file, and its caption (.txt) or captions (.json, a list under `caption`).
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser, split_names
from clip_retrieval.errors import UserError, run_with_exit_code
from clip_retrieval.options import DataOptions
from clip_retrieval.run.merge import settle


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(DataOptions,))
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    splits_help = "comma-separated splits, under the names to write (default: all)"
    parser.add_argument("--splits", type=split_names, default=[], help=splits_help)
    parser.add_argument("--shard_size", type=int, default=1000, help="images per shard (default: 1000)")
    typed = vars(parser.parse_args())
    own = {name: typed.pop(name) for name in ("output", "splits", "shard_size")}
    if own["shard_size"] < 1:
        raise UserError(f"--shard_size {own['shard_size']}: must be at least 1")
    options = settle(typed).data

    from clip_retrieval.data.writers.tar_shards import export_shards
    from clip_retrieval.log import start_log

    start_log()
    export_shards(options, own["output"], own["splits"], own["shard_size"])


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
