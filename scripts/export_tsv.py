"""Write any data set as Chinese-CLIP's tsv and jsonl files, the input of `build_lmdb.py`.

python scripts/export_tsv.py --dataset flickr30k --dataset_root DATA --output DATA/flickr30k-tsv
python scripts/export_tsv.py --dataset csv --annotations photos.csv --image_dir photos --output DATA/photos-tsv

Images are stored as the bytes of their files. Their ids are the data set's own. If it has none, they are numbers from 0
in each split, which Chinese-CLIP needs for its features, or with `--ids name` the file names.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser, split_names
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions
from clip_retrieval.run.merge import settle


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(DataOptions,))
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    splits_help = "comma-separated splits, under the names to write (default: all)"
    parser.add_argument("--splits", type=split_names, default=[], help=splits_help)
    parser.add_argument(
        "--ids", choices=("number", "name"), default="number", help="image ids if the data set has none"
    )
    typed = vars(parser.parse_args())
    own = {name: typed.pop(name) for name in ("output", "splits", "ids")}
    options = settle(typed).data

    from clip_retrieval.data.writers.tsv import export
    from clip_retrieval.log import start_log

    start_log()
    export(options, own["output"], own["splits"], own["ids"])


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
