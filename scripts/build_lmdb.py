"""Build the LMDB folders that Chinese-CLIP and `--dataset chinese` read from tsv and jsonl files.

python scripts/build_lmdb.py --data_dir DATA --splits train,valid,test

It reads DATA/{split}_imgs.tsv and {split}_texts.jsonl, and writes DATA/lmdb/{split}/imgs and pairs. A split that is up
to date is skipped; one whose build was interrupted is rebuilt.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser, split_names
from clip_retrieval.errors import UserError, run_with_exit_code


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=())
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the tsv and jsonl files")
    splits_help = "comma-separated names of splits: train,valid,test"
    parser.add_argument("--splits", type=split_names, required=True, help=splits_help)
    parser.add_argument("--lmdb_dir", type=Path, help="folder to write to (default: lmdb in data_dir)")
    typed = vars(parser.parse_args())

    from clip_retrieval.data.writers.build_lmdb import build_lmdb
    from clip_retrieval.log import start_log

    if not typed["splits"]:
        raise UserError("--splits is empty; give the names before _imgs.tsv, such as train,valid,test")
    start_log()
    build_lmdb(**typed)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
